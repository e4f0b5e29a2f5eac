"""Couplings: what is re-ordered, how well, and what stays."""

import dataclasses
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close
from scipy.optimize import linear_sum_assignment

import flowdiffrax as fd


def points(seed, size=40, dim=2):
    base_key, data_key = jr.split(jr.key(seed))
    return jr.normal(base_key, (size, dim)), jr.uniform(data_key, (size, dim))


def squared_distances(x0, x1):
    return np.sum((np.asarray(x0)[:, None] - np.asarray(x1)[None]) ** 2, axis=-1)


def least_cost(x0, x1):
    cost = squared_distances(x0, x1)
    return cost[linear_sum_assignment(cost)].sum()


def paired_cost(x0, x1):
    return np.sum((np.asarray(x0) - np.asarray(x1)) ** 2)


def sorted_rows(x):
    return np.asarray(sorted(map(tuple, np.asarray(x))))


@pytest.fixture(scope="module")
def transport():
    pytest.importorskip("ott")
    return fd.paths.OptimalTransportCoupling()


def test_independent_coupling_keeps_the_batch():
    x0, x1 = points(0)
    assert_close(fd.paths.IndependentCoupling()(jr.key(0), x0, x1, jnp.arange(40)), x0)


@pytest.mark.parametrize("size, dim", [(1, 2), (2, 1), (40, 2), (33, 50)])
def test_transport_is_optimal(transport, size, dim):
    x0, x1 = points(size, size, dim)
    y0 = transport(jr.key(0), x0, x1)
    assert_close(sorted_rows(y0), sorted_rows(x0), 0, 0)
    np.testing.assert_allclose(paired_cost(y0, x1), least_cost(x0, x1), rtol=1e-10)


def test_transport_far_from_the_origin_in_float32(transport):
    # Squares of 1e3 leave float32 no digits for distances of 0.01, were it not centred.
    x0, x1 = (x.astype(jnp.float32) / 4 + 1e3 for x in points(1))
    y0 = transport(jr.key(0), x0, x1)
    assert y0.dtype == jnp.float32
    x0, x1, y0 = (np.asarray(x, float) for x in (x0, x1, y0))
    np.testing.assert_allclose(paired_cost(y0, x1), least_cost(x0, x1), rtol=1e-4)


def test_transport_keeps_the_base_of_each_label(transport):
    x0, x1 = points(2)
    labels = jr.randint(jr.key(3), (40,), 0, 4)
    y0 = transport(jr.key(0), x0, x1, labels)
    assert paired_cost(y0, x1) < paired_cost(x0, x1)
    for label in range(4):
        own = np.asarray(labels == label)
        assert_close(sorted_rows(y0[own]), sorted_rows(x0[own]), 0, 0)
        expected = least_cost(x0[own], x1[own])
        np.testing.assert_allclose(paired_cost(y0[own], x1[own]), expected, rtol=1e-10)


def test_labels_may_be_put_aside(transport):
    x0, x1 = points(2)
    across = fd.paths.OptimalTransportCoupling(within_labels=False)
    assert_close(
        across(jr.key(0), x0, x1, jnp.ones((40, 3))), transport(jr.key(0), x0, x1)
    )


def test_labels_of_one_point_each_leave_the_batch(transport):
    x0, x1 = points(4)
    assert_close(transport(jr.key(0), x0, x1, jnp.arange(40)), x0, 0, 0)


def test_transport_of_a_pytree(transport):
    # The same numbers as rows of a matrix, and in leaves of several shapes and dtypes.
    x0, x1 = points(5, dim=5)
    as_tree = lambda x: {
        "a": x[:, 0],
        "b": x[:, 1:3].reshape(-1, 1, 2),
        "c": jax.lax.complex(x[:, 3], x[:, 4]),
    }
    assert_close(
        transport(jr.key(0), as_tree(x0), as_tree(x1)),
        as_tree(transport(jr.key(0), x0, x1)),
    )


def test_leaves_keep_their_dtypes(transport):
    x0, x1 = points(6)
    mixed = lambda x: {"a": x.astype(jnp.bfloat16), "b": x.astype(jnp.float32)}
    y0 = transport(jr.key(0), mixed(x0), mixed(x1))
    assert y0["a"].dtype == jnp.bfloat16 and y0["b"].dtype == jnp.float32


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_has_no_order_comes_in_some_order(transport, value):
    x0, x1 = points(7)
    y0 = jax.jit(transport)(jr.key(0), x0, jnp.full_like(x1, value))
    assert_close(sorted_rows(y0), sorted_rows(x0), 0, 0)


def test_labels_are_kept_where_float32_overflows(transport):
    x0, x1 = (x.astype(jnp.float32) * 5e19 for x in points(7))
    labels = jnp.arange(40) % 4
    y0 = transport(jr.key(0), x0, x1, labels)
    for label in range(4):
        assert_close(sorted_rows(y0[label::4]), sorted_rows(x0[label::4]), 0, 0)


