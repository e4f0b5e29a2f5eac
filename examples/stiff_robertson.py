"""A stiff problem over nine decades of time, in one jump or in a few.

Robertson's three reactions have rates from 0.04 to 3e7. No network could learn an average
velocity that varies so much. Here a jump is one step of linear exchange between species
instead. Its rates are those of the reactions times factors of order one from the network:

    X = (I + h K)^{-1} x,   K_ij = k_ij exp(n_ij(x, log h)),   columns of K sum to zero.

No species can become negative, the mass is conserved to round-off, and X is x at h = 0.
With n = 0 this is a classical positive scheme, the untrained map of the table.

    python examples/stiff_robertson.py

prints errors (relative, rms over the batch, the worst of eight times), the least share,
the error of the mass and seconds. It saves a figure and the map under `--out`, and takes
2 minutes.
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


class ExchangeFlowMap(fd.AbstractFlowMap):
    """One implicit step of linear exchange, with rates that the network corrects."""

    net: fd.nn.MLP
    time_range = (T0, T1)

    def jump(self, s, t, x, args):
        h = jnp.asarray(t - s, x.dtype)
        # The second species at the end of the step, if the others stood still.
        source, decay = x[1] + 0.04 * h * x[0], 1 + 1e4 * h * x[2]
        y = 2 * source / (decay + jnp.sqrt(decay**2 + 1.2e8 * h * source))
        traces = jnp.log(jnp.stack([x[1], y]) + 1e-9) / 3 + 4
        z = jnp.stack([2 * x[0] - 1, jnp.log(x[2] + 1e-6) / 2 + 1, *traces])
        clock = jnp.log10(h + 1e-6) / 10 + 0.6
        n = self.net(0.0, clock.astype(jnp.float32), z.astype(jnp.float32))[:3]
        rates = jnp.stack([0.04 * jnp.ones_like(y), 1e4 * x[2], 3e7 * y])
        # At h = 0 the network has no effect: the velocity there is that of the reactions.
        a, b, c = h * rates * jnp.exp(h / (h + 1e-4) * n.astype(x.dtype))
        second = (a * x[0] + (1 + a) * x[1]) / (1 + a + b + c + a * c)
        return jnp.stack([(x[0] + b * second) / (1 + a), second, x[2] + c * second])


class LogMatching(fd.objectives.AbstractResidualObjective):
    """Trajectory matching in logarithms, for species with very different amounts."""

    times: fd.times.AbstractTimes
    weight: fd.weights.AbstractWeight = fd.weights.NoWeight()

    def residual(self, flow_map, teacher, path, s, t, args, key):
        log = lambda x: jnp.log(x + jnp.asarray([1e-6, 1e-9, 1e-8]))
        return log(flow_map(s, t, path.evaluate(s), args)) - log(path.evaluate(t))


def learn(num_steps=20_000, seed=0, pool=8192):
    """The flow map, learned from trajectories of Kvaerno5."""
    draw_key, late_key, fit_key = jr.split(jr.key(seed), 3)
    net = fd.nn.MLP(4, 64, 3, frequencies=(0.5,), key=jr.key(seed))
    net = jax.tree_util.tree_map(lambda w: jnp.float32(w) if eqx.is_array(w) else w, net)
    how = {"solver": STIFF, "rtol": 1e-6, "atol": 1e-12}
    solve = lambda x: fd.solve_trajectories(vector_field, x, GRID, **how)
    ys = solve(draw(draw_key, pool // 2))
    # Half of them start late on the others: short steps are needed there too.
    late = ys[jnp.arange(pool // 2), jr.randint(late_key, (pool // 2,), 1, GRID.size)]
    batches = fd.data.TrajectoryBatches(GRID, jnp.concatenate([ys, solve(late)]), 1024)
    grid = fd.times.GridTimes(GRID)
    objective = LogMatching(
        fd.times.MixedTimes((grid, fd.times.StartAt(grid, 0.0)), (0.5, 0.5))
    )
    rate = optax.warmup_cosine_decay_schedule(0, 5e-3, num_steps // 30, num_steps)
    optim, run = optax.adam(rate, b2=0.99), {"num_steps": num_steps, "key": fit_key}
    return fd.train.fit(ExchangeFlowMap(net), objective, batches, optim, **run).ema_map


@eqx.filter_jit
def integrate(solver, controller, dt0, ts, x0):
    return jax.vmap(lambda x: diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field), solver, T0, ts[-1], dt0, x, max_steps=2_000,
        saveat=diffrax.SaveAt(ts=ts), stepsize_controller=controller, throw=False,
    ))(x0)  # fmt: skip


def main(*, steps=20_000, pool=8192, num_samples=4096, methods=9, out="out/robertson"):
    """Learns, compares the first `methods` methods and draws."""
    x0 = draw(jr.key(1), num_samples).at[0].set(jnp.asarray([1.0, 0, 0]))  # textbook
    flow_map = learn(num_steps=steps, pool=pool)
    fd.train.save(f"{out}/map.safetensors", {"steps": steps, "pool": pool}, flow_map)
    to = lambda tol: diffrax.PIDController(jnp.asarray(tol), jnp.asarray(1e-6 * tol))
    even = lambda n: diffrax.StepTo(jnp.append(T0, T1 / 1e7 ** (np.arange(n)[::-1] / n)))
    jump, untrained = fd.FlowMapSolver(flow_map), ExchangeFlowMap(lambda *_: jnp.zeros(3))
    hybrid, wary = (fd.HybridSolver(m, STIFF) for m in (flow_map, untrained))
    truth = integrate(STIFF, to(1e-9), 1e-5, TIMES, x0).ys
    print(f"method | steps | error 1 | 2 | 3 | least | mass | seconds\n---{' | ---' * 7}")
    for name, *inputs in (
        ("map, 1 jump", jump, even(1), None, TIMES),
        ("map, 4 jumps", jump, even(4), None, TIMES),
        ("untrained map, 1 jump", fd.FlowMapSolver(untrained), even(1), None, TIMES),
        *((f"Kvaerno5, {a:.0e}", STIFF, to(a), 1e-5, TIMES) for a in (1e-2, 1e-4, 1e-6)),
        ("HybridSolver, 1e-02", hybrid, to(1e-2), 1e-5, TIMES),
        ("HybridSolver, untrained, 1e-02", wary, to(1e-2), 1e-5, TIMES),
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
