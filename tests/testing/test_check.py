"""The search for counterexamples: where it looks, what it finds, and what it says."""

import re

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import without_type_checks
from test_benchmarks import load
from test_testing import Decay, decay

import flowdiffrax as fd
from flowdiffrax import testing

detection = load("detection")
X = jnp.asarray([0.8, -0.5])


def failure_of(flow_map, *field, **settings):
    with pytest.raises(testing.IdentityError) as info:
        testing.check(flow_map, *field, **{"seed": 0, "state": X, **settings})
    (failure,) = info.value.failures
    return failure, str(info.value)


# Where it looks


def jumps(**settings):
    """The jumps that a map outside of JAX is asked for, to test its inverse."""
    asked = []

    def record(s, t, x):
        asked.append((float(s), float(t)))
        return np.asarray(x)

    testing.check(record, state=X, identities=["inverse"], seed=0, **settings)
    return np.asarray(asked)


def test_jumps_are_everywhere_and_at_the_edges():
    s, t = jumps(t0=-1.0, t1=3.0, max_examples=400).T
    assert np.min([s, t]) == -1 and np.max([s, t]) == 3
    gaps = (t - s) / 4
    assert np.sum(gaps == 0) > 10
    assert np.sum((np.abs(gaps) > 0) & (np.abs(gaps) < 1e-3)) > 10
    for values in (s, t):
        counts, _ = np.histogram(values, bins=50, range=(-1, 3))
        assert counts.min() >= 2
    counts, _ = np.histogram(gaps, bins=50, range=(-1, 1))
    assert counts.min() >= 1


def test_rising_times_only_rise():
    seen = []
    flow_map = lambda s, t, x: (seen.append((float(s), float(t))), np.asarray(x))[1]
    names = ["starts_as_identity", "semigroup"]
    testing.check(flow_map, state=X, identities=names, ordered=True, seed=0)
    s, t = np.asarray(seen).T
    assert np.all(s <= t) and np.sum(s < t) > 400


def test_states_keep_to_their_bounds():
    low, high = jnp.asarray([0.0, 5.0]), jnp.asarray([1.0, 5.5])
    inside = lambda s, t, x: jnp.where(jnp.all((low <= x) & (x <= high)), x, jnp.nan)
    settings = {"state": X, "identities": ["semigroup"]}
    testing.check(inside, bounds=(low, high), **settings)
    with pytest.raises(testing.IdentityError):
        testing.check(inside, bounds=(0.0, 5.5), **settings)
    with pytest.raises(ValueError, match="the lowest and the highest"):
        testing.check(inside, bounds=(1.0, 0.0), **settings)


def test_complex_states_and_trees_are_bounded():
    state = {"a": jnp.zeros(2, complex), "b": jnp.zeros((1, 3), jnp.float32)}

    def inside(s, t, x):
        parts = [jnp.abs(x["a"].real), jnp.abs(x["a"].imag), jnp.abs(x["b"][0])]
        ok = jnp.all(jnp.stack([part.max() <= 0.5 for part in parts]))
        return jax.tree_util.tree_map(lambda leaf: jnp.where(ok, leaf, jnp.nan), x)

    settings = {"state": state, "identities": ["inverse"]}
    testing.check(inside, bounds=(-0.5, 0.5), **settings)
    bounds = {"a": -0.5, "b": -0.5}, {"a": 0.5, "b": 0.6}
    with pytest.raises(testing.IdentityError):
        testing.check(inside, bounds=bounds, **settings)


def test_states_of_a_strategy_stay_in_it():
    # Right for states that sum to one, which no other state does.
    def flow_map(s, t, x):
        return jnp.where(jnp.abs(jnp.sum(x) - 1) < 1e-9, x, x + 1)

    whole = st.integers(0, 10).map(lambda k: jnp.asarray([k / 10, 1 - k / 10]))
    testing.check(flow_map, state=whole, identities=["semigroup"])
    late = Decay(lambda s, t, x: jnp.where((t > 0.7) & (x[0] > 0.55), 0.1, 0.0))
    failure, said = failure_of(late, state=whole, identities=["starts_as_identity"])
    assert failure.x.tolist() == [0.6, 0.4] and failure.times["s"] == 0.8
    assert "11 states of the strategy" in said


def test_strategies_of_many_shapes():
    shapes = st.sampled_from([(), (2,), (0,), (2, 3)])
    found = testing.check(
        Decay(), decay, state=testing.states(shapes), identities=["lagrangian"]
    )
    assert found["lagrangian"] < 1e-14 and found.num_points == pytest.approx(4096, abs=4)


# What it finds


@pytest.mark.parametrize("band", detection.BANDS)
def test_fault_in_a_narrow_band_is_found(band):
    identity = "lagrangian" if band == "length" else "semigroup"
    assert all(detection.is_found(identity, band, seed) for seed in range(100, 105))


