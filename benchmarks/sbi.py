"""Learned posteriors beside the published ones of the sbibm benchmark.

    pip install --no-deps sbibm==1.1.0
    python benchmarks/sbi.py                          # everything: hours on one core
    python benchmarks/sbi.py --tasks two_moons --simulations 10000

sbibm (Lueckmann and others, arXiv:2101.04653) has ten observations for each task, and
10,000 samples of each posterior. Only the files of the package are read: its code needs
PyTorch and pinned versions of many packages, none of which is imported. Its simulators
are written in NumPy here, from their definitions in the paper, appendix T.

- Every task and number of simulations gets the same call, `learn_posterior(thetas, xs,
  bounds=..., num_steps=...)`, with the bounds of the uniform priors. A posterior is
  learned once, for all observations.
- C2ST is the accuracy of a classifier that tells 10,000 samples from those of sbibm: 0.5
  if it cannot. The classifier is that of sbibm, scikit-learn's `MLPClassifier` with two
  hidden layers of ten units for each parameter, as a function in JAX that is faster: Adam
  with a rate of 1e-3, batches of 200, an L2 penalty of 1e-4, until the loss has not
  fallen by 1e-4 in ten epochs. sbibm takes the mean over five folds. `--folds` of them
  are used here, since one fold of ten parameters takes 15 s; its standard error is 0.008
  for a single observation.
- Observations are the first `--observations` of the ten. Published means are over ten.
- Seconds are processor time, so that other jobs on the machine take no part of them, and
  include compilation.

Rows are printed as soon as they are done, and kept in `--out`.
"""

import argparse
import bz2
import importlib.util
import json
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

import flowdiffrax as fd

JUMPS = 1, 2, 4

# --- the tasks ------------------------------------------------------------------------


def files():
    """The folder of sbibm's tasks, without importing it."""
    spec = importlib.util.find_spec("sbibm")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the data: pip install --no-deps sbibm==1.1.0")
    return pathlib.Path(spec.origin).parent / "tasks"


def read(path):
    text = bz2.open(path, "rt") if path.suffix == ".bz2" else path
    return np.loadtxt(text, delimiter=",", skiprows=1, ndmin=2)


def reference(task, number):
    """One of the ten observations, and samples of its posterior."""
    folder = files() / task / "files" / f"num_observation_{number}"
    samples = read(folder / "reference_posterior_samples.csv.bz2")
    return read(folder / "observation.csv")[0], samples


def uniform(bound, size):
    return lambda rng, num: rng.uniform(-bound, bound, (num, size))


def two_moons(rng, thetas):
    """A noisy half circle, moved by the sum and the difference of the parameters."""
    angle = rng.uniform(-math.pi / 2, math.pi / 2, len(thetas))
    radius = rng.normal(0.1, 0.01, len(thetas))
    moon = np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], 1)
    moved = -np.abs(thetas.sum(1)), thetas[:, 1] - thetas[:, 0]
    return moon + np.stack(moved, 1) / math.sqrt(2)


def slcp(rng, thetas):
    """Four draws of a Gaussian in two dimensions; the parameters are its moments."""
    first, second = thetas[:, [2]] ** 2, thetas[:, [3]] ** 2
    correlation = np.tanh(thetas[:, [4]])
    noise = rng.normal(size=(2, len(thetas), 4))
    across = correlation * noise[0] + np.sqrt(1 - correlation**2) * noise[1]
    draws = thetas[:, [0]] + first * noise[0], thetas[:, [1]] + second * across
    return np.stack(draws, -1).reshape(len(thetas), 8)


def gaussian_mixture(rng, thetas):
    """Noise of two sizes, around the parameters."""
    size = rng.choice([1.0, 0.1], (len(thetas), 1))
    return thetas + size * rng.normal(size=thetas.shape)


def gaussian_linear(rng, thetas):
    """The parameters with noise."""
    return thetas + math.sqrt(0.1) * rng.normal(size=thetas.shape)


def bernoulli_glm_prior(rng, num):
    """An offset, and a filter whose second differences are small."""
    differences = np.eye(9) - np.eye(9, k=-1)
    root = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, root.T @ root
    return rng.multivariate_normal(np.zeros(10), np.linalg.inv(precision), num)


def bernoulli_glm(rng, thetas):
    """The number of spikes in 100 bins, and the mean input before them."""
    design = stored("design_matrix.pt", 1000).reshape(100, 10)
    stimulus = stored("stimulus_I.pt", 100)
    rates = 1 / (1 + np.exp(-thetas @ design.T))
    spikes = (rng.uniform(size=rates.shape) < rates).astype(float)
    padded = np.pad(spikes, ((0, 0), (8, 8)))
    triggered = [padded[:, lag : lag + 100] @ stimulus for lag in range(8, 17)]
    return np.stack([spikes.sum(1), *triggered], axis=1)


def stored(name, size):
    """The numbers of a tensor that PyTorch stored: they are the end of the file."""
    content = (files() / "bernoulli_glm" / "files" / name).read_bytes()
    return np.frombuffer(content[-4 * size :], "<f4").astype(float)


