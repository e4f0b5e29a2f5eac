"""The overhead of the training engine over the network's work, and against PyTorch.

    python benchmarks/training.py                              # a quarter of an hour
    python benchmarks/training.py --networks mlp --repeats 3   # a quick check
    python benchmarks/training.py --parts host                 # feeding from the host
    python benchmarks/training.py --parts --torch --torch-python torch/bin/python

**Engine.** For each network and objective, the seconds per step of

- `forward, backward`: `eqx.filter_value_and_grad` of `batch_loss` on one fixed batch;
- `and Adam`: the same and Optax's update, which any loop needs. All ratios are to this
  one;
- `and a batch`: the same, on rows and noise drawn in the same program, as any loop needs;
- `train.update`: the engine's step on the fixed batch. To `and Adam` it adds the moving
  average, the norm of the gradient, and the checks that skip a step which is not finite;
- `train.make_step`: the step as it is used: all of this, called as users call it;
- `train.fit`: the loop around it, with a report, and so a copy of the state, every
  `steps` steps. The default of `fit` is a report every 100 steps.

FLOPs are those of XLA's cost analysis of the compiled program, also as ratios. The
analysis counts the body of a loop once. Memory is given as the program's temporary
memory, and in total: with arguments, and with results that do not reuse the memory of
arguments.

**Host.** Steps with batches from a set on disk, by `fd.data.stream` by hand and by
`fd.data.StreamBatches` as in `fit`, against the same steps with images on the device; and
the images per second of the stream alone. On a CPU, the threads that read share the cores
with the step.

**PyTorch**, with `--torch`. The network and the step of torchcfm's CIFAR-10 example
(`UNetModelWrapper`, `ConditionalFlowMatcher`, clipping, Adam, moving average; without
dropout) against `nn.UNet` of one time with the same parts, in float32. It runs in a
separate process with the interpreter `--torch-python`, which needs torch and torchcfm but
not this library. Blocks of steps alternate between the two.

Everything that is compared runs in the same rounds, in random order, in blocks of steps.
Seconds are medians over rounds. A ratio is the median over rounds of the ratio to the
baseline in the same round, with the quartiles.
"""

import argparse
import concurrent.futures
import functools
import inspect
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

import flowdiffrax as fd

SHAPE = (32, 32, 3)

# Title, network, shape of a state, rows of a batch, steps in a block.
NETWORKS = {
    "mlp": (
        "`MLP` 3x512, 32 entries",
        lambda key: fd.nn.MLP(32, 512, 3, key=key),
        (32,),
        1024,
        20,
    ),
    "unet": (
        "`UNet`, 32 channels",
        lambda key: fd.nn.UNet(SHAPE, 32, (1, 2, 2), 1, attention=(8,), key=key),
        SHAPE,
        16,
        2,
    ),
    "magnitude": (
        "`MagnitudePreservingUNet`, 32 channels",
        lambda key: fd.nn.MagnitudePreservingUNet(
            SHAPE, 32, (1, 2, 2), 1, attention=(8,), key=key
        ),
        SHAPE,
        16,
        2,
    ),
    "dit": (
        "`DiT`, 6 blocks of width 192",
        lambda key: fd.nn.DiT(SHAPE, 4, 192, 6, key=key),
        SHAPE,
        32,
        2,
    ),
}
OBJECTIVES = {
    "flow matching": fd.FlowMatching(),
    "Lagrangian self-distillation": fd.LagrangianSelfDistillation(),
}
BASELINE = "and Adam"
EMA_DECAY = 0.999

# Channels and rows of a batch.
PEERS = {"32": (32, 16), "64": (64, 16), "128": (128, 8)}


