"""Seeded mistakes: each is a change of one line, and some test must notice it."""

import jax.random as jr
import pytest
import test_fixed_points
import test_limits
import test_objectives
from mutate import assert_noticed

import flowdiffrax as fd
from flowdiffrax import testing

OBJECTIVE = "flowdiffrax.objectives._"

# what went wrong, the module, the line, the mistaken line, the test that notices
MUTANTS = [
    (
        "s and t swapped",
        "flowdiffrax.identities",
        "start = lambda s, x: flow_map(s, t, x, args)",
        "start = lambda s, x: flow_map(t, s, x, args)",
        test_limits.test_mean_flow_on_the_papers_clock,
    ),
    (
        "t - s dropped",
        OBJECTIVE + "eulerian",
        "add_scaled(w, r * (t - s), dv)",
        "add_scaled(w, r, dv)",
        test_limits.test_mean_flow_on_the_papers_clock,
    ),
    (
        "a sign flipped",
        OBJECTIVE + "eulerian",
        "add_scaled(w, r * (t - s), dv)",
        "add_scaled(w, r * (s - t), dv)",
        test_limits.test_mean_flow_on_the_papers_clock,
    ),
    (
        "a sign flipped in improved mean flow",
        OBJECTIVE + "mean_flow",
        "v_ss = add_scaled(v_st, s - t, dv)",
        "v_ss = add_scaled(v_st, t - s, dv)",
        test_limits.test_improved_mean_flow_on_the_papers_clock,
    ),
    (
        "the target of mean flow not held fixed",
        OBJECTIVE + "eulerian",
        "subtract(freeze(add_scaled(w, r * (t - s), dv)), v_st)",
        "subtract(add_scaled(w, r * (t - s), dv), v_st)",
        test_limits.test_improved_mean_flow_along_the_data_is_mean_flow,
    ),
    (
        "the transport not held fixed",
        OBJECTIVE + "eulerian",
        "_, transported = jvp(lambda x: freeze(flow_map)(s, t, x, args), (x,), (w,))\n"
        "        return jtu.tree_map(jnp.add, dX_ds, freeze(transported))",
        "_, transported = jvp(lambda x: flow_map(s, t, x, args), (x,), (w,))\n"
        "        return jtu.tree_map(jnp.add, dX_ds, transported)",
        test_limits.test_transport_is_held_fixed,
    ),
    (
        "the Lagrangian teacher not held fixed",
        OBJECTIVE + "lagrangian",
        "freeze(teacher(t, freeze(x), args))",
        "teacher(t, x, args)",
        lambda: test_limits.test_own_weights_teach_as_a_copy_does("lsd"),
    ),
    (
        "the progressive target not held fixed",
        OBJECTIVE + "progressive",
        "is_frozen = self.stop_gradient is StopGradient.TEACHER",
        "is_frozen = False",
        lambda: test_limits.test_own_weights_teach_as_a_copy_does("psd"),
    ),
    (
        "the consistency target not held fixed",
        OBJECTIVE + "consistency",
        "subtract(X_s1, freeze(target))",
        "subtract(X_s1, target)",
        test_limits.test_consistency_training_goes_to_its_continuous_form,
    ),
    (
        "v_tt for v_ss",
        OBJECTIVE + "eulerian",
        "w = self.direction(flow_map, teacher, path, s, I_s, args)",
        "w = self.direction(flow_map, teacher, path, t, I_s, args)",
        test_limits.test_eulerian_self_distillation_by_finite_differences,
    ),
    (
        "v_ss for v_tt",
        "flowdiffrax.identities",
        "b_t = check_like(teacher(t, X_st, args)",
        "b_t = check_like(teacher(s, X_st, args)",
        test_objectives.test_lagrangian_by_finite_differences,
    ),
    (
        "the teacher at the start of the jump",
        "flowdiffrax.identities",
        "b_t = check_like(teacher(t, X_st, args)",
        "b_t = check_like(teacher(t, x, args)",
        test_objectives.test_lagrangian_by_finite_differences,
    ),
    (
        "shares of the pieces swapped",
        "flowdiffrax.identities",
        "add_scaled(scale(share, v_su), 1 - share, v_ut)",
        "add_scaled(scale(1 - share, v_su), share, v_ut)",
        lambda: test_limits.test_progressive_goes_to_the_equations("start"),
    ),
    (
        "the second piece from the start",
        "flowdiffrax.identities",
        "second(u, t, add_scaled(x, u - s, v_su))",
        "second(u, t, x)",
        lambda: test_limits.test_progressive_goes_to_the_equations("end"),
    ),
    (
        "pulled back by the forward map",
        OBJECTIVE + "flow_matching",
        "y = flow_map(t, s, I_t, args)",
        "y = flow_map(s, t, I_t, args)",
        test_limits.test_flow_map_matching_by_finite_differences,
    ),
    (
        "the inner map held fixed",
        OBJECTIVE + "flow_matching",
        "y = flow_map(t, s, I_t, args)",
        "y = jax.lax.stop_gradient(flow_map(t, s, I_t, args))",
        test_limits.test_flow_map_matching_holds_nothing_fixed,
    ),
    (
        "a biased loss taken for an unbiased one",
        OBJECTIVE + "eulerian",
        "if stop_gradient in (StopGradient.NONE, StopGradient.TEACHER):",
        "if stop_gradient is not StopGradient.DERIVATIVE:",
        lambda: test_fixed_points.test_jumps_to_the_end_are_unbiased("ee", 1.0),
    ),
    (
        "a tangent that is not divided by its step",
        OBJECTIVE + "two_piece",
        "scale(1 / share, subtract(v_st, target))",
        "subtract(v_st, target)",
        test_limits.test_alpha_flow_goes_to_mean_flow,
    ),
    (
        "an adaptive weight that is not held fixed",
        "flowdiffrax.weights._norms",
        "squared_error / lax.stop_gradient(squared_error + self.floor) ** self.power",
        "squared_error / (squared_error + self.floor) ** self.power",
        test_objectives.test_power_weight_is_held_fixed,
    ),
    (
        "one key for all objectives",
        OBJECTIVE + "mixture",
        "jr.fold_in(key, index)",
        "jr.clone(key)",
        test_objectives.test_mixture_draws_other_times_for_each,
    ),
    (
        "one key for both times",
        "flowdiffrax.times._base",
        "first_key, second_key = jr.split(key)",
        "first_key, second_key = key, jr.clone(key)",
        lambda: testing.assert_independent(
            lambda key: fd.times.UniformSquare()(key, 1), jr.key(5)
        ),
    ),
]


# Each compiles everything anew; a few of them for every day.
DAILY = 3


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(
            mutant, id=mutant[0], marks=pytest.mark.slow if index >= DAILY else ()
        )
        for index, mutant in enumerate(MUTANTS)
    ],
)
def test_noticed(mutant, monkeypatch):
    _, name, line, mistake, notices = mutant
    assert_noticed(monkeypatch, name, line, mistake, notices)


def test_clones_are_allowed_to_be_reused():
    # Some mutants reuse a key behind the back of JAX's own check.
    key = jr.key(0)
    assert jr.uniform(jr.clone(key)) == jr.uniform(key)
