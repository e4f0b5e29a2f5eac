from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ._problem import Problem, call_afresh

_LOOPS = "scan", "while", "cond"


def depends_on_time(problem: Problem) -> bool:
    """Whether the vector field uses its time, by its jaxpr rather than by its values.

    Values would miss a pulse between the times at which one looks.
    """
    at = jnp.zeros(()), jnp.zeros(problem.size), jnp.zeros(problem.args_size)
    closed = call_afresh(jax.make_jaxpr(problem.vector_field), *at)
    inputs = [True] + [False] * (len(closed.jaxpr.invars) - 1)
    return any(_reaches(closed.jaxpr, inputs))


def _reaches(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the marked inputs, or might."""
    marked = {
        var for var, is_marked in zip(jaxpr.invars, inputs, strict=True) if is_marked
    }
    is_marked = lambda var: not isinstance(var, core.Literal) and var in marked
    for eqn in jaxpr.eqns:
        given = [is_marked(var) for var in eqn.invars]
        if not any(given):
            continue
        # A call of a function within, such as one under `jit`.
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        # What a loop carries from one turn to the next is not followed.
        is_call = eqn.primitive.name not in _LOOPS
        if inner is not None and is_call and len(inner.invars) == len(given):
            reached = _reaches(inner, given)
        else:
            reached = [True] * len(eqn.outvars)
        marked |= {var for var, yes in zip(eqn.outvars, reached, strict=True) if yes}
    return [is_marked(var) for var in jaxpr.outvars]
