"""Evaluations of the vector field by `HybridSolver`, and by Tsit5 and Dopri8.

    python benchmarks/evaluations.py            # ten minutes on one core

The ODE is a FitzHugh-Nagumo neuron to T = 40, from six starts. The map is exact but for
`size * sin(k h + 3 x) (1 - exp(-h))` after a jump of length h, or useless: the identity,
and `x + h sin(x)`. The classical solvers run at tolerances from 1e-2 to 1e-9; between
these, evaluations at the error of the hybrid are interpolated in logarithms. Errors are
medians over the starts of the largest entry, against Dopri8 at 1e-11, in float64.

Evaluations are counted as they are made, one for each state. A Jacobian counts as one for
each entry, and its value as another. What does not wait for each other is one call; the
number of calls is the depth of a solve.

A second table has pulses: a stimulus of 2 units, at 37 onsets, that the exact map of the
neuron without a stimulus does not know. A third one has the time of tracing and compiling
a solve. A figure shows one solve, with the predictions and what they are corrected to.
"""

import argparse
import json
import pathlib
import time

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import flowdiffrax as fd

T1 = 40.0
TOLERANCES = [10.0**-k for k in range(2, 10)]
counts = {"evaluations": 0, "calls": 0}


def neuron(x, stimulus=0.5):
    v, w = x
    return jnp.stack([v - v**3 / 3 - w + stimulus, 0.08 * (v + 0.7 - 0.8 * w)])


def _count(x):
    counts["evaluations"] += int(np.prod(x.shape[:-1]))
    counts["calls"] += 1
    return x


def counted(x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(_count, like, x, vmap_method="broadcast_all")


@jax.custom_jvp
def counted_neuron(x):
    return neuron(counted(x))


@counted_neuron.defjvp
def _(primals, tangents):
    value, slope = jax.jvp(neuron, (counted(*primals),), (counted(*tangents),))
    return value, slope


def solve(field, solver, tol, x, dt0=None, t1=T1, args=None, **controller):
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    pid = diffrax.PIDController(rtol=tol, atol=tol, **controller)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        t1,
        dt0,
        x,
        args,
        saveat=saveat,
        stepsize_controller=pid,
        max_steps=4096,
    )


def exact(h, x):
    field = lambda t, x, args: neuron(x)
    return solve(field, diffrax.Dopri8(), 1e-11, x, t1=h).ys[0]


def disturbed(size, k):
    def flow_map(s, t, x, args):
        h = t - s
        return exact(h, x) + size * jnp.sin(k * h + 3 * x) * -jnp.expm1(-h)

    return flow_map


def measure(solver, tol, starts, truth, dt0):
    run = jax.jit(
        lambda x: solve(lambda t, x, args: counted_neuron(x), solver, tol, x, dt0)
    )
    row = {"evaluations": [], "calls": [], "error": [], "jumps": [], "steps": []}
    for x, end in zip(starts, truth, strict=True):
        jax.block_until_ready(run(x))
        counts.update(evaluations=0, calls=0)
        sol = jax.block_until_ready(run(x))
        for name, count in counts.items():
            row[name].append(count)
        row["error"].append(float(jnp.max(jnp.abs(sol.ys[0] - end))))
        row["steps"].append(int(sol.stats["num_steps"]))
        row["jumps"].append(int(getattr(sol.solver_state, "num_learned", 0)))
    worst = max(row["error"])
    return {name: float(np.median(values)) for name, values in row.items()} | {
        "worst": worst
    }


def at_error(rows, error, what):
    """Interpolates a number of a classical solver at an error, in logarithms."""
    rows = sorted(rows, key=lambda row: row["error"])
    errors, values = ([np.log(row[k]) for row in rows] for k in ("error", what))
    return float(np.exp(np.interp(np.log(error), errors, values)))


