"""The log-density as an extra component of the state, with its own velocity."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Key

from .._check import check_bools, check_callable, check_flow_map, check_like
from .._time import time_dtype
from .._types import Args, Scalar, State, Time, TwoTimeMap, VectorField
from ..flow_maps._base import AbstractFlowMap
from ._trace import AbstractTrace, ExactTrace, divergence, ravel_floats


class LogDensityVelocity(eqx.Module):
    r"""The velocity of the pair $(x, \ell)$, where $\ell$ is the log-density.

    Along the flow, $\dot x = b_t(x)$ and $\dot \ell = -\nabla \cdot b_t(x)$. Started from
    $\ell = \log \rho_s(x_s)$, this keeps $\ell = \log \rho_t(x_t)$. Integrated by
    Diffrax, it is a continuous normalising flow. Used as a teacher, it trains a flow map
    that carries densities along; see [`flowdiffrax.likelihood.LogDensityFlowMap`][].

    **Arguments:**

    - `vector_field`: a callable `(t, x, args) -> dx/dt`.
    - `trace`: how to compute the divergence.
    - `key`: a random key, if the trace needs one. The probes are then the same for all
      times, so that the field is smooth and an ODE solver can meet its tolerance. For
      different probes in each solve, create the velocity inside the function that is
      mapped over the batch, with one key per example.
    - `fresh`: whether to draw new probes for each time and state instead. Set it for a
      teacher: with fixed probes, a map learns their estimate and not the divergence.

    The state is a tuple `(x, l)` of a state and a scalar.

    **Raises:** when called, `ValueError` if a key is missing or the state is not a pair.

    ??? cite "Reference"

        [arXiv:1810.01367](https://arxiv.org/abs/1810.01367), equation (4) and
        section 3.1.
    """

    vector_field: VectorField
    trace: AbstractTrace = ExactTrace()
    key: Key[Array, ""] | None = None
    fresh: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_callable(self.vector_field, "vector_field", "vector_field(t, x, args)")
        check_bools(fresh=self.fresh)

    def __call__(
        self, t: Time, x: tuple[State, Float[Array, ""]], args: Args = None
    ) -> tuple[State, Float[Array, ""]]:
        x, log_density = _pair(x)
        key = self.key
        if self.fresh and key is not None:
            key = _key_of(key, t, x)
        b_t, rate = divergence(self.vector_field, t, x, args, trace=self.trace, key=key)
        return b_t, -rate.astype(log_density.dtype)


class LogDensityNet(eqx.Module):
    r"""A network for pairs $(x, \ell)$ whose output depends on $x$ alone.

    The change of the log-density in a jump depends on the path and not on the
    log-density itself, so $\ell$ is set to zero before it reaches the network. Wrapped
    in [`flowdiffrax.FlowMap`][], it gives $\ell_t = \ell_s - (t - s) D_{s,t}(x)$, where
    $D_{s,t}$ is the mean divergence. The network's last output is $-D_{s,t}$.

    **Arguments:**

    - `net`: for a vector state, a network of vectors with one more entry, such as
      `nn.MLP(size + 1)`. For any other state, a callable `net(s, t, (x, l), args)` that
      returns a pair.

    ??? cite "Reference"

        Joint distillation of a map and its divergence:
        [arXiv:2512.02636](https://arxiv.org/abs/2512.02636).
    """

    is_network: ClassVar[bool] = True

    net: Callable

    def __check_init__(self):
        check_callable(self.net, "net", "net(s, t, x, args)")

    def __call__(
        self, s: Time, t: Time, x: tuple[State, Float[Array, ""]], args: Args = None
    ) -> tuple[State, Float[Array, ""]]:
        x, log_density = _pair(x)
        nothing = jnp.zeros_like(log_density)
        if not isinstance(x, Array) or x.ndim != 1:
            return self.net(s, t, (x, nothing), args)
        v_st = self.net(s, t, jnp.append(x, nothing.astype(x.dtype)), args)
        return v_st[:-1], v_st[-1].astype(log_density.dtype)


class LogDensityFlowMap(AbstractFlowMap):
    r"""A map on $x$ with a learned log-determinant, from a flow map on pairs $(x, \ell)$.

    It can be used wherever a flow map can. With
    [`flowdiffrax.likelihood.LearnedLogDet`][] it gives likelihoods in a few jumps without
    derivatives.

    **Arguments:**

    - `flow_map`: a map on pairs, trained to follow a
      [`flowdiffrax.likelihood.LogDensityVelocity`][].

    ??? cite "Reference"

        [arXiv:2512.02636](https://arxiv.org/abs/2512.02636).
    """

    flow_map: TwoTimeMap

    def __check_init__(self):
        check_flow_map(self.flow_map)

    @property
    def time_range(self):
        return getattr(self.flow_map, "time_range", None)

    def jump(self, s: Scalar, t: Scalar, x: State, args: Args) -> State:
        """The end alone."""
        return self.with_log_det(s, t, x, args)[0]

    def with_log_det(
        self, s: Time, t: Time, x: State, args: Args = None
    ) -> tuple[State, Scalar]:
        r"""The pair $X_{s,t}(x)$ and $\log |\det \nabla X_{s,t}(x)|$, as learned."""
        start = (x, jnp.zeros((), time_dtype(x)))
        X_st, gain = check_like(self.flow_map(s, t, start, args), start, "`flow_map`")
        return X_st, -gain


def _pair(x) -> tuple[State, Array]:
    if not isinstance(x, tuple) or len(x) != 2 or jnp.shape(x[1]) != ():
        raise ValueError(
            "The state must be a tuple `(x, l)` of one state and its log-density, a "
            f"scalar; got {eqx.tree_pformat(x)}."
        )
    return x[0], jnp.asarray(x[1])


def _key_of(key: Key[Array, ""], t: Time, x: State) -> Key[Array, ""]:
    """A key that depends on the bits of the time and the state."""
    numbers = jnp.append(
        ravel_floats(x)[0].astype(jnp.float32), jnp.asarray(t, jnp.float32)
    )
    bits = lax.bitcast_convert_type(lax.stop_gradient(numbers), jnp.uint32)
    # Multiply by distinct odd numbers, so that swapping two entries changes the sum.
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    return jr.fold_in(key, jnp.sum(bits * odd, dtype=jnp.uint32))
