"""Vector fields whose flow is known in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._time import times_like
from .._tree import ravel
from .._types import Args, Numbers, Scalar, State, Time
from ..flow_maps._base import AbstractFlowMap


class KnownField(eqx.Module):
    r"""A smooth vector field, nonlinear in time and space, whose flow is known.

    Any family of smooth one-to-one maps $\Psi_t$ defines a vector field,
    $b_t = \partial_t \Psi_t \circ \Psi_t^{-1}$, whose flow is
    $X_{s,t} = \Psi_t \circ \Psi_s^{-1}$. Here $\Psi_t$ maps each entry $z$ to
    $\sinh(e^{w \sin t} \operatorname{asinh} z)$, shears the odd and the even entries of
    the state against each other with waves, and then scales and shifts each entry. All
    these steps have closed-form inverses. With all arguments zero, nothing moves.

    It is called as `field(t, x, args)`, and takes any real state with as many entries as
    `growth`. It does not use `args`.

    **Arguments:**

    - `growth`: for each entry, roughly the logarithm of its growth per unit of time.
    - `drift`: for each entry, how far it is shifted.
    - `shear`: the amplitude of the waves.
    - `warp`: the number $w$.

    **Attributes:**

    - `flow_map`: its flow map, a [`flowdiffrax.AbstractFlowMap`][].
    """

    growth: Float[Array, " size"]
    drift: Float[Array, " size"]
    shear: Float[Array, ""]
    warp: Float[Array, ""]

    def __init__(
        self,
        growth: Numbers,
        drift: Numbers,
        shear: float | Array = 0.0,
        warp: float | Array = 0.0,
    ):
        self.growth, self.drift = jnp.asarray(growth, float), jnp.asarray(drift, float)
        self.shear, self.warp = jnp.asarray(shear, float), jnp.asarray(warp, float)

    @property
    def flow_map(self) -> "_KnownFlowMap":
        return _KnownFlowMap(self)

    def __call__(self, t: Time, x: State, args: Args = None) -> State:
        del args
        (t,) = times_like(x, t)
        vector, unravel = ravel(x, "`KnownField`")
        label = self._pull_back(t, vector.astype(t.dtype))
        push = lambda t: self._push_forward(t, label)
        _, velocity = jax.jvp(push, (t,), (jnp.ones_like(t),))
        return unravel(velocity.astype(vector.dtype))

    def __repr__(self) -> str:
        show = lambda value: np.round(np.asarray(value), 6).tolist()
        return (
            f"KnownField(growth={show(self.growth)}, drift={show(self.drift)}, "
            f"shear={show(self.shear)}, warp={show(self.warp)})"
        )

    def transport(self, s: Array, t: Array, x: State) -> State:
        r"""$\Psi_t(\Psi_s^{-1}(x))$."""
        vector, unravel = ravel(x, "`KnownField`")
        label = self._pull_back(s, vector.astype(t.dtype))
        return unravel(self._push_forward(t, label).astype(vector.dtype))

    def _push_forward(self, t, z):
        growth, drift, shear, warp = self._numbers(t)
        y = jnp.sinh(jnp.exp(warp) * jnp.arcsinh(z))
        y = _shear_odd(y, shear * jnp.sin(2 * t), jnp.sin)
        y = _shear_even(y, shear * t, jnp.cos)
        return jnp.exp(growth) * y + drift

    def _pull_back(self, t, x):
        growth, drift, shear, warp = self._numbers(t)
        y = jnp.exp(-growth) * (x - drift)
        y = _shear_even(y, -shear * t, jnp.cos)
        y = _shear_odd(y, -shear * jnp.sin(2 * t), jnp.sin)
        return jnp.sinh(jnp.exp(-warp) * jnp.arcsinh(y))

    def _numbers(self, t):
        cast = lambda value: value.astype(t.dtype)
        growth = cast(self.growth) * (t + jnp.sin(3 * t) / 3)
        drift = cast(self.drift) * jnp.sin(t + t**2)
        return growth, drift, cast(self.shear), cast(self.warp) * jnp.sin(t)


class _KnownFlowMap(AbstractFlowMap):
    """The flow map of a [`flowdiffrax.testing.KnownField`][], exact to rounding.

    **Arguments:**

    - `field`: the vector field.
    """

    field: KnownField

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The exact transport."""
        del args
        return self.field.transport(s, t, x)

    def tangent(self, t: Scalar, x: State, args: Args) -> State:
        """The field."""
        return self.field(t, x, args)

    def __repr__(self) -> str:
        return f"{self.field!r}.flow_map"


def _shear_odd(y, size, wave):
    moved = y[1::2] + size * wave(y[::2][: y[1::2].size])
    return y.at[1::2].set(moved)


def _shear_even(y, size, wave):
    odd = y[1::2]
    return y.at[: 2 * odd.size : 2].add(size * wave(odd))
