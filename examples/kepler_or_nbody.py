"""The Kepler problem over a hundred periods, in jumps of up to half a period.

The velocity is a combination of position and momentum. The network computes the
coefficients from the step and from e cos E and e sin E (e: eccentricity, E: eccentric
anomaly), which are invariant under rotations. Without projection, the map drifts off the
orbit, and may lose it, with an infinite error. With a projection to the initial energy
and angular momentum after each jump, it stays on the orbit.

    python examples/kepler_or_nbody.py

prints calls of the network or the vector field, errors of position after 0.7, 9.7 and
99.7 periods, the last error of energy (both root mean squares) and seconds for the batch.
It saves a figure and the map under `--out`, in about two minutes on 2 cores.
"""

import argparse
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

import flowdiffrax as fd

# In float32, rounding alone would limit the best solvers over a hundred periods.
jax.config.update("jax_enable_x64", True)
T0, T1, PERIOD, LONGEST = 0.0, 200 * np.pi, 2 * np.pi, np.pi


def vector_field(t, x, args):
    return jnp.concatenate([x[2:], -x[:2] / jnp.sum(x[:2] ** 2) ** 1.5])


def invariants(x, args=None):
    energy = jnp.sum(x[2:] ** 2) / 2 - 1 / jnp.linalg.norm(x[:2])
    return jnp.stack([energy, x[0] * x[3] - x[1] * x[2]])


def draw(key, n, t=0.0, largest=0.5):
    """States at time `t` on orbits of semi-major axis 1, from Kepler's equation."""
    e, tilt, phase = jr.uniform(key, (3, n)) * jnp.array([[largest], [PERIOD], [PERIOD]])
    mean = phase + t
    E = mean + e * jnp.sin(mean)
    for _ in range(8):
        E = E - (E - e * jnp.sin(E) - mean) / (1 - e * jnp.cos(E))
    c, s, b, turn = jnp.cos(E), jnp.sin(E), jnp.sqrt(1 - e**2), jnp.exp(1j * tilt)
    q, p = ((c - e) + 1j * b * s) * turn, (-s + 1j * b * c) / (1 - e * c) * turn
    return jnp.stack([q.real, q.imag, p.real, p.imag], axis=-1)


class OrbitNet(eqx.Module):
    """An average velocity that rotates and scales with the orbit."""

    net: fd.nn.MLP

    def __call__(self, s, t, x, args=None):
        q, p, r = x[:2], x[2:], jnp.linalg.norm(x[:2])
        axis = 1 / (2 / r - p @ p)
        cosine, sine, rate = 1 - r / axis, q @ p / jnp.sqrt(axis), axis**-1.5
        z = jnp.stack([cosine, sine, axis / r - 1, cosine**2 + sine**2])
        clock = rate * (t - s) / LONGEST
        n = self.net(0.0, clock.astype(jnp.float32), z.astype(jnp.float32))
        a, b, c, d = n.astype(x.dtype)
        return jnp.concatenate([a * rate * q + b * p, c * rate**2 * q + d * rate * p])


def learn(num_steps=20_000, seed=0, pool=8192):
    """The flow map, learned from trajectories of half a period, and then projected."""
    draw_key, net_key, fit_key = jr.split(jr.key(seed), 3)
    net = fd.nn.MLP(4, 64, 3, frequencies=(0.5,), key=net_key)
    net = jax.tree_util.tree_map(lambda w: jnp.float32(w) if eqx.is_array(w) else w, net)
    flow_map = fd.AutonomousFlowMap(fd.FlowMap(OrbitNet(net)))
    ts = jnp.linspace(0.0, LONGEST, 17)
    # Train on slightly larger eccentricities too: a map is worst at the edge of its data.
    x0, solver = draw(draw_key, pool, largest=0.55), diffrax.Dopri8()
    ys = fd.solve_trajectories(vector_field, x0, ts, solver=solver, rtol=1e-7, atol=1e-7)
    start = fd.times.StartAt(fd.times.GridTimes(ts), 0.0)
    times = fd.times.MixedTimes((start, fd.times.EndAt(start, LONGEST)), (0.7, 0.3))
    objective = fd.TrajectoryMatching(times, fd.weights.InverseGap(1.0))
    batches = fd.data.TrajectoryBatches(ts, ys, 1024)
    schedule, warmup = optax.warmup_cosine_decay_schedule, num_steps // 30
    rate = lambda peak: schedule(0, peak, warmup, num_steps, exponent=2)
    # Muon for the matrices and Adam for the rest give a third of Adam's error.
    optim = optax.contrib.muon(rate(0.02), adam_learning_rate=rate(2e-3))
    run = {"num_steps": num_steps, "key": fit_key}
    flow_map = fd.train.fit(flow_map, objective, batches, optim, **run).ema_map
    # Training through the projection gave much worse maps.
    return fd.ProjectedFlowMap(flow_map, fd.ConserveInvariants(invariants, 2))


