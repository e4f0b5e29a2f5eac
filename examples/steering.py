"""An inverse problem without training: the posterior of a measurement, by a flow map.

The prior is a mixture of four Gaussians in eight dimensions, whose flow map is known.
Three noisy linear measurements are made. The posterior is again a mixture, in closed
form. `sample_tilted` samples it by steering draws of the prior with the gradient of the
likelihood of their look-ahead, and weights them.

    python examples/steering.py

prints a table and saves a figure under `--out`, in one minute of CPU time. Errors of the
mean are root mean squares of several runs, in units of the posterior's standard
deviation; that of the log-evidence is the mean of the runs, in nats.

One jump is importance sampling from the prior, with 3 effective samples of 1,000. In 16
jumps, the effective number stays above 369 on average, and the error of the mean falls
from 0.58 to 0.12. The same steering without weights and resampling is biased: 0.70.
"""

import argparse
import os

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import flowdiffrax as fd

SIZE, MEASURED, NOISE = 8, 3, 0.2


def make_prior(rng):
    """Weights, means and covariances."""
    roots = rng.standard_normal((4, SIZE, SIZE)) / np.sqrt(SIZE)
    covariances = 0.1 * roots @ roots.swapaxes(1, 2) + 0.05 * np.eye(SIZE)
    return np.full(4, 0.25), 1.2 * rng.standard_normal((4, SIZE)), covariances


def posterior(prior, matrix, y):
    """The mixture given y = matrix @ x + noise, and the log-evidence."""
    parts = []
    for weight, mean, cov in zip(*prior, strict=True):
        spread = matrix @ cov @ matrix.T + NOISE**2 * np.eye(MEASURED)
        gain, miss = cov @ matrix.T @ np.linalg.inv(spread), y - matrix @ mean
        log_det = np.linalg.slogdet(2 * np.pi * spread)[1]
        log_weight = np.log(weight) - (miss @ np.linalg.solve(spread, miss) + log_det) / 2
        parts.append((log_weight, mean + gain @ miss, cov - gain @ matrix @ cov))
    log_weights, means, covariances = map(np.stack, zip(*parts, strict=True))
    log_evidence = np.logaddexp.reduce(log_weights)
    return (np.exp(log_weights - log_evidence), means, covariances), log_evidence


def draw(mixture, number, rng):
    """Draws from a mixture."""
    weights, means, covariances = mixture
    index = rng.choice(len(weights), number, p=weights)
    roots = np.linalg.cholesky(covariances)[index]
    return means[index] + np.einsum(
        "nij,nj->ni", roots, rng.standard_normal((number, SIZE))
    )


def log_likelihood(x, args):
    """The reward; its measurement is passed in `args`."""
    matrix, y = args
    error = (y - matrix @ x) / NOISE
    return -jnp.sum(error**2) / 2 - MEASURED * np.log(NOISE * np.sqrt(2 * np.pi))


def main(*, particles=1000, runs=8, jumps=16, seed=0, out="out/steering"):
    """Samples the posterior with up to `jumps` jumps. Returns the rows of the table."""
    rng = np.random.default_rng(seed)
    prior, matrix = make_prior(rng), rng.standard_normal((MEASURED, SIZE)) / 2
    # Half-way between two components, so that the posterior has both.
    y = matrix @ (prior[1][0] + prior[1][1]) / 2
    exact, log_evidence = posterior(prior, matrix, y)
    mean = exact[0] @ exact[1]
    spread = exact[1] - mean
    variance = exact[0] @ (spread**2 + np.diagonal(exact[2], axis1=1, axis2=2))
    velocity = fd.exact.GaussianMixtureVelocity(*prior)
    flow_map = fd.ODEFlowMap(velocity, diffrax.Dopri5(), num_steps=3)

    @jax.jit
    def sample(key, ts, resample_below):
        base_key, key = jr.split(key)
        x0 = jr.normal(base_key, (particles, SIZE))
        measured = jnp.asarray(matrix), jnp.asarray(y)
        problem = flow_map, velocity.interpolant, log_likelihood, x0, ts, measured
        settings = {"key": key, "resample_below": resample_below}
        return fd.solvers.sample_tilted(*problem, **settings)

    def error(weights, x):
        return np.sum((weights @ x - mean) ** 2) / np.sum(variance)

    rows, equal = [], np.full(particles, 1 / particles)
    print("| jumps | effective | log-evidence | mean | mean without weights |")
    print("| --- " * 5 + "|")
    for n in sorted({min(n, jumps) for n in (1, 4, 16)}):
        found, ts = [], jnp.linspace(0, 1, n + 1)
        for key in jr.split(jr.key(seed), runs):
            samples, steered = sample(key, ts, 0.5), sample(key, ts, 0.0)
            weights = np.asarray(jax.nn.softmax(samples.log_weights), float)
            errors = error(weights, samples.x), error(equal, steered.x)
            gap = samples.log_normaliser - log_evidence
            found.append((samples.effective_sizes.min() / particles, gap, *errors))
        share, gap, *errors = np.mean(found, axis=0)
        rows.append((n, *map(float, (share, gap, *np.sqrt(errors)))))
        print("| {} | {:.1%} | {:.2f} | {:.2f} | {:.2f} |".format(*rows[-1]))

    # Seen along the line between the two clusters, and along the first measurement.
    between = exact[1][1] - exact[1][0]
    plane = np.stack([matrix[0], between / np.linalg.norm(between)], axis=1)
    shown = {
        "prior": (draw(prior, particles, rng), equal),
        "posterior, exact": (draw(exact, particles, rng), equal),
        f"steered, {n} jumps": (samples.x, weights),
        "without weights": (steered.x, equal),
    }
    figure, axes = plt.subplots(
        1, 4, figsize=(11, 3.2), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (title, (x, sizes)) in zip(axes, shown.items(), strict=True):
        axis.axvline(y[0], color="k", lw=0.7)
        axis.scatter(*(x @ plane).T, s=3 * particles * sizes, alpha=0.4, lw=0)
        axis.set(title=title, xlabel="first measurement")
    axes[0].set(ylabel="from cluster to cluster")
    os.makedirs(out, exist_ok=True)
    figure.savefig(f"{out}/steering.png", dpi=90)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in main.__kwdefaults__.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    main(**vars(parser.parse_args()))
