r"""Bayesian inference through a learned solver, made exact by delayed acceptance.

A network learns the flow map of the Lotka-Volterra equations for a range of parameters,
and NUTS samples the posterior of the parameters through it, with the priors of the sbibm
benchmark. Two steps of NUTS make a proposal, which one solve by Tsit5 accepts or rejects.
The rival is NUTS through Tsit5.

    pip install "flowdiffrax[posteriors]"
    python examples/posterior.py

prints R-hat and effective sample sizes (of the worst parameter), exact solves, the share
of rejected proposals or divergent steps, and CPU seconds without compilation. It saves
the map, which the next run loads, and a corner plot.
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

jax.config.update("jax_enable_x64", True)
# The map learns two standard deviations of the prior on each side. The prior ends there.
RANGE, SCALE = 2.0, 0.5
NAMES, MEDIAN = ("alpha", "beta", "gamma", "delta"), np.exp([-0.125, -3, -0.125, -3])
X0, T1, OBSERVED, NOISE = np.log([30.0, 1.0]), 20.0, np.arange(2.0, 21.0, 2.0), 0.1


def vector_field(t, x, z):
    """Of log-populations. `z`: logarithms of the rates, in units of the prior."""
    alpha, beta, gamma, delta = jnp.asarray(MEDIAN) * jnp.exp(SCALE * z)
    return jnp.stack([alpha - beta * jnp.exp(x[1]), delta * jnp.exp(x[0]) - gamma])


def by_map(flow_map, z):
    """One jump to each of the observations, in the precision of the training."""
    ts, x0, z = (jnp.asarray(value, jnp.float32) for value in (OBSERVED, X0, z))
    return jax.vmap(lambda t: flow_map(0.0, t, x0, z))(ts).astype(float)


def by_tsit5(z):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), diffrax.Tsit5(), 0.0, T1, 0.1, jnp.asarray(X0), z,
        stepsize_controller=diffrax.PIDController(1e-5, 1e-5, dtmax=1.0), throw=False,
        saveat=diffrax.SaveAt(ts=OBSERVED), adjoint=diffrax.ForwardMode(),
    ).ys  # fmt: skip


def log_posterior(predict, data, noise):
    """The log-density of `z`, with a gradient by forward mode: parameters are few."""

    def value(z):
        misfit = (predict(jnp.clip(z, -RANGE, RANGE)) - data) / noise
        value = -0.5 * (jnp.sum(misfit**2) + jnp.sum(z**2))
        # The map would extrapolate outside of the range, and solves can fail.
        inside = jnp.all(jnp.abs(z) <= RANGE) & jnp.isfinite(value)
        return jnp.where(inside, value, -jnp.inf)

    forward = jax.jacfwd(lambda z: (value(z),) * 2, has_aux=True)
    log_density = jax.custom_vjp(value)
    log_density.defvjp(lambda z: forward(z)[::-1], lambda slope, ct: (ct * slope,))
    return log_density


def run(chain, starts, key, num_samples):
    """Positions, exact solves and refusals of chains side by side, and CPU seconds."""

    def step(state, key):
        if isinstance(chain, fd.likelihood.DelayedAcceptance):
            state = chain.step(key, state)
            return state, (state.x, 1, ~state.accepted)
        state, info = chain.step(key, state)
        return state, (state.position, info.num_integration_steps, info.is_divergent)

    one = lambda key, z: jax.lax.scan(step, chain.init(z), jr.split(key, num_samples))[1]
    inputs = jr.split(key, len(starts)), starts
    compiled = jax.jit(jax.vmap(one)).lower(*inputs).compile()
    begin = time.process_time()
    return jax.block_until_ready(compiled(*inputs)), time.process_time() - begin


def load_blackjax():
    try:
        import blackjax
    except ImportError as error:
        raise SystemExit(
            'blackjax is missing: pip install "flowdiffrax[posteriors]"'
        ) from error
    return blackjax


def compare(cheap, exact, size, key, chains, num_samples, nuts_steps, tuning):
    """Samples by the map, by the map with the correction, and by the classical solver."""
    blackjax, keys, samples = load_blackjax(), jr.split(key, 5), {}
    # Thousands of draws of the prior cost little through the map: start from the best.
    draws = jr.truncated_normal(keys[0], -RANGE, RANGE, (8192, size))
    starts = draws[jnp.argsort(-jax.jit(jax.vmap(cheap))(draws))[:chains]]
    adapt = blackjax.window_adaptation(blackjax.nuts, cheap, False)  # a dense matrix
    tuned = jax.jit(lambda key, z: adapt.run(key, z, tuning)[0])(keys[1], starts[0])
    by_map, by_solver = (blackjax.nuts(f, **tuned.parameters) for f in (cheap, exact))

    def propose(key, z):
        step = lambda state, key: (by_map.step(key, state)[0], None)
        return jax.lax.scan(step, by_map.init(z), jr.split(key, nuts_steps))[0].position

    corrected = fd.likelihood.DelayedAcceptance(propose, cheap, exact)
    header = "R-hat | ESS | solves | refused | seconds | solves / ESS | seconds / ESS"
    print(f"chain | {header}\n---{' | ---' * 7}")
    kinds = {"map": by_map, "map, corrected": corrected, "exact": by_solver}
    for key, (name, chain) in zip(keys[2:], kinds.items(), strict=True):
        (z, solves, refused), seconds = run(chain, starts, key, num_samples)
        z = z[:, num_samples // 10 :]  # without the approach, which the seconds include
        samples[name] = np.asarray(z).reshape(-1, size)
        ess = blackjax.diagnostics.ess_bulk(z).min()
        solves = 0 if name == "map" else solves.sum()
        row = [blackjax.diagnostics.rhat(z).max(), ess, solves, refused.mean(), seconds]
        row = [f"{float(number):.3g}" for number in (*row, solves / ess, seconds / ess)]
        print(name, *row, sep=" | ")
    return samples


def draw_figure(path, names, samples, truth):
    """Marginals on the diagonal, pairs below it."""
    n, style = len(names), {"bins": 40, "density": True, "histtype": "step"}
    figure, axes = plt.subplots(n, n, figsize=(2 * n, 2 * n), layout="constrained")
    for (i, j), axis in np.ndenumerate(axes):
        axis.set(xlabel=names[j], ylabel=names[i] if i > j else "", visible=i >= j)
        axis.axvline(truth[j], color="k", lw=0.7)
        for label, z in samples.items():
            if i == j:
                axis.hist(z[:, i], label=label, **style)
            else:
                axis.plot(*z[::4, [j, i]].T, ".", ms=1, alpha=0.4)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right")
    figure.savefig(path, dpi=80)


def main(
    *, minutes=4.0, chains=4, num_samples=1000, nuts_steps=2, tuning=500,
    out="out/posterior/lotka_volterra.safetensors",
):  # fmt: skip
    """Learns the map, samples, prints the table and draws the figure."""
    load_blackjax()  # before the minutes of learning
    path, keys = pathlib.Path(out), jr.split(jr.key(1), 3)
    if not path.exists():
        x0 = lambda key: X0 + 1e-3 * jr.normal(key, (2,))
        z = lambda key: jr.uniform(key, (4,), minval=-RANGE, maxval=RANGE)
        fd.learn_solver(vector_field, x0, 0.0, T1, z, minutes=minutes).save(path)
    learned = fd.learn.LearnedSolver.load(path)
    truth = jr.normal(keys[0], (4,)).clip(-1, 1)
    data = by_tsit5(truth) + NOISE * jr.normal(keys[1], (len(OBSERVED), 2))
    cheap = log_posterior(lambda z: by_map(learned.flow_map, z), data, NOISE)
    exact = log_posterior(by_tsit5, data, NOISE)
    samples = compare(cheap, exact, 4, keys[2], chains, num_samples, nuts_steps, tuning)
    draw_figure(path.with_suffix(".png"), NAMES, samples, truth)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for k, v in main.__kwdefaults__.items():
        parser.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    main(**vars(parser.parse_args()))
