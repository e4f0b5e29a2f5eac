"""Presets: recipes under the names that the command line has for them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp

from ... import objectives, times, weights
from .._recipe import Recipe
from .._recipes import recipe, recipes
from ._options import FROM_TEACHER, OBJECTIVES, Options

# Some recipes have arrays, which start JAX. A function makes them when they are needed:
# after the options are read, and after the processes have joined.
Presets: TypeAlias = Mapping[str, Recipe | Callable[[], Recipe]]


def published(prefix: str) -> dict[str, Callable[[], Recipe]]:
    """Returns the recipes of papers whose names start with a prefix, as presets.

    **Arguments:**

    - `prefix`: the prefix, for example `"cifar10-"`.

    **Returns:** functions that return the recipes, by the rest of their names.
    """
    return {
        name.removeprefix(prefix): functools.partial(recipe, name)
        for name in recipes()
        if name.startswith(prefix)
    }


def siblings(lsd: Recipe) -> dict[str, Recipe]:
    """Returns presets that train the network of a self-distilled recipe in other ways.

    **Arguments:**

    - `lsd`: the recipe. Its network must accept `two_times=False`, as
      [`flowdiffrax.nn.UNet`][] does.

    **Returns:** recipes that differ in the objective: `"teacher"`, by flow matching;
    `"lmd"`, distilled from that teacher; and `"psd"` and `"improved-meanflow"`, which
    need no teacher.
    """
    change = functools.partial(dataclasses.replace, lsd)
    uniform = times.DiagonalMixture(times.UniformTriangle(), 0.75)
    return {
        "teacher": change(
            name="teacher",
            objective=objectives.FlowMatching(),
            architecture=functools.partial(lsd.architecture, two_times=False),
        ),
        "lmd": change(
            name="lmd",
            objective=objectives.LagrangianMapDistillation(),
            teacher="teacher",
            starts_from_teacher=True,
        ),
        "psd": change(name="psd", objective=objectives.ProgressiveSelfDistillation()),
        "improved-meanflow": change(
            name="improved-meanflow",
            objective=objectives.ImprovedMeanFlow(uniform, weights.NoWeight()),
        ),
    }


def recipe_of(presets: Presets, name: str) -> Recipe:
    """The recipe of a preset."""
    found = presets[name]
    return found if isinstance(found, Recipe) else found()


def with_options(recipe: Recipe, options: Options) -> Recipe:
    """The preset with the changes in the options: the recipe that is printed and run."""
    changes = {}
    if options.steps is not None:
        changes["num_steps"] = options.steps
    if options.batch_size is not None:
        changes["batch_size"] = options.batch_size
    steps = changes.get("num_steps", recipe.num_steps)
    if "num_steps" in getattr(recipe.optimiser, "keywords", {}):
        changes["optimiser"] = functools.partial(recipe.optimiser, num_steps=steps)  # pyright: ignore
    settings = {
        "channels": options.channels,
        "num_blocks": options.num_blocks,
        "dtype": jnp.bfloat16 if options.precision == "bfloat16" else None,
        "remat": options.remat or None,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    changes["architecture"] = functools.partial(recipe.architecture, **settings)
    objective = recipe.objective
    if options.objective is not None:
        objective = OBJECTIVES[options.objective]()
        needs_one = options.objective in FROM_TEACHER
        own = f"{recipe.name} --objective flow-matching"
        changes["teacher"] = (recipe.teacher or own) if needs_one else None
        changes["starts_from_teacher"] = recipe.starts_from_teacher and needs_one
    if options.both_directions:
        if not hasattr(objective, "times"):
            raise ValueError("--both-directions needs an objective with times of its own")
        objective = eqx.tree_at(
            lambda o: o.times, objective, replace_fn=times.EitherDirection
        )
    changes["objective"] = objective
    return dataclasses.replace(recipe, **changes)
