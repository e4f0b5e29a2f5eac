r"""Samples of Boltzmann densities in a few jumps, with exact weights.

Three densities $p(x) \propto e^{-U(x)}$ with closed formulas: a double well in two
dimensions, four particles with double-well bonds in the plane (DW-4), and thirteen
Lennard-Jones particles in space (LJ-13). Particles are mean-free, and their state is a
vector in an orthonormal basis of that space.

    python benchmarks/boltzmann.py

makes reference samples and the log-evidence by sequential Monte Carlo, learns a velocity
from the samples by flow matching, distils it into an invertible map, and fine-tunes the
map by the energy for four jumps. It prints, for the velocity in a hundred evaluations and
for the maps: the effective size per sample, the error of the log-evidence in nats with
its standard error, samples without a density, and the distance of the energies (W2, in
units of temperature) before and after weighing.
"""

import argparse
import functools
import json
import math
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import scipy.optimize

import flowdiffrax as fd

# --- targets --------------------------------------------------------------------------


class DoubleWell:
    size, std = 2, 1.5

    def energy(self, x):
        return x[0] ** 4 / 4 - 3 * x[0] ** 2 + x[0] + x[1] ** 2 / 2

    def network(self, width, key):
        return fd.nn.MLP(2, width, 3, scale=self.std, key=key)

    def align(self, x0, x1):
        return x0, x1


class Particles:
    """Mean-free particles, with a potential of their squared distances."""

    def __init__(self, n, dims, std, potential, trap=0.0):
        self.n, self.dims, self.std = n, dims, std
        self.potential, self.trap = potential, trap
        self.size = (n - 1) * dims
        # Helmert's basis of the vectors with mean zero.
        rows = np.triu(np.ones((n, n - 1)))
        rows[np.arange(1, n), np.arange(n - 1)] = -np.arange(1, n)
        self.basis = rows / np.linalg.norm(rows, axis=0)

    def positions(self, y):
        y = y.reshape(*y.shape[:-1], self.n - 1, self.dims)
        return self.basis.astype(y.dtype) @ y

    def energy(self, y):
        x = self.positions(y)
        i, j = np.triu_indices(self.n, 1)
        bonds = self.potential(jnp.sum((x[i] - x[j]) ** 2, axis=-1))
        return jnp.sum(bonds) + self.trap / 2 * jnp.sum(y**2)

    def network(self, width, key):
        return ParticleNet(self, width, key=key)

    def align(self, x0, x1):
        """Permutes and rotates each base point towards its data point."""
        x0, x1 = self.positions(x0), self.positions(x1)
        for _ in range(2):
            costs = -np.einsum("bid,bjd->bji", x0, x1)
            order = [scipy.optimize.linear_sum_assignment(cost)[1] for cost in costs]
            x0 = np.take_along_axis(x0, np.asarray(order)[..., None], axis=1)
            u, _, v = np.linalg.svd(np.einsum("bid,bie->bde", x0, x1))
            x0 = x0 @ (u @ v)
        back = lambda x: (self.basis.T @ x).reshape(len(x), -1)
        return back(x0), back(x1)


def bond(squared):
    away = jnp.sqrt(squared) - 4
    return 0.9 * away**4 - 4 * away**2


def lennard_jones(squared):
    inverse = squared**-3
    return inverse**2 - 2 * inverse


TARGETS = {
    "double-well": DoubleWell(),
    "dw4": Particles(4, 2, 2.0, bond),
    "lj13": Particles(13, 3, 1.0, lennard_jones, trap=1.0),
}


# --- reference ------------------------------------------------------------------------


def log_base(std, x):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, scale=std))


