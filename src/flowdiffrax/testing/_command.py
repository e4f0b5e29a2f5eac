"""One line that names a map and how to check it, for the command and for pytest."""

import argparse
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._assess import check_names
from ._check import CheckReport, check
from ._strategies import hypothesis_module


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a line."""
    made = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Checks whether a map (s, t, x) -> x_t is the flow map of an ODE.",
    )
    add = made.add_argument
    add("target", help="`package.module:name` or `file.py:name`, a callable (s, t, x) of "
        "JAX, NumPy, PyTorch or anything else; or a file that `LearnedSolver.save` "
        "wrote")  # fmt: skip
    add("--field", metavar="TARGET", help="the vector field, a callable (t, x)")
    add("--state", metavar="SHAPE", help="the shape of a state, such as 2 or 28,28,1; by "
        "default, states that a learned solver was validated with")  # fmt: skip
    add("--bounds", nargs=2, type=float, metavar=("LOW", "HIGH"), help="the range of the "
        "entries of states, -2 and 2 by default")  # fmt: skip
    add(
        "--times", nargs=2, type=float, metavar=("T0", "T1"), help="the interval of times"
    )
    add("--ordered", action="store_true", help="times only rise")
    add("--budget", nargs="+", default=[], metavar="TOLERANCE", help="the error that is "
        "allowed, absolute, such as 0.01, or by identity: semigroup=0.01; without one, "
        "only rounding")  # fmt: skip
    add("--identities", nargs="+", metavar="NAME", help="only these identities; by "
        "default all, or those without derivatives for a learned solver without a "
        "field")  # fmt: skip
    add("--num-points", type=int, metavar="N", help="the number of jumps")
    add("--seed", type=int, help="the seed of the jumps, to repeat a search")
    add("--float64", action="store_true", help="check in float64")
    return made


def check_line(options: argparse.Namespace) -> CheckReport:
    """Does what a parsed line says; raises as [`flowdiffrax.testing.check`][]."""
    if options.float64:
        jax.config.update("jax_enable_x64", True)
    found = _learned(options.target) if _is_file(options.target) else {}
    flow_map = found.pop("flow_map", None) or load(options.target)
    given = {
        "state": None if options.state is None else _example(options.state),
        "bounds": options.bounds and tuple(options.bounds),
        "t0": None if options.times is None else options.times[0],
        "t1": None if options.times is None else options.times[1],
        "ordered": options.ordered or None,
    }
    found |= {name: value for name, value in given.items() if value is not None}
    if "state" not in found:
        raise ValueError("Give the shape of a state, such as `--state 2`.")
    if options.identities is not None or options.field is not None:
        found["identities"] = options.identities
    return check(
        flow_map,
        None if options.field is None else load(options.field),
        atol=budget(options.budget),
        max_examples=options.num_points,
        seed=options.seed,
        **found,
    )


def load(target: str) -> Callable:
    """Imports `module:name` or reads `file.py:name`."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(
            f"A target must be `module:name` or `file.py:name`; got {target!r}."
        )
    if place.endswith(".py"):
        path = pathlib.Path(place)
        if not path.is_file():
            raise FileNotFoundError(f"{place} is not there, which {target!r} names.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)  # pyright: ignore
        spec.loader.exec_module(module)  # pyright: ignore
    else:
        # As Python itself does for `-m`.
        if "" not in sys.path:
            sys.path.insert(0, "")
        module = importlib.import_module(place)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{place} has no {name!r}, which {target!r} names.")
        value = getattr(value, part)
    return value


def budget(words: Sequence[str]) -> float | dict[str, float] | None:
    """Reads tolerances: one number, or numbers by identity."""
    if not words:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return _number(words[0])
    pairs = [word.partition("=") for word in words]
    check_names([name for name, _, _ in pairs])
    return {name: _number(value) for name, _, value in pairs}


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(
            "A budget must be one number, such as 0.01, or numbers by identity, such as "
            f"semigroup=0.01; got {word!r}."
        ) from None


def _example(shape: str) -> Any:
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        raise ValueError(f"`--state` must be like 2 or 28,28,1; got {shape!r}.") from None
    return jnp.zeros(sizes)


def _is_file(target: str) -> bool:
    return target.endswith(".safetensors")


def _learned(path: str) -> dict[str, Any]:
    """The map of a learned solver, and where it was learned."""
    from ..learn import LearnedSolver

    learned = LearnedSolver.load(path)
    if not learned.plan.is_vector or learned.plan.args_size:
        raise ValueError(
            f"{path} has states that are not vectors, or `args`. Name a function of "
            "(s, t, x) in a file, `file.py:name`, that calls its `flow_map`."
        )
    exact = learned.fresh["exact"]
    states = jnp.asarray(exact.reshape(-1, exact.shape[-1]))
    ts, one_way = np.asarray(learned.plan.ts), not learned.plan.both_directions
    names = ["starts_as_identity", "semigroup"] + ["inverse"] * (not one_way)
    return {
        "flow_map": learned.flow_map,
        "state": hypothesis_module().strategies.sampled_from(list(states)),
        "t0": float(ts[0]),
        "t1": float(ts[-1]),
        "ordered": one_way,
        # Derivatives of a map that learned from states are another matter.
        "identities": names,
    }
