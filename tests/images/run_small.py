"""Runs a script with smaller networks than its presets', for `test_launch.py`.

    python tests/images/run_small.py examples/digits.py --preset teacher ...

Two processes compile each step of training, and then again when a run is resumed. With a
single resolution and no attention, they do so in a fraction of the time.
"""

import runpy
import sys

import flowdiffrax as fd

network = fd.images.Recipe.network


def small(recipe, **settings):
    return network(recipe, **{"multipliers": (1,), "attention": ()} | settings)


if __name__ == "__main__":
    fd.images.Recipe.network = small
    _, script, *sys.argv[1:] = sys.argv
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
