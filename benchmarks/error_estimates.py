"""The calibration of error estimates, on learned maps and new initial conditions.

    python benchmarks/error_estimates.py                       # ten minutes
    python benchmarks/error_estimates.py --problems pendulum

For each problem of `examples/`, the map is learned as in the example, and makes jumps of
several lengths from new initial conditions. For each estimate, the script prints the rank
correlation with the true error over those jumps, its coverage (the share of jumps whose
error is no more than the estimate), the median and the 5 % and 95 % quantiles of estimate
over error, and its cost. Errors are lengths in standard deviations of the states, against
a tight solution. The table and the figure are saved under `--out`.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator
from work_precision import PROBLEMS, as_vectors, command_line, exact, initial, load

import flowdiffrax as fd

# Name; function of map, field, times, state and args; evaluations of map and field.
ESTIMATES = {
    "semigroup defect": (lambda *jump: fd.estimates.SemigroupDefect()(*jump)[1], "3, 0"),
    "Lagrangian defect": (
        lambda *jump: fd.estimates.LagrangianDefect()(*jump)[1],
        "2, 1",
    ),
    "Picard defect, 8 nodes": (
        lambda *jump: fd.estimates.PicardDefect(8)(*jump)[1],
        "9, 10",
    ),
    "Alekseev-Gröbner, 8 nodes": (
        lambda *jump: fd.estimates.AlekseevGroebner(8)(*jump)[1],
        "25, 10",
    ),
    "linearised error, 8 nodes": (
        lambda *jump: fd.estimates.LinearisedError(8)(*jump)[1],
        "9, 10 + 16d",
    ),
    "linearised error, 16 nodes": (
        lambda *jump: fd.estimates.LinearisedError(16)(*jump)[1],
        "17, 18 + 32d",
    ),
    "linearised error, 24 graded nodes": (
        lambda *jump: fd.estimates.LinearisedError(24, is_graded=True)(*jump)[1],
        "26, 28 + 48d",
    ),
}


def length(x, spread):
    """The length of a difference of states, in standard deviations."""
    vector = jnp.concatenate([leaf.ravel() for leaf in jax.tree_util.tree_leaves(x)])
    return jnp.linalg.norm(vector / jnp.asarray(spread, vector.dtype))


def run_one(name, options, learn):
    """Pairs of true and estimated errors for one problem, by estimate."""
    example, setting = load(name), PROBLEMS[name]
    flow_map = learn(example)
    span = example.T1 - example.T0
    pairs = {}
    for part, share in enumerate((0.1, 0.3, 1.0)):
        x0, args = initial(example, jr.key(100 + part), options.size)
        t1 = example.T0 + share * span
        truth = exact(example, setting, x0, args, t1)
        spread = truth.std(axis=0)
        jump = eqx.filter_jit(
            jax.vmap(lambda x, args, t1=t1: flow_map(example.T0, t1, x, args))
        )
        errors = np.linalg.norm((as_vectors(jump(x0, args)) - truth) / spread, axis=1)
        for label, (estimate, _) in ESTIMATES.items():

            def estimated(x, args, estimate=estimate, t1=t1, spread=spread):
                field = example.vector_field
                error = estimate(flow_map, field, example.T0, t1, x, args)
                return length(error, spread)

            found = eqx.filter_jit(jax.vmap(estimated))(x0, args)
            pairs.setdefault(label, []).append(
                [errors.tolist(), np.asarray(found).tolist()]
            )
    return pairs


def ranks(x):
    order = np.empty(len(x))
    order[np.argsort(x)] = np.arange(len(x))
    return order


def report(name, pairs):
    """A line for each estimate, over jumps of all lengths."""
    lines = [
        f"\n{name}\n",
        "| estimate | rank correlation, by length | coverage | estimate / error: 5 % "
        "| median | 95 % | evaluations of map, field |",
        "| --- " * 7 + "|",
    ]
    for label, groups in pairs.items():
        correlation = [
            np.corrcoef(ranks(np.asarray(e)), ranks(np.asarray(f)))[0, 1]
            for e, f in groups
        ]
        errors, found = (np.concatenate([g[k] for g in groups]) for k in (0, 1))
        low, middle, high = np.quantile(found / errors, (0.05, 0.5, 0.95))
        cells = [label, ", ".join(f"{c:.2f}" for c in correlation)]
        cells += [f"{np.mean(found >= errors):.0%}", f"{low:.2f}", f"{middle:.2f}"]
        cells += [f"{high:.2f}", ESTIMATES[label][1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results, path):
    """Plots estimate against error: a row per estimate, a column per problem.

    The figure is as wide as the column of text on its page.
    """
    figure, axes = plt.subplots(
        len(ESTIMATES), len(results), figsize=(1.45 * len(results), 1.3 * len(ESTIMATES)),
        sharex="col", squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, (name, pairs) in zip(axes.T, results.items(), strict=True):
        column[0].set_title(name, fontsize=8)
        column[-1].set_xlabel("true error", fontsize=7)
        for axis, groups in zip(column, pairs.values(), strict=True):
            for errors, found in groups:
                axis.loglog(errors, found, ".", markersize=1, alpha=0.4, rasterized=True)
            ends = np.quantile(np.concatenate([g[0] for g in groups]), (0.001, 1))
            axis.loglog(ends, ends, "k-", linewidth=0.8)
            axis.tick_params(labelsize=6, pad=1)
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(LogLocator(numticks=4))
                side.set_minor_locator(NullLocator())
    for axis, label in zip(axes[:, 0], ESTIMATES, strict=True):
        axis.set_ylabel(label.replace(", ", ",\n"), fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=500, help="jumps of each length")
    command_line(parser, run_one, report, draw)
