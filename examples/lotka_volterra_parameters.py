r"""Fitting parameters through a learned flow map: predators and prey.

A network learns the flow map of $\dot u = \alpha - \beta e^v$, $\dot v = \delta e^u -
\gamma$, the Lotka-Volterra equations for the logarithms of the populations, for a range
of parameters, which are its `args`. Then parameters are fitted to noisy data, for many
data sets at once: through the map, in one jump to each observation time, and through
Tsit5.

    python examples/lotka_volterra_parameters.py

prints evaluations of the network or the vector field, the seconds for all data sets
and quantiles of the relative errors. It saves a figure and the map under `--out`. Both
ways find the same parameters. This vector field costs almost nothing, so Tsit5 is faster.
"""

import argparse
import functools
import pathlib
import time

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import flowdiffrax as fd

T0, T1 = 0.0, 8.0
LOW, HIGH = 0.5, 1.5  # of alpha, beta, gamma and delta
OBSERVED, NOISE = np.arange(1.0, 9.0), 0.05


def vector_field(t, x, args):
    alpha, beta, gamma, delta = args
    return jnp.stack([alpha - beta * jnp.exp(x[1]), delta * jnp.exp(x[0]) - gamma])


def draw(key, n):
    """Logarithms of populations between one half and two, and parameters."""
    state_key, args_key = jr.split(key)
    x0 = jr.uniform(state_key, (n, 2), minval=-np.log(2), maxval=np.log(2))
    return x0, jr.uniform(args_key, (n, 4), minval=LOW, maxval=HIGH)


def learn(num_steps=20_000, seed=0, pool=32_768):
    """A learned solver, from the equations and the parameters of interest."""
    x0, args = draw(jr.key(seed), 5 * pool // 4)  # a fifth is held out
    how = {"args_per_example": True, "num_steps": num_steps, "pool_size": pool}
    return fd.learn_solver(vector_field, x0, T0, T1, args, minutes=5, **how)


def by_map(flow_map, x0, args):
    """States at the observation times, in one jump to each, and the evaluations."""
    jumps = jax.vmap(flow_map, in_axes=(None, 0, None, None))
    return jumps(T0, OBSERVED, x0, args), OBSERVED.size


def by_tsit5(tol, x0, args):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), diffrax.Tsit5(), T0, T1, 0.1, x0, args,
        # In a longer trial step the exponential may overflow.
        stepsize_controller=diffrax.PIDController(tol, tol, dtmax=0.5),
        saveat=diffrax.SaveAt(ts=OBSERVED), adjoint=diffrax.ForwardMode(), max_steps=256,
    )  # fmt: skip
    return solution.ys, 6 * solution.stats["num_steps"]


def fit(predict, x0, data, num_iterations=20):
    """The parameters, by the method of Levenberg and Marquardt."""
    # Stay in the range of training, with a prior that is roughly uniform there.
    to_args = lambda z: LOW + (HIGH - LOW) * jax.nn.sigmoid(z)
    misfit = lambda z: (predict(x0, to_args(z))[0] - data) / NOISE
    residual = lambda z: jnp.append(misfit(z), z / 1.8)

    def step(z, _):
        r, jacobian = residual(z), jax.jacfwd(residual)(z)
        damped = jacobian.T @ jacobian + 0.01 * (r @ r) * jnp.eye(4)
        return z - jnp.linalg.solve(damped, jacobian.T @ r), None

    return to_args(jax.lax.scan(step, jnp.zeros(4), length=num_iterations)[0])


def draw_figure(path, flow_map, x0, args, data, found):
    """Plots one fit, and the errors of all parameters."""
    _, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ts = jnp.linspace(T0, T1, 200)
    truth = fd.solve_trajectories(vector_field, x0[:1], ts, args[0])[0]
    fitted = jax.vmap(lambda t: flow_map(T0, t, x0[0], found["flow map"][0]))(ts)
    for i, name in enumerate(("prey", "predators")):
        axes[0].plot(ts, jnp.exp(truth[:, i]), f"C{i}", alpha=0.4, lw=4, label=name)
        axes[0].plot(ts, jnp.exp(fitted[:, i]), f"C{i}", lw=1)
        axes[0].plot(OBSERVED, jnp.exp(data[0, :, i]), f"C{i}o")
    for (name, fits), width in zip(found.items(), (4, 2, 1), strict=True):
        axes[1].ecdf(jnp.abs(fits / args - 1).ravel(), label=name, lw=width)
    axes[0].set(xlabel="time", title="truth (wide), data, and fit by the map (thin)")
    axes[1].set(xscale="log", xlabel="relative error", title="share of parameters")
    axes[1].legend()
    plt.savefig(path, dpi=110)


def main(*, steps=20_000, pool=32_768, num_samples=256, out="out/lotka_volterra"):
    """Learns the map, fits, prints the table and draws the figure."""
    out, keys, rows, found = pathlib.Path(out), jr.split(jr.key(1)), [], {}
    learned = learn(num_steps=steps, pool=pool)
    print(learned.report(out / "report.png"))
    learned.save(out / "map.safetensors")
    flow_map = learned.flow_map
    x0, args = draw(keys[0], num_samples)
    ts = jnp.append(T0, OBSERVED)
    data = fd.solve_trajectories(vector_field, x0, ts, args, args_per_example=True)[:, 1:]
    data += NOISE * jr.normal(keys[1], data.shape)
    for name, predict in (
        ("flow map", functools.partial(by_map, flow_map)),
        ("Tsit5 to 1e-3", functools.partial(by_tsit5, 1e-3)),
        ("Tsit5 to 1e-5", functools.partial(by_tsit5, 1e-5)),
    ):
        cost = float(jnp.mean(jax.vmap(predict)(x0, args)[1]))
        fit_all = jax.jit(jax.vmap(functools.partial(fit, predict)))
        compiled, begin = fit_all.lower(x0, data).compile(), time.perf_counter()
        found[name] = jax.block_until_ready(compiled(x0, data))
        seconds = time.perf_counter() - begin
        row = {"fitted by": name, "evaluations a solution": cost, "seconds": seconds}
        error = np.quantile(jnp.abs(found[name] / args - 1), (0.5, 0.9, 0.99))
        error = ", ".join(f"{e:.3f}" for e in error)
        rows.append(row | {"error: 50 %, 90 %, 99 %": error})
    form = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    print("\n".join("| " + " | ".join(map(form, line)) + " |" for line in lines))
    draw_figure(out / "lotka_volterra.png", flow_map, x0, args, data, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in main.__kwdefaults__.items():
        name = "--" + name.replace("_", "-")
        parser.add_argument(name, type=type(default), default=default)
    main(**vars(parser.parse_args()))
