"""Diffrax's own tests, with our solver for its Tsit5.

    git clone --depth 1 --branch v0.7.2 https://github.com/patrick-kidger/diffrax
    python tests/diffrax_suite.py diffrax -n auto             # options of pytest
    python tests/diffrax_suite.py diffrax --map still -k event

They run twice: with a useless map, so that the solver falls back, and with exact maps, so
that it takes every jump.

Tests of a solver's order, of SDEs and of types are left out: they ask for what no
solver of this kind has. The others must pass as they are.
"""

import argparse
import os
import pathlib
import subprocess
import sys

import diffrax
import equinox as eqx

FILES = ("integrate", "saveat_solution", "event", "adjoint", "vmap", "detest")
FILES += ("adaptive_stepsize_controller", "global_interpolation", "progress_meter")
# Parts of names of tests, and why they are left out.
LEFT_OUT = {
    "sde": "not an ODE",
    "brownian": "not an ODE",
    "_order": "asks for the order of Tsit5",
    "citation": "asks for the reference of Tsit5",
}
CLASSICAL = diffrax.Tsit5
MAPS = ("still", "exact")


def solvers(name):
    """What stands for Tsit5."""
    import flowdiffrax as fd

    class Exact(fd.HybridSolver):
        """Takes jumps of the map of the very ODE that it is asked to solve."""

        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            sign = terms.contr(0.0, 1.0)
            field = lambda t, x, args: terms.vf(sign * t, x, args)
            exact = fd.ODEFlowMap(field, CLASSICAL(), max_steps=4096)
            own = eqx.tree_at(lambda solver: solver.flow_map, self, exact)
            given = terms, t0, t1, y0, args, solver_state, made_jump
            return super(Exact, own).step(*given)

    solver = {"still": fd.HybridSolver, "exact": Exact}[name]
    still = lambda s, t, x, args: x
    return lambda kind=None: solver(still, CLASSICAL(kind), rtol=1e-3, atol=1e-6)


# This file is a plugin of pytest too, so that each worker has it.


def pytest_configure():
    diffrax.Tsit5 = solvers(os.environ["DIFFRAX_SUITE_MAP"])


def pytest_collection_modifyitems(config, items):
    out = [item for item in items if any(part in item.name for part in LEFT_OUT)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, help="a clone of Diffrax")
    parser.add_argument("--map", choices=MAPS, nargs="+", default=MAPS)
    options, rest = parser.parse_known_args()
    paths = str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    files = [f"test/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", *files, "-p", "diffrax_suite", "-q"]
    # Without its own options, which check the types of diffrax.
    command += ["-o", "addopts=", "-p", "no:cacheprovider", *rest]
    status = 0
    for name in options.map:
        environment = {**os.environ, "DIFFRAX_SUITE_MAP": name}
        done = subprocess.run(command, cwd=options.folder, env=environment, check=False)
        status = max(status, done.returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