@pytest.mark.slow
def test_nearly_all_faults_in_narrow_bands_are_found():
    assert min(detection.main().values()) >= 0.99


def logistic(s, t, x):
    return x / (x + (1 - x) * jnp.exp(s - t))


KNOWN = testing.KnownField([0.8, 0.9, -0.6, 0.5], [-0.4, 0.1, 0.7, 0.2], 0.5, -0.3)
ALL_BUT_DENSE = [name for name in detection.IDENTITIES if name != "average_velocity"]
EXACT = {
    "rotation": (
        lambda s, t, x: detection.rotate(t - s, x),
        detection.velocity,
        2,
        (-2, 2),
    ),
    "logistic": (logistic, lambda t, x: x * (1 - x), 1, (0.05, 0.95)),
    "known": (KNOWN.flow_map, KNOWN, 4, (-2, 2)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "name",
    [
        "rotation",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("logistic", "known")),
    ],
)
def test_exact_maps_raise_no_alarm(name, dtype):
    flow_map, field, size, bounds = EXACT[name]
    # The field of `known` is too wild for the polynomials of dense output.
    names = ALL_BUT_DENSE if name == "known" else None
    found = testing.check(
        flow_map,
        field,
        state=jnp.zeros(size, dtype),
        bounds=bounds,
        identities=names,
        seed=1,
    )
    assert found.num_points == 4096 and len(found) == (8 if names else 11)


# What it says


def test_worst_is_printed_with_the_simplest():
    wrong = Decay(lambda s, t, x: 0.3 * (t - s) ** 2 * jnp.heaviside(x[0], 0.0))
    failure, said = failure_of(wrong, state=X, identities=["inverse"])
    worst = failure.worst
    assert worst is not None and failure.share is not None
    assert worst.defect > failure.defect
    ratios = [one.defect / one.tolerance for one in (failure, worst)]
    assert ratios[0] >= 0.1 * ratios[1]
    assert failure.defect > 1e6 * failure.tolerance
    assert 0.3 < failure.share < 0.6
    for one in (failure, worst):
        line = f"off by {one.defect:.3g}, where {one.tolerance:.3g} is allowed"
        assert line in said
        times = ", ".join(f"{name} = {time!s}" for name, time in one.times.items())
        assert times in said
    # The simplest has few digits.
    assert all(len(str(time)) <= 4 for time in failure.times.values())
    assert failure.x.tolist()[1] == 0 and failure.x.tolist()[0] == 0.1
    assert re.search(r"Looked at 4,096 jumps, .* in \[0.0, 1.0\]", said)
    assert "entries in [-2.0, 2.0], in float64" in said
    # 1 - 0.05^(1/n), of 2,048 uniform pairs of times and 3,584 uniform states.
    assert "0.15 % of the pairs of times, or on 0.084 % of the states" in said


def test_numbers_that_differ_are_printed_apart():
    wrong = lambda s, t, x: x + jnp.where(t > 0.5, 1.0001e-3, 0.0)
    settings = {"identities": ["starts_as_identity"], "atol": 1e-3, "rtol": 0.0}
    _, said = failure_of(wrong, **settings)
    assert "off by 0.0010001, where 0.001 is allowed" in said


def test_what_is_not_finite_is_found():
    wrong = Decay(lambda s, t, x: jnp.where((s == 1) & (t == 0), jnp.nan, 0.0))
    failure, said = failure_of(wrong, identities=["inverse"])
    assert "off by nan" in said and failure.x.tolist() == [0, 0]
    # A solve that fails is a failure of the map, not an error.
    wrong = Decay(lambda s, t, x: jnp.where(t > 0.9, jnp.nan, 0.0))
    failure, _ = failure_of(wrong, identities=["solver_equals_map"])
    assert not np.isfinite(failure.defect) and max(failure.times.values()) > 0.9


def test_large_states_are_simplified_in_blocks():
    wrong = lambda s, t, x: x + jnp.where(x[37] > 1.5, 0.1, 0)
    names = ["starts_as_identity"]
    failure, _ = failure_of(wrong, state=jnp.zeros(100), identities=names)
    assert np.flatnonzero(failure.x).tolist() == [37] and failure.x[37] == 1.6
    # Nothing can be left out of a sum.
    wrong = lambda s, t, x: x + jnp.where(jnp.sum(jnp.abs(x)) > 105.0, 0.1, 0)
    failure, _ = failure_of(wrong, state=jnp.zeros(100), identities=names)
    assert np.sum(np.abs(failure.x)) > 105


