"""Markov chains on a cheap density, corrected to be exact."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, Key

from .._check import check_callable, check_key, check_like, check_scalar
from .._types import Scalar, State


class DelayedAcceptanceState(NamedTuple):
    """Where a chain of [`flowdiffrax.likelihood.DelayedAcceptance`][] is.

    **Attributes:**

    - `x`: the position.
    - `cheap`, `exact`: the two log-densities at `x`.
    - `accepted`: whether the last proposal was accepted.
    - `num_exact`: how often the chain evaluated the exact log-density, `init` included.
    """

    x: State
    cheap: Scalar
    exact: Scalar
    accepted: Bool[Array, ""]
    num_exact: Int[Array, ""]


class DelayedAcceptance(eqx.Module):
    r"""A Markov chain that proposes with a cheap density and corrects with the exact one.

    Let $\tilde\pi$ be the cheap density, for example a posterior through a learned flow
    map, and $\pi$ the exact one, for example the posterior through a Diffrax solver. A
    step runs a kernel that leaves $\tilde\pi$ invariant from $x$ to $y$, and accepts $y$
    with probability

    $$\min\left(1, \frac{\pi(y)\,\tilde\pi(x)}{\pi(x)\,\tilde\pi(y)}\right).$$

    The chain then leaves $\pi$ invariant, whatever the error of $\tilde\pi$. That error
    only decides how many proposals are rejected. A step evaluates $\pi$ once, without
    its gradient.

    ```python
    nuts = blackjax.nuts(cheap_log_density, step_size, inverse_mass_matrix)

    def propose(key, x):
        step = lambda state, key: (nuts.step(key, state)[0], None)
        return jax.lax.scan(step, nuts.init(x), jr.split(key, 5))[0].position

    chain = fd.likelihood.DelayedAcceptance(propose, cheap_log_density, exact_log_density)
    step = lambda state, key: (chain.step(key, state),) * 2
    states = jax.lax.scan(step, chain.init(x0), jr.split(key, 1000))[1]
    ```

    !!! warning "What the kernel must satisfy"

        `propose` must be reversible with respect to $\tilde\pi$: invariance alone is not
        enough. Random-walk Metropolis, MALA, HMC with fresh momenta and NUTS are
        reversible, and so is any fixed number of steps of one such kernel with the same
        settings. A sweep that updates entries in a fixed order is not, nor is a kernel
        that still adapts its step size. The cheap density must be positive wherever the
        exact one is: the chain cannot reach the rest.

    Works under `jax.jit`, and under `jax.vmap` for several chains. Log-densities may lack
    their normalising constants. A proposal is rejected if either log-density there is NaN
    or infinite: return `-jnp.inf` outside the support of the prior, and where a solve
    fails.

    **Arguments:**

    - `propose`: a callable `(key, x) -> y`, one or several steps of the kernel.
    - `cheap_log_density`: a callable `x -> scalar`, the log-density that `propose` leaves
      invariant.
    - `exact_log_density`: a callable `x -> scalar`, the log-density to sample.

    **Raises:** `TypeError` for callables of other arguments; from `init` and `step`,
    `TypeError` or `ValueError` if a log-density is not a scalar or a proposal is not like
    the position.

    ??? cite "Reference"

        Delayed acceptance: Christen and Fox, Markov chain Monte Carlo using an
        approximation, Journal of Computational and Graphical Statistics 14 (2005).
        Several steps before the correction: the surrogate transition method of Liu, Monte
        Carlo Strategies in Scientific Computing (2001), section 9.4.3. NUTS samples with
        detailed balance on a trajectory, which is as probable from each of its points:
        [arXiv:1111.4246](https://arxiv.org/abs/1111.4246), section 3.1.
    """

    propose: Callable[[Key[Array, ""], State], State]
    cheap_log_density: Callable[[State], Scalar]
    exact_log_density: Callable[[State], Scalar]

    def __check_init__(self):
        check_callable(self.propose, "propose", "propose(key, x)")
        for name in ("cheap_log_density", "exact_log_density"):
            check_callable(getattr(self, name), name, f"{name}(x)")

    def init(self, x: State) -> DelayedAcceptanceState:
        """The state of a chain that starts at `x`.

        **Raises:** `RuntimeError` at run time if one of the log-densities at `x` is NaN
        or infinite.
        """
        x = jtu.tree_map(jnp.asarray, x)
        cheap, exact = self._log_densities(x)
        for name, value in (("cheap", cheap), ("exact", exact)):
            message = f"`{name}_log_density` is not finite where the chain starts."
            message += " Start inside the support of the prior, where solves succeed."
            exact = eqx.error_if(exact, ~jnp.isfinite(value), message)
        return DelayedAcceptanceState(x, cheap, exact, jnp.asarray(True), jnp.asarray(1))

    def step(
        self, key: Key[Array, ""], state: DelayedAcceptanceState
    ) -> DelayedAcceptanceState:
        """One proposal, accepted or rejected."""
        check_key(key)
        propose_key, accept_key = jr.split(key)
        x = check_like(self.propose(propose_key, state.x), state.x, "`propose`")
        cheap, exact = self._log_densities(x)
        # A difference of infinities would be NaN, and a comparison with NaN is false.
        log_ratio = exact - state.exact + (state.cheap - cheap)
        finite = jnp.isfinite(exact) & jnp.isfinite(cheap)
        threshold = -jr.exponential(accept_key, dtype=log_ratio.dtype)
        accepted = finite & (threshold <= log_ratio)
        proposed = DelayedAcceptanceState(x, cheap, exact, accepted, state.num_exact)
        select = lambda new, old: jnp.where(accepted, new, old)
        kept = jtu.tree_map(select, proposed, state)
        return kept._replace(accepted=accepted, num_exact=state.num_exact + 1)

    def _log_densities(self, x: State) -> tuple[Scalar, Scalar]:
        """Both, in the dtype of the exact one."""
        cheap = _real(self.cheap_log_density(x), "cheap_log_density(x)")
        exact = _real(self.exact_log_density(x), "exact_log_density(x)")
        return cheap.astype(exact.dtype), exact


def _real(value: Any, name: str) -> Scalar:
    """**Raises:** `TypeError` or `ValueError` unless it is a real number."""
    if value is None or jnp.iscomplexobj(value):
        what = value if value is None else jnp.result_type(value)
        raise TypeError(f"`{name}` must be a real number; got {what}.")
    check_scalar(value, name)
    value = jnp.asarray(value)
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    return value if is_float else value.astype(jnp.result_type(float))