@eqx.filter_jit
def integrate(solver, controller, dt0, ts, x0):
    terms, start = diffrax.ODETerm(vector_field), lambda x: x
    if isinstance(solver, diffrax.SemiImplicitEuler):
        force = lambda t, q, args: vector_field(t, jnp.tile(q, 2), args)[2:]
        terms = diffrax.ODETerm(lambda t, p, args: p), diffrax.ODETerm(force)
        start = lambda x: (x[:2], x[2:])
    solution = jax.vmap(lambda x: diffrax.diffeqsolve(
        terms, solver, T0, ts[-1], dt0, start(x), saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=controller, max_steps=100_000, throw=False,
    ))(x0)  # fmt: skip
    return jnp.concatenate(jax.tree_util.tree_leaves(solution.ys), -1), solution.stats


def main(*, steps=20_000, pool=8192, num_samples=1024, methods=5, out="out/kepler"):
    """Learns, compares and draws, with the first `methods` methods."""
    x0, flow_map = draw(jr.key(1), num_samples), learn(steps, pool=pool)
    fd.train.save(f"{out}/map.safetensors", {"steps": steps, "pool": pool}, flow_map)
    # Avoid whole periods, where the energy error of a symplectic solver is small.
    ts = PERIOD * (jnp.geomspace(1.0, 100.0, 25) - 0.3)
    truth = jax.vmap(lambda t: draw(jr.key(1), num_samples, t), out_axes=1)(ts)
    energy = jax.vmap(jax.vmap(lambda x: invariants(x)[0]))
    rms = lambda error: np.sqrt(np.mean(np.square(error), axis=0))
    print(f"| method | calls | 0.7 | 9.7 | 99.7 | energy | seconds |\n{'| --- ' * 7}|")
    for name, cost, solver, choices in (
        ("projected map, jumps a period", 1, fd.FlowMapSolver(flow_map), (2, 4, 8)),
        ("map, jumps a period", 1, fd.FlowMapSolver(flow_map.flow_map), (2, 4, 8)),
        ("symplectic Euler, steps a period", 1, diffrax.SemiImplicitEuler(), (200, 800)),
        ("Tsit5, tolerance", 6, diffrax.Tsit5(), (1e-6, 1e-8)),
        ("Dopri8, tolerance", 13, diffrax.Dopri8(), (1e-6, 1e-8)),
    )[:methods]:
        for setting in choices:
            inputs = diffrax.ConstantStepSize(), jnp.asarray(PERIOD / setting), ts, x0
            if setting < 1:
                inputs = diffrax.PIDController(*jnp.full(2, setting)), 0.1, ts, x0
            jax.block_until_ready(integrate(solver, *inputs))
            begin = time.perf_counter()
            ys, stats = jax.block_until_ready(integrate(solver, *inputs))
            seconds = time.perf_counter() - begin
            position = rms(jnp.linalg.norm((ys - truth)[..., :2], axis=-1))
            drift = rms(energy(ys) - energy(truth))[-1]
            row = [cost * stats["num_steps"].mean(), *position[::12], drift, seconds]
            numbers = " | ".join(f"{float(number):.3g}" for number in row)
            print(f"| {name} {setting} | {numbers} |")
            if setting in (2, 200, 1e-6):
                plt.loglog(ts / PERIOD, position, label=f"{name} {setting}")
    plt.legend(fontsize="x-small")
    plt.gca().set(xlabel="periods", ylabel="error of position")
    plt.savefig(f"{out}/kepler.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for k, v in main.__kwdefaults__.items():
        parser.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    main(**vars(parser.parse_args()))