class Program:
    """A compiled function of carried values, whose memory it reuses, and fixed ones.

    `fn(carried, fixed)` returns the next carried values and other results. All arrays are
    arguments, and none are constants.
    """

    def __init__(self, fn, carried, fixed):
        copy = lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf
        # The first call takes over the memory of the carried values.
        carried = jtu.tree_map(copy, carried)
        self.carried, static_carried = eqx.partition(carried, eqx.is_array)
        self.fixed, static_fixed = eqx.partition(fixed, eqx.is_array)

        def run(carried, fixed):
            carried = eqx.combine(carried, static_carried)
            out = fn(carried, eqx.combine(fixed, static_fixed))
            return eqx.filter(out, eqx.is_array)

        jitted = jax.jit(run, donate_argnums=0)
        self.compiled = jitted.lower(self.carried, self.fixed).compile()
        self.flops = self.compiled.cost_analysis()["flops"]
        memory = self.compiled.memory_analysis()
        self.temporary = memory.temp_size_in_bytes
        self.memory = (
            self.temporary
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def __call__(self, steps):
        out = None
        for _ in range(steps):
            self.carried, out = self.compiled(self.carried, self.fixed)
        jax.block_until_ready((self.carried, out))


class Steps:
    """Steps of `train.make_step` on batches from `next_batches`."""

    def __init__(self, step, state, next_batches):
        self.step, self.state, self.next_batches = step, state, next_batches

    def __call__(self, steps):
        for _ in range(steps):
            self.state, info = self.step(self.state, self.next_batches())
        jax.block_until_ready((self.state, info))


def seconds_in_random_order(calls, steps):
    """Seconds per step of each call. Every call runs once."""
    seconds = {}
    for name in random.sample(list(calls), len(calls)):
        start = time.perf_counter()
        calls[name](steps)
        seconds[name] = (time.perf_counter() - start) / steps
    return seconds


def ratio(samples, baseline):
    low, median, high = np.percentile(np.divide(samples, baseline), [25, 50, 75])
    return {"ratio": median, "from": low, "to": high}


def spread(numbers, digits=3):
    low, high = f"{numbers['from']:.{digits}f}", f"{numbers['to']:.{digits}f}"
    return f"{numbers['ratio']:.{digits}f} ({low} to {high})"


def table(columns):
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


# --- engine ---------------------------------------------------------------------------


def programs(flow_map, objective, optim, batches, state):
    """The functions to compile, with their carried and fixed arguments."""
    weights, static = eqx.partition(flow_map, eqx.is_inexact_array)
    opt_state = optim.init(weights)
    fixed = (*batches(jr.key(2)), jr.key(3))

    def gradients(weights, fixed):
        paths, args, key = fixed

        def loss(weights):
            flow_map = eqx.combine(weights, static)
            return fd.objectives.batch_loss(
                objective, flow_map, None, paths, args, key=key
            )

        return eqx.filter_value_and_grad(loss, has_aux=True)(weights)

    def forward_backward(old, fixed):
        del old  # Only their memory is needed, as the other ways reuse theirs.
        (loss, _), grads = gradients(*fixed)
        return grads, loss

    def and_adam(carried, fixed):
        weights, opt_state = carried
        (loss, _), grads = gradients(weights, fixed)
        updates, opt_state = optim.update(grads, opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state), loss

    def and_batch(carried, batches):
        carried, number = carried
        batch_key, loss_key = jr.split(jr.fold_in(jr.key(4), number))
        carried, loss = and_adam(carried, (*batches(batch_key), loss_key))
        return (carried, number + 1), loss

    def update(state, fixed):
        paths, args, key = fixed
        return fd.train.update(
            state, objective, optim, None, paths, args, key=key, ema_decay=EMA_DECAY
        )

    def whole_step(state, batches):
        return fd.train.make_step(objective, optim, ema_decay=EMA_DECAY)(state, batches)

    yield "forward, backward", (forward_backward, weights, (weights, fixed))
    yield BASELINE, (and_adam, (weights, opt_state), fixed)
    counted = (weights, opt_state), jnp.zeros((), int)
    yield "and a batch", (and_batch, counted, batches)
    yield "train.update", (update, state, fixed)
    yield "train.make_step", (whole_step, state, batches)


def measure_engine(network, objective, options):
    """A dictionary for each way of one network and objective."""
    title, build, shape, size, steps = NETWORKS[network]
    steps = options.steps or steps
    flow_map = fd.FlowMap(build(jr.key(0)))
    x1 = jr.normal(jr.key(1), (256, *shape))
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), x1, size)
    optim = optax.adam(1e-4)
    settings = dict(ema_decay=EMA_DECAY)
    create = functools.partial(
        fd.train.TrainState.create, flow_map, optim, key=jr.key(4), **settings
    )
    loss = OBJECTIVES[objective]
    wanted = dict(programs(flow_map, loss, optim, batches, create()))
    # XLA compiles outside Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(lambda parts: Program(*parts), wanted.values()))
    compiled = dict(zip(wanted, built, strict=True))
    # Time the step as users call it, with Python's overhead. The program above is only
    # for its FLOPs and memory.
    step = fd.train.make_step(loss, optim, **settings)
    calls = compiled | {"train.make_step": Steps(step, create(), lambda: batches)}
    for call in calls.values():
        call(1)

    rounds, in_fit, start = [], [], None

    def on_report(state, report):
        """Runs the other ways between the steps of `fit`."""
        nonlocal start
        jax.block_until_ready(state)
        if start is not None:
            in_fit.append((time.perf_counter() - start) / steps)
        if len(rounds) < options.repeats:
            rounds.append(seconds_in_random_order(calls, steps))
        start = time.perf_counter()

    fd.train.fit(
        flow_map,
        loss,
        batches,
        optim,
        num_steps=steps * (options.repeats + 1),
        key=jr.key(4),
        report_every=steps,
        on_report=on_report,
        progress=False,
        **settings,
    )
    seconds = {name: [each[name] for each in rounds] for name in calls}
    seconds["train.fit"] = in_fit
    for name, samples in seconds.items():
        # The loop calls the same program.
        program = compiled.get(name, compiled["train.make_step"])
        yield {
            "network": f"{title}, batch {size}",
            "objective": objective,
            "way": name,
            "seconds": float(np.median(samples)),
            "time": ratio(samples, seconds[BASELINE]),
            "flops": program.flops / compiled[BASELINE].flops,
            "temporary": program.temporary,
            "memory": program.memory,
        }


