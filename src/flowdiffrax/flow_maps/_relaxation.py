from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._check import check_callable, check_like
from .._tree import subtract
from .._types import Args, Scalar, State
from ._base import AbstractFlowMap, as_time_range


class RelaxationFlowMap(AbstractFlowMap):
    r"""A state that decays towards a target: $X_{s,t}(x) = e^{-\lambda h} x +
    (1 - e^{-\lambda h})\,x^*$ with $h = t - s$.

    The rates $\lambda$ and the target $x^*$, one of each for every entry, are what a
    network returns for $s$, $t$ and $x$. Each entry of the end is between its start and
    its target, so a network with positive targets makes a map that keeps positive states
    positive, whatever its weights. The map is the identity at $s = t$, and exact for an
    entry with constant production and loss, $\dot x = p - \lambda x$, if the network
    returns $\lambda$ and $x^* = p / \lambda$. A rate much larger than $1 / h$ means only
    that the entry has reached its target, so the network need not resolve how stiff the
    system is.

    Use it for the concentrations of a chemical mechanism, with
    [`flowdiffrax.nn.RelaxationMLP`][], and forward in time: backwards, a state moves away
    from its target exponentially.

    **Arguments:**

    - `net`: a callable `net(s, t, x, args) -> (rate, target)`, two states like `x`. Rates
      should not be negative.
    - `time_range`: the interval `(low, high)` that the network is trained on; `None` for
      no check.

    **Raises:** when called, `ValueError` or `TypeError` if the rates or the targets are
    not like `x`, and `ValueError` for concrete times outside `time_range`.

    ??? cite "Reference"

        The form of the solution over one step of exponential and quasi-steady-state
        integrators: Hochbruck and Ostermann, *Exponential integrators*, Acta Numerica
        2010, equation (1.4); Mott, Oran and van Leer, J. Comput. Phys. 164 (2000).
    """

    net: Callable
    time_range: tuple[float, float] | None = eqx.field(
        static=True, converter=as_time_range, default=None
    )

    def __check_init__(self):
        check_callable(self.net, "net", "net(s, t, x, args)")

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Moves each entry towards its target."""
        rate, target = self._relaxation(s, t, x, args)

        def one(x: Array, rate: Array, target: Array) -> Array:
            gone = jnp.expm1(-rate * (t - s).astype(rate.dtype))
            # A sum of positive terms, so that rounding cannot make it negative.
            return x * (1 + gone) - target * gone

        return jtu.tree_map(one, x, rate, target)

    def chord(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """Returns the average velocity, without a division by the length of the jump."""
        rate, target = self._relaxation(s, t, x, args)

        def one(way: Array, rate: Array) -> Array:
            z = rate * (t - s).astype(way.dtype)
            safe = jnp.where(z == 0, 1, z)
            # The mean of exp(-z) over the jump, which is 1 at z = 0, with slope -1/2.
            mean = jnp.where(z == 0, 1 - z / 2, -jnp.expm1(-safe) / safe)
            return rate * way * mean

        return jtu.tree_map(one, subtract(target, x), rate)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """Returns the velocity, $\\lambda (x^* - x)$."""
        rate, target = self._relaxation(t, t, x, args)
        return jtu.tree_map(jnp.multiply, rate, subtract(target, x))

    def _relaxation(self, s, t, x, args) -> tuple[State, State]:
        name = "`RelaxationFlowMap.net`"
        rate, target = self.net(s, t, x, args)
        return check_like(rate, x, name), check_like(target, x, name)