# The prior, the simulator, and the bounds of the prior.
TASKS = {
    "two_moons": (uniform(1.0, 2), two_moons, (-1.0, 1.0)),
    "slcp": (uniform(3.0, 5), slcp, (-3.0, 3.0)),
    "gaussian_mixture": (uniform(10.0, 2), gaussian_mixture, (-10.0, 10.0)),
    "gaussian_linear": (
        lambda rng, num: math.sqrt(0.1) * rng.normal(size=(num, 10)),
        gaussian_linear,
        None,
    ),
    "bernoulli_glm": (bernoulli_glm_prior, bernoulli_glm, None),
}

# --- the score ------------------------------------------------------------------------


def c2st(samples, others, folds=5, seed=0):
    """The accuracy of a classifier of two sets of samples, by cross-validation."""
    mean, std = samples.mean(0), samples.std(0, ddof=1)
    rows = np.concatenate([samples, others])
    rows = jnp.asarray((rows - mean) / std, jnp.float32)
    labels = jnp.asarray(np.repeat([0, 1], [len(samples), len(others)]), jnp.float32)
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = np.array_split(order, 5)
    scores = []
    for fold in range(folds):
        rest = np.concatenate(parts[:fold] + parts[fold + 1 :])
        given = rows[rest], labels[rest], rows[parts[fold]], labels[parts[fold]]
        scores.append(accuracy(jr.key(seed + fold), *given))
    return float(np.mean(scores))


@jax.jit
def accuracy(key, rows, labels, test_rows, test_labels):
    """Trains the classifier on some rows, and counts how many others it gets right."""
    size, batch = rows.shape[1], 200
    init_key, key = jr.split(key)
    keys = iter(jr.split(init_key, 6))
    sizes = size, 10 * size, 10 * size, 1
    limits = [math.sqrt(6 / (a + b)) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    draw = lambda shape, limit: jr.uniform(next(keys), shape, rows.dtype, -limit, limit)
    params = [
        (draw((sizes[i], sizes[i + 1]), limits[i]), draw((sizes[i + 1],), limits[i]))
        for i in range(3)
    ]
    optim = optax.adam(1e-3)

    def logits(params, x):
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        return (x @ params[-1][0] + params[-1][1])[:, 0]

    def loss(params, x, y):
        errors = optax.sigmoid_binary_cross_entropy(logits(params, x), y)
        penalty = 1e-4 / 2 / batch * sum(jnp.sum(weight**2) for weight, _ in params)
        return errors.mean() + penalty

    def epoch(carry):
        params, state, least, failures, count = carry
        order = jr.permutation(jr.fold_in(key, count), len(rows))
        order = order[: len(rows) // batch * batch].reshape(-1, batch)

        def step(carry, index):
            params, state = carry
            value, grad = jax.value_and_grad(loss)(params, rows[index], labels[index])
            updates, state = optim.update(grad, state)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = lax.scan(step, (params, state), order)
        value = values.mean()
        failures = jnp.where(value > least - 1e-4, failures + 1, 0)
        return params, state, jnp.minimum(least, value), failures, count + 1

    more = lambda carry: (carry[3] <= 10) & (carry[4] < 10_000)
    start = params, optim.init(params), jnp.asarray(jnp.inf, rows.dtype), 0, 0
    params = lax.while_loop(more, epoch, start)[0]
    return jnp.mean((logits(params, test_rows) > 0) == (test_labels > 0.5))


# --- the runs -------------------------------------------------------------------------


def run(task, num_simulations, options):
    """Learns one posterior, and compares it with those of sbibm."""
    prior, simulator, bounds = TASKS[task]
    rng = np.random.default_rng(num_simulations)
    thetas = prior(rng, num_simulations)
    xs = simulator(rng, thetas)
    begin = time.process_time()
    posterior = fd.learn.learn_posterior(
        thetas, xs, bounds=bounds, num_steps=options.steps, progress=options.verbose
    )
    seconds = time.process_time() - begin
    scores = {num_jumps: [] for num_jumps in JUMPS}
    for number in range(1, options.observations + 1):
        x, samples = reference(task, number)
        for num_jumps in JUMPS:
            key = jr.fold_in(jr.key(number), num_jumps)
            own = np.asarray(posterior.sample(key, x, len(samples), num_jumps))
            scores[num_jumps].append(c2st(samples, own, options.folds))
    return {
        "task": task,
        "simulations": num_simulations,
        "seconds": round(seconds),
        "c2st": scores,
        "held_out": posterior.held_out,
    }


def line(row):
    means = [f"{np.mean(row['c2st'][num_jumps]):.3f}" for num_jumps in JUMPS]
    cells = row["task"], f"{row['simulations']:,}", *means, row["seconds"]
    return f"| {' | '.join(map(str, cells))} |"


def main():
    """Runs all tasks and numbers of simulations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    budgets = [1000, 10_000, 100_000]
    parser.add_argument("--simulations", nargs="+", type=int, default=budgets)
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--folds", type=int, default=1, help="1 to 5, for each score")
    parser.add_argument("--steps", type=int, default=3000, help="of the distillation")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default="out/sbi")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        # One core for all, before JAX starts its threads.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    options.out.mkdir(parents=True, exist_ok=True)
    heads = ["task", "simulations", *(f"{n} jumps" for n in JUMPS), "CPU s"]
    print(f"| {' | '.join(heads)} |\n" + "| --- " * len(heads) + "|", flush=True)
    for num_simulations in options.simulations:
        for task in options.tasks:
            row = run(task, num_simulations, options)
            print(line(row), flush=True)
            path = options.out / f"{task}_{num_simulations}.json"
            path.write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