def engine(options):
    found = []
    print("\nThe engine over forward, backward and Adam\n")
    columns = "network", "objective", "way", "ms a step", "time", "FLOPs"
    table((*columns, "temporary MiB", "MiB in all"))
    for network in options.networks:
        for objective in OBJECTIVES:
            for one in measure_engine(network, objective, options):
                cells = one["network"], one["objective"], one["way"]
                memory = (one[key] / 2**20 for key in ("temporary", "memory"))
                row(
                    *cells,
                    f"{1e3 * one['seconds']:.2f}",
                    spread(one["time"]),
                    f"{one['flops']:.3f}",
                    *(f"{number:.1f}" for number in memory),
                )
                found.append(one)
    return found


# --- host -----------------------------------------------------------------------------


def image_networks():
    """Title, network with ten classes, rows of a batch, steps in a block."""
    mlp = fd.nn.MLP(3072, 512, 3, args_size=1, key=jr.key(0))
    unet = fd.nn.UNet(SHAPE, 32, (1, 2, 2), 1, num_classes=10, key=jr.key(0))
    yield "`Ravelled(MLP)` 3x512", fd.nn.Ravelled(mlp), 256, 10
    yield "`UNet`, 32 channels", unet, 16, 2


def measure_host(images, net, size, steps, options):
    """Seconds per step by source of batches, and per batch of the stream alone."""
    optim = optax.adam(1e-4)
    step = fd.train.make_step(fd.FlowMatching(), optim)
    create = lambda: fd.train.TrainState.create(fd.FlowMap(net), optim, key=jr.key(4))
    batches = lambda source: fd.data.InterpolantBatches(
        fd.LinearInterpolant(), source, size
    )
    on_device = batches(fd.images.DeviceImages(images, flip=True))
    stream = fd.data.stream(images, size)
    make = lambda batch: batches(fd.images.DeviceImages(*batch, flip=True, draw=False))
    ready = fd.data.StreamBatches(images, size, make).each_step(0)
    from_host = lambda: make(next(stream))

    def stream_alone(steps):
        for _ in range(steps):
            next(stream)

    calls = {
        "on the device": Steps(step, create(), lambda: on_device),
        "stream": Steps(step, create(), from_host),
        "StreamBatches": Steps(step, create(), lambda: next(ready)),
    }
    for call in calls.values():
        call(1)
    rounds = [seconds_in_random_order(calls, steps) for _ in range(options.repeats)]
    start = time.perf_counter()
    # Use many batches, as some are ready in advance.
    count = 50 * steps
    stream_alone(count)
    alone = (time.perf_counter() - start) / count
    return {name: [each[name] for each in rounds] for name in calls}, alone


def host(options):
    found = []
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (options.images, *SHAPE), np.uint8)
        labels = draw.integers(0, 10, options.images, np.int32)
        fd.images.save_images(f"{folder}/set", fd.images.Images(pixels, labels))
        images = fd.images.load_images(f"{folder}/set")
        print(f"\nFed from the host: {options.images} images of 32x32x3 on disk\n")
        columns = "network", "fed by", "ms a step", "time", "images a second"
        table((*columns, "of the stream alone"))
        for title, net, size, steps in image_networks():
            steps = options.steps or steps
            seconds, alone = measure_host(images, net, size, steps, options)
            for way, samples in seconds.items():
                median = float(np.median(samples))
                one = {
                    "network": f"{title}, batch {size}",
                    "way": way,
                    "seconds": median,
                    "time": ratio(samples, seconds["on the device"]),
                    "rate": size / median,
                    "stream alone": size / alone,
                }
                numbers = f"{one['rate']:.0f}", f"{one['stream alone']:.0f}"
                milliseconds = f"{1e3 * median:.2f}"
                row(one["network"], way, milliseconds, spread(one["time"]), *numbers)
                found.append(one)
    return found


# --- PyTorch --------------------------------------------------------------------------


