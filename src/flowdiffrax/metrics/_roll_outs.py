from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Real

from .._check import check_callable
from .._tree import num_rows, subtract
from .._types import Args, State


def roll_out_errors(xs: State, ys: State) -> Float[Array, "trajectories times"]:
    r"""The normalised error of roll-outs, by trajectory and time.

    It is $|\hat x_t - x_t| / |x_t|$, with norms over all entries of a state: 0 for no
    error, and about $\sqrt 2$ where a roll-out of centred states has lost the trajectory.

    ```python
    roll_out = lambda x0, args: fd.solvers.roll_out(flow_map, x0, ts, args, throw=False)
    xs = jax.vmap(roll_out)(ys[:, 0], args)
    errors = fd.metrics.roll_out_errors(xs, ys).mean(axis=0)  # one for each jump
    ```

    **Arguments:**

    - `xs`: the states of roll-outs, every leaf of shape `(trajectories, times, ...)`.
    - `ys`: the true states, in the same shapes. None of them may be zero.

    **Returns:** the errors, infinite or NaN where a roll-out is.

    **Raises:** `ValueError` if the shapes differ, or are not of trajectories.
    """
    size, times = _num_trajectories_and_times(ys)
    if jtu.tree_map(jnp.shape, xs) != jtu.tree_map(jnp.shape, ys):
        raise ValueError(
            "Roll-outs and true states must have the same shapes; got "
            f"{jtu.tree_map(jnp.shape, xs)} and {jtu.tree_map(jnp.shape, ys)}."
        )

    def square(tree):
        leaves = [jnp.reshape(leaf, (size, times, -1)) for leaf in jtu.tree_leaves(tree)]
        return sum(jnp.sum(jnp.abs(leaf) ** 2, axis=2) for leaf in leaves)

    return jnp.sqrt(square(subtract(xs, ys)) / square(ys))


def first_bad_jump(xs: State) -> Int[np.ndarray, " trajectories"]:
    """The number of the first jump of each roll-out whose end is not finite.

    **Arguments:**

    - `xs`: the states of roll-outs, every leaf of shape `(trajectories, times, ...)`.

    **Returns:** numbers that count from 1 for the first jump, or 0 if all states of a
    roll-out are finite.

    **Raises:** `ValueError` for arrays that do not have these two axes in common, or for
    an initial state that is not finite.
    """
    size, times = _num_trajectories_and_times(xs)
    bad = np.zeros((size, times), bool)
    for leaf in jtu.tree_leaves(xs):
        bad |= ~np.isfinite(np.asarray(leaf)).reshape(size, times, -1).all(axis=2)
    if bad[:, 0].any():
        raise ValueError(
            f"The initial state of roll-out {bad[:, 0].argmax()} is not finite."
        )
    return np.where(bad.any(axis=1), bad.argmax(axis=1), 0)


def invariant_drift(
    invariants: Callable[[State, Args], PyTree], xs: State, args: Args = None
) -> PyTree[Float[Array, "trajectories times ..."]]:
    """The change of conserved quantities along roll-outs, since their first states.

    **Arguments:**

    - `invariants`: a function `(x, args)` of one state that returns a number, an array or
      a PyTree of them, as for [`flowdiffrax.ConserveInvariants`][].
    - `xs`: the states of roll-outs, every leaf of shape `(trajectories, times, ...)`.
    - `args`: conditions, one row for each roll-out, or `None`.

    **Returns:** the changes, in units of the invariants, every leaf of shape
    `(trajectories, times, ...)`.

    **Raises:** `TypeError` if `invariants` is not callable; `ValueError` for arrays of
    other shapes.
    """
    check_callable(invariants, "invariants", "invariants(x, args)")
    _num_trajectories_and_times(xs)
    num_rows((xs, args), "Roll-outs and conditions")

    def along(xs, args):
        values = jax.vmap(invariants, (0, None))(xs, args)
        return jtu.tree_map(lambda leaf: leaf - leaf[:1], values)

    return jax.vmap(along)(xs, args)


def energy_spectrum(
    x: Real[Array, "*grid channels"],
) -> Float[Array, "wavenumbers channels"]:
    r"""The energy of a periodic field by wavenumber, $\tfrac12 \sum |\hat x_k|^2$.

    The sum is over the wave vectors whose length, rounded, is the wavenumber. Wave
    vectors count the periods along each axis of the grid, so the axes should have the
    same length. The sum of the spectrum is half the mean square of the field.

    It is differentiable, and takes one field, so that it can be a penalty in training:
    see [`flowdiffrax.objectives.RollOutMatching`][]. Energies span many orders of
    magnitude: compare their logarithms.

    **Arguments:**

    - `x`: a real field on a grid of one to three dimensions, channels last; use
      `jax.vmap` for a batch.

    **Returns:** the energies of the wavenumbers 0, 1, 2, ... by channel. On an `n`-point
    axis the largest wavenumber that is resolved in all directions is `n // 2`; those
    above come from the corners of the grid.

    **Raises:** `ValueError` for a field of less than one or more than three dimensions.
    """
    x = jnp.asarray(x)
    grid = x.shape[:-1]
    if not 1 <= len(grid) <= 3:
        raise ValueError(
            "A field has one to three axes of the grid, then the channels; got shape "
            f"{x.shape}. For a batch, use `jax.vmap`."
        )
    amplitudes = jnp.fft.fftn(x, axes=range(len(grid)), norm="forward")
    energy = jnp.abs(amplitudes) ** 2 / 2
    waves = [np.fft.fftfreq(n, 1 / n) for n in grid]
    lengths = np.sqrt(sum(k**2 for k in np.meshgrid(*waves, indexing="ij")))
    shells = np.rint(lengths).astype(int).ravel()
    rows = jnp.reshape(energy, (-1, x.shape[-1]))
    return jax.ops.segment_sum(rows, shells, num_segments=shells.max() + 1)


def _num_trajectories_and_times(xs: State) -> tuple[int, int]:
    shapes = sorted({jnp.shape(leaf)[:2] for leaf in jtu.tree_leaves(xs)})
    if len(shapes) != 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(
            "States must have shape (trajectories, times, ...), as returned by "
            f"`solve_trajectories`; got leading axes {shapes}."
        )
    size, times = shapes[0]
    return size, times
