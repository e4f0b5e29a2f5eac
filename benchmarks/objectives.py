"""The cost of a training step of each objective, relative to flow matching.

    python benchmarks/objectives.py                            # both networks
    python benchmarks/objectives.py --rounds 1 --network mlp   # a quick check

Most of the time is compilation: one to three seconds per row for the MLP, about ten for
the U-Net, on two busy cores.

A step is the loss and its gradient in the map's weights, and with `--optimiser` a step of
Adam. It is compared with a count, in units of one forward evaluation of the network:

- an evaluation is 1, and its derivative along one direction is 1 more: a `jax.jvp` is 2;
- backpropagation through either costs twice as much again, once for the weights and once
  for the inputs. A trained evaluation or derivative therefore costs 3, and one that is
  held fixed costs 1;
- backpropagation through a frozen network to its input costs 1;
- a value that is needed twice is computed once.

Flow matching is one trained evaluation, 3. Lagrangian distillation is a trained
evaluation, its trained derivative in time, and the teacher, 3 + 3 + 1 = 7. MeanFlow is a
trained evaluation and a derivative that is held fixed, 3 + 1 = 4. A jump in two frozen
pieces is 3 + 1 + 1 = 5. The teacher is a network of the same size as the map. All
interpolants, norms and weights count as zero, and so does the optimiser. The count of a
whole batch is the mean over its rows: 3 for those on the diagonal, where every objective
with such rows is flow matching.

FLOPs are those of XLA's cost analysis: `compiled` of the program that runs, `as traced`
of the program before XLA merges repeated computations. Both include elementwise work, and
count the body of a loop once, so that the evaluations of later iterations are added by
hand. FLOPs can be below the count, because first layers save work: they pass on no
gradient, and have no derivative in a time that enters later. Memory is the compiled
program's temporary memory. All are ratios to flow matching on the same network and batch.
So are seconds, in the same rounds: the median over rounds in which all rows run once in
random order, and the span from the 10th to the 90th percentile. The script fails if
compiled FLOPs exceed a count by more than 15%.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from methods import METHODS

import flowdiffrax as fd

# The excess is elementwise work: activations, and even more their derivatives.
LIMIT = 1.15


@dataclasses.dataclass
class Row:
    """An objective, and how many forward evaluations an example costs."""

    objective: fd.objectives.AbstractObjective
    count: int
    looped: int
    has_teacher: bool


def row(method, objective=None):
    count = 3 * method.trained + method.frozen + 2 * method.through
    objective = method.make() if objective is None else objective
    return Row(objective, count, method.looped, method.teacher == "velocity")


def rows():
    found = {}
    for name, method in METHODS.items():
        title = method.name if name != "sCD" else f"{method.name}, teacher"
        found[title] = row(method)
    # XLA counts loops once.
    unrolled = fd.objectives.RollOutMatching(unroll=True)
    found["RollOutMatching"] = row(METHODS["roll-outs"], unrolled)
    # Settings that change the cost, or could.
    none, transport = (
        fd.objectives.StopGradient.NONE,
        fd.objectives.StopGradient.TRANSPORT,
    )
    found["LagrangianMapDistillation, NONE"] = row(
        METHODS["LMD"]._replace(frozen=0, through=1),
        fd.LagrangianMapDistillation(stop_gradient=none),
    )
    # The derivatives in time and in space separately, the second one held fixed.
    found["EulerianMapDistillation, TRANSPORT"] = row(
        METHODS["EMD"]._replace(frozen=2),
        fd.objectives.EulerianMapDistillation(stop_gradient=transport),
    )
    # The state before the last piece, or after the first one, and the teacher there.
    for name in ("AYF-LMD", "AYF-EMD"):
        method = METHODS[name]
        found[f"{method.name}, epsilon"] = row(method, method.make(epsilon=0.05))
    return found


class Block(eqx.Module):
    """Two convolutions with a skip connection and a shift by an embedding of times."""

    norms: list[eqx.nn.GroupNorm]
    convs: list[eqx.nn.Conv2d]
    shift: eqx.nn.Linear
    skip: eqx.nn.Conv2d

    def __init__(self, channels_in, channels_out, embedding, key):
        keys = jr.split(key, 4)
        conv = functools.partial(eqx.nn.Conv2d, kernel_size=3, padding=1)
        self.norms = [eqx.nn.GroupNorm(8, c) for c in (channels_in, channels_out)]
        self.convs = [
            conv(channels_in, channels_out, key=keys[0]),
            conv(channels_out, channels_out, key=keys[1]),
        ]
        self.shift = eqx.nn.Linear(embedding, channels_out, key=keys[2])
        self.skip = eqx.nn.Conv2d(channels_in, channels_out, 1, key=keys[3])

    def __call__(self, x, embedding):
        h = self.convs[0](jax.nn.silu(self.norms[0](x)))
        h = h + self.shift(embedding)[:, None, None]
        return self.skip(x) + self.convs[1](jax.nn.silu(self.norms[1](h)))


class UNet(eqx.Module):
    """A U-Net that takes two times and an image, with two resolutions."""

    times: eqx.nn.MLP
    first: eqx.nn.Conv2d
    down: Block
    shrink: eqx.nn.Conv2d
    middle: Block
    up: Block
    norm: eqx.nn.GroupNorm
    last: eqx.nn.Conv2d

    def __init__(self, channels, width, key):
        keys = jr.split(key, 7)
        conv = functools.partial(eqx.nn.Conv2d, kernel_size=3, padding=1)
        silu = jax.nn.silu
        self.times = eqx.nn.MLP(8, 4 * width, 4 * width, 1, silu, silu, key=keys[0])
        self.first = conv(channels, width, key=keys[1])
        self.down = Block(width, width, 4 * width, keys[2])
        self.shrink = conv(width, 2 * width, stride=2, key=keys[3])
        self.middle = Block(2 * width, 2 * width, 4 * width, keys[4])
        self.up = Block(3 * width, width, 4 * width, keys[5])
        self.norm = eqx.nn.GroupNorm(8, width)
        self.last = conv(width, channels, key=keys[6])

    def __call__(self, s, t, x, args):
        del args
        angles = jnp.outer(jnp.stack([s, t]), jnp.pi * jnp.asarray([0.5, 1.0])).ravel()
        embedding = self.times(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))
        fine = self.down(self.first(x), embedding)
        coarse = self.middle(self.shrink(fine), embedding)
        coarse = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
        h = self.up(jnp.concatenate([fine, coarse]), embedding)
        return self.last(jax.nn.silu(self.norm(h)))


def mlp(key):
    net = fd.nn.MLP(2, 256, 4, key=key)
    # The last layer of a new network is zero.
    last = 0.1 * jr.normal(key, net.last.weight.shape)
    return eqx.tree_at(lambda net: net.last.weight, net, last)


# Title, network, shape of a state, and rows of a batch: a multiple of eight, so that the
# shares on the diagonal are exact.
NETWORKS = {
    "mlp": ("MLP 4x256, 2-D", mlp, (2,), 4096),
    "unet": ("U-Net, 32x32x3", lambda key: UNet(3, 32, key), (3, 32, 32), 8),
}


def off_diagonal(objective):
    """The objective with only its times off the diagonal, if there are any."""
    if isinstance(objective.times, fd.times.DiagonalMixture):
        return dataclasses.replace(objective, times=objective.times.times)
    return objective


class Program:
    """A compiled function with all arrays as arguments, and none as constants."""

    def __init__(self, fn, *args):
        self.arrays, rest = eqx.partition(args, eqx.is_array)
        run = lambda arrays: eqx.filter(fn(*eqx.combine(arrays, rest)), eqx.is_array)
        lowered = jax.jit(run).lower(self.arrays)
        self.compiled = lowered.compile()
        self.traced_flops = lowered.cost_analysis()["flops"]
        self.flops = self.compiled.cost_analysis()["flops"]
        self.memory = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self):
        return self.compiled(self.arrays)


def off_diagonal_loss(objective, flow_map, teacher, paths, key):
    """The mean loss, with all rows treated as off the diagonal."""
    times_key, draw_key = jr.split(key)
    batch = jtu.tree_leaves(paths)[0].shape[0]
    s, t = objective.times(times_key, batch)

    def loss(path, s, t, key):
        return objective(flow_map, teacher, path, s, t, key=key)

    over_rows = eqx.filter_vmap(loss, in_axes=(eqx.if_array(0), 0, 0, 0))
    return jnp.mean(over_rows(paths, s, t, jr.split(draw_key, batch)))


def whole_loss(objective, flow_map, teacher, paths, key):
    return fd.objectives.batch_loss(objective, flow_map, teacher, paths, key=key)[0]


def step(loss_fn, optim, objective, flow_map, opt_state, teacher, paths, key):
    """Loss and gradient, or with an optimiser the loss and the next weights and state."""
    of_map = lambda flow_map: loss_fn(objective, flow_map, teacher, paths, key)
    loss, grads = eqx.filter_value_and_grad(of_map)(flow_map)
    if optim is None:
        return loss, grads
    updates, opt_state = optim.update(grads, opt_state)
    return loss, eqx.apply_updates(flow_map, updates), opt_state


@dataclasses.dataclass
class Case:
    """One row of the table: an objective on a batch."""

    name: str
    rows: str
    count: float
    looped: int
    objective: Any
    has_teacher: bool
    loss_fn: Callable


def cases(chosen, batch):
    """Each objective off the diagonal, then each batch with some rows on it."""
    for name, row in chosen.items():
        objective = off_diagonal(row.objective)
        kind = "off the diagonal"
        if objective.times.num_diagonal(batch) == batch:
            kind = "all on it"
        yield Case(
            name,
            kind,
            row.count,
            row.looped,
            objective,
            row.has_teacher,
            off_diagonal_loss,
        )
    for name, row in chosen.items():
        share = row.objective.times.num_diagonal(batch) / batch
        if 0 < share < 1:
            count = share * 3 + (1 - share) * row.count
            kind = f"{share:.1%} on it"
            yield Case(
                name,
                kind,
                count,
                row.looped,
                row.objective,
                row.has_teacher,
                whole_loss,
            )


def ratios(samples, baseline):
    quotient = np.asarray(samples) / np.asarray(baseline)
    low, median, high = np.percentile(quotient, [10, 50, 90])
    return {"ratio": median, "from": low, "to": high}


def time_programs(programs, rounds):
    """Seconds of each program in each round. A round runs all in random order."""
    seconds = [[] for _ in programs]
    for program in programs:
        jax.block_until_ready(program())
    order = list(range(len(programs)))
    for _ in range(rounds):
        random.shuffle(order)
        for index in order:
            start = time.perf_counter()
            jax.block_until_ready(programs[index]())
            seconds[index].append(time.perf_counter() - start)
    return seconds


def measure(network, chosen, options):
    """The FLOPs of a forward evaluation of a batch, and a dictionary for each case."""
    title, build, shape, batch = NETWORKS[network]
    batch = batch if options.batch is None else options.batch
    flow_map = fd.FlowMap(build(jr.key(0)))
    velocity = fd.FlowMap(build(jr.key(1))).velocity
    ends = jr.normal(jr.key(2), (2, batch, *shape))
    paths = jax.vmap(fd.LinearInterpolant())(*ends)
    forward = Program(
        jax.vmap(flow_map.average_velocity), *jr.uniform(jr.key(3), (2, batch)), ends[0]
    )

    # Trajectories of three points are enough: only networks count.
    ts = jnp.tile(jnp.asarray([0.0, 0.5, 1.0]), (batch, 1))
    states = jnp.stack([ends[0], ends.mean(0), ends[1]], axis=1)
    trajectories = fd.paths.TrajectoryPath(ts, states)
    optim = optax.adam(1e-3) if options.optimiser else None
    opt_state = None
    if optim is not None:
        opt_state = optim.init(eqx.filter(flow_map, eqx.is_inexact_array))

    def program(case):
        teacher = velocity if case.has_teacher else None
        run = functools.partial(step, case.loss_fn, optim)
        solved = isinstance(
            case.objective, fd.TrajectoryMatching | fd.objectives.RollOutMatching
        )
        data = trajectories if solved else paths
        return Program(run, case.objective, flow_map, opt_state, teacher, data, jr.key(4))

    found = list(cases(chosen, batch))
    # XLA compiles outside Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(program, found))
    seconds = time_programs(programs, options.rounds)
    first = programs[0]
    results = []
    for case, one, times in zip(found, programs, seconds, strict=True):
        later_turns = case.looped * forward.flops
        count = case.count / 3
        results.append(
            {
                "network": f"{title}, batch {batch}",
                "objective": case.name,
                "rows": case.rows,
                "count": count,
                "compiled": (one.flops + later_turns) / first.flops,
                "traced": (one.traced_flops + later_turns) / first.traced_flops,
                "over": (one.flops + later_turns) / first.flops / count,
                "memory": one.memory / first.memory,
                "seconds": float(np.median(times)),
                "time": ratios(times, seconds[0]),
            }
        )
    return forward.flops, first, results


def spread(numbers):
    return f"{numbers['ratio']:.2f} ({numbers['from']:.2f} to {numbers['to']:.2f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=(*NETWORKS, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--objectives", nargs="+", metavar="NAME")
    parser.add_argument("--batch", type=int, help="rows of a batch; a multiple of eight")
    parser.add_argument("--optimiser", action="store_true", help="time whole steps")
    parser.add_argument("--out", default="out/benchmarks")
    options = parser.parse_args()

    # Do not use `choices`: some rows have arrays, which start JAX.
    known = rows()
    names = known if options.objectives is None else options.objectives
    if unknown := {*names} - known.keys():
        parser.error(f"no objective {sorted(unknown)}; there are {', '.join(known)}")
    # Everything is relative to flow matching, which comes first.
    chosen = {
        name: row
        for name, row in known.items()
        if name in names or name == "FlowMatching"
    }
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs,", end=" "
    )
    print(f"{jax.default_backend()}, jax {jax.__version__}")
    results = []
    for network in NETWORKS if options.network == "both" else (options.network,):
        forward, first, found = measure(network, chosen, options)
        print(
            f"\n{found[0]['network']}: a forward evaluation has {forward / 1e9:.2f} "
            f"GFLOPs, a step of flow matching {first.flops / forward:.2f} times that, "
            f"and {first.memory / 2**20:.0f} MiB of temporary memory.\n"
        )
        print(
            "| objective | rows | count | FLOPs compiled | over the count | as traced | "
            "memory | ms | time |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in found:
            numbers = [row[key] for key in ("count", "compiled", "over")]
            numbers += [row["traced"], row["memory"]]
            numbers = " | ".join(f"{number:.2f}" for number in numbers)
            print(
                f"| {row['objective']} | {row['rows']} | {numbers} | "
                f"{1e3 * row['seconds']:.1f} | {spread(row['time'])} |"
            )
        results += found
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "objectives.json").write_text(json.dumps(results, indent=1))
    worst = max(results, key=lambda row: row["over"])
    print(
        f"\nMost FLOPs over the count: {worst['over']:.3f}, {worst['objective']} on the "
        f"{worst['network']}."
    )
    if worst["over"] > LIMIT:
        raise SystemExit(f"More than {LIMIT} times the count.")


if __name__ == "__main__":
    main()
