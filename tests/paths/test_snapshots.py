"""Chains through snapshots: optimal pairs, kept distributions, and what is refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, without_type_checks
from scipy.optimize import linear_sum_assignment

import flowdiffrax as fd
from flowdiffrax.paths import couple_snapshots

pytest.importorskip("ott")


def populations(sizes=(30, 30, 30), dim=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, dim)) + k for k, n in enumerate(sizes)]


def sorted_rows(x):
    return np.asarray(sorted(map(tuple, np.asarray(x))))


def cost(x0, x1):
    return np.sum((x0[:, None] - x1[None]) ** 2, axis=-1)


def test_neighbours_are_paired_optimally():
    snapshots = populations()
    chains = np.asarray(couple_snapshots(snapshots, key=jr.key(0)))
    assert chains.shape == (30, 3, 2)
    for k in range(3):
        assert_close(sorted_rows(chains[:, k]), sorted_rows(snapshots[k]), 0, 0)
    for k in range(2):
        between = cost(snapshots[k], snapshots[k + 1])
        least = between[linear_sum_assignment(between)].sum()
        np.testing.assert_allclose(
            np.sum((chains[:, k] - chains[:, k + 1]) ** 2), least, rtol=1e-10
        )


def test_in_one_dimension_chains_keep_their_order():
    chains = couple_snapshots(populations((50, 50, 50, 50), 1), key=jr.key(1))
    order = np.argsort(np.asarray(chains)[..., 0], axis=0)
    for k in range(1, 4):
        np.testing.assert_array_equal(order[:, k], order[:, 0])


def test_chains_approach_the_transport_maps_of_gaussians():
    # From N(0, diag(1, 4)) over N(m, diag(4, 1)) to N(-m, I), maps are diagonal.
    stds, means = np.array([[1, 2], [2, 1], [1, 1]]), np.array([[0, 0], [3, 1], [-3, -1]])
    rng = np.random.default_rng(2)
    draws = rng.normal(size=(3, 1000, 2))
    snapshots = [s * z + m for s, z, m in zip(stds, draws, means, strict=True)]
    chains = np.asarray(couple_snapshots(snapshots, key=jr.key(3)))
    start = (chains[:, 0] - means[0]) / stds[0]
    for k in (1, 2):
        error = (chains[:, k] - means[k]) / stds[k] - start
        # In the plane, an optimal matching of n points is off by about sqrt(log n / n).
        assert np.sqrt(np.mean(error**2)) < 0.2
    # Independent members are off by the square root of two.
    mixed = (snapshots[1] - means[1]) / stds[1] - start
    assert np.sqrt(np.mean(mixed**2)) > 1.2


def test_members_of_unequal_snapshots_occur_equally_often():
    snapshots = populations((7, 40, 23))
    chains = np.asarray(couple_snapshots(snapshots, 100, key=jr.key(4), block_size=32))
    assert chains.shape == (100, 3, 2)
    for k, members in enumerate(snapshots):
        counts = (chains[:, k, None] == members[None]).all(-1).sum(axis=0)
        assert counts.sum() == 100
        assert counts.max() - counts.min() <= 1


def test_blocks_are_coupled_on_their_own():
    snapshots = populations((40, 40))
    calls = []

    class Recording(fd.paths.AbstractCoupling):
        def __call__(self, key, x0, x1, args=None):
            calls.append((x0.shape, args))
            return jnp.flip(x0, axis=0)

    chains = couple_snapshots(
        snapshots, key=jr.key(5), coupling=Recording(), block_size=16
    )
    # Two blocks of 14, compiled once, and one of 12.
    assert calls == [((14, 2), None), ((12, 2), None)]
    for k in range(2):
        assert_close(sorted_rows(chains[:, k]), sorted_rows(snapshots[k]), 0, 0)


def test_the_earlier_snapshot_comes_first_in_a_coupling():
    early, late = populations((20, 20))
    sizes = []

    class ByFirst(fd.paths.AbstractCoupling):
        def __call__(self, key, x0, x1, args=None):
            sizes.append((x0, x1))
            return x0

    with jax.disable_jit():
        chains = couple_snapshots([early, late], key=jr.key(6), coupling=ByFirst())
    assert_close(sizes[0][0], chains[:, 0], 0, 0)
    assert_close(sizes[0][1], chains[:, 1], 0, 0)
    assert_close(sorted_rows(chains[:, 0]), sorted_rows(early), 0, 0)


def test_default_number_is_that_of_the_largest_snapshot():
    chains = couple_snapshots(populations((5, 12, 9)), key=jr.key(7))
    assert chains.shape == (12, 3, 2)


def test_snapshots_may_be_pytrees_or_one_array():
    members = populations()
    as_tree = [{"a": x[:, :1], "b": x[:, 1]} for x in members]
    chains = couple_snapshots(as_tree, key=jr.key(8))
    expected = couple_snapshots(np.stack(members), key=jr.key(8))
    assert_close(chains["a"], expected[..., :1])
    assert_close(chains["b"], expected[..., 1])


def test_chains_depend_on_the_key_alone():
    snapshots = populations((9, 8))
    draw = lambda seed: couple_snapshots(snapshots, key=jr.key(seed))
    assert_close(draw(0), draw(0), 0, 0)
    assert not np.array_equal(draw(0), draw(1))


A = np.ones((5, 2))
BAD = {
    "one": ([A], ValueError, "at least two snapshots; got 1"),
    "none": ([], ValueError, "at least two snapshots; got 0"),
    "dimensions": ([A, np.ones((5, 3))], ValueError, "Use the same entries at all times"),
    "structures": ([A, {"a": A}], ValueError, "alike in structure"),
    "dtypes": (
        [A, A.astype(np.float32)],
        ValueError,
        "alike in structure, shape and dty",
    ),
    "NaN": ([A, np.where(np.arange(5)[:, None] == 3, np.nan, A)], ValueError, "row 3"),
    "integers": ([A, A.astype(int)], TypeError, "`.astype"),
    "empty": (
        [A, A[:0]],
        ValueError,
        "Snapshot 1 must be arrays with one common leading",
    ),
    "numbers": ([1.0, 2.0], ValueError, "Snapshot 0 must be arrays"),
    "a dictionary": ({0.0: A, 2.0: A}, TypeError, "a list of populations, one for each"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_snapshots(bad):
    snapshots, error, message = BAD[bad]
    with without_type_checks(), pytest.raises(error, match=message):
        couple_snapshots(snapshots, key=jr.key(0))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_chains": 0}, ValueError, "`num_chains` must be at least 1"),
        ({"num_chains": 2.5}, TypeError, "`num_chains` must be an integer"),
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1"),
        ({"coupling": "ot"}, TypeError, "`coupling` must be a callable"),
        ({"key": 3}, TypeError, "`key` must be a key"),
    ],
)
def test_bad_settings(change, error, message):
    with without_type_checks(), pytest.raises(error, match=message):
        couple_snapshots(**{"snapshots": [A, A], "key": jr.key(0), **change})
