from collections.abc import Callable
from typing import Any, cast

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._check import check_callable, check_like
from .._time import at_least_float32
from .._tree import Frozen, add_scaled
from .._types import Args, Scalar, State, VectorField
from ._base import AbstractChordFlowMap, as_time_range


class HypersolverFlowMap(AbstractChordFlowMap):
    r"""One step of a classical solver plus a learned remainder of the right order.

    The average velocity is that of a Runge-Kutta step of order $p$ from $s$ to $t$, plus
    $h^p\,n_{s,t}(x)$ with $h = t - s$ and a network $n$. The error of the solver's
    average velocity has the same order, so $n$ learns a function of order one that is
    smooth in $h$. Whatever $n$ is, the map is a consistent integrator: its velocity is
    the vector field itself, and its local error is $O(h^{p+1})$. With $n = 0$, as
    [`flowdiffrax.nn.MLP`][] starts, the map is the solver.

    A jump evaluates the network once and the vector field once for each stage of the
    solver. This pays off if the vector field is cheap. For steps of other methods, see
    [`flowdiffrax.flow_maps.StepperFlowMap`][].

    !!! info "Numerics"

        The average velocity $u$ is computed as one solver step of
        $\dot u = b_{s+\tau h}(x + h u)$ from $\tau = 0$ to 1. This is equivalent to a
        step in the state, but smooth in $s$, $t$ and $x$ also at $h = 0$ and for negative
        $h$, where a step in the state would have to be divided by $h$. Stages that only
        serve an error estimate are skipped.

    !!! info "What is trained"

        Only the network. The vector field's arrays are held fixed: they are not
        floating-point leaves of this module, so gradients, weight decay and
        `equinox.tree_at` do not reach them. Pass parameters that vary through `args`.

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `net`: any callable `net(s, t, x, args)` that returns the remainder $n$, like `x`.
    - `solver`: an explicit Runge-Kutta solver of Diffrax for ODEs, such as
      `diffrax.Euler()`, `diffrax.Heun()`, `diffrax.Bosh3()` or `diffrax.Tsit5()`.
    - `time_range`: the interval `(low, high)` that the network is trained on; `None` for
      no check.

    **Raises:** `TypeError` for any other solver, or if `vector_field` or `net` is not
    callable; when called, `ValueError` or `TypeError` if the output of either is not like
    the state.

    ??? cite "Reference"

        Hypersolvers, [arXiv:2007.09601](https://arxiv.org/abs/2007.09601). There, the
        remainder is multiplied by $h^{p+1}$ and added to the step.
    """

    net: Callable
    frozen_field: Frozen
    solver: diffrax.AbstractSolver
    time_range: tuple[float, float] | None = eqx.field(static=True)

    def __init__(
        self,
        vector_field: VectorField,
        net: Callable,
        solver: Any = None,
        time_range: tuple[float, float] | None = None,
    ):
        check_callable(vector_field, "vector_field", "vector_field(t, x, args)")
        check_callable(net, "net", "net(s, t, x, args)")
        solver = diffrax.Heun() if solver is None else solver
        # `isinstance` sees a wrapped solver as the solver inside.
        wraps = isinstance(solver, diffrax.AbstractWrappedSolver)
        if wraps or not isinstance(solver, diffrax.AbstractERK | diffrax.Euler):
            got = getattr(solver, "__name__", None) or type(solver).__name__
            raise TypeError(
                "`solver` must be an explicit Runge-Kutta solver of Diffrax for ODEs, "
                f"such as `diffrax.Heun()`; got {got}."
            )
        self.net = net
        self.frozen_field = Frozen(vector_field)
        self.solver = solver
        self.time_range = as_time_range(time_range)

    @property
    def vector_field(self) -> VectorField:
        """The vector field, with its arrays held fixed."""
        return self.frozen_field.thaw()

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Evaluates the vector field."""
        return check_like(self.vector_field(t, x, args), x, "`vector_field`")

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity of one step, plus the remainder."""
        h = t - s
        field = self.vector_field
        b = lambda t, y: check_like(field(t, y, args), y, "`vector_field`")
        # In float32 at least: the stages' weights have both signs, and terms cancel.
        widen = lambda x: jnp.asarray(x, at_least_float32(jnp.result_type(x)))
        step = _step_velocity(self.solver, b, s, h, jtu.tree_map(widen, x))
        step = jtu.tree_map(lambda v, x: v.astype(jnp.result_type(x)), step, x)
        remainder = check_like(self.net(s, t, x, args), x, "`HypersolverFlowMap.net`")
        power = cast(int, self.solver.order(diffrax.ODETerm(field)))
        return add_scaled(step, h**power, remainder)


def _step_velocity(solver, b, s, h, x):
    """The average velocity of one step: the solver's weighted sum of its stages."""
    if isinstance(solver, diffrax.Euler):
        return b(s, x)
    tableau = solver.tableau
    num_stages = np.flatnonzero(tableau.b_sol)[-1] + 1
    stages = [b(s + float(tableau.c1) * h, x)]
    for index in range(num_stages - 1):
        u = _weighted(tableau.a_lower[index], stages)
        stages.append(b(s + float(tableau.c[index]) * h, add_scaled(x, h, u)))
    return _weighted(tableau.b_sol[:num_stages], stages)


def _weighted(weights, stages):
    # Python numbers adopt the precision of the state. Most of a tableau is zero.
    kept = [(float(w), index) for index, w in enumerate(weights) if w != 0]
    total = lambda *leaves: sum(
        (w * leaves[index] for w, index in kept), start=jnp.zeros_like(leaves[0])
    )
    return jtu.tree_map(total, *stages)
