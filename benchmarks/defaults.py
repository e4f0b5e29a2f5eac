"""A gate for the defaults: every objective as it is, on six densities in various units.

    python benchmarks/defaults.py                       # all, and the table
    python benchmarks/defaults.py --objectives LSD MeanFlow --densities spiral
    python benchmarks/defaults.py --rejudge             # the table of finished runs

Each objective trains the same network with the same optimiser and its own defaults. The
error is the sliced Wasserstein distance of its samples from the data, in standard
deviations. The gate fails if an objective has more than 1.5 times the error of LSD in one
jump, or a larger error in four jumps than in one. `EXCEPTIONS` lists the objectives that
may, with the reasons. Each finished run is a line of `runs.jsonl` under `--out`. When
started again, the script makes only the missing runs. It exits with status 1 if the gate
fails.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from methods import METHODS

import flowdiffrax as fd

STEPS, WIDTH, NUM_SAMPLES = 2000, 64, 20_000
LIMIT = 1.5
# Two sets of this many samples from the data are about this far from each other.
NOISE = 0.01


# --- densities ------------------------------------------------------------------------


class Density(NamedTuple):
    """A mixture of round Gaussians with a standard deviation of 1, and its own units."""

    weights: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    scale: float
    mean: float
    batch_size: int
    accumulate: int = 1

    @property
    def size(self):
        return self.means.shape[1]

    def draw(self, key, n):
        part_key, point_key = jr.split(key)
        part = jr.choice(part_key, len(self.weights), (n,), p=jnp.asarray(self.weights))
        noise = jr.normal(point_key, (n, self.size))
        x = jnp.asarray(self.means)[part] + jnp.asarray(self.stds)[part][:, None] * noise
        return self.scale * x + self.mean

    def base(self):
        """A base with the mean and standard deviation of the data."""
        return fd.data.GaussianBase(self.scale, self.mean)

    def velocity(self):
        centred = fd.exact.GaussianMixtureVelocity(
            self.weights,
            self.scale * self.means,
            (self.scale * self.stds) ** 2,
            fd.LinearInterpolant(),
            self.scale,
        )
        return lambda t, x, args: centred(t, x - self.mean, args)


def standardised(weights, means, stds, **units):
    weights, means, stds = map(np.asarray, (weights, means, stds))
    means = means - weights @ means
    spread = np.sqrt(weights @ ((means**2).mean(axis=1) + stds**2))
    return Density(weights, means / spread, stds / spread, **units)


def mixture(size, **units):
    rng = np.random.default_rng(size)
    means, stds = 1.2 * rng.standard_normal((5, size)), rng.uniform(0.2, 0.5, 5)
    return standardised([0.3, 0.25, 0.2, 0.15, 0.1], means, stds, **units)


def modes(**units):
    angles = np.arange(8) * np.pi / 4
    means = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return standardised(np.full(8, 1 / 8), means, np.full(8, 0.15), **units)


def spiral(**units):
    angles = np.linspace(0.6, 3.4 * np.pi, 60)
    means = 0.1 * angles[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return standardised(np.full(60, 1 / 60), means, np.full(60, 0.06), **units)


def tail(**units):
    stds = 0.3 * 2.0 ** np.arange(4)
    return standardised([0.5, 0.3, 0.15, 0.05], np.zeros((4, 4)), stds, **units)


DENSITIES = {
    "mixture, 2-D": mixture(2, scale=1.0, mean=0.0, batch_size=256),
    "modes, 2-D": modes(scale=0.01, mean=0.0, batch_size=1024),
    "spiral, 2-D": spiral(scale=1000.0, mean=20.0, batch_size=256, accumulate=2),
    "tail, 4-D": tail(scale=1.0, mean=20.0, batch_size=512),
    "mixture, 8-D": mixture(8, scale=1000.0, mean=0.0, batch_size=64, accumulate=4),
    "mixture, 16-D": mixture(16, scale=0.01, mean=0.0, batch_size=32),
}


# --- objectives -----------------------------------------------------------------------

# Those that learn maps to be sampled.
OBJECTIVES = {name: row for name, row in METHODS.items() if row.no_sampler is None}

_ONE_JUMP = "learns jumps to the end, or from the base, only: sample it in one"
_NOISY = "noisy in small batches: its gradient runs through the derivative in space"
_STEEP = "follows an exact velocity, which is steep near heavy tails: see `DataEndWeight`"
# (name, number of jumps) -> why it may fail there
EXCEPTIONS = {
    **{(name, 4): _ONE_JUMP for name, row in OBJECTIVES.items() if row.is_single},
    ("EMD", 1): _NOISY,
    ("LMD", 1): _STEEP,
    ("AYF-LMD", 1): _STEEP,
    ("FreeFlow", 1): _STEEP,
    ("PFMM", 4): "compares states, so that short jumps count little without `InverseGap`",
}


def batches_of(name, density):
    interpolant = fd.LinearInterpolant()
    if OBJECTIVES[name].teacher != "trajectories":
        return fd.data.InterpolantBatches(
            interpolant, density.draw, density.batch_size, base=density.base()
        )
    ts = jnp.linspace(0.0, 1.0, 33)
    x0 = density.base()(jr.key(7), jnp.zeros((8192, density.size)))
    ys = fd.solve_trajectories(density.velocity(), x0, ts, atol=1e-5 * density.scale)
    return fd.data.TrajectoryBatches(ts, ys, density.batch_size)


def teacher_of(name, density):
    velocity = density.velocity()
    teachers = {"velocity": velocity, "map": runge_kutta(velocity)}
    return teachers.get(OBJECTIVES[name].teacher)


def runge_kutta(velocity, num_steps=4):
    """A map made of a few classical steps, which is cheap to train with."""

    def flow_map(s, t, x, args):
        h = (t - s) / num_steps
        for index in range(num_steps):
            u = s + index * h
            k1 = velocity(u, x, args)
            k2 = velocity(u + h / 2, x + h / 2 * k1, args)
            k3 = velocity(u + h / 2, x + h / 2 * k2, args)
            k4 = velocity(u + h, x + h * k3, args)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    return flow_map


# --- runs -----------------------------------------------------------------------------


def train(name, density, seed):
    """The averaged map after training, whose steps run in one compiled loop."""
    objective = OBJECTIVES[name].make()
    map_key, run_key = jr.split(jr.key(seed))
    net = fd.nn.MLP(density.size, WIDTH, 3, scale=density.scale, key=map_key)
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, 100, STEPS)
    optim = optax.adam(rate, b2=0.99)
    options = {"ema_decay": 0.99}
    step = fd.train.make_step(objective, optim, accumulate=density.accumulate, **options)
    state = fd.train.TrainState.create(
        fd.FlowMap(net), optim, key=run_key, objective=objective, **options
    )
    batches, teacher = batches_of(name, density), teacher_of(name, density)

    @eqx.filter_jit
    def run(state, batches, teacher):
        arrays, rest = eqx.partition(state, eqx.is_array)

        def one(_, arrays):
            state, _ = step(eqx.combine(arrays, rest), batches, teacher)
            return eqx.filter(state, eqx.is_array)

        arrays = jax.lax.fori_loop(0, STEPS, one, arrays)
        return eqx.combine(arrays, rest).ema_map

    return run(state, batches, teacher)


def sliced_wasserstein(x, y, num_directions=128):
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((x.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    x, y = np.sort(x @ directions, axis=0), np.sort(y @ directions, axis=0)
    return float(np.sqrt(np.mean((x - y) ** 2)))


@functools.cache
def test_set(name):
    density = DENSITIES[name]
    x0 = density.base()(jr.key(123), jnp.zeros((NUM_SAMPLES, density.size)))
    return x0, np.asarray(density.draw(jr.key(321), NUM_SAMPLES))


@eqx.filter_jit
def sample(flow_map, x0, jumps):
    return jax.vmap(lambda x: fd.sample(flow_map, x, jumps))(x0)


def measure(name, density_name, seed):
    start = time.perf_counter()
    density = DENSITIES[density_name]
    flow_map = train(name, density, seed)
    x0, data = test_set(density_name)
    errors = {}
    for jumps in (1, 4):
        x1 = np.asarray(sample(flow_map, x0, jumps))
        errors[str(jumps)] = sliced_wasserstein(x1 / density.scale, data / density.scale)
    return {
        "objective": name,
        "density": density_name,
        "seed": seed,
        "errors": errors,
        "seconds": time.perf_counter() - start,
    }


# --- the verdict ----------------------------------------------------------------------


def by_run(lines):
    return {(line["objective"], line["density"]): line["errors"] for line in lines}


def failures(lines):
    """The failures, as (objective, density, jumps, how)."""
    by = by_run(lines)
    found = []
    for (name, density), errors in by.items():
        one, four = errors["1"], errors["4"]
        best = by.get(("LSD", density))
        if best is not None and not one <= LIMIT * best["1"] + NOISE:
            found.append((name, density, 1, f"{one / best['1']:.2f} times LSD"))
        if not four <= one + NOISE:
            found.append((name, density, 4, f"{four / one:.2f} times one jump"))
    return found


def table(lines):
    by = by_run(lines)
    densities = [name for name in DENSITIES if any(name == key[1] for key in by)]
    text = ["| objective | " + " | ".join(densities) + " |"]
    text.append("| --- " * (len(densities) + 1) + "|")
    for name in OBJECTIVES:
        if not any(name == key[0] for key in by):
            continue
        cells = [_cell(name, by.get((name, density))) for density in densities]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _cell(name, errors):
    """The error in one jump, and in four if the objective learns such jumps."""
    if errors is None:
        return "-"
    four = "" if (name, 4) in EXCEPTIONS else f", {errors['4']:.3f}"
    return f"{errors['1']:.3f}{four}"


def main(*, objectives, densities, seed, out, rejudge):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    path.touch()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    done = {(line["objective"], line["density"], line["seed"]) for line in lines}
    for density in densities:
        for name in objectives:
            if rejudge or (name, density, seed) in done:
                continue
            lines.append(measure(name, density, seed))
            with path.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            errors, seconds = lines[-1]["errors"], lines[-1]["seconds"]
            print(
                f"{density:14} {name:20} {errors['1']:.3f} {errors['4']:.3f} "
                f"{seconds:.0f} s",
                flush=True,
            )
    print(table(lines))
    bad = [one for one in failures(lines) if (one[0], one[2]) not in EXCEPTIONS]
    for name, density, jumps, how in bad:
        print(f"FAILED: {name} on {density}, {jumps} jumps: {how}")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), metavar="O")
    parser.add_argument("--densities", nargs="+", default=list(DENSITIES), metavar="D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rejudge", action="store_true", help="do not train")
    parser.add_argument("--out", default="out/defaults")
    sys.exit(1 if main(**vars(parser.parse_args())) else 0)
