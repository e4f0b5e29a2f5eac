r"""Kuramoto-Sivashinsky: a chaotic PDE, and its statistics far beyond the horizon.

One flow map of $u_t = -u u_x - u_{xx} - u_{xxxx}$ on a circle of length 22, for jumps of
any length up to 4, learns from an exponential integrator: single jumps, then roll-outs.

    python examples/kuramoto_sivashinsky.py

prints errors at time 4 and seconds for a batch by number of jumps, and those of as many
steps of the integrator, then the largest value and the error of the spectrum over 1,000
jumps. It saves a figure and the map, in four minutes of one core.
"""

import argparse
import functools
import math
import timeit

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import flowdiffrax as fd

N, LENGTH, T1 = 64, 22.0, 4.0  # points, length of the circle, the longest jump
X = np.arange(N) * LENGTH / N
WAVES = 2 * np.pi * np.arange(N // 2 + 1)[:, None] / LENGTH
RATES = WAVES**2 - WAVES**4  # of the linear part
ADVECT = -0.5j * WAVES * (np.arange(N // 2 + 1)[:, None] <= N // 3)  # without aliases
fft, ifft = (functools.partial(f, n=N, axis=0) for f in (jnp.fft.rfft, jnp.fft.irfft))
advect = lambda u: ADVECT * fft(u**2)
keep_mean = lambda u, end, args: end + u.mean() - end.mean()
spectrum = lambda us: jax.vmap(jax.vmap(fd.metrics.energy_spectrum))(us).mean((0, 1, 3))


def phi(k, z):
    """The functions of exponential integrators, as means over a circle around z."""
    z = z[..., None] + np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
    first = sum(z**j / math.factorial(j) for j in range(k))
    return np.mean((np.exp(z) - first) / z**k, axis=-1).real


def etdrk4(h):
    """Steps of length h of Krogstad's exponential Runge-Kutta method of order 4."""
    (half1, half2), z = (h / 2 * phi(k, h / 2 * RATES) for k in (1, 2)), h * RATES
    one, two, three = (h * phi(k, z) for k in (1, 2, 3))

    def step(s, t, u, args):
        y, half = fft(u), np.exp(z / 2) * fft(u)
        a = advect(u)
        b = advect(ifft(half + half1 * a))
        c = advect(ifft(half + half1 * a + 2 * half2 * (b - a)))
        d = advect(ifft(np.exp(z) * y + one * a + 2 * two * (c - a)))
        y = np.exp(z) * y + (one - 3 * two + 4 * three) * a + (4 * three - two) * d
        return ifft(y + (2 * two - 4 * three) * (b + c))

    return step


def solve(u0, ts, h=0.05):
    num = round(float(ts[1] - ts[0]) / h)
    return fd.paths.step_trajectories(etdrk4(h), u0, ts, num_substeps=num, chunk_size=64)


def draw(key, n):
    """States on the attractor: random waves, after a while."""
    a, b = jr.normal(key, (2, n, 4))
    u0 = a @ jnp.cos(WAVES[1:5] * X) + b @ jnp.sin(WAVES[1:5] * X)
    return solve(u0[..., None], jnp.array([0.0, 100.0]))[:, 1]


def decay(s, t, u, args):
    """The exact decay of the waves that decay, as a cheap step to begin with."""
    return ifft(jnp.exp((t - s) * np.minimum(RATES, 0)) * fft(u))


def learn(steps, fine_tune, pool, seed=0):
    """The flow map, from single jumps and then from roll-outs of four jumps."""
    keys, ts = jr.split(jr.key(seed), 4), jnp.linspace(0.0, T1, 17)
    net = fd.nn.FNO((N, 1), width=48, modes=24, max_frequency=1.0, key=keys[0])
    inner = fd.AutonomousFlowMap(fd.flow_maps.StepperFlowMap(decay, net))
    flow_map = fd.ProjectedFlowMap(inner, keep_mean)
    batches = fd.data.TrajectoryBatches(ts, solve(draw(keys[1], pool), ts), 32)
    how = fd.times.GridTimes(ts), fd.weights.InverseGap(1.0)
    roll_outs = fd.objectives.RollOutMatching(4, *how, unroll=True)
    roll_outs = roll_outs, fine_tune, 3e-4, keys[3]
    single = fd.TrajectoryMatching(*how), steps, 3e-3, keys[2]
    for objective, num, rate, key in (single, roll_outs):
        rates = optax.warmup_cosine_decay_schedule(0.0, rate, num // 30, num)
        optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))
        state = fd.train.fit(flow_map, objective, batches, optim, num_steps=num, key=key)
        flow_map = state.ema_map
    return flow_map


def measure(name, step, n, u0, truth):
    """Prints the error at time 4 and the seconds of the fastest of eight runs."""
    run = jax.jit(jax.vmap(lambda u: fd.sample(step, u, jnp.linspace(0.0, T1, n + 1))))
    errors = fd.metrics.roll_out_errors(jnp.stack([u0, run(u0)], axis=1), truth)
    seconds = timeit.repeat(lambda: run(u0).block_until_ready(), number=1, repeat=8)
    print(f"| {name} | {n} | {float(errors[:, 1].mean()):.2g} | {min(seconds):.2g} |")


def draw_figure(path, made, true, ts, errors):
    _, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    panels = {"integrator": true, "jumps of length 2": made, "error": made - true}
    for axis, (title, us) in zip(axes[0], panels.items(), strict=True):
        axis.pcolormesh(ts[:76], X, us[0, :76, :, 0].T, cmap="RdBu_r", clim=(-3.5, 3.5))
        axis.set(title=title, xlabel="time", ylabel="x")
    for name, us, style in (("integrator", true, "-"), ("map", made, "--")):
        axes[1, 0].semilogy(WAVES[:22, 0], spectrum(us)[:22], style, label=name, lw=2)
        late = np.ravel(us[:, len(ts) // 2 :])
        axes[1, 1].hist(late, 80, density=True, histtype="step", ls=style, lw=2)
    for h, (times, error) in errors.items():
        axes[1, 2].semilogy(times[1:], error[1:], label=f"jumps of length {h:g}")
    axes[1, 0].set(title=f"energy, {len(ts) - 1} jumps", xlabel="wavenumber")
    axes[1, 1].set(title="values in the second half", xlabel="u", yscale="log")
    axes[1, 2].set(title="normalised error", xlabel="time", xlim=(0, 100))
    axes[1, 0].legend(), axes[1, 2].legend()
    plt.savefig(path, dpi=110)


def main(*, steps=8000, fine_tune=800, pool=1024, num_samples=64, jumps=1000, out="out"):
    flow_map, u0 = learn(steps, fine_tune, pool), draw(jr.key(1), num_samples)
    fd.train.save(f"{out}/kuramoto_sivashinsky.safetensors", {"pool": pool}, flow_map)
    truth = solve(u0, jnp.array([0.0, T1]))
    print(f"| method | steps | error | seconds |\n{'| --- ' * 4}|")
    for n in (1, 2, 4, 8):
        measure("map", flow_map, n, u0, truth)
        measure("ETDRK4", etdrk4(T1 / n), n, u0, truth)
    errors = {}
    print(f"\n| {jumps} jumps | largest | true | spectrum off |\n{'| --- ' * 4}|")
    for h in (0.5, 4.0, 2.0):
        ts = jnp.arange(jumps + 1) * h
        run = jax.jit(jax.vmap(lambda u, ts=ts: fd.solvers.roll_out(flow_map, u, ts)))
        made, true = run(u0[:16]), solve(u0[:16], ts)
        errors[h] = ts, fd.metrics.roll_out_errors(made, true).mean(axis=0)
        off = np.abs(np.log(spectrum(made) / spectrum(true)))[1:11].mean()
        most, truly = (float(jnp.abs(us).max()) for us in (made, true))
        print(f"| length {h:g} | {most:.3g} | {truly:.3g} | {off:.1%} |")
    draw_figure(f"{out}/kuramoto_sivashinsky.png", made, true, ts, errors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for k, v in main.__kwdefaults__.items():
        parser.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    main(**vars(parser.parse_args()))
