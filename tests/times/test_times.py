"""Distributions of times: against their definitions, in shape, dtype and randomness."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import without_type_checks
from scipy import stats

import flowdiffrax as fd

N = 20_000
LAWS = {
    "triangle": lambda: fd.times.UniformTriangle(),
    "band": lambda: fd.times.UniformTriangle(max_gap=0.3),
    "square": lambda: fd.times.UniformSquare(),
    "square-band": lambda: fd.times.UniformSquare(max_gap=0.3),
    "diagonal": lambda: fd.times.Diagonal(),
    "diagonal-logit": lambda: fd.times.Diagonal(fd.times.LogitNormal()),
    "mixture": lambda: fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.25),
    "logit-normal": lambda: fd.times.LogitNormal(-0.4, 1.2),
    "logit-normal-unsorted": lambda: fd.times.LogitNormal(sort=False),
    "logit-normal-pair": lambda: fd.times.LogitNormalPair(),
    "logit-normal-gap": lambda: fd.times.LogitNormalGap(),
    "logit-normal-end": lambda: fd.times.LogitNormalGap(-0.8, 1.0, 0.4, 1.0),
    "neighbours": lambda: fd.times.Neighbours(jnp.asarray([0.0, 0.1, 0.4, 1.0])),
    "windows": lambda: fd.times.Neighbours(jnp.asarray([0.0, 0.1, 0.4, 1.0]), 2),
    "mean-flow": lambda: fd.objectives.MeanFlow().times,
    "consistency": lambda: fd.objectives.ConsistencyTraining().times,
    "dyadic": lambda: fd.times.Dyadic(3),
    "grid": lambda: fd.times.GridTimes(jnp.asarray([0.0, 0.1, 0.4, 1.0])),
    "start": lambda: fd.times.StartAt(fd.times.UniformTriangle(), 0.0),
    "end": lambda: fd.times.EndAt(fd.times.UniformTriangle(), 1.0),
    "mixed": lambda: fd.times.MixedTimes(
        (fd.times.Diagonal(), fd.times.UniformSquare()), (1.0, 3.0)
    ),
    "interval": lambda: fd.times.OnInterval(fd.times.UniformTriangle(), 0.0, 1.0),
    "stratified": lambda: fd.times.Stratified(fd.times.UniformTriangle()),
    "log-uniform-gap": lambda: fd.times.LogUniformGap(1e-3, 0.5),
    "either": lambda: fd.times.EitherDirection(fd.times.LogUniformGap(1e-3)),
}


def draw(times, n=N, seed=0):
    return (np.asarray(value) for value in times(jr.key(seed), n))


def definition(seed=1, n=N):
    """Two independent uniform numbers, from NumPy."""
    return np.random.default_rng(seed).random((2, n))


def same_law(a, b):
    """No difference by Kolmogorov and Smirnov at one in ten thousand."""
    return stats.ks_2samp(a, b).pvalue > 1e-4


@pytest.mark.parametrize("name", LAWS)
def test_shape_range_and_dtype(name):
    for dtype in (jnp.float32, jnp.float64):
        s, t = LAWS[name]()(jr.key(0), 257, dtype)
        assert s.shape == t.shape == (257,)
        assert s.dtype == t.dtype == dtype
        assert float(min(s.min(), t.min())) >= 0 and float(max(s.max(), t.max())) <= 1


@pytest.mark.parametrize("name", LAWS)
def test_default_dtype(name):
    s, t = LAWS[name]()(jr.key(0), 8)
    assert s.dtype == t.dtype == jnp.float64


@pytest.mark.parametrize("name", LAWS)
def test_a_function_of_the_key(name):
    times = LAWS[name]()
    (s, t), (s_again, t_again) = draw(times, 64), draw(times, 64)
    s_other, t_other = draw(times, 64, seed=5)
    assert (s == s_again).all() and (t == t_again).all()
    assert (s != s_other).any() or (t != t_other).any()


@pytest.mark.parametrize("name", LAWS)
def test_jit_equals_eager(name):
    times = LAWS[name]()
    made = jax.jit(lambda key: times(key, 33))(jr.key(3))
    np.testing.assert_allclose(made, times(jr.key(3), 33), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["triangle", "square", "logit-normal", "grid", "dyadic"])
def test_batch_of_one(name):
    s, t = LAWS[name]()(jr.key(0), 1)
    assert s.shape == t.shape == (1,)


# --- the distributions ---------------------------------------------------------------


def test_triangle_is_two_sorted_uniforms():
    s, t = draw(fd.times.UniformTriangle())
    low, high = np.sort(definition(), axis=0)
    assert (s <= t).all()
    assert same_law(s, low) and same_law(t, high) and same_law(t - s, high - low)
    # Beyond marginals: a product moment, within 4 standard errors.
    product = s * t
    error = product.std() / np.sqrt(N)
    assert abs(product.mean() - 1 / 4) < 4 * error


@pytest.mark.parametrize("max_gap", [0.05, 0.4, 1.0])
def test_band_is_the_triangle_cut_off(max_gap):
    s, t = draw(fd.times.UniformTriangle(max_gap))
    low, high = np.sort(definition(n=40 * N), axis=0)
    kept = high - low <= max_gap
    assert (t - s <= max_gap + 1e-12).all()
    assert same_law(s, low[kept]) and same_law(t - s, (high - low)[kept])


def test_square_is_two_uniforms():
    s, t = draw(fd.times.UniformSquare())
    first, second = definition()
    assert same_law(s, first) and same_law(t, second) and same_law(s - t, first - second)
    # Independent: a correlation of N pairs has a standard error of 1/sqrt(N).
    assert abs(np.corrcoef(s, t)[0, 1]) < 4 / np.sqrt(N)


def test_square_band_is_the_square_cut_off():
    s, t = draw(fd.times.UniformSquare(0.3))
    first, second = definition(n=4 * N)
    kept = np.abs(first - second) <= 0.3
    assert same_law(s - t, (first - second)[kept]) and same_law(t, second[kept])
    assert abs((s < t).mean() - 0.5) < 4 * 0.5 / np.sqrt(N)


def test_band_fills_its_cells_evenly():
    # Uniform on an area: counts of a grid of cells wholly inside the band |t - s| < 0.3.
    s, t = draw(fd.times.UniformSquare(0.3))
    counts, *_ = np.histogram2d(s, t, bins=20, range=[(0, 1), (0, 1)])
    i, j = np.indices(counts.shape)
    inside = counts[np.abs(i - j) < 5]
    assert stats.chisquare(inside).pvalue > 1e-4
    assert counts[np.abs(i - j) > 6].sum() == 0


def test_gap_may_be_traced():
    traces = []

    @jax.jit
    def longest(max_gap, key):
        traces.append(max_gap)
        s, t = fd.times.UniformTriangle(max_gap)(key, 1000)
        return jnp.max(t - s)

    gaps = [float(longest(gap, jr.key(i))) for i, gap in enumerate((0.1, 0.5, 1.0))]
    assert len(traces) == 1
    assert gaps[0] <= 0.1 < gaps[1] <= 0.5 < gaps[2] <= 1


def test_diagonal_is_uniform():
    s, t = draw(fd.times.Diagonal())
    assert (s == t).all() and stats.kstest(t, "uniform").pvalue > 1e-4


def test_diagonal_of_another_law():
    s, t = draw(fd.times.Diagonal(fd.times.UniformTriangle()))
    assert (s == t).all() and same_law(t, definition().max(axis=0))


@pytest.mark.parametrize("fraction, n, count", [(0.75, 100, 75), (0, 7, 0), (1, 7, 7)])
def test_mixture_counts(fraction, n, count):
    with without_type_checks():
        s, t = draw(fd.times.DiagonalMixture(fd.times.UniformTriangle(), fraction), n)
    assert (s[:count] == t[:count]).all() and (s[count:] != t[count:]).all()


def test_mixture_is_uniform_on_the_diagonal():
    _, t = draw(fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.5))
    assert stats.kstest(t[: N // 2], "uniform").pvalue > 1e-4
    assert same_law(t[N // 2 :], definition().max(axis=0))


def test_logit_normal_is_two_sorted_draws():
    s, t = draw(fd.times.LogitNormal(-0.4, 1.2))
    normals = -0.4 + 1.2 * np.random.default_rng(0).standard_normal((2, N))
    low, high = np.sort(1 / (1 + np.exp(-normals)), axis=0)
    assert same_law(s, low) and same_law(t, high) and same_law(t - s, high - low)


def test_unsorted_logit_normal_times_are_independent():
    s, t = draw(fd.times.LogitNormal(-0.4, 1.2, sort=False))
    expected = 1 / (1 + np.exp(0.4 - 1.2 * np.random.default_rng(0).standard_normal(N)))
    assert same_law(s, expected) and same_law(t, expected)
    assert abs(np.corrcoef(s, t)[0, 1]) < 4 / np.sqrt(N)


def test_mixture_with_its_own_diagonal():
    law = fd.times.LogitNormal(-0.4, 1.2)
    s, t = draw(fd.times.DiagonalMixture(law, 0.5, fd.times.Diagonal(law, start=True)))
    low, _ = draw(law, seed=7)
    assert (s[: N // 2] == t[: N // 2]).all() and same_law(s[: N // 2], low)


def test_pair_of_logit_normals():
    s, t = draw(fd.times.LogitNormalPair(0.6, 1.6, 2.0, 1.2))
    rng = np.random.default_rng(0)
    starts, ends = (
        1 / (1 + np.exp(-mean - std * rng.standard_normal(N)))
        for mean, std in ((0.6, 1.6), (2.0, 1.2))
    )
    assert same_law(s, starts) and same_law(t, np.maximum(starts, ends))
    # The difference of the logits is normal with mean 1.4 and standard deviation 2.
    share = stats.norm.cdf(-0.7)
    assert abs(np.mean(s == t) - share) < 4 * (share * (1 - share) / N) ** 0.5


def test_gap_is_logit_normal_and_its_place_uniform():
    s, t = draw(fd.times.LogitNormalGap(-0.6, 1.6))
    normals = -0.6 + 1.6 * np.random.default_rng(0).standard_normal(N)
    assert same_law(t - s, 1 / (1 + np.exp(-normals)))
    assert stats.kstest(s / (1 - (t - s)), "uniform").pvalue > 1e-4


def test_end_is_logit_normal_above_the_gap():
    s, t = draw(fd.times.LogitNormalGap(-0.8, 1.0, 0.4, 1.0))
    rng = np.random.default_rng(0)
    # By rejection: ends below the gap are drawn again.
    gaps = 1 / (1 + np.exp(0.8 - rng.standard_normal(N)))
    ends = np.zeros(N)
    while (ends < gaps).any():
        fresh = 1 / (1 + np.exp(-0.4 - rng.standard_normal(N)))
        ends = np.where(ends < gaps, fresh, ends)
    assert same_law(t - s, gaps) and same_law(t, ends) and same_law(s, ends - gaps)


@pytest.mark.parametrize("max_gap", [0.2, 1.0])
def test_log_uniform_gap_and_its_place(max_gap):
    s, t = draw(fd.times.LogUniformGap(1e-4, max_gap))
    share = np.log((t - s) / 1e-4) / np.log(max_gap / 1e-4)
    assert stats.kstest(share, "uniform").pvalue > 1e-4
    assert stats.kstest(s / (1 - (t - s)), "uniform").pvalue > 1e-4
    # Gap and place are independent.
    assert abs(np.corrcoef(share, s / (1 - (t - s)))[0, 1]) < 4 / np.sqrt(N)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_log_uniform_gaps_stay_within_theirs(dtype):
    numbers = jnp.asarray([0.0, 0.5, 1 - np.finfo(dtype).epsneg], dtype)
    s, t = fd.times.LogUniformGap(0.1, 1.0).from_uniform(numbers, jnp.zeros(3, dtype))
    np.testing.assert_allclose(t - s, [0.1, np.sqrt(0.1), 1.0], rtol=1e-6)
    assert float(jnp.max(t)) <= 1
    s, t = fd.times.LogUniformGap(0.25, 0.25).from_uniform(numbers, numbers)
    np.testing.assert_allclose(t - s, 0.25, rtol=1e-6)


def test_log_uniform_gaps_may_be_traced():
    shortest = lambda gap: jnp.min(
        jnp.subtract(*fd.times.LogUniformGap(gap, 2 * gap)(jr.key(0), 99)[::-1])
    )
    assert 0.1 <= float(jax.jit(shortest)(0.1)) < 0.11


def test_either_direction_swaps_one_half():
    s, t = draw(fd.times.EitherDirection(fd.times.LogitNormalGap()))
    low, high = draw(fd.times.LogitNormalGap(), seed=7)
    forward = s < t
    assert abs(forward.mean() - 0.5) < 4 * 0.5 / np.sqrt(N)
    for start, end in [(s[forward], t[forward]), (t[~forward], s[~forward])]:
        assert same_law(start, low) and same_law(end - start, high - low)


def test_either_direction_of_stratified_draws():
    s, t = draw(
        fd.times.Stratified(fd.times.EitherDirection(fd.times.UniformTriangle())), 64
    )
    assert (s < t).sum() == 32
    # The gaps of each half are as even as those of a batch of its size.
    for gaps in (np.sort((t - s)[s < t]), np.sort((s - t)[s > t])):
        cells = np.floor(32 * (1 - (1 - gaps) ** 2))
        assert (cells == np.arange(32)).all()


def test_either_direction_on_an_interval():
    law = fd.times.OnInterval(
        fd.times.EitherDirection(fd.times.LogUniformGap(0.1, 0.5)), 2.0, 7.0
    )
    s, t = draw(law, 1000)
    gaps = np.abs(t - s)
    assert gaps.min() >= 0.5 - 1e-12 and gaps.max() <= 2.5 + 1e-12
    assert min(s.min(), t.min()) >= 2 and max(s.max(), t.max()) <= 7
    assert (s < t).any() and (s > t).any()


def test_either_direction_of_mixed_laws():
    laws = (fd.times.Diagonal(), fd.times.EndAt(fd.times.Diagonal(), 1.0))
    s, t = draw(fd.times.EitherDirection(fd.times.MixedTimes(laws, (1.0, 3.0))), 40)
    assert (s[:10] == t[:10]).all()
    assert ((s[10:] == 1) ^ (t[10:] == 1)).all() and (s[10:] == 1).any()


def test_neighbours_are_equally_likely():
    ts = np.asarray([0.0, 0.1, 0.4, 1.0])
    s, t = draw(fd.times.Neighbours(jnp.asarray(ts)))
    starts, counts = np.unique(s, return_counts=True)
    assert (starts == ts[:-1]).all() and stats.chisquare(counts).pvalue > 1e-4
    assert (t == ts[np.searchsorted(ts, s) + 1]).all()


def test_karras_times():
    # Noise levels 80, ..., 0.002 of the EDM paper, even in their seventh roots.
    ts = np.asarray(fd.times.karras_times(18))
    levels = 1 / ts - 1
    assert ts.shape == (18,) and ts[-1] == 1 and levels[0] == pytest.approx(80)
    assert np.ptp(np.diff(levels[:-1] ** (1 / 7))) < 1e-12
    # The last, 0.002, is put on the data.
    least = lambda roots: 2 * roots[-1] - roots[-2]
    assert least(levels[:-1] ** (1 / 7)) ** 7 == pytest.approx(0.002)
    assert np.asarray(fd.times.karras_times(3, base_std=2.0))[0] == pytest.approx(2 / 82)
    # Of a range and a power of one's choice.
    ts = np.asarray(fd.times.karras_times(7, 0.1, 10.0, base_std=2.0, power=3.0))
    levels = 2 / ts - 2
    roots = levels[:-1] ** (1 / 3)
    assert np.ptp(np.diff(roots)) < 1e-12
    assert levels[0] == pytest.approx(10) and least(roots) ** 3 == pytest.approx(0.1)


def test_karras_neighbours_are_those_of_the_grid():
    ts = np.array(fd.times.karras_times(18, base_std=2.0))
    ts[0] = 0.0
    s, t = map(np.asarray, draw(fd.times.KarrasNeighbours(18, base_std=2.0), 2000))
    expected_s, expected_t = map(np.asarray, draw(fd.times.Neighbours(ts), 2000))
    np.testing.assert_allclose(s, expected_s, atol=1e-12)
    np.testing.assert_allclose(t, expected_t, atol=1e-12)
    assert s.min() == 0 and t.max() == 1


def test_grid_that_grows():
    # Ten intervals at first, doubled three times, in four stages of equal length.
    grid = fd.times.doubling_schedule(400, 10, 80)
    steps = [0, 99, 100, 199, 200, 300, 399, 10**6]
    found = [int(grid(jnp.asarray(step))) for step in steps]
    assert found == [11, 11, 21, 21, 41, 81, 81, 81]
    times = fd.times.KarrasNeighbours(fd.times.karras_times(3).shape[0])
    s, t = jax.jit(lambda n: fd.times.KarrasNeighbours(n)(jr.key(0), 50))(jnp.asarray(3))
    assert set(np.asarray(t)) == set(np.asarray(times(jr.key(0), 50)[1]))
    assert len(set(np.asarray(s))) == 2


@pytest.mark.parametrize(
    "times, count",
    [
        (fd.times.UniformTriangle(), 0),
        (fd.times.Diagonal(), 40),
        (fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.25), 10),
        (
            fd.times.Stratified(
                fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.25)
            ),
            10,
        ),
        (fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.999), 39),
        (fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.001), 1),
        (
            fd.times.MixedTimes(
                (fd.times.Diagonal(), fd.times.UniformTriangle()), (3.0, 1.0)
            ),
            30,
        ),
        (
            fd.times.MixedTimes(
                (fd.times.UniformTriangle(), fd.times.Diagonal()), (3.0, 1.0)
            ),
            0,
        ),
        (
            fd.times.OnInterval(
                fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.25), 0.0, 3.0
            ),
            10,
        ),
        (
            fd.times.EitherDirection(
                fd.times.DiagonalMixture(fd.times.LogUniformGap(0.1), 0.25)
            ),
            10,
        ),
        (
            fd.times.DiagonalMixture(
                fd.times.EitherDirection(fd.times.LogUniformGap(0.1)), 0.25
            ),
            10,
        ),
        (fd.times.EitherDirection(fd.times.LogUniformGap(0.1)), 0),
    ],
)
def test_rows_known_to_be_on_the_diagonal(times, count):
    assert times.num_diagonal(40) == count
    s, t = draw(times, 40)
    assert (s[:count] == t[:count]).all()


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (1.0, 1)])
def test_one_pair_takes_a_whole_share(fraction, count):
    mixture = fd.times.DiagonalMixture(fd.times.UniformTriangle(), fraction)
    s, t = draw(mixture, 1)
    assert mixture.num_diagonal(1) == (s == t).sum() == count


@pytest.mark.parametrize("size, count", [(2, 1), (3, 2), (4, 3), (5, 4), (8, 6)])
def test_no_share_vanishes(size, count):
    assert (
        fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.75).num_diagonal(size)
        == count
    )


def test_logit_normal_of_the_least_uniform_number():
    times = fd.times.LogitNormal().from_uniform(jnp.zeros(1), jnp.zeros(1))
    assert np.isfinite(times).all()


def test_dyadic_jumps():
    s, t = draw(fd.times.Dyadic(3))
    level, counts = np.unique(-np.log2(t - s), return_counts=True)
    assert (level == np.arange(4)).all()
    assert stats.chisquare(counts).pvalue > 1e-4
    finest = s[t - s == 1 / 8]
    starts, counts = np.unique(finest, return_counts=True)
    assert (starts == np.arange(8) / 8).all() and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("both", [False, True])
def test_grid_pairs_are_equally_likely(both):
    ts = np.asarray([0.0, 0.1, 0.4, 1.0])
    s, t = draw(fd.times.GridTimes(jnp.asarray(ts), both_directions=both))
    pairs, counts = np.unique(np.stack([s, t]), axis=1, return_counts=True)
    assert counts.size == (12 if both else 6)
    assert (pairs[0] != pairs[1]).all() and np.isin(pairs, ts).all()
    assert both or (pairs[0] < pairs[1]).all()
    assert stats.chisquare(counts).pvalue > 1e-4


def test_start_and_end():
    s, t = draw(fd.times.StartAt(fd.times.UniformTriangle(), 0.25))
    assert (s == 0.25).all() and same_law(t, definition().max(axis=0))
    s, t = draw(fd.times.EndAt(fd.times.UniformTriangle(), 0.75))
    assert (t == 0.75).all() and same_law(s, definition().min(axis=0))


def test_interval():
    s, t = draw(fd.times.OnInterval(fd.times.UniformTriangle(), -2.0, 3.0))
    unit_s, unit_t = draw(fd.times.UniformTriangle())
    np.testing.assert_allclose([s, t], [5 * unit_s - 2, 5 * unit_t - 2], atol=1e-12)


def test_mixed_laws_have_their_rows():
    laws = (
        fd.times.Diagonal(),
        fd.times.UniformTriangle(),
        fd.times.EndAt(fd.times.Diagonal(), 1.0),
    )
    s, t = draw(fd.times.MixedTimes(laws, (1.0, 2.0, 1.0)), 40)
    assert (s[:10] == t[:10]).all() and (t[30:] == 1).all()
    assert (s[10:30] < t[10:30]).all() and (t[:30] < 1).all()


# --- stratified ---------------------------------------------------------------------


class Raw(fd.times.AbstractTimes):
    """The uniform numbers themselves."""

    def from_uniform(self, first, second):
        return first, second


@pytest.mark.parametrize("n", [1, 7, 64])
def test_each_cell_once(n):
    for numbers in draw(fd.times.Stratified(Raw()), n):
        assert sorted(np.floor(numbers * n)) == list(range(n))


def test_cells_of_the_two_numbers_are_independent():
    first, second = draw(fd.times.Stratified(Raw()))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(N)


@pytest.mark.parametrize("n", [5, 1000])
def test_numbers_stay_below_one_in_float32(n):
    # The last cell, whose upper edge float32 rounds to one.
    draws = [
        fd.times.Stratified(Raw())(jr.key(seed), n, jnp.float32) for seed in range(20)
    ]
    assert np.max(draws) < 1


def test_stratified_keeps_the_law():
    # One pair of each of 4000 batches of three: its law is that of the plain draw.
    keys = jr.split(jr.key(0), 4000)
    s, t = jax.vmap(lambda key: fd.times.Stratified(fd.times.UniformTriangle())(key, 3))(
        keys
    )
    low, high = np.sort(definition(), axis=0)
    assert same_law(s[:, 0], low) and same_law(t[:, 0], high)


def test_stratified_has_less_variance():
    plain_keys, keys = jr.split(jr.key(0), (2, 500))
    spread = lambda times, keys: float(
        jnp.std(jax.vmap(lambda key: jnp.mean(times(key, 32)[0]))(keys))
    )
    stratified, plain = (
        fd.times.Stratified(fd.times.UniformTriangle()),
        fd.times.UniformTriangle(),
    )
    assert spread(stratified, keys) < 0.5 * spread(plain, plain_keys)


# --- refusals -----------------------------------------------------------------------

DIAGONAL = fd.times.Diagonal()


@pytest.mark.parametrize(
    "make, match",
    [
        (
            lambda: fd.times.UniformTriangle()(jr.key(0), 0),
            "`batch_size` must be",
        ),
        (lambda: fd.times.Stratified(DIAGONAL)(jr.key(0), -1), "`batch_size` must be at"),
        (lambda: fd.times.UniformTriangle(0.0), r"`max_gap` must be in \(0, 1\]; got 0"),
        (lambda: fd.times.UniformTriangle(jnp.asarray(1.5)), "max_gap"),
        (lambda: fd.times.UniformSquare(-0.5), "max_gap"),
        (lambda: fd.times.DiagonalMixture(DIAGONAL, 1.5), r"`fraction` .* in \[0, 1\]"),
        (
            lambda: draw(fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.75), 1),
            "A batch of 1 has no room for a share of 0.75",
        ),
        (lambda: fd.times.LogitNormal(0.0, 0.0), "`std` must be positive"),
        (lambda: fd.times.LogitNormalPair(0.0, 0.0), "`std` must be positive"),
        (lambda: fd.times.LogitNormalPair(end_std=-1.0), "`end_std` must be positive"),
        (lambda: fd.times.LogitNormalGap(0.0, 0.0), "`std` must be positive"),
        (lambda: fd.times.LogitNormalGap(0.0, 1.0, 0.0, 0.0), "`end_std` must be pos"),
        (lambda: fd.times.LogitNormalGap(end_mean=0.0), "together"),
        (lambda: fd.times.LogitNormal(float("nan")), "`mean` must be finite; got nan"),
        (lambda: fd.times.LogitNormalPair(end_mean=jnp.inf), "`end_mean` must be finite"),
        (lambda: fd.times.LogitNormalGap(end_mean=jnp.nan, end_std=1.0), "`end_mean` mu"),
        (lambda: fd.times.Dyadic(-1), "`max_level` must be at least 0; got -1"),
        (lambda: fd.times.LogUniformGap(0.0), "`min_gap` must be in"),
        (lambda: fd.times.LogUniformGap(0.5, 0.1), r"`min_gap` must be in \(0, 0.1\]"),
        (lambda: fd.times.LogUniformGap(0.5, 5.0), "`max_gap` must be in"),
        (lambda: fd.times.GridTimes(jnp.asarray([0.5])), "at least two"),
        (lambda: fd.times.GridTimes(jnp.ones((2, 2))), "at least two"),
        (lambda: fd.times.Neighbours(jnp.asarray([0.0, 1.0, 0.5])), "times that rise"),
        (lambda: fd.times.MixedTimes((DIAGONAL,), (1.0, 1.0)), "one share for each part"),
        (lambda: fd.times.MixedTimes((DIAGONAL,), (0.0,)), "`shares` must be positive"),
        (
            lambda: draw(fd.times.MixedTimes((DIAGONAL, DIAGONAL), (1.0, 99.0)), 4),
            "too small for the shares",
        ),
        (lambda: fd.times.karras_times(1), "`num_times` must be at least 2"),
        (lambda: fd.times.KarrasNeighbours(1), "`num_times` must be at least 2"),
        (lambda: fd.times.karras_times(5, 1.0, 0.1), "`sigma_min` must be in"),
        (lambda: fd.times.doubling_schedule(0, 10, 80), "`num_steps` must be at least 1"),
        (lambda: fd.times.doubling_schedule(10, 0, 80), r"`first` must be in \[1, 80\]"),
        (lambda: fd.times.doubling_schedule(10, 20, 10), "`first` must be in"),
    ],
)
def test_refusals(make, match):
    with without_type_checks(), pytest.raises(ValueError, match=match):
        make()


def test_known_numbers_are_checked_inside_jit():
    made = jax.jit(lambda x: x * fd.times.UniformTriangle(jnp.asarray(0.5)).max_gap)
    assert made(2.0) == 1.0
    with pytest.raises(ValueError, match="max_gap"):
        jax.jit(lambda x: x * fd.times.UniformTriangle(1.5).max_gap)(2.0)


def test_stages_shorter_than_a_step_take_one():
    grid = fd.times.doubling_schedule(1, 2, 64)
    assert [int(grid(step)) for step in (0, 1, 2, 50)] == [3, 5, 9, 65]


def test_no_level_is_one_jump():
    s, t = fd.times.Dyadic(0)(jr.key(0), 4)
    np.testing.assert_array_equal([s, t], [np.zeros(4), np.ones(4)])


def test_mixtures_count_what_is_on_the_diagonal_first():
    half = fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.5)
    whole = fd.times.Diagonal()
    count = lambda *parts: fd.times.MixedTimes(parts, (1.0,) * len(parts)).num_diagonal(8)
    assert count(whole, half) == 4 + 2
    assert count(half, whole) == 2
    assert count(whole, whole) == 8
    assert count(fd.times.UniformTriangle(), whole) == 0