def test_gradients_follow_the_draws(transport):
    x0, x1 = points(8)
    weights = jnp.arange(80.0).reshape(40, 2)
    gradient = jax.grad(lambda x: jnp.sum(weights * transport(jr.key(0), x, x1)))(x0)
    y0 = transport(jr.key(0), x0, x1)
    np.testing.assert_allclose(jnp.sum(gradient * x0), jnp.sum(weights * y0))
    assert_close(sorted_rows(gradient), np.asarray(weights), 0, 0)


@pytest.mark.parametrize("labels", [None, jnp.arange(100) % 3])
def test_batches_with_transport(transport, labels):
    data = jr.uniform(jr.key(9), (100, 2))
    plain, args = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), data, 32, args=labels
    )(jr.key(0))
    source = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), data, 32, coupling=transport, args=labels
    )
    paths, same_args = eqx.filter_jit(source)(jr.key(0))
    assert_close((paths.x1, same_args), (plain.x1, args), 0, 0)
    assert_close(paths.x0, transport(jr.key(0), plain.x0, plain.x1, args), 1e-12)
    assert paired_cost(paths.x0, paths.x1) < paired_cost(plain.x0, plain.x1)


class Recorder(fd.paths.AbstractCoupling):
    """Marks each base draw with what the coupling is given."""

    def __call__(self, key, x0, x1, args=None):
        return jnp.stack([args, jr.uniform(key, args.shape)], axis=1)


def test_couplings_are_given_a_key_and_the_conditions():
    data = jnp.zeros((10, 2))
    source = fd.data.InterpolantBatches(
        fd.LinearInterpolant(), data, 6, coupling=Recorder(), args=jnp.arange(10.0)
    )
    (first, args), (second, _) = source(jr.key(0)), source(jr.key(1))
    assert_close(first.x0[:, 0], args)
    assert not np.any(np.isin(first.x0[:, 1], second.x0[:, 1]))


@pytest.mark.parametrize(
    "same",
    [
        lambda labels: jax.nn.one_hot(labels, 4),
        lambda labels: {"a": labels // 2, "b": (labels % 2).astype(float)},
    ],
    ids=["one-hot", "tree"],
)
def test_conditions_of_other_kinds_are_labels(transport, same):
    x0, x1 = points(0)
    labels = jnp.arange(40) % 4
    expected = transport(jr.key(0), x0, x1, labels)
    assert_close(transport(jr.key(0), x0, x1, same(labels)), expected)
    # Where no two conditions are the same, nothing moves.
    assert_close(transport(jr.key(0), x0, x1, jnp.linspace(0.0, 1.0, 40)), x0)


@pytest.mark.parametrize(
    "coupling",
    [fd.paths.OptimalTransportCoupling, fd.paths.ConditionalOptimalTransportCoupling],
)
def test_without_the_extra(monkeypatch, coupling):
    monkeypatch.setitem(sys.modules, "ott.tools.unreg", None)
    with pytest.raises(ImportError, match=r'pip install "flowdiffrax\[ot\]"'):
        coupling()


@pytest.mark.parametrize("sizes", [(40, 40, 39), (39, 40, 40)])
def test_batches_of_two_sizes(transport, sizes):
    rows = [jnp.ones((size, 2)) for size in sizes]
    with pytest.raises(ValueError, match="common leading axis"):
        transport(jr.key(0), *rows)


# --- transport between similar conditions ---------------------------------------------


@pytest.fixture(scope="module")
def conditional():
    pytest.importorskip("ott")
    return fd.paths.ConditionalOptimalTransportCoupling


def condition_costs(conditions):
    return np.sum(np.asarray(conditions[:, None] - conditions[None]) ** 2, axis=-1)


def test_a_fixed_weight_adds_the_distance_of_conditions(conditional):
    x0, x1 = points(0)
    conditions = jr.normal(jr.key(1), (40, 2))
    cost = squared_distances(x0, x1) + 0.7 * condition_costs(conditions)
    rows, columns = linear_sum_assignment(cost)
    y0 = conditional(weight=0.7)(jr.key(0), x0, x1, conditions)
    assert_close(y0, x0[rows[np.argsort(columns)]], 0, 0)


# Most pairs cost no less without any weight, so that 0.8 is out of reach.
@pytest.mark.parametrize("share", [0.05, 0.2, 0.8])
def test_the_weight_gives_the_share_of_cheaper_pairs(conditional, share):
    # The mean of the data does not matter, so that the check centres them too.
    x0, x1 = (10 * (x - x.mean(0, keepdims=True)) for x in points(0))
    conditions = jr.normal(jr.key(1), (40, 2))
    cost, distances = squared_distances(x0, x1), condition_costs(conditions)
    own = np.diagonal(cost)[None]
    is_cheaper = lambda weight: np.mean(cost + weight * distances <= own) + 1e-9
    # By bisection, as the authors find it.
    low, high = 0.0, 1e4
    for _ in range(100):
        weight = (low + high) / 2
        low, high = (weight, high) if is_cheaper(weight) >= share else (low, weight)
    rows, columns = linear_sum_assignment(cost + weight * distances)
    y0 = conditional(share)(jr.key(0), x0, x1 + 5.0, conditions)
    assert_close(y0, x0[rows[np.argsort(columns)]], 1e-12)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_base_given_a_continuous_condition_stays(conditional, noise):
    # Data of mean c, so that transport alone moves base draws to like conditions.
    size, keys = 512, jr.split(jr.key(0), 3)
    conditions = jr.normal(keys[0], (size, 1))
    x1 = conditions + noise * jr.normal(keys[1], (size, 1))
    x0 = jr.normal(keys[2], (size, 1))
    correlation = lambda y0: np.corrcoef(y0[:, 0], conditions[:, 0])[0, 1]
    plain = fd.paths.OptimalTransportCoupling(within_labels=False)
    y0 = conditional()(jr.key(0), x0, x1, conditions)
    assert correlation(plain(jr.key(0), x0, x1, conditions)) > 0.6
    # 512 independent pairs have a correlation of 0.04.
    assert abs(correlation(y0)) < 0.1
    # Moments of the base for low, middle and high conditions.
    for part in np.array_split(np.argsort(conditions[:, 0]), 4):
        own = np.asarray(y0)[part, 0]
        assert abs(own.mean()) < 4 / np.sqrt(len(own))
        assert abs(own.std() - 1) < 4 / np.sqrt(2 * len(own))
    # Labels of their own leave nothing to transport; similar conditions do.
    within = fd.paths.OptimalTransportCoupling()
    assert_close(within(jr.key(0), x0, x1, conditions), x0, 0, 0)
    assert paired_cost(y0, x1) < paired_cost(x0, x1) * (0.95 if noise < 1 else 0.6)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: jax.nn.one_hot(x, 4)])