def tempered_samples(target, num, key, num_moves=10, num_leaps=8):
    """Sequential Monte Carlo from the base to the target, with Hamiltonian moves.

    Returns samples and the estimate of the log-evidence.
    """

    def log_density(x, temper):
        base = log_base(target.std, x)
        return base + temper * jnp.nan_to_num(-target.energy(x) - base, neginf=-1e30)

    gains = jax.jit(jax.vmap(lambda x: -target.energy(x) - log_base(target.std, x)))

    def share(change, gain):
        log_weights = jnp.asarray(change * gain, jnp.float32)
        made = fd.likelihood.importance_weights(log_weights, jnp.zeros(num))
        return float(made.effective_size) / num

    @jax.jit
    def move(key, xs, temper, step):
        value_and_grad = jax.value_and_grad(log_density)

        def one(key, x):
            momentum_key, accept_key = jr.split(key)
            p = jr.normal(momentum_key, x.shape, x.dtype)
            before, slope = value_and_grad(x, temper)
            end = before - p @ p / 2, x, p, slope

            def leap(_, state):
                _, x, p, slope = state
                p = p + step / 2 * slope
                x = x + step * p
                value, slope = value_and_grad(x, temper)
                p = p + step / 2 * slope
                return value - p @ p / 2, x, p, slope

            start, _, _, _ = end
            last, new, _, _ = jax.lax.fori_loop(0, num_leaps, leap, end)
            accept = jnp.log(jr.uniform(accept_key)) < last - start
            return jnp.where(accept, new, x), accept

        xs, accepted = jax.vmap(one)(jr.split(key, len(xs)), xs)
        return xs, jnp.mean(accepted)

    base_key, key = jr.split(key)
    xs = target.std * jr.normal(base_key, (num, target.size))
    temper, total, step = 0.0, 0.0, 0.1
    while temper < 1:
        gain = np.nan_to_num(np.asarray(gains(xs), np.float64), neginf=-1e30)
        # The longest step after which 95 % of the samples are effective.
        low, high = math.log(1e-30), math.log(1 - temper)
        if share(math.exp(high), gain) < 0.95:
            for _ in range(30):
                middle = (low + high) / 2
                is_long = share(math.exp(middle), gain) < 0.95
                low, high = (low, middle) if is_long else (middle, high)
            high = low
        weights = math.exp(high) * gain
        temper = min(temper + math.exp(high), 1.0)
        if 1 - temper < 1e-9:
            temper = 1.0
        total += float(np.logaddexp.reduce(weights) - math.log(num))
        key, draw_key, *keys = jr.split(key, 2 + num_moves)
        p = np.exp(weights - weights.max())
        xs = xs[jr.choice(draw_key, num, (num,), p=jnp.asarray(p / p.sum(), jnp.float32))]
        for each in keys:
            xs, rate = move(each, xs, temper, step)
            step = float(np.clip(step * math.exp(0.5 * (float(rate) - 0.8)), 1e-4, 1.0))
    return xs, total


# --- networks -------------------------------------------------------------------------


class ParticleNet(eqx.Module):
    """Velocities of particles along the lines between them, from all distances."""

    target: Particles = eqx.field(static=True)
    embedding: fd.nn.TwoTimeEmbedding
    encode: eqx.nn.Linear
    rounds: list[tuple[eqx.nn.Linear, eqx.nn.Linear, eqx.nn.Linear]]
    last: eqx.nn.Linear

    def __init__(self, target, width, num_rounds=3, num_features=16, *, key):
        keys = iter(jr.split(key, 3 + 3 * num_rounds))
        linear = lambda a, b: eqx.nn.Linear(a, b, key=next(keys))
        self.target = target
        self.embedding = fd.nn.TwoTimeEmbedding(width, key=next(keys))
        self.encode = linear(num_features, width)
        self.rounds = [
            tuple(linear(width, width) for _ in range(3)) for _ in range(num_rounds)
        ]
        last = linear(width, 2)
        self.last = jax.tree_util.tree_map(lambda leaf: 0.1 * leaf, last)

    def __call__(self, s, t, y, args):
        n, width = self.target.n, self.last.in_features
        x = self.target.positions(y)
        i, j = np.triu_indices(n, 1)
        ends = jnp.zeros((n, len(i)), x.dtype).at[i, np.arange(len(i))].set(1)
        ends = ends.at[j, np.arange(len(j))].set(1)
        lines = (x[i] - x[j]) / self.target.std
        distance = jnp.sqrt(jnp.sum(lines**2, axis=-1) + 1e-4)
        centres = jnp.linspace(0.0, 4.0, self.encode.in_features)
        bumps = jnp.exp(-8 * (distance[:, None] - centres) ** 2)
        time = self.embedding(s, t)
        edges = jax.nn.silu(jax.vmap(self.encode)(bumps))
        for of_edge, of_ends, of_time in self.rounds:
            nodes = jax.vmap(of_ends)(ends @ edges / math.sqrt(n))
            new = jax.vmap(of_edge)(edges) + ends.T @ nodes
            edges = edges + jax.nn.silu(new * (1 + of_time(time)))
        out = jax.vmap(self.last)(edges)
        pull = out[:, :1] * lines / distance[:, None]
        sign = jnp.zeros((n, len(i)), x.dtype).at[i, np.arange(len(i))].set(1)
        sign = sign.at[j, np.arange(len(j))].set(-1)
        stretch = ends @ out[:, 1:] / (n * math.sqrt(width))
        v = sign @ pull / math.sqrt(n) + stretch * x
        return (self.target.basis.T.astype(x.dtype) @ v).reshape(-1)