def smooth_map(options):
    starts = 1.2 * jr.normal(jr.key(options.seed), (6, 2))
    truth = jax.vmap(lambda x: exact(T1, x))(starts)
    classical = {}
    for solver in (diffrax.Tsit5(), diffrax.Dopri8()):
        rows = [measure(solver, tol, starts, truth, None) for tol in TOLERANCES]
        classical[type(solver).__name__] = rows
        for tol, row in zip(TOLERANCES, rows, strict=True):
            print(f"{type(solver).__name__} {tol:.0e}: {row}", flush=True)
    heads = "map", "tolerance", "error: median", "worst", "evaluations", "calls"
    heads += "jumps", "Tsit5, as exact", "Dopri8", "calls of Tsit5"
    print("\n| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    maps = {"identity": lambda tol: lambda s, t, x, args: x}
    maps["x + h sin(x)"] = lambda tol: lambda s, t, x, args: x + (t - s) * jnp.sin(x)
    for share in (0.1, 1.0, 10.0):
        for k in (1, 10):
            name = f"off by {share:g} tolerances, k = {k}"
            maps[name] = lambda tol, share=share, k=k: disturbed(share * tol, k)
    found = {"classical": classical}
    for tol in (1e-3, 1e-6):
        for name, make in maps.items():
            row = measure(fd.HybridSolver(make(tol)), tol, starts, truth, 2 * T1)
            names = (
                ("Tsit5", "evaluations"),
                ("Dopri8", "evaluations"),
                ("Tsit5", "calls"),
            )
            peers = [
                at_error(classical[peer], row["error"], what) for peer, what in names
            ]
            found[f"{name}, {tol:.0e}"] = row | {"peers": peers}
            cells = [name, f"{tol:.0e}", f"{row['error']:.1e}", f"{row['worst']:.1e}"]
            cells += [f"{row['evaluations']:.0f}", f"{row['calls']:.0f}"]
            cells += [f"{row['jumps']:.0f}", *(f"{peer:.0f}" for peer in peers)]
            print("| " + " | ".join(cells) + " |", flush=True)
    return found


def pulses():
    tol, onsets = 1e-3, jnp.linspace(1.0, 37.0, 37)
    start = jnp.asarray([-1.0, 1.0])
    flow_map = lambda s, t, x, args: exact(t - s, x)

    def field(t, x, onset):
        is_on = (t >= onset) & (t < onset + 2)
        return neuron(x, jnp.where(is_on, 1.5, 0.5))

    def run(solver, onset, dt0, dtmax=None, clip=False):
        pid = diffrax.PIDController(rtol=tol, atol=tol, dtmax=dtmax)
        if clip:
            ends = jnp.stack([onset, onset + 2])
            pid = diffrax.ClipStepSizeController(pid, jump_ts=ends)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            T1,
            dt0,
            start,
            onset,
            stepsize_controller=pid,
            max_steps=16384,
        ).ys[0]

    fine = jax.vmap(lambda onset: run(diffrax.Tsit5(), onset, 1e-3, dtmax=0.02))(onsets)
    print("\n| steps | HybridSolver: above 100 tolerances | Tsit5 |\n| --- | --- | --- |")
    found = {}
    cases = {"adaptive": {}, "dtmax=2": {"dtmax": 2.0}, "jump_ts": {"clip": True}}
    for name, given in cases.items():
        shares = []
        for solver, dt0 in ((fd.HybridSolver(flow_map), 2 * T1), (diffrax.Tsit5(), None)):
            each = jax.jit(
                jax.vmap(lambda o, s=solver, d=dt0, g=given: run(s, o, d, **g))
            )
            error = jnp.max(jnp.abs(each(onsets) - fine), axis=1)
            shares.append(float(jnp.mean(error > 100 * tol)))
        found[name] = shares
        print(f"| {name} | {shares[0]:.0%} | {shares[1]:.0%} |", flush=True)
    return found


def draw(path):
    """A map that is off by ten tolerances, and what the vector field makes of it."""
    tol, x = 1e-3, jnp.asarray([-1.0, 1.0])
    flow_map = disturbed(10 * tol, 3)
    field = lambda t, x, args: neuron(x)
    saveat = diffrax.SaveAt(steps=True, dense=True, solver_state=True)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        fd.HybridSolver(flow_map),
        0.0,
        T1,
        2 * T1,
        x,
        saveat=saveat,
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        max_steps=64,
    )
    ends = sol.ts[jnp.isfinite(sol.ts)]
    starts = jnp.concatenate([jnp.zeros(1), ends[:-1]])
    states = jnp.concatenate([x[None], sol.ys[: len(ends) - 1]])
    ts = jnp.linspace(0.0, T1, 801)[1:]
    index = jnp.searchsorted(ends, ts)
    truth = jax.vmap(lambda t: exact(t, x))(ts)
    made = jax.vmap(sol.evaluate)(ts)
    jump = jax.vmap(lambda k, t: flow_map(starts[k], t, states[k], None))(index, ts)
    _, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    axes[0].plot(ts, truth[:, 0], color="0.8", lw=6, label="exact")
    axes[0].plot(ts, jump[:, 0], color="tab:orange", lw=1, label="predicted by the map")
    axes[0].plot(ts, made[:, 0], color="tab:blue", lw=1.5, label="corrected")
    axes[0].set(ylabel="v")
    for us, colour in ((jump, "tab:orange"), (made, "tab:blue")):
        error = jnp.max(jnp.abs(us - truth), axis=1)
        axes[1].semilogy(ts, error, color=colour, lw=1)
    axes[1].axhline(tol, color="k", lw=0.8, ls=":", label="tolerance")
    axes[1].set(xlabel="time", ylabel="largest error", ylim=(1e-8, 1))
    for axis in axes:
        for end in starts[1:]:
            axis.axvline(end, color="0.6", lw=0.8)
        axis.legend(loc="upper right")
    plt.savefig(path, dpi=110)
    print(f"{int(sol.solver_state.num_learned)} jumps, in {path}")


def compilation():
    flow_map = fd.FlowMap(fd.nn.MLP(2, 64, 3, key=jr.key(0)))
    x = jnp.zeros(2)
    field = lambda t, x, args: neuron(x)
    found = {}
    for solver in (diffrax.Tsit5(), fd.HybridSolver(flow_map)) * 2:
        run = jax.jit(lambda x, s=solver: solve(field, s, 1e-3, x, 0.1).ys)
        begin = time.perf_counter()
        lowered = run.lower(x)
        traced = time.perf_counter()
        lowered.compile()
        done = time.perf_counter()
        # The second round, in which all that JAX and Diffrax keep has been made.
        found[type(solver).__name__] = traced - begin, done - traced
    print("\n| solver | seconds to trace | to compile |\n| --- | --- | --- |")
    for name, (tracing, compiling) in found.items():
        print(f"| {name} | {tracing:.2f} | {compiling:.2f} |", flush=True)
    return found


def main(options):
    jax.config.update("jax_enable_x64", True)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "predict_and_correct.png")
    found = {"compilation": compilation(), "pulses": pulses()}
    found["smooth"] = smooth_map(options)
    (options.out / "evaluations.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="out/evaluations")
    main(parser.parse_args())