def test_labels_with_a_share_each_are_kept_apart(conditional, transport, kind):
    labels, (x0, x1) = kind(jnp.arange(40) % 4), points(2)
    expected = transport(jr.key(0), x0, x1, labels)
    assert_close(conditional()(jr.key(0), x0, x1, labels), expected, 0, 0)


def test_conditional_transport_in_batches(conditional):
    conditions = jr.normal(jr.key(1), (100, 2)).astype(jnp.float32)
    source = fd.data.InterpolantBatches(
        fd.LinearInterpolant(),
        {"a": jr.normal(jr.key(2), (100, 3)), "b": jr.normal(jr.key(3), (100,))},
        32,
        coupling=conditional(0.2),
        args={"kind": jnp.arange(100) % 2, "parameters": conditions},
    )
    paths, _ = eqx.filter_jit(source)(jr.key(0))
    plain, _ = dataclasses.replace(source, coupling=fd.paths.IndependentCoupling())(
        jr.key(0)
    )
    assert_close(sorted_rows(paths.x0["a"]), sorted_rows(plain.x0["a"]), 1e-12)
    assert not np.array_equal(paths.x0["a"], plain.x0["a"])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("where", ["data", "conditions"])
def test_conditional_transport_of_values_that_are_not_finite(conditional, value, where):
    (x0, x1), conditions = points(7), jr.normal(jr.key(1), (40, 2))
    if where == "data":
        x1 = x1.at[3].set(value)
    else:
        conditions = conditions.at[3].set(value)
    y0 = jax.jit(conditional())(jr.key(0), x0, x1, conditions)
    assert_close(sorted_rows(y0), sorted_rows(x0), 0, 0)


@pytest.mark.parametrize("value, settings", [(np.nan, {}), (np.inf, {"weight": 0.0})])
def test_base_draw_of_a_condition_that_is_not_finite_stays(conditional, value, settings):
    (x0, x1), conditions = points(7), jr.normal(jr.key(1), (40, 2))
    conditions = conditions.at[jnp.asarray([3, 8]), 0].set(value)
    y0 = conditional(**settings)(jr.key(0), x0, x1, conditions)
    own, others = np.asarray([3, 8]), np.delete(np.arange(40), [3, 8])
    assert_close(y0[own], x0[own], 0, 0)
    assert_close(sorted_rows(y0[others]), sorted_rows(x0[others]), 0, 0)
    # The others move as they would without it, apart from what `share` counts.
    if settings:
        rows = x0[others], x1[others], conditions[others]
        rest = conditional(**settings)(jr.key(0), *rows)
        assert_close(y0[others], rest, 0, 0)


def test_conditional_transport_without_conditions(conditional):
    with pytest.raises(ValueError, match="needs conditions"):
        conditional()(jr.key(0), *points(0))


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0}, {"weight": -1.0}])
def test_settings_of_conditional_transport(conditional, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        conditional(**settings)
