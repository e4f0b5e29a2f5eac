"""Bayesian inference for a stiff system: three rates over five decades of time.

As `posterior.py`, for the rates of Robertson's reactions, whose classical solver is the
implicit Kvaerno5. Its gradients are what makes NUTS slow, and delayed acceptance needs
none of them.

    pip install "flowdiffrax[posteriors]"
    python examples/posterior_stiff.py

prints the same table, and saves the map and a corner plot.
"""

import argparse
import pathlib

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx

import flowdiffrax as fd
import posterior

NAMES, MEDIAN = ("k1", "k2", "k3"), np.asarray([0.04, 1e4, 3e7])
# Not at zero: the map learns logarithms, from positive shares around these.
X0, T1, NOISE = np.asarray([1 - 1e-7, 5e-8, 5e-8]), 1e4, 0.1
GRID, OBSERVED = np.asarray([0.0, *np.logspace(-3, 4, 57)]), np.logspace(-1, 4, 11)
# Diffrax's default root finder, a chord method, takes five times as many steps.
STIFF = diffrax.Kvaerno5(root_finder=optx.Newton(rtol=1e-6, atol=1e-14))


def vector_field(t, x, z):
    """`z`: logarithms of the rates, in units of the prior."""
    k1, k2, k3 = jnp.asarray(MEDIAN) * jnp.exp(posterior.SCALE * z)
    slow, back, fast = k1 * x[0], k2 * x[1] * x[2], k3 * x[1] ** 2
    return jnp.stack([back - slow, slow - back - fast, fast])


def draw(key):
    """Mixtures close to (1, 0, 0)."""
    y, z = 1e-7 * jr.uniform(key, (2,))
    return jnp.stack([1 - y - z, y, z])


def by_map(flow_map, z):
    """Logarithms of the shares, by one jump to each of the observations."""
    ts, x0, z = (jnp.asarray(value, jnp.float32) for value in (OBSERVED, X0, z))
    return jnp.log(jax.vmap(lambda t: flow_map(0.0, t, x0, z))(ts)).astype(float)


def by_kvaerno5(z):
    shares = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), STIFF, 0.0, T1, 1e-5, jnp.asarray(X0), z,
        saveat=diffrax.SaveAt(ts=OBSERVED), max_steps=4096, throw=False,
        stepsize_controller=diffrax.PIDController(1e-4, 1e-10),
        adjoint=diffrax.ForwardMode(),
    ).ys  # fmt: skip
    return jnp.log(shares)


def main(
    *, minutes=3.0, chains=4, num_samples=1000, nuts_steps=2, tuning=500,
    out="out/posterior/robertson.safetensors",
):  # fmt: skip
    """Learns the map, samples, prints the table and draws the figure."""
    posterior.load_blackjax()  # before the minutes of learning
    path, keys = pathlib.Path(out), jr.split(jr.key(1), 3)
    if not path.exists():
        low, high = -posterior.RANGE, posterior.RANGE
        args = lambda key: jr.uniform(key, (3,), minval=low, maxval=high)
        how = {"ts": GRID, "minutes": minutes, "width": 64, "depth": 3}
        fd.learn_solver(vector_field, draw, 0.0, T1, args, **how).save(path)
    learned = fd.learn.LearnedSolver.load(path)
    truth = jr.normal(keys[0], (3,)).clip(-1, 1)
    data = by_kvaerno5(truth) + NOISE * jr.normal(keys[1], (len(OBSERVED), 3))
    predictions = lambda z: by_map(learned.flow_map, z), by_kvaerno5
    cheap, exact = (posterior.log_posterior(f, data, NOISE) for f in predictions)
    settings = keys[2], chains, num_samples, nuts_steps, tuning
    samples = posterior.compare(cheap, exact, 3, *settings)
    posterior.draw_figure(path.with_suffix(".png"), NAMES, samples, truth)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for k, v in main.__kwdefaults__.items():
        parser.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    main(**vars(parser.parse_args()))