# --- training -------------------------------------------------------------------------


def paired_batches(target, x1, batch_size, seed):
    """Batches of pairs of base and data, each aligned by the target's symmetries."""
    rng = np.random.default_rng(seed)
    x1 = np.asarray(x1)[rng.integers(len(x1), size=4 * len(x1))]
    x0 = target.std * rng.normal(size=x1.shape)
    x0, x1 = (jnp.asarray(x, jnp.float32) for x in target.align(x0, x1))

    def batches(key):
        rows = jr.randint(key, (batch_size,), 0, len(x0))
        return jax.vmap(fd.LinearInterpolant())(x0[rows], x1[rows]), None

    return batches


def learn_velocity(target, batches, options, key):
    net_key, key = jr.split(key)
    net = target.network(options.width, net_key)
    optim = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(options.rate, options.steps)),
    )
    flow_map = fd.FlowMap(net, time_range=(0.0, 1.0))
    return fd.train.fit(
        flow_map, fd.FlowMatching(), batches, optim, num_steps=options.steps, key=key
    ).ema_map


def distil(teacher, batches, options, key):
    objective = fd.objectives.Mixture(
        (
            fd.LagrangianMapDistillation(),
            fd.objectives.VelocityDistillation(),
            fd.objectives.CycleConsistency(fd.times.UniformTriangle()),
        ),
        shares=(4, 1, 1),
    )
    optim = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(options.rate, options.distil_steps)),
    )
    velocity = teacher.velocity
    return fd.train.fit(
        teacher, objective, batches, optim, num_steps=options.distil_steps, key=key,
        teacher=(velocity, velocity, None),
    ).ema_map  # fmt: skip


def by_energy(flow_map, target, options, key, num_jumps=4):
    """Fine-tunes a map by its exact weights: KL divergence minus log effective share."""
    base = functools.partial(log_base, target.std)
    optim = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(options.rate / 10, options.energy_steps)),
    )
    optim = optax.apply_if_finite(optim, options.energy_steps)

    def loss(params, static, x0):
        flow_map = eqx.combine(params, static)
        draw = lambda x0: fd.likelihood.sample_log_prob(flow_map, base, x0, num_jumps)
        x1, log_q = jax.vmap(draw)(x0)
        gap = log_q + jax.vmap(target.energy)(x1)
        # Without a density, or with an atom inside another.
        middle = jnp.nanmedian(gap)
        kept = jnp.isfinite(gap) & (jnp.abs(gap - middle) < 20)
        log_weights = jnp.where(kept, -gap, -jnp.inf)
        size = fd.likelihood.importance_weights(log_weights, 0 * gap).effective_size
        return jnp.mean(jnp.where(kept, gap, 0)) - jnp.log(size / len(x0))

    params, static = eqx.partition(flow_map, eqx.is_inexact_array)

    @jax.jit
    def step(carry, key):
        params, state, mean = carry
        x0 = target.std * jr.normal(key, (options.energy_batch, target.size))
        value, grads = jax.value_and_grad(loss)(params, static, x0)
        updates, state = optim.update(grads, state)
        params = optax.apply_updates(params, updates)
        mean = jax.tree_util.tree_map(lambda a, b: 0.98 * a + 0.02 * b, mean, params)
        return (params, state, mean), value

    carry = params, optim.init(params), params
    for index, each in enumerate(jr.split(key, options.energy_steps)):
        carry, value = step(carry, each)
        if index % 50 == 0:
            print(f"  energy step {index}: {float(value):.3f}", flush=True)
    return eqx.combine(carry[2], static)


# --- figures --------------------------------------------------------------------------