def torch_worker():
    """Steps of torchcfm's CIFAR-10 example, run in another interpreter.

    Each line of its input is a number of steps. It answers when they are done.
    """
    import copy
    import json
    import sys

    import torch
    import torchcfm
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet.unet import UNetModelWrapper

    channels, size, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # XLA does the same. Otherwise, small gradients can slow a CPU down.
    torch.set_flush_denormal(True)
    net = UNetModelWrapper(
        dim=(3, 32, 32),
        num_res_blocks=2,
        num_channels=channels,
        channel_mult=[1, 2, 2, 2],
        num_head_channels=64,
        attention_resolutions="16",
        # The example omits these two parts of ADM, and has dropout.
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    ema_net = copy.deepcopy(net)
    optim = torch.optim.Adam(net.parameters(), lr=2e-4)
    matcher = ConditionalFlowMatcher(sigma=0.0)
    data = torch.randn(256, 3, 32, 32)

    def ema(source, target, decay):
        source, target = source.state_dict(), target.state_dict()
        for key in source:
            target[key].data.copy_(
                target[key].data * decay + source[key].data * (1 - decay)
            )

    def step():
        optim.zero_grad()
        x1 = data[torch.randint(0, len(data), (size,))]
        x0 = torch.randn_like(x1)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        loss = torch.mean((net(t, xt) - ut) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        ema(net, ema_net, 0.9999)

    step()
    versions = f"torch {torch.__version__}, torchcfm {torchcfm.__version__}"
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(json.dumps([versions, parameters, torch.get_num_threads()]), flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            step()
        print("done", flush=True)


class Torch:
    """The worker, in a separate process."""

    def __init__(self, python, channels, size):
        source = f"{inspect.getsource(torch_worker)}\ntorch_worker()\n"
        threads = len(os.sched_getaffinity(0))
        self.process = subprocess.Popen(
            [python, "-c", source, str(channels), str(size), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions, self.parameters, self.threads = json.loads(self._answer())

    def __call__(self, steps):
        print(steps, file=self.process.stdin, flush=True)
        self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if line == "":
            raise SystemExit(
                "PyTorch's process has ended. `--torch-python` names an interpreter "
                "with torch and torchcfm."
            )
        return line

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure_torch(channels, size, options):
    """A dictionary with the numbers of both networks, and PyTorch's versions."""
    net = fd.nn.UNet(
        SHAPE, channels, (1, 2, 2, 2), 2, attention=(16,), two_times=False, key=jr.key(0)
    )
    flow_map = fd.FlowMap(net)
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    x1 = jr.normal(jr.key(1), (256, *SHAPE))
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), x1, size)
    state = fd.train.TrainState.create(flow_map, optim, key=jr.key(4), ema_decay=0.9999)
    step = fd.train.make_step(fd.FlowMatching(), optim, ema_decay=0.9999)
    peer = Torch(options.torch_python, channels, size)
    try:
        calls = {
            "flowdiffrax": Steps(step, state, lambda: batches),
            "torchcfm": peer,
        }
        for call in calls.values():
            call(1)
        steps = options.steps or 2
        rounds = [seconds_in_random_order(calls, steps) for _ in range(options.repeats)]
    finally:
        peer.close()
    seconds = {name: [each[name] for each in rounds] for name in calls}
    weights = jtu.tree_leaves(eqx.filter(net, eqx.is_inexact_array))
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    return {
        "channels": channels,
        "batch": size,
        "parameters": [sum(leaf.size for leaf in weights), peer.parameters],
        "seconds": medians,
        "time": ratio(seconds["flowdiffrax"], seconds["torchcfm"]),
        "versions": f"{peer.versions}, {peer.threads} threads",
    }


def torch(options):
    found = []
    print(
        "\nA step of flow matching against PyTorch's, 32x32x3, (1, 2, 2, 2), 2 blocks\n"
    )
    table(("channels", "batch", "parameters", "torchcfm's", "ms", "torchcfm's", "time"))
    for name in options.peers:
        one = measure_torch(*PEERS[name], options)
        row(
            one["channels"],
            one["batch"],
            *(f"{number:,}" for number in one["parameters"]),
            *(f"{1e3 * median:.0f}" for median in one["seconds"].values()),
            spread(one["time"], 2),
        )
        found.append(one)
    print(f"\n{found[0]['versions']}")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"engine": engine, "host": host}
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--steps", type=int, help="per block; default: by the network")
    parser.add_argument("--images", type=int, default=50_000, help="in the set on disk")
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--out", default="out/benchmarks")
    options = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs,", end=" "
    )
    print(f"{jax.default_backend()}, jax {jax.__version__}")
    found = {name: parts[name](options) for name in options.parts}
    if options.torch:
        found["torch"] = torch(options)
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
