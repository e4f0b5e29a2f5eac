"""Runs of a small training, printed for `test_parallel.py`: `jax` must not have started.

    python tests/train/parallel_train.py 8                # simulated devices
    python tests/train/parallel_train.py 8 more
    python tests/train/parallel_train.py 2 localhost:1234 2 0         # one of two
    python tests/train/parallel_train.py 2 localhost:1234 2 0 FOLDER

Prints the loss and some weights after each of a few steps, for each way to train; `more`
is for those that slow tests need. With a folder, two processes begin a run in it, which
the first of them is told to end, or finish the one that is there.
"""

import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import flowdiffrax as fd

# The steps of a run that is ended on its way.
LONG = 40


def begin(devices, address=None, processes=1, index=0):
    """Before the first use of JAX, which fixes its devices."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    if address is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(index))


def train(parallel, *, num_steps=4, end_at=None, plug_in=False, **settings):
    """Losses and final weights of a few steps of self-distillation."""
    losses, data = [], jr.normal(jr.key(3), (200, 2)) + 1.0

    def on_report(state, report):
        losses.append(report["loss"])
        if report["step"] == end_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if end_at is not None:
            # The service that passes the signal round takes a moment.
            time.sleep(0.1)

    state = fd.train.fit(
        fd.FlowMap(fd.nn.MLP(2, 64, 2, key=jr.key(0))),
        fd.LagrangianSelfDistillation(),
        fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 32, plug_in=plug_in),
        optax.adam(1e-2),
        num_steps=num_steps,
        key=jr.key(1),
        parallel=parallel,
        report_every=1,
        on_report=on_report,
        progress=False,
        **settings,
    )
    return losses, state


def summary(run):
    losses, state = run
    whole = fd.train.DataParallel().replicate(state.ema_map.net.hidden[0].weight)
    return [*losses, *jnp.ravel(whole)[:3].tolist()]


if __name__ == "__main__":
    devices, *joined = sys.argv[1:]
    is_more, joined = joined == ["more"], joined[:3] if len(joined) > 1 else []
    begin(devices, *joined)
    everywhere, in_parts = fd.train.DataParallel(), fd.train.DataParallel(None, True)
    found = {}
    if len(sys.argv) == 6:
        run = fd.train.Run(sys.argv[5], save_every=100)
        if run.steps:
            found["resumed"] = summary(train(in_parts, num_steps=LONG, run=run))
        else:
            end_at = 2 if jax.process_index() == 0 else None
            train(in_parts, num_steps=LONG, run=run, end_at=end_at)
    elif is_more:
        found["alone, long"] = summary(train(None, num_steps=LONG))
        found["accumulated"] = summary(train(everywhere, accumulate=2))
        found["alone, accumulated"] = summary(train(None, accumulate=2))
        found["plug-in"] = summary(train(everywhere, accumulate=2, plug_in=True))
        found["alone, plug-in"] = summary(train(None, accumulate=2, plug_in=True))
    else:
        found["parts"] = summary(split := train(in_parts))
        weight = split[1].flow_map.net.hidden[0].weight
        found["share"] = weight.addressable_shards[0].data.size / weight.size
        if not joined:
            found["whole"] = summary(train(everywhere))
            found["alone"] = summary(train(None))
            try:
                train(fd.train.DataParallel(jax.devices()[:3]))
            except ValueError as error:
                found["error"] = str(error)
    print(json.dumps(found), flush=True)
    if joined:
        jax.distributed.shutdown()
