"""The overhead of stepping a flow map through Diffrax over evaluating its network.

    python benchmarks/sampling.py                  # a table, about four minutes
    python benchmarks/sampling.py --errors raise   # with Equinox's run-time checks on

Each row is a way to make the same jumps from the same states. Times are ratios to a
hand-written `lax.scan` over the same network in the same rounds. In each round, all rows
run once in random order. The table gives the median over rounds, and the span from the
10th to the 90th percentile. Compilation is measured from a cleared cache.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import random
import time

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--errors", choices=("nan", "raise"), default="nan")
parser.add_argument("--rounds", type=int, default=40)
parser.add_argument("--builds", type=int, default=5)
parser.add_argument("--out", default="out/benchmarks")
options = parser.parse_args()
# Equinox reads this once, when it is imported.
os.environ["EQX_ON_ERROR"] = options.errors

import diffrax  # noqa: E402
import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402

import flowdiffrax as fd  # noqa: E402


class ConvNet(eqx.Module):
    """A small convolutional network that takes two times and an image."""

    layers: list[eqx.nn.Conv2d]

    def __init__(self, channels, width, depth, key):
        sizes = [channels + 2, *[width] * depth, channels]
        keys = jr.split(key, depth + 1)
        self.layers = [
            eqx.nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, key=keys[i])
            for i in range(depth + 1)
        ]

    def __call__(self, s, t, x, args):
        del args
        times = jnp.stack([s, t])[:, None, None]
        h = jnp.concatenate([x, jnp.broadcast_to(times, (2, *x.shape[1:]))])
        for layer in self.layers[:-1]:
            h = jax.nn.silu(layer(h))
        return self.layers[-1](h)


def models():
    """Name, flow map and a batch of states."""
    mlp = fd.nn.MLP(16, 256, 4, key=jr.key(0))
    conv = ConvNet(3, 32, 3, jr.key(1))
    yield "MLP 4x256, batch 256", fd.FlowMap(mlp), jr.normal(jr.key(2), (256, 16))
    yield (
        "conv 4 layers, 16x16x3, batch 16",
        fd.FlowMap(conv),
        jr.normal(jr.key(3), (16, 3, 16, 16)),
    )


def hand_written(flow_map, x, ts):
    def jump(x, ends):
        s, t = ends
        v = jax.vmap(flow_map.net, in_axes=(None, None, 0, None))(s, t, x, None)
        return x + (t - s) * v, None

    return jax.lax.scan(jump, x, (ts[:-1], ts[1:]))[0]


def unrolled(flow_map, x, ts):
    for i in range(ts.shape[0] - 1):
        v = jax.vmap(flow_map.net, in_axes=(None, None, 0, None))
        x = x + (ts[i + 1] - ts[i]) * v(ts[i], ts[i + 1], x, None)
    return x


def with_sample(flow_map, x, ts, unroll=1):
    return jax.vmap(lambda x: fd.sample(flow_map, x, ts, unroll=unroll))(x)


def with_diffeqsolve(flow_map, x, ts):
    def solve(x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(flow_map.velocity),
            fd.FlowMapSolver(flow_map),
            ts[0],
            ts[-1],
            None,
            x,
            stepsize_controller=diffrax.StepTo(ts),
            max_steps=ts.shape[0] - 1,
            throw=False,
        ).ys[0]

    return jax.vmap(solve)(x)


WAYS = {
    "lax.scan by hand": hand_written,
    "network alone, unrolled": unrolled,
    "sample": with_sample,
    "sample, unroll=True": functools.partial(with_sample, unroll=True),
    "diffeqsolve, StepTo": with_diffeqsolve,
}


def ratios(samples, baseline):
    quotient = np.asarray(samples) / np.asarray(baseline)
    low, median, high = np.percentile(quotient, [10, 50, 90])
    return {"ratio": median, "from": low, "to": high}


def time_ways(calls, rounds):
    """Seconds of each call in each round. A round runs all calls in random order."""
    seconds = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(flow_map, x, jumps, rounds):
    ts = jnp.linspace(0.0, 1.0, jumps + 1)
    weights, rest = eqx.partition(flow_map, eqx.is_array)

    def compiled(way):
        # Use a fresh function and empty caches, so that no compilation is reused.
        jax.clear_caches()
        run = lambda weights, x, ts: way(eqx.combine(weights, rest), x, ts)
        start = time.perf_counter()
        lowered = jax.jit(run).lower(weights, x, ts)
        traced = time.perf_counter() - start
        executable = lowered.compile()
        return executable, time.perf_counter() - start, traced

    builds = {name: [] for name in WAYS}
    traces = {name: [] for name in WAYS}
    executables = {}
    for _ in range(options.builds):
        for name, way in WAYS.items():
            executables[name], seconds, traced = compiled(way)
            builds[name].append(seconds)
            traces[name].append(traced)
    reference = executables["lax.scan by hand"](weights, x, ts)
    for executable in executables.values():
        np.testing.assert_allclose(
            executable(weights, x, ts), reference, rtol=1e-4, atol=1e-4
        )
    runs = time_ways(
        {
            name: functools.partial(executable, weights, x, ts)
            for name, executable in executables.items()
        },
        rounds,
    )
    for name in WAYS:
        run = ratios(runs[name], runs["lax.scan by hand"])
        build = ratios(builds[name], builds["lax.scan by hand"])
        medians = [float(np.median(x[name])) for x in (runs, builds, traces)]
        yield name, medians[0], run, *medians[1:], build


def against_tsit5(rounds):
    """Jumps of a map against Tsit5 on its own velocity, a network of the same size."""
    flow_map = fd.FlowMap(fd.nn.MLP(16, 256, 4, key=jr.key(0)))
    # The last layer of a new network is zero, so its ODE would be trivial.
    last = 0.1 * jr.normal(jr.key(4), flow_map.net.last.weight.shape)
    flow_map = eqx.tree_at(lambda m: m.net.last.weight, flow_map, last)
    x = jr.normal(jr.key(2), (256, 16))

    @eqx.filter_jit
    def tsit5(flow_map, x):
        def solve(x):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(flow_map.velocity),
                diffrax.Tsit5(),
                0.0,
                1.0,
                0.1,
                x,
                stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
                throw=False,
            )

        solution = jax.vmap(solve)(x)
        return solution.ys[:, 0], solution.stats["num_steps"]

    jump = eqx.filter_jit(with_sample)
    calls = {"Tsit5, rtol 1e-5": functools.partial(tsit5, flow_map, x)}
    for jumps in (1, 4):
        ts = jnp.linspace(0.0, 1.0, jumps + 1)
        calls[f"flow map, {jumps} jumps"] = functools.partial(jump, flow_map, x, ts)
    for call in calls.values():
        jax.block_until_ready(call())
    steps = tsit5(flow_map, x)[1]
    # First-same-as-last: six evaluations per step and one at the start.
    evaluations = [6 * float(steps.mean()) + 1, 1, 4]
    runs = time_ways(calls, rounds)
    for (name, seconds), count in zip(runs.items(), evaluations, strict=True):
        ratio = ratios(seconds, runs["flow map, 1 jumps"])
        yield name, count, float(np.median(seconds)), ratio


def spread(numbers):
    return f"{numbers['ratio']:.2f} ({numbers['from']:.2f} to {numbers['to']:.2f})"


def main():
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs,", end=" "
    )
    print(f"{jax.default_backend()}, jax {jax.__version__}, errors: {options.errors}")
    results = []
    print(
        "\n| network | jumps | way | ms | run ratio | compile s | of it tracing s | "
        "compile ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, flow_map, x in models():
        for jumps in (1, 4, 16):
            for row in measure(flow_map, x, jumps, options.rounds):
                way, seconds, run, build_seconds, traced, build = row
                print(
                    f"| {name} | {jumps} | {way} | {1e3 * seconds:.2f} | {spread(run)} | "
                    f"{build_seconds:.2f} | {traced:.2f} | {spread(build)} |",
                    flush=True,
                )
                results.append([name, jumps, *row])
    print("\n| MLP 4x256, batch 256 | evaluations | ms | ratio to one jump |")
    print("| --- | --- | --- | --- |")
    for name, evaluations, seconds, ratio in against_tsit5(options.rounds):
        print(f"| {name} | {evaluations:.1f} | {1e3 * seconds:.2f} | {spread(ratio)} |")
        results.append([name, evaluations, seconds, ratio])
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"sampling-{options.errors}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
