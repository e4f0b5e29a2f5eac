"""A stiff problem over nine decades of time, in one jump or in a few.

Robertson's three reactions have rates from 0.04 to 3e7. `learn_solver` finds out that the
problem is stiff, that shares stay positive and that their sum is conserved, and learns a
map in relaxation form from trajectories of Kvaerno5, whose times grow in proportion.

    python examples/stiff_robertson.py

prints errors (relative, rms over the batch, the worst of eight times), the least share,
the error of the mass and seconds. It saves a figure and the map under `--out`.
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
import optimistix as optx

import flowdiffrax as fd

# The equations of an implicit step need more digits than float32 has.
jax.config.update("jax_enable_x64", True)
T0, T1 = 0.0, 1e4
GRID = np.asarray([0.0, *np.logspace(-5, 4, 73)])
TIMES = GRID[17::8]  # 1e-3, 1e-2, ...
# Diffrax's default, a chord method, takes five times as many steps. With looser
# tolerances than these, long steps can end on a wrong branch.
STIFF = diffrax.Kvaerno5(root_finder=optx.Newton(rtol=1e-6, atol=1e-14))


def vector_field(t, x, args):
    slow, back, fast = 0.04 * x[0], 1e4 * x[1] * x[2], 3e7 * x[1] ** 2
    return jnp.stack([back - slow, slow - back - fast, fast])


def draw(key, n):
    """Mixtures near (1, 0, 0): a trace of the second species and some of the third."""
    y, z = jr.uniform(key, (2, n)) ** 4 * jnp.asarray([[1e-4], [0.4]])
    return jnp.stack([1 - y - z, y, z], axis=1)


def learn(num_steps=20_000, seed=0, pool=4096):
    """A learned solver, from the equations and the mixtures of interest."""
    one = lambda key: draw(key, 1)[0]
    how = {"num_steps": num_steps, "pool_size": pool, "key": jr.key(seed)}
    return fd.learn_solver(vector_field, one, T0, T1, ts=GRID, minutes=5, **how)


@eqx.filter_jit
def integrate(solver, controller, dt0, ts, x0):
    return jax.vmap(lambda x: diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), solver, T0, ts[-1], dt0, x, max_steps=2_000,
        saveat=diffrax.SaveAt(ts=ts), stepsize_controller=controller, throw=False,
    ))(x0)  # fmt: skip


def main(*, steps=20_000, pool=4096, num_samples=4096, methods=7, out="out/robertson"):
    """Learns, compares the first `methods` methods and draws."""
    x0 = draw(jr.key(1), num_samples).at[0].set(jnp.asarray([1.0, 0, 0]))  # textbook
    learned = learn(num_steps=steps, pool=pool)
    learned.save(f"{out}/map.safetensors")
    flow_map = learned.flow_map
    to = lambda tol: diffrax.PIDController(jnp.asarray(tol), jnp.asarray(1e-6 * tol))
    even = lambda n: diffrax.StepTo(jnp.append(T0, T1 / 1e7 ** (np.arange(n)[::-1] / n)))
    jump, hybrid = fd.FlowMapSolver(flow_map), fd.HybridSolver(flow_map, STIFF)
    truth = integrate(STIFF, to(1e-9), 1e-5, TIMES, x0).ys
    print(f"method | steps | error 1 | 2 | 3 | least | mass | seconds\n---{' | ---' * 7}")
    for name, *inputs in (
        ("map, 1 jump", jump, even(1), None, TIMES),
        ("map, 4 jumps", jump, even(4), None, TIMES),
        *((f"Kvaerno5, {a:.0e}", STIFF, to(a), 1e-5, TIMES) for a in (1e-2, 1e-4, 1e-6)),
        ("HybridSolver, 1e-02", hybrid, to(1e-2), 1e-5, TIMES),
        ("Tsit5 until t = 1, 1e-03", diffrax.Tsit5(), to(1e-3), 1e-5, TIMES[:4]),
    )[:methods]:
        jax.block_until_ready(integrate(*inputs, x0))
        begin = time.perf_counter()
        solution = jax.block_until_ready(integrate(*inputs, x0))
        seconds, ys, stats = time.perf_counter() - begin, solution.ys, solution.stats
        error = jnp.sqrt(((ys / truth[:, : ys.shape[1]] - 1) ** 2).mean(axis=0)).max(0)
        bounds = ys[:, 1:].min(), jnp.abs(ys.sum(axis=-1) - 1).max()
        row = [stats["num_steps"].mean(), *error, *bounds, seconds]
        print(name, *(f"{float(number):.3g}" for number in row), sep=" | ")
    jumps = jax.vmap(lambda t: flow_map(T0, t, x0[0]))(GRID[1:])
    plt.loglog(GRID[1:], jumps, "-", TIMES, truth[0], "k.")
    plt.gca().set(title="one jump, Kvaerno5 (dots)", xlabel="time", ylabel="share")
    plt.savefig(f"{out}/robertson.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for k, v in main.__kwdefaults__.items():
        parser.add_argument("--" + k.replace("_", "-"), type=type(v), default=v)
    main(**vars(parser.parse_args()))
