r"""A driven, damped pendulum: a learned flow map against Tsit5, at equal error.

A network learns the flow map of $\ddot\theta = -\sin\theta - c\,\dot\theta + A\cos\omega
t$ between all times in one period of the drive. Its longest jump is the Poincaré map.

    python examples/pendulum.py

prints errors against a tight solve, evaluations (of the network or the vector field) and
seconds for the batch, and saves a figure and the map under `--out`. The vector field
costs almost nothing: one jump saves 99 % of the evaluations, and far less of the time.
"""

import argparse
import pathlib
import time

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import flowdiffrax as fd

T0, T1 = 0.0, 3 * np.pi  # one period of the drive


def vector_field(t, x, args=None):
    force = 0.4 * jnp.cos(2 / 3 * t) - jnp.sin(x[0]) - 0.2 * x[1]
    return jnp.stack([x[1], force])


def draw(key, n):
    """A batch of initial angles and rates."""
    return jr.uniform(key, (n, 2), minval=-1, maxval=1) * jnp.array([1.5, 1.0])


def learn(num_steps=20_000, seed=0, pool=32_768):
    """A learned solver, from the equations and the initial states of interest."""
    one = lambda key: draw(key, 1)[0]
    how = {"num_steps": num_steps, "pool_size": pool, "key": jr.key(seed)}
    return fd.learn_solver(vector_field, one, T0, T1, minutes=5, **how)


def evaluate(solver, controller, x0, truth):
    """Work, errors, and the seconds of the fastest of nine runs."""
    hybrid = isinstance(solver, fd.HybridSolver)
    # A hybrid tries the whole interval first.
    dt0 = (2 if hybrid else 0.05) * (T1 - T0)
    dt0 = None if isinstance(controller, diffrax.StepTo) else dt0
    solve = lambda x: diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), solver, T0, T1, dt0, x,
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t1=True, solver_state=hybrid),
    )  # fmt: skip
    compiled, seconds = jax.jit(jax.vmap(solve)).lower(x0).compile(), []
    for _ in range(9):
        begin = time.perf_counter()
        solution = jax.block_until_ready(compiled(x0))
        seconds.append(time.perf_counter() - begin)
    steps = float(solution.stats["num_steps"].mean())
    cost = {"Heun": 2, "Tsit5": 6, "Dopri8": 13}.get(type(solver).__name__, 1)
    row = {"steps": f"{steps:.1f}", "evaluations": cost * steps}
    if state := solution.solver_state:
        learned, classical = state.num_learned.mean(), state.num_classical.mean()
        row = {"steps": f"{learned:.2f} learned, {classical:.1f} Tsit5", "evaluations": 0}
    error = np.linalg.norm(solution.ys[:, 0] - truth, axis=1)
    row |= {"rms error": float((error**2).mean() ** 0.5), "max error": float(error.max())}
    return row | {"seconds": min(seconds)}


def draw_figure(path, flow_map, rows, x0):
    """Plots work against precision, and the map between the ends of a single jump."""
    _, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, work in zip(axes, ("evaluations", "seconds"), strict=False):
        plain = [r for r in rows if r["evaluations"] and "faster" not in r["method"]]
        curves = {}
        for row in plain:
            curves.setdefault(row["method"], []).append((row[work], row["rms error"]))
        fd.plot.work_precision(axis, curves, xlabel=work, ylabel="rms error")
    ts = jnp.linspace(T0, T1, 200)
    for x, ys in zip(x0, fd.solve_trajectories(vector_field, x0, ts), strict=True):
        jump = jnp.array([T0, T1]), jnp.stack([x, flow_map(T0, T1, x)])
        between = fd.solvers.FlowMapInterpolation(*jump, flow_map).evaluate(ts)
        axes[2].plot(*ys.T, "C0", alpha=0.4, linewidth=4)
        axes[2].plot(*between.T, "C3", linewidth=1)
        axes[2].plot(*x, "k.")
    axes[2].set(xlabel="angle", ylabel="rate", title="Tsit5 (blue), one jump (red)")
    plt.savefig(path, dpi=110)


def main(*, steps=20_000, pool=32_768, num_samples=4096, settings=9, out="out/pendulum"):
    """Learns, compares and draws, with at most `settings` settings of each method."""
    out, x0, rows = pathlib.Path(out), draw(jr.key(1), num_samples), []
    learned = learn(num_steps=steps, pool=pool)
    print(learned.report(out / "report.png"))
    learned.save(out / "map.safetensors")
    flow_map = learned.flow_map
    even = lambda *ns: {n: diffrax.StepTo(jnp.linspace(T0, T1, n + 1)) for n in ns}
    to = lambda *tols: {tol: diffrax.PIDController(tol, tol) for tol in tols}
    jump, hybrid = fd.FlowMapSolver(flow_map), fd.HybridSolver(flow_map)
    for name, solver, controllers in (
        ("flow map", jump, even(1, 2, 4, 8, 16)),
        ("Tsit5", diffrax.Tsit5(), to(1e-3, 1e-4, 1e-5)),
        ("Tsit5, equal steps", diffrax.Tsit5(), even(8, 12, 16)),
        ("Heun", diffrax.Heun(), even(32, 256)),
        ("HybridSolver", hybrid, to(1e-2, 1e-3)),
        # Starts outside the training data: many pendulums go over the top.
        ("flow map, faster starts", jump, even(1)),
        ("Tsit5, faster starts", diffrax.Tsit5(), to(1e-3)),
        ("HybridSolver, faster starts", hybrid, to(1e-3)),
    ):
        x = x0 + jnp.array([0.0, 2.0]) if "faster" in name else x0
        ends = jnp.array([T0, T1])
        truth = fd.solve_trajectories(vector_field, x, ends, rtol=1e-7, atol=1e-7)[:, 1]
        for setting in [*controllers][:settings]:
            row = {"method": name, "jumps or tolerance": setting}
            rows.append(row | evaluate(solver, controllers[setting], x, truth))
    form = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    print("\n".join("| " + " | ".join(map(form, line)) + " |" for line in lines))
    draw_figure(out / "pendulum.png", flow_map, rows, x0[:8])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in main.__kwdefaults__.items():
        name = "--" + name.replace("_", "-")
        parser.add_argument(name, type=type(default), default=default)
    main(**vars(parser.parse_args()))
