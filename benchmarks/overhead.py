"""What the library adds to the arithmetic: eager calls, and calls while JAX traces.

    python benchmarks/overhead.py

Prints the time of an eager call of a `FlowMap` over that of its bare arithmetic, and for
one training step and two solves: how many calls of Python functions tracing makes inside
the library, how often they move from one file to another, the share of helpers (the files
`_time`, `_tree` and `_check`) among them, and the seconds of the whole trace. Diffrax's
own functions in a solve by `Tsit5` are counted alike, for comparison. Takes a minute.
"""

import argparse
import collections
import statistics
import sys
import time
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import flowdiffrax as fd

ROOT = Path(fd.__file__).parent
HELPERS = ("_time.py", "_tree.py", "_check.py")


def median_seconds(call, repeats):
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def eager(repeats):
    """Microseconds of a map whose network is trivial, and of the same by hand."""
    net = lambda s, t, x, args: -x
    flow_map = fd.FlowMap(net)
    x = jnp.ones(3)

    def by_hand(s, t):
        jax.block_until_ready(x + (t - s) * net(s, t, x, None))

    def by_map(s, t):
        jax.block_until_ready(flow_map(s, t, x))

    rows = {"Python floats": (0.2, 0.7), "arrays": (jnp.asarray(0.2), jnp.asarray(0.7))}
    print(f"{'eager call with times as':26} {'bare':>8} {'FlowMap':>8} {'ratio':>6}")
    for name, times in rows.items():
        bare, ours = (
            1e6 * median_seconds(lambda call=call: call(*times), repeats)  # noqa: B023
            for call in (by_hand, by_map)
        )
        print(f"{name:26} {bare:6.0f}us {ours:6.0f}us {ours / bare:6.1f}")


def counted(trace, root):
    """Calls of functions in files below `root` while tracing, and moves between files."""
    calls, moves, last = collections.Counter(), 0, None

    def hook(frame, event, _):
        nonlocal moves, last
        if event != "call":
            return
        file = frame.f_code.co_filename
        if file.startswith(str(root)):
            calls[file[len(str(root)) + 1 :]] += 1
            moves += last is not None and file != last
            last = file

    sys.setprofile(hook)
    try:
        trace()
    finally:
        sys.setprofile(None)
    return calls, moves


def training_step():
    net = fd.nn.MLP(2, 32, 2, key=jr.key(0))
    optim = optax.adam(1e-3)
    step = fd.train.make_step(fd.LagrangianMapDistillation(), optim)
    state = fd.train.TrainState.create(fd.FlowMap(net), optim, key=jr.key(1))
    points = jr.normal(jr.key(2), (64, 2))
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), points, 16)
    field = lambda t, x, args: -x
    return lambda: step(state, batches, field)


def solve(solver):
    def run(y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            solver,
            0.0,
            1.0,
            0.25,
            y0,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 5)),
        ).ys

    return lambda: eqx.filter_make_jaxpr(run)(jnp.ones(2))


def tracing(repeats):
    diffrax_root = Path(diffrax.__file__).parent
    solver = fd.FlowMapSolver(fd.FlowMap(fd.nn.MLP(2, 32, 2, key=jr.key(0))))
    rows = {
        "one step of LMD": (training_step, ROOT),
        "FlowMapSolver, SaveAt(ts)": (lambda: solve(solver), ROOT),
        "the same, within Diffrax": (lambda: solve(solver), diffrax_root),
        "Tsit5, within Diffrax": (lambda: solve(diffrax.Tsit5()), diffrax_root),
    }
    print(f"\n{'tracing':26} {'calls':>6} {'moves':>6} {'helpers':>8} {'seconds':>8}")
    for name, (make, root) in rows.items():
        make()()
        jax.clear_caches()
        calls, moves = counted(make(), root)
        helpers = sum(calls[file] for file in HELPERS) / calls.total()
        seconds = []
        for _ in range(repeats):
            jax.clear_caches()
            call = make()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        share = f"{helpers:7.0%}" if root == ROOT else "      -"
        least = min(seconds)
        print(f"{name:26} {calls.total():6d} {moves:6d} {share:>8} {least:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    eager(200)
    tracing(options.repeats)


if __name__ == "__main__":
    main()