def test_report_prints_as_a_table():
    found = testing.check(Decay(), decay, state=X, identities=["tangent"], seed=0)
    assert found == {"tangent": found["tangent"]} and found.num_points == 4096
    lines = str(found).splitlines()
    assert lines[0].split() == ["identity", "worst"] and lines[1].startswith("tangent")
    assert str(found).endswith(f"\n\n{found.looked_at}") and repr(found) == str(found)


def test_same_seed_finds_the_same():
    wrong = Decay(lambda s, t, x: 0.1 * jnp.sin(7 * s) * (t - s))
    one, two = (failure_of(wrong, identities=["inverse"])[1] for _ in range(2))
    assert one == two
    # The profile of these tests is derandomised.
    with pytest.raises(testing.IdentityError, match="seed=0"):
        testing.check(wrong, state=X, identities=["inverse"])


# Maps of all kinds


def callback(s, t, x):
    """A decay on the host, which `jax.vmap` refuses."""
    on_host = lambda s, t, x: np.exp(np.asarray(s) - t) * x
    return jax.pure_callback(on_host, jax.eval_shape(lambda x: x, x), s, t, x)


def test_map_that_cannot_be_vectorised():
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(callback)(jnp.zeros(2), jnp.zeros(2), jnp.zeros((2, 2)))
    names = ["starts_as_identity", "semigroup", "inverse"]
    found = testing.check(callback, state=X, identities=names)
    assert found.num_points == 256 and max(found.values()) < 1e-13
    assert "fewer than 4,096 jumps because JAX cannot" in found.looked_at
    wrong = lambda s, t, x: callback(s, t, x) + jnp.where(t > 0.7, 0.1, 0)
    failure, said = failure_of(wrong, identities=["starts_as_identity"])
    assert failure.times["s"] == 0.8 and "Looked at 256 jumps" in said


def test_search_of_a_slow_map_stops_in_time(monkeypatch):
    monkeypatch.setattr("flowdiffrax.testing._search._PATIENCE", 0.0)
    found = testing.check(Decay(), state=X, identities=["inverse"])
    assert found.num_points == 256 and "stopped after a minute" in found.looked_at
    found = testing.check(Decay(), state=X, identities=["inverse"], max_examples=600)
    assert found.num_points == 600 and "stopped" not in found.looked_at


def test_point_at_which_a_map_raises_is_named():
    def fragile(s, t, x):
        if x[0] > 1.9 and s > 0.3:
            raise RuntimeError("no such layer")
        return x

    with pytest.raises(Exception, match="no such layer") as info:
        testing.check(fragile, state=X, identities=["starts_as_identity"], seed=0)
    (note,) = [note for note in info.value.__notes__ if note.startswith("At (s, u, t)")]
    s, _, _, x0 = map(float, re.findall(r"\d\.\d+|-?[\d.]+(?=,)", note)[:4])
    assert s > 0.3 and x0 > 1.9


def test_args_are_the_same_for_all_jumps():
    class Growth(eqx.Module):
        def __call__(self, s, t, x, args):
            return x * jnp.exp(args["rate"] * (t - s))

    args = {"rate": jnp.asarray([0.5, -1.0]), "name": "not an array"}
    field = lambda t, x, args: args["rate"] * x
    names = ["semigroup", "lagrangian", "solver_equals_map"]
    found = testing.check(Growth(), field, state=X, identities=names, args=args)
    assert max(found.values()) < 1e-12
    wrong = lambda t, x, args: args["rate"] ** 2 * x
    failure, _ = failure_of(Growth(), wrong, identities=["lagrangian"], args=args)
    assert failure.args is args and "args=" in failure.command()


def test_map_of_the_library_in_its_time_range():
    class Ranged(Decay):
        time_range = (2.0, 3.0)

    assert isinstance(Ranged(), fd.AbstractFlowMap)
    found = testing.check(Ranged(), decay, state=X, identities=["semigroup"])
    assert "in [2.0, 3.0]" in found.looked_at


def test_settings_out_of_their_ranges():
    check = lambda **given: testing.check(lambda s, t, x: x, state=X, **given)
    with pytest.raises(ValueError, match="`rtol` must be at least 0; got -1"):
        check(rtol=-1.0)
    with without_type_checks():
        with pytest.raises(ValueError, match="the lowest and the highest"):
            check(bounds=(1.0,))
        with pytest.raises(TypeError, match="`max_examples` must be an integer"):
            check(max_examples=2.5)


@pytest.mark.parametrize("t0, t1", [(1.0, 1.0), (float("nan"), 1.0), (0.0, np.inf)])
def test_interval_without_a_length(t0, t1):
    with pytest.raises(ValueError, match="must be finite and not empty"):
        testing.check(lambda s, t, x: x, state=X, t0=t0, t1=t1, identities=["inverse"])
