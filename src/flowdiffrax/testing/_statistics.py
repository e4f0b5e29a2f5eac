"""Statistical assertions about estimators and random draws."""

from collections.abc import Callable

import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PyTree

from .._check import check_count


def assert_unbiased(
    estimator: Callable,
    expected: PyTree[ArrayLike],
    key: Key[Array, ""],
    *,
    num_draws: int = 4096,
    sigmas: float = 5.0,
) -> None:
    """Asserts that an estimator is unbiased: its mean is the expected value.

    **Arguments:**

    - `estimator`: a function `key -> estimate`, in JAX.
    - `expected`: the expected mean, with the structure and shapes of an estimate.
    - `key`: a random key.
    - `num_draws`: the number of draws $n$.
    - `sigmas`: how many standard errors the mean may be off. A bias of this many times
      the standard deviation over $\\sqrt n$ is found half of the time, and one twice as
      large nearly always. An unbiased entry exceeds five by chance for one key in two
      million.

    **Raises:** `AssertionError` if it is biased; `ValueError` if `expected` is not like
    the estimates, or for fewer than two draws.
    """
    check_count(num_draws, 2, "num_draws")
    draws = jax.jit(jax.vmap(estimator))(jr.split(key, num_draws))

    def compare(path, values, truth):
        values, truth = np.asarray(values, float), np.asarray(truth, float)
        mean, error = values.mean(axis=0), values.std(axis=0) / np.sqrt(num_draws)
        # An estimator without variance is only correct to rounding.
        error = error + 1e-6 * np.maximum(np.abs(truth), np.abs(mean)) / sigmas
        off = np.abs(mean - truth) / np.maximum(error, np.finfo(float).tiny)
        if not np.all(off <= sigmas):
            worst = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)
            entry = jtu.keystr(path) + (str([*map(int, worst)]) if worst else "")
            at = f", at entry {entry}" if entry else ""
            raise AssertionError(
                f"The estimator is biased: the mean of {num_draws} draws is "
                f"{mean[worst]:.5g} ± {error[worst]:.1g}, where {truth[worst]:.5g} is "
                f"expected, {off[worst]:.3g} standard errors away; {sigmas:g} are "
                f"allowed{at}.\n  often it is: a product or a power of estimates that "
                "share their draws, or a factor of the variance of the draws"
            )

    jtu.tree_map_with_path(compare, draws, expected)


def assert_independent(
    draw: Callable,
    key: Key[Array, ""],
    *,
    num_draws: int = 4096,
    sigmas: float = 5.5,
) -> None:
    """Asserts that random draws are independent, which they are not if they share a key.

    It compares every entry of each part with every entry of the others, by the
    correlations of the values and of their distances from the mean.

    **Arguments:**

    - `draw`: a function from a key to two or more arrays that should be independent,
      `key -> (a, b, ...)`, in JAX.
    - `key`: a random key.
    - `num_draws`: the number of draws.
    - `sigmas`: how many standard errors a correlation may be from zero.

    **Raises:** `AssertionError` if the draws are correlated or not finite; `ValueError`
    for fewer than two parts or draws.
    """
    check_count(num_draws, 2, "num_draws")
    parts = jax.jit(jax.vmap(draw))(jr.split(key, num_draws))
    if not isinstance(parts, tuple | list) or len(parts) < 2:
        raise ValueError("`draw` must return a tuple of two arrays or more.")
    columns = [np.asarray(part, float).reshape(num_draws, -1) for part in parts]
    for index, column in enumerate(columns):
        if not np.isfinite(column).all():
            wrong = int((~np.isfinite(column).all(axis=1)).sum())
            raise AssertionError(f"Part {index} is not finite in {wrong} of {num_draws}.")
    chance = sigmas / np.sqrt(num_draws)
    for i in range(len(columns)):
        for j in range(i):
            for of, transform in (("values", lambda x: x), ("sizes", np.abs)):
                found = _correlations(columns[j], columns[i], transform)
                if np.max(np.abs(found)) > chance:
                    a, b = np.unravel_index(np.argmax(np.abs(found)), found.shape)
                    raise AssertionError(
                        f"Parts {j} and {i} are not independent: the {of} of entries {a} "
                        f"and {b} are correlated by {found[a, b]:.3g} over {num_draws} "
                        f"draws; chance allows {chance:.2g}.\n"
                        "  often it is: one key for two draws; split it"
                    )


def _correlations(a: np.ndarray, b: np.ndarray, transform: Callable) -> np.ndarray:
    def standardise(x):
        x = transform(x - x.mean(axis=0))
        x = x - x.mean(axis=0)
        return x / np.maximum(x.std(axis=0), np.finfo(float).tiny)

    return standardise(a).T @ standardise(b) / len(a)
