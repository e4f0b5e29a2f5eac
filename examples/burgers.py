r"""Viscous Burgers: one map for all steps and viscosities, against classical solvers.

The flow map of $u_t = -u u_x + \nu u_{xx}$ is exact diffusion plus a Fourier neural
operator that learns from trajectories by Diffrax. Its `args` are $\log(\nu/0.01)$.

    python examples/burgers.py

prints normalised errors at time 1 on new initial states and viscosities, and seconds for
batches of 1 and 64, by number of jumps; then those of Tsit5 and of a spectral integrator
that are as accurate. It saves a figure and the map, in about six minutes on one core.
"""

import argparse
import functools
import timeit

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import flowdiffrax as fd

N, T1, RANGE = 96, 1.0, np.log(2.0)  # points, last time, range of `args`
X, WAVES = np.arange(N) / N, 2 * np.pi * np.arange(N // 2 + 1)[:, None] / N


def advect(u):
    return (jnp.roll(u, 1, 0) ** 2 - jnp.roll(u, -1, 0) ** 2) * N / 4


def vector_field(t, u, args):
    second = (jnp.roll(u, 1, 0) - 2 * u + jnp.roll(u, -1, 0)) * N**2
    return advect(u) + 0.01 * jnp.exp(args) * second


def diffuse(s, t, u, args):
    """The exact solution without advection, by the Fourier multiplier of `second`."""
    rate = 0.01 * jnp.exp(args) * 2 * N**2 * (jnp.cos(WAVES) - 1)
    return jnp.fft.irfft(jnp.exp(rate * (t - s)) * jnp.fft.rfft(u, axis=0), N, axis=0)


def draw(key, n):
    """Random waves of four wavenumbers with mean square 0.36, and viscosities."""
    keys, k = jr.split(key), jnp.arange(1, 5)
    (a, b), angles = jr.normal(keys[0], (2, n, 4)) / k, 2 * jnp.pi * k[:, None] * X
    u = a @ jnp.cos(angles) + b @ jnp.sin(angles)
    u = 0.6 * u / jnp.sqrt(jnp.mean(u**2, axis=1, keepdims=True))
    return u[..., None], jr.uniform(keys[1], (n,), minval=-RANGE, maxval=RANGE)


solve_all = functools.partial(fd.solve_trajectories, vector_field, args_per_example=True)


def learn(num_steps, pool, seed=0):
    """The flow map, learned from pairs of states along trajectories."""
    keys, ts = jr.split(jr.key(seed), 3), jnp.linspace(0.0, T1, 65)
    u0, args = draw(keys[0], pool)
    how = {"args_size": 1, "scale": 0.6, "max_frequency": 3.0, "key": keys[1]}
    net = fd.nn.FNO((N, 1), width=32, modes=32, **how)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, num_steps // 30, num_steps)
    return fd.train.fit(
        fd.AutonomousFlowMap(fd.flow_maps.StepperFlowMap(diffuse, net)),
        fd.TrajectoryMatching(fd.times.GridTimes(ts), fd.weights.InverseGap(1.0)),
        fd.data.TrajectoryBatches(ts, solve_all(u0, ts, args), 32, args),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        num_steps=num_steps, key=keys[2],
    ).ema_map  # fmt: skip


def by_tsit5(tol, u, args):
    how = {"stepsize_controller": diffrax.PIDController(tol, tol), "throw": False}
    term, solver = diffrax.ODETerm(vector_field), diffrax.Tsit5()
    return diffrax.diffeqsolve(term, solver, 0.0, T1, 1e-3, u, args, **how).ys[0]


def by_spectral(num_steps, u, args):
    """Runge-Kutta of order 4 with exact diffusion, an integrating factor."""
    h, half = T1 / num_steps, lambda u: diffuse(0.0, T1 / num_steps / 2, u, args)

    def step(_, u):
        a = h * advect(u)
        b = h * advect(half(u + a / 2))
        c = h * advect(half(u) + b / 2)
        d = h * advect(half(half(u) + c))
        return half(half(u + a / 6) + (b + c) / 3) + d / 6

    return jax.lax.fori_loop(0, num_steps, step, u)


def measure(solve, u0, args, truth):
    """The mean normalised error, and the seconds of the fastest of eight runs."""
    solve, norm = jax.jit(jax.vmap(solve)), lambda u: jnp.linalg.norm(u, axis=(1, 2))
    row = [float(jnp.mean(norm(solve(u0, args) - truth) / norm(truth)))]
    run = lambda size: solve(u0[:size], args[:size]).block_until_ready()
    for size in (1, 64):
        row.append(min(timeit.repeat(functools.partial(run, size), number=1, repeat=8)))
    return row


def draw_figure(path, flow_map, u0, rows):
    """Plots single jumps to many times, their errors, and seconds against errors."""
    _, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    ts, args = jnp.linspace(0.0, T1, 101), jnp.array([RANGE, 0.0, -RANGE])
    truth = solve_all(jnp.stack([u0] * 3), ts, args)[..., 0]
    jumps = jax.vmap(jax.vmap(flow_map, (None, 0, None, None)), (None, None, None, 0))
    made = jumps(0.0, ts, u0, args)[..., 0]
    for axis, us, wide, log in zip(axes[0], made, truth, args, strict=True):
        for j in (0, 10, 25, 50, 100):
            colour = plt.cm.viridis(0.9 * float(ts[j]) ** 0.5)
            axis.plot(X, wide[j], color=colour, alpha=0.3, lw=5)
            axis.plot(X, us[j], color=colour, lw=1.2, label=f"t = {float(ts[j]):.2f}")
        axis.set(title=f"viscosity {0.01 * jnp.exp(log):.3g}: one jump, truth wide")
    axes[0, 0].legend(fontsize="small")
    panels = ("one jump to each time", made[2]), ("its error", made[2] - truth[2])
    for axis, (title, us) in zip(axes[1], panels, strict=False):
        colours = {"cmap": "RdBu_r", "norm": plt.matplotlib.colors.CenteredNorm()}
        plt.colorbar(axis.pcolormesh(X, ts, us, **colours), ax=axis)
        axis.set(xlabel="x", ylabel="time", title=title)
    curves = {name: [(r[3], r[1]) for r in each] for name, each in rows.items()}
    fd.plot.work_precision(axes[1, 2], curves, xlabel="seconds for 64", ylabel="error")
    plt.savefig(path, dpi=110)


def main(*, steps=10_000, pool=1024, num_samples=256, settings=6, out="out/burgers"):
    """Learns, compares and draws, with at most `settings` settings of each method."""
    flow_map, (u0, args) = learn(steps, pool), draw(jr.key(1), num_samples)
    fd.train.save(f"{out}/map.safetensors", {"steps": steps, "pool": pool}, flow_map)
    truth = solve_all(u0, jnp.array([0.0, T1]), args, rtol=1e-7, atol=1e-7)[:, 1]
    by_jumps = lambda n, u, args: fd.ComposedFlowMap(flow_map, n)(0.0, T1, u, args)
    test = lambda by, n: [n, *measure(functools.partial(by, n), u0, args, truth)]
    rows = {"jumps": [test(by_jumps, n) for n in (1, 4, 16, 64)]}
    rows["Tsit5"] = [test(by_tsit5, 0.03 * 0.3**n) for n in range(settings)]
    rows["spectral"] = [test(by_spectral, 20 + 4 * n) for n in range(settings)]
    print(f"| method | | error | seconds for 1 | for 64 |\n{'| --- ' * 5}|")
    for row in rows["jumps"]:
        for name, others in rows.items():
            equal = [row] if row in others else [r for r in others if r[1] <= row[1]]
            for cheapest in equal[:1]:
                print(f"| {name} | " + " | ".join(f"{x:.2g}" for x in cheapest) + " |")
    draw_figure(f"{out}/burgers.png", flow_map, u0[0], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for k, v in main.__kwdefaults__.items():
        parser.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    main(**vars(parser.parse_args()))
