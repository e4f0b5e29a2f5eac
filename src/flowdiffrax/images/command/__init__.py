"""A command line for training runs on images.

A script has presets, which are recipes, and a way to load its images. `parse` reads the
options from the command line, and `run` does the rest: checks, training, samples and
scores.
"""

from ._data import load_split as load_split
from ._maps import load_map as load_map
from ._options import Options as Options
from ._options import parse as parse
from ._presets import published as published
from ._presets import siblings as siblings
from ._run import run as run
