"""Each objective at its defaults, against its paper's formulas in NumPy.

A row of `EQUATIONS` is an objective and the paper's loss on the paper's own clock, of
trained weights `p` and of the same weights `q` held fixed. Losses and semigradients must
agree, so that a weight, a coefficient, a stop-gradient or a clock that is off is seen. A
row of `TIMES` is the paper's distribution of times, drawn by NumPy, and its share on the
diagonal.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_close, public_objectives

import flowdiffrax as fd

S, T = 0.2, 0.9
X0, X1 = np.asarray([0.8, -0.5]), np.asarray([-0.3, 1.1])
I = lambda t: (1 - t) * X0 + t * X1  # noqa: E741
RATE = X1 - X0
# Two states of a trajectory, at S and T.
X_S, X_T = np.asarray([0.3, -0.7]), np.asarray([0.9, 0.4])
# And one between them, as a roll-out of two jumps visits it.
M, X_M = 0.5, np.asarray([0.7, -0.1])


class Net(eqx.Module):
    """One hidden layer, simple enough to be written again in NumPy."""

    inner: jax.Array
    outer: jax.Array

    def __call__(self, s, t, x, args):
        return self.outer @ jnp.tanh(self.inner @ jnp.concatenate([x, jnp.stack([s, t])]))


RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((5, 4)), RNG.standard_normal((2, 5))
DIRECTION = RNG.standard_normal((5, 4)), RNG.standard_normal((2, 5))
MAP = fd.FlowMap(Net(*map(jnp.asarray, WEIGHTS)))


def v(p, s, t, x):
    """The average velocity, in NumPy; complex weights carry a derivative."""
    inner, outer = p
    return outer @ np.tanh(inner @ np.concatenate([x, [s, t]]))


def X(p, s, t, x):
    return x + (t - s) * v(p, s, t, x)


def teacher(t, x, args=None):
    return jnp.stack([-x[1] + 0.3 * x[0] ** 2, x[0] * (0.5 + t)])


def b(t, x):
    return np.asarray([-x[1] + 0.3 * x[0] ** 2, x[0] * (0.5 + t)])


def slope(fn, step=1e-5):
    """The derivative at 0, by a difference of fourth order."""
    near, far = fn(step) - fn(-step), fn(2 * step) - fn(-2 * step)
    return (8 * near - far) / (12 * step)


def square(x):
    return np.sum(x * x)


# --- equations, on the papers' own clocks ---------------------------------------------


def flow_matching(p, q):
    return square(v(p, T, T, I(T)) - RATE)


def velocity_distillation(p, q):
    return square(v(p, T, T, I(T)) - b(T, I(T)))


def end_rate(p, x):
    return slope(lambda h: X(p, S, T + h, x))


def lagrangian_distillation(p, q):
    return square(end_rate(p, I(S)) - b(T, X(q, S, T, I(S))))


def lagrangian_self_distillation(p, q):
    return square(end_rate(p, I(S)) - v(q, T, T, X(q, S, T, I(S))))


def eulerian_distillation(p, q):
    return square(slope(lambda h: X(p, S + h, T, I(S) + h * b(S, I(S)))))


def eulerian_along(w):
    """Consistency in two times, with the derivative in space held fixed."""

    def loss(p, q):
        direction = w(q)
        in_time = slope(lambda h: X(p, S + h, T, I(S)))
        in_space = slope(lambda h: X(q, S, T, I(S) + h * direction))
        return square(in_time + in_space)

    return loss


def naive_eulerian(p, q):
    return square(slope(lambda h: X(p, S + h, T, I(S) + h * RATE)))


def flow_map_matching(p, q, factor=1.0):
    y = X(p, T, S, I(T))
    return square(end_rate(p, y) - RATE) + factor * square(X(p, S, T, y) - I(T))


def cycle(p, q):
    return square(X(p, T, S, X(p, S, T, I(S))) - I(S))


def progressive_matching(p, q):
    middle = (S + T) / 2
    return square(X(p, S, T, I(S)) - X(q, middle, T, X(q, S, middle, I(S))))


def two_pieces(share):
    def loss(p, q):
        u = S + share * (T - S)
        first = v(q, S, u, I(S))
        second = v(q, u, T, I(S) + (u - S) * first)
        return square(v(p, S, T, I(S)) - share * first - (1 - share) * second)

    return loss


def two_jumps(share):
    """PSD as it is defined: the difference of states, with no gradient stopped."""

    def loss(p, q):
        u = S + share * (T - S)
        return square(X(p, S, T, I(S)) - X(p, u, T, X(p, S, u, I(S))))

    return loss


def stopped_jumps(share):
    return lambda p, q: (T - S) ** 2 * two_pieces(share)(p, q)


def shortcut(p, q, limit=np.inf):
    # s(x, t, d) over a step d, on our clock; the jump is two steps.
    s_of = lambda p, x, t, d: v(p, t, t + d, x)
    d = (T - S) / 2
    first = s_of(q, I(S), S, d)
    second = s_of(q, I(S) + d * first, S + d, d)
    target = np.clip((first + second) / 2, -limit, limit)
    return square(s_of(p, I(S), S, 2 * d) - target)


# The clock of MeanFlow and its successors: z = (1 - t) x + t e, from time t back to r.
R_, T_ = 1 - T, 1 - S
Z = (1 - T_) * X1 + T_ * X0
V = X0 - X1


def u(p, z, r, t):
    return -v(p, 1 - t, 1 - r, z)


def mean_flow(p, q):
    du_dt = slope(lambda h: u(q, Z + h * V, R_, T_ + h))
    return square(u(p, Z, R_, T_) - (V - (T_ - R_) * du_dt))


def improved_mean_flow(p, q):
    own = u(q, Z, T_, T_)
    du_dt = slope(lambda h: u(q, Z + h * own, R_, T_ + h))
    return square(u(p, Z, R_, T_) + (T_ - R_) * du_dt - V)


def alpha_flow(p, q, alpha=5e-3):
    s = alpha * R_ + (1 - alpha) * T_
    target = alpha * V + (1 - alpha) * u(q, Z - (T_ - s) * V, R_, s)
    return square(u(p, Z, R_, T_) - target) / alpha


def terminal_velocity(p, q):
    f = lambda p, s: Z + (s - T_) * u(p, Z, s, T_)
    terminal = slope(lambda h: f(p, R_ + h)) - u(q, f(q, R_), R_, R_)
    matching = u(p, (1 - R_) * X1 + R_ * X0, R_, R_) - V
    return square(terminal) + square(matching)


def align_eulerian(p, q, r=0.99):
    F = lambda p, x, t: u(p, x, R_, t)
    v_phi = -b(1 - T_, Z)
    dF_dt = slope(lambda h: F(q, Z + h * v_phi, T_ + h))
    g = F(q, Z, T_) - v_phi + r * (T_ - R_) * dF_dt
    return square(F(p, Z, T_) - (F(q, Z, T_) - g))


def align_lagrangian(p, q):
    f = lambda s: Z + (s - T_) * u(q, Z, s, T_)
    v_phi = -b(1 - R_, f(R_))
    g = slope(lambda h: f(R_ + h)) - v_phi
    return square(u(p, Z, R_, T_) - (u(q, Z, R_, T_) - g))


# Consistency models: x + sigma n, from noise sigma to the data.
SIGMA, NEXT = (1 - S) / S, (1 - T) / T


def f(p, x, sigma):
    t = 1 / (1 + sigma)
    return X(p, t, 1.0, t * x)


def consistency_training(p, q):
    error = f(p, X1 + SIGMA * X0, SIGMA) - f(q, X1 + NEXT * X0, NEXT)
    return square(error) / (SIGMA - NEXT)


def consistency_distillation(p, q):
    # A step of Heun's method, on our clock.
    h, here = T - S, b(S, I(S))
    there = b(T, I(S) + h * here)
    moved = I(S) + h * (here + there) / 2
    return square(X(p, S, 1.0, I(S)) - X(q, T, 1.0, moved))


def continuous_consistency(direction):
    def loss(p, q):
        w = direction()
        dv = slope(lambda h: v(q, S + h, 1.0, I(S) + h * w))
        return square(v(p, S, 1.0, I(S)) - (w + (1 - S) * dv))

    return loss


def free_flow(p, q):
    # F(z, d) with the jump d from the base.
    F = lambda p, d: v(p, 0.0, d, X0)
    dF = slope(lambda h: F(q, T + h))
    return square(F(p, T) - (b(T, X0 + T * F(q, T)) - T * dF))


def trajectory_matching(p, q):
    return square((X(p, S, T, X_S) - X_T) / (T - S))


def roll_out(p, q):
    """Of weights `q` up to the last jump; unrolled if they are `p`."""
    first, second = X(p, S, M, X_S), X(p, M, T, X(q, S, M, X_S))
    errors = square((first - X_M) / (M - S)), square((second - X_T) / (T - S))
    return sum(errors) / 2


class Equation(NamedTuple):
    objective: fd.objectives.AbstractObjective
    loss: object  # (p, q) -> the paper's loss
    times: tuple[float, float] = (S, T)
    teacher: object = None  # "velocity" or "map"
    path: str = "interpolant"
    value: float = 1.0  # the library's value over the paper's


EQUATIONS = {
    "flow matching": Equation(fd.FlowMatching(), flow_matching),
    "velocity distillation": Equation(
        fd.objectives.VelocityDistillation(), velocity_distillation, teacher="velocity"
    ),
    "LMD": Equation(
        fd.LagrangianMapDistillation(), lagrangian_distillation, teacher="velocity"
    ),
    "EMD": Equation(
        fd.objectives.EulerianMapDistillation(), eulerian_distillation, teacher="velocity"
    ),
    "EE": Equation(fd.objectives.StopGradientEulerian(), eulerian_along(lambda q: RATE)),
    "naive Eulerian": Equation(fd.objectives.NaiveEulerian(), naive_eulerian),
    "FMM": Equation(fd.objectives.FlowMapMatching(), flow_map_matching),
    "FMM, coefficient": Equation(
        fd.objectives.FlowMapMatching(inverse_weight=0.3),
        lambda p, q: flow_map_matching(p, q, 0.3),
    ),
    "PFMM": Equation(fd.objectives.ProgressiveFlowMapMatching(), progressive_matching),
    "LSD": Equation(fd.LagrangianSelfDistillation(), lagrangian_self_distillation),
    "ESD": Equation(
        fd.objectives.EulerianSelfDistillation(),
        eulerian_along(lambda q: v(q, S, S, I(S))),
    ),
    "PSD": Equation(fd.objectives.ProgressiveSelfDistillation(), two_pieces(0.5)),
    "PSD, split": Equation(
        fd.objectives.ProgressiveSelfDistillation(split=0.3), two_pieces(0.3)
    ),
    "PSD, as defined": Equation(
        fd.objectives.ProgressiveSelfDistillation(
            stop_gradient="none", split=0.3, compare_states=True
        ),
        two_jumps(0.3),
    ),
    "PSD of states": Equation(
        fd.objectives.ProgressiveSelfDistillation(compare_states=True), stopped_jumps(0.5)
    ),
    "LSD, as defined": Equation(
        fd.LagrangianSelfDistillation(stop_gradient="none"),
        lambda p, q: lagrangian_self_distillation(p, p),
    ),
    "ESD, as defined": Equation(
        fd.objectives.EulerianSelfDistillation(stop_gradient="none"),
        lambda p, q: square(slope(lambda h: X(p, S + h, T, I(S) + h * v(p, S, S, I(S))))),
    ),
    "SplitMeanFlow": Equation(fd.objectives.split_mean_flow(split=0.3), two_pieces(0.3)),
    "Shortcut": Equation(fd.objectives.Shortcut(), shortcut),
    "Shortcut, clipped": Equation(
        fd.objectives.Shortcut(clip=0.4), lambda p, q: shortcut(p, q, 0.4)
    ),
    "MeanFlow": Equation(fd.objectives.MeanFlow(), mean_flow),
    "improved MeanFlow": Equation(fd.objectives.ImprovedMeanFlow(), improved_mean_flow),
    # The library reports the limit of small alpha, whose gradient is the paper's.
    "AlphaFlow": Equation(fd.objectives.AlphaFlow(), alpha_flow, value=1 / 5e-3),
    "AlphaFlow, share": Equation(
        fd.objectives.AlphaFlow(alpha=0.5),
        lambda p, q: alpha_flow(p, q, 0.5),
        value=1 / 0.5,
    ),
    "TVM": Equation(fd.objectives.TerminalVelocityMatching(), terminal_velocity),
    "AYF-EMD": Equation(
        fd.objectives.AlignYourFlowEMD(), align_eulerian, teacher="velocity"
    ),
    "AYF-EMD, tangent": Equation(
        fd.objectives.AlignYourFlowEMD(tangent_scale=0.4),
        lambda p, q: align_eulerian(p, q, 0.4),
        teacher="velocity",
    ),
    "AYF-LMD": Equation(
        fd.objectives.AlignYourFlowLMD(), align_lagrangian, teacher="velocity"
    ),
    "CT": Equation(fd.objectives.ConsistencyTraining(), consistency_training),
    "CD": Equation(
        fd.objectives.ConsistencyDistillation(),
        consistency_distillation,
        teacher="velocity",
    ),
    "sCT": Equation(
        fd.objectives.ContinuousConsistency(),
        continuous_consistency(lambda: RATE),
        (S, 1.0),
    ),
    "sCD": Equation(
        fd.objectives.ContinuousConsistency(),
        continuous_consistency(lambda: b(S, I(S))),
        (S, 1.0),
        "velocity",
    ),
    "FreeFlow": Equation(fd.objectives.free_flow(), free_flow, (0.0, T), "velocity"),
    "cycle": Equation(fd.objectives.CycleConsistency(), cycle),
    "trajectory matching": Equation(
        fd.TrajectoryMatching(), trajectory_matching, path="trajectory"
    ),
    "roll-out": Equation(
        fd.objectives.RollOutMatching(), lambda p, q: roll_out(p, p), path="roll-out"
    ),
    "roll-out, push-forward": Equation(
        fd.objectives.RollOutMatching(push_forward=True), roll_out, path="roll-out"
    ),
    "roll-out, one jump": Equation(
        fd.objectives.RollOutMatching(1), trajectory_matching, path="roll-out"
    ),
}


@eqx.filter_jit
def value_and_slope(objective, teacher, path, s, t):
    """The loss, and its semigradient along a fixed direction of the weights."""
    loss = lambda flow_map: objective(flow_map, teacher, path, s, t, key=jr.key(0))
    value, grads = eqx.filter_value_and_grad(loss)(MAP)
    pairs = zip(jtu.tree_leaves(grads), DIRECTION, strict=True)
    return value, sum(jnp.sum(g * d) for g, d in pairs)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_papers_equation(name):
    row = EQUATIONS[name]
    path = {
        "interpolant": fd.LinearInterpolant()(jnp.asarray(X0), jnp.asarray(X1)),
        "trajectory": fd.paths.TrajectoryPath(
            jnp.asarray([S, T]), jnp.asarray([X_S, X_T])
        ),
        "roll-out": fd.paths.TrajectoryPath(
            jnp.asarray([S, M, T]), jnp.asarray([X_S, X_M, X_T])
        ),
    }[row.path]
    teach = {None: None, "velocity": teacher}[row.teacher]
    value, along = value_and_slope(
        row.objective, teach, path, *map(jnp.asarray, row.times)
    )
    # A step along the imaginary axis has no rounding error.
    tiny = 1e-30
    moved = tuple(w + 1j * tiny * d for w, d in zip(WEIGHTS, DIRECTION, strict=True))
    expected = row.loss(WEIGHTS, WEIGHTS)
    assert_close(value, row.value * expected, 1e-9, 1e-8)
    slope_along = row.loss(moved, WEIGHTS).imag / tiny
    assert abs(slope_along) > 1e-2
    assert_close(along, slope_along, 1e-9, 1e-8)


def test_every_objective_has_its_equation():
    public = public_objectives()
    assert {type(row.objective).__name__ for row in EQUATIONS.values()} == public


def test_diagonals_are_flow_matching_of_the_end():
    # What self-distillation learns of data, on rows that are known to be diagonal.
    path = fd.LinearInterpolant()(jnp.asarray(X0), jnp.asarray(X1))
    expected = flow_matching(WEIGHTS, WEIGHTS)
    for name in ("LSD", "ESD", "PSD", "Shortcut", "SplitMeanFlow", "MeanFlow", "EE"):
        made = EQUATIONS[name].objective.on_diagonal(MAP, None, path, jnp.asarray(T))
        assert_close(made, expected, 1e-9, 1e-8)


# --- times ----------------------------------------------------------------------------

NUM = 4000
DRAWS = np.random.default_rng(1)


def logit_normal(mean, std, n=NUM):
    return 1 / (1 + np.exp(-(mean + std * DRAWS.standard_normal(n))))


def triangle():
    return np.sort(DRAWS.uniform(size=(NUM, 2)), axis=1).T


def square_of_times():
    return DRAWS.uniform(size=(2, NUM))


def equal():
    t = DRAWS.uniform(size=NUM)
    return t, t


def dyadic():
    level = DRAWS.integers(0, 7, NUM)
    start = DRAWS.integers(0, 2**level)
    return start / 2.0**level, (start + 1) / 2.0**level


def from_the_base():
    return np.zeros(NUM), triangle()[1]


def to_the_data():
    return DRAWS.uniform(size=NUM), np.ones(NUM)


def noise_levels(num_times):
    # Noise sigma on data is time 1 / (1 + sigma); sampling starts without any data.
    roots = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), num_times)
    ts = 1 / (1 + roots**7)
    ts[0], ts[-1] = 0, 1
    i = DRAWS.integers(0, num_times - 1, NUM)
    return ts[i], ts[i + 1]


def align_times():
    # A gap, then the end s below 1 - gap; noise is at time 1.
    gap = logit_normal(-0.6, 1.6)
    s = DRAWS.uniform(size=NUM) * (1 - gap)
    return 1 - (s + gap), 1 - s


def terminal_times():
    gap, s = logit_normal(-0.8, 1.0, 40 * NUM), logit_normal(-0.4, 1.0, 40 * NUM)
    # Given the gap, the end is cut off where there is no room: so no gap is rejected.
    gap, s = gap.reshape(NUM, 40), s.reshape(NUM, 40)
    chosen_gap = gap[:, 0]
    fits = s + chosen_gap[:, None] <= 1
    first = np.argmax(fits, axis=1)
    has_one = fits.any(axis=1)
    s, chosen_gap = s[np.arange(NUM), first][has_one], chosen_gap[has_one]
    return 1 - (s + chosen_gap), 1 - s


def mean_flow_cifar():
    # Noise is at time 1: two draws, the larger one first.
    pair = np.sort([logit_normal(-2, 2), logit_normal(-2, 2)], axis=0)
    return 1 - pair[1], 1 - pair[0]


def sct_noise():
    # The paper's noise level, with n of the data's standard deviation 0.5.
    sigma = np.exp(-1.0 + 1.4 * DRAWS.standard_normal(NUM))
    return 0.5 / (0.5 + sigma), np.ones(NUM)


HALF, THREE_QUARTERS = 0.5, 0.75
# name -> (objective, its share on the diagonal, times off the diagonal)
TIMES = {
    "flow matching": (fd.FlowMatching(), 1.0, equal),
    "velocity distillation": (fd.objectives.VelocityDistillation(), 1.0, equal),
    "LMD": (fd.LagrangianMapDistillation(), 0.0, triangle),
    "EMD": (fd.objectives.EulerianMapDistillation(), 0.0, triangle),
    "EE": (fd.objectives.StopGradientEulerian(), THREE_QUARTERS, triangle),
    "naive Eulerian": (fd.objectives.NaiveEulerian(), THREE_QUARTERS, triangle),
    "FMM": (fd.objectives.FlowMapMatching(), 0.0, square_of_times),
    "PFMM": (fd.objectives.ProgressiveFlowMapMatching(), 0.0, triangle),
    "LSD": (fd.LagrangianSelfDistillation(), THREE_QUARTERS, triangle),
    "ESD": (fd.objectives.EulerianSelfDistillation(), THREE_QUARTERS, triangle),
    "PSD": (fd.objectives.ProgressiveSelfDistillation(), THREE_QUARTERS, triangle),
    "SplitMeanFlow": (fd.objectives.split_mean_flow(), HALF, triangle),
    "Shortcut": (fd.objectives.Shortcut(), HALF, dyadic),
    "MeanFlow": (fd.objectives.MeanFlow(), HALF, triangle),
    "improved MeanFlow": (fd.objectives.ImprovedMeanFlow(), HALF, triangle),
    "AlphaFlow": (fd.objectives.AlphaFlow(), 0.25, triangle),
    "TVM": (fd.objectives.TerminalVelocityMatching(), HALF, triangle),
    "AYF-EMD": (fd.objectives.AlignYourFlowEMD(), 0.0, align_times),
    "AYF-LMD": (fd.objectives.AlignYourFlowLMD(), 0.0, align_times),
    "CT": (fd.objectives.ConsistencyTraining(), 0.0, lambda: noise_levels(151)),
    "CD": (fd.objectives.ConsistencyDistillation(), 0.0, lambda: noise_levels(19)),
    "sCT": (fd.objectives.ContinuousConsistency(), 0.0, to_the_data),
    "FreeFlow": (fd.objectives.free_flow(), 0.0, from_the_base),
    "cycle": (fd.objectives.CycleConsistency(), 0.0, square_of_times),
    "trajectory matching": (fd.TrajectoryMatching(), 0.0, triangle),
    "roll-out": (fd.objectives.RollOutMatching(), 0.0, triangle),
    "recipe cifar10-meanflow": ("cifar10-meanflow", 0.25, mean_flow_cifar),
    "recipe cifar10-sct": ("cifar10-sct", 0.0, sct_noise),
    "recipe cifar10-align-your-flow": ("cifar10-align-your-flow", 0.0, align_times),
}


def distance(x, y):
    """The largest distance of two empirical distribution functions."""
    at = np.sort(np.concatenate([x, y]))
    below = lambda z: np.searchsorted(np.sort(z), at, side="right") / len(z)
    return np.abs(below(x) - below(y)).max()


@pytest.mark.parametrize("name", TIMES)
def test_the_papers_times(name):
    objective, share, draw = TIMES[name]
    if isinstance(objective, str):
        objective = fd.images.recipe(objective).objective
        if isinstance(objective, fd.objectives.Scheduled):
            objective = objective.at(jnp.asarray(20_000))
    size = NUM if share == 0 else round(NUM / (1 - share)) if share < 1 else NUM
    s, t = map(np.asarray, objective.times(jr.key(2), size))
    assert np.mean(s == t) == pytest.approx(share, abs=1e-3)
    off = s != t if share < 1 else s == t
    s, t = s[off], t[off]
    paper_s, paper_t = draw()
    # Four standard errors of a distance of two samples of this size.
    for ours, theirs in ((s, paper_s), (t, paper_t), (t - s, paper_t - paper_s)):
        assert distance(ours, theirs) < 0.05


def test_times_of_terminal_velocity_matching_for_images():
    times = fd.times.LogitNormalGap(-0.8, 1.0, end_mean=0.4, end_std=1.0)
    s, t = map(np.asarray, times(jr.key(2), NUM))
    paper_s, paper_t = terminal_times()
    assert distance(s, paper_s) < 0.05 and distance(t, paper_t) < 0.05


def test_diagonal_of_the_mean_flow_recipe_is_at_the_noisier_time():
    objective = fd.images.recipe("cifar10-meanflow").objective
    s, t = map(np.asarray, objective.times(jr.key(3), 4 * NUM))
    on = s[s == t]
    # The paper keeps t, the larger of two draws, and sets r to it.
    assert distance(on, mean_flow_cifar()[0]) < 0.05


def test_every_objective_has_its_times():
    classes = {type(row.objective) for row in EQUATIONS.values()}
    assert {type(row[0]) for row in TIMES.values()} - {str} == classes


# --- weights of the papers ------------------------------------------------------------


def test_weights_of_the_mean_flow_recipe():
    weight = fd.images.recipe("cifar10-meanflow").objective.weight
    error = jnp.asarray(2.5)
    # Power 0.75, floor 1e-3, of the squared error summed over all entries.
    assert_close(weight(S, T, error), jnp.asarray(2.5 / 2.501**0.75), 1e-12)


@pytest.mark.parametrize("name", ["cifar10-sct", "cifar10-align-your-flow"])
def test_tangents_of_the_recipes_are_normalised(name):
    objective = fd.images.recipe(name).objective.at(jnp.asarray(0))
    # |g|^2 becomes |g|^2 / (|g| + 0.1).
    assert_close(objective.weight(S, T, jnp.asarray(4.0)), jnp.asarray(4 / 2.1), 1e-12)


def test_consistency_training_weighs_as_the_paper_over_all_levels():
    # Of one error, the loss at a pair of levels is that over their difference.
    objective = fd.objectives.ConsistencyTraining()
    sigma = 80 * 0.002 ** (np.arange(40) / 39)
    ts = jnp.asarray(1 / (1 + sigma))
    one = jnp.asarray(1.0)
    made = jax.vmap(lambda s, t: objective.weight(s, t, one))(ts[:-1], ts[1:])
    np.testing.assert_allclose(made * (sigma[:-1] - sigma[1:]), 1.0, rtol=1e-9)
    # At time 0, where sampling starts, it is that of the largest level.
    first = objective.weight(jnp.asarray(0.0), ts[1], one)
    np.testing.assert_allclose(first * (80 - sigma[1]), 1.0, rtol=1e-9)