def flow_sampler(velocity, base):
    """25 steps of RK4 for the state and its log-density: 100 evaluations."""
    pair = fd.likelihood.LogDensityVelocity(velocity)

    def draw(x0):
        def step(state, t):
            h = 1 / 25
            add = lambda a, c, b: jax.tree_util.tree_map(lambda a, b: a + c * b, a, b)
            k1 = pair(t, state)
            k2 = pair(t + h / 2, add(state, h / 2, k1))
            k3 = pair(t + h / 2, add(state, h / 2, k2))
            k4 = pair(t + h, add(state, h, k3))
            for c, k in ((1, k1), (2, k2), (2, k3), (1, k4)):
                state = add(state, c * h / 6, k)
            return state, None

        return jax.lax.scan(step, (x0, base(x0)), jnp.arange(25) / 25)[0]

    return draw


def measure(name, draw, target, evidence, energies, num, key, chunk=250):
    begin = time.time()
    x0 = target.std * jr.normal(key, (num, target.size))
    x1, log_q = jax.lax.map(jax.jit(draw), x0, batch_size=chunk)
    seconds = time.time() - begin
    energy = np.asarray(jax.vmap(target.energy)(x1))
    weights = fd.likelihood.importance_weights(-energy, log_q)
    p = np.asarray(jax.nn.softmax(weights.log_weights), np.float64)
    quantiles = (np.arange(200) + 0.5) / 200
    true = np.quantile(energies, quantiles)
    order = np.argsort(energy)
    weighed = np.interp(quantiles, np.cumsum(p[order]), energy[order])
    distance = lambda q: float(np.sqrt(np.mean((q - true) ** 2)))
    row = {
        "name": name,
        "effective": float(weights.effective_size) / num,
        "evidence": float(weights.log_normaliser) - evidence,
        "error": float(weights.log_normaliser_error),
        "lost": int(weights.num_lost),
        "energy": distance(np.quantile(energy, quantiles)),
        "weighed": distance(weighed),
        "seconds": seconds,
    }
    shares = f"{row['effective']:.1%} | {row['evidence']:+.3f} ± {row['error']:.3f}"
    distances = f"{row['energy']:.2f} | {row['weighed']:.2f} | {seconds:.0f}"
    print(f"| {name} | {shares} | {row['lost']} | {distances} |", flush=True)
    return row


def run(name, options):
    target = TARGETS[name]
    keys = jr.split(jr.key(options.seed), 8)
    begin = time.time()
    runs = [
        tempered_samples(target, options.pool // 4, key) for key in jr.split(keys[0], 4)
    ]
    samples = jnp.concatenate([xs for xs, _ in runs])
    values = np.asarray([value for _, value in runs])
    evidence = float(np.logaddexp.reduce(values) - math.log(4))
    spread = float(values.std(ddof=1) / 2)
    print(
        f"{name}: log-evidence {evidence:.3f} ± {spread:.3f}, {time.time() - begin:.0f} s"
    )
    energies = np.asarray(jax.vmap(target.energy)(samples))
    batches = paired_batches(target, samples, options.batch_size, options.seed)
    teacher = learn_velocity(target, batches, options, keys[1])
    print(f"  flow matching: {time.time() - begin:.0f} s", flush=True)
    student = distil(teacher, batches, options, keys[2])
    print(f"  distillation: {time.time() - begin:.0f} s", flush=True)
    tuned = by_energy(student, target, options, keys[3]) if options.energy_steps else None
    base = functools.partial(log_base, target.std)
    jumps = lambda flow_map, n: (
        lambda x0: fd.likelihood.sample_log_prob(flow_map, base, x0, n)
    )
    print("| sampler | effective | log-evidence | lost | energy | weighed | seconds |")
    print("| --- " * 7 + "|")
    judge = functools.partial(
        measure, target=target, evidence=evidence, energies=energies, key=keys[4],
        num=options.samples,
    )  # fmt: skip
    rows = [judge("velocity, 100", flow_sampler(teacher.velocity, base))]
    rows += [judge(f"map, {n}", jumps(student, n)) for n in (1, 2, 4, 8)]
    if tuned is not None:
        rows.append(judge("map tuned by energy, 4", jumps(tuned, 4)))
    return {"target": name, "evidence": evidence, "error": spread, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--pool", type=int, default=20_000, help="of reference samples")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--distil-steps", type=int, default=4000)
    parser.add_argument("--energy-steps", type=int, default=400)
    parser.add_argument("--energy-batch", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="out/boltzmann")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.targets:
        found = run(name, options)
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
