"""Runs of a small training, printed for `test_parallel.py`: `jax` must not have started.

    python tests/train/parallel_train.py 8                # simulated devices
    python tests/train/parallel_train.py 2 localhost:1234 2 0 FOLDER  # one of two

Prints the loss and some weights after each of a few steps, for each way to train. Two
processes then begin a run with a folder, which the first of them is told to end, or
finish the one that is there.
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


def train(parallel, *, num_steps=4, end_at=None, **settings):
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
        fd.FlowMap(fd.nn.MLP(2, 64, 3, key=jr.key(0))),
        fd.LagrangianSelfDistillation(),
        fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 32),
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
    *arguments, folder = sys.argv[1:] if len(sys.argv) > 2 else (*sys.argv[1:], None)
    begin(*arguments)
    everywhere, in_parts = fd.train.DataParallel(), fd.train.DataParallel(None, True)
    run = None if folder is None else fd.train.Run(folder, save_every=100)
    if run is not None and run.steps:
        found = {"resumed": summary(train(in_parts, num_steps=LONG, run=run))}
    else:
        found = {
            "whole": summary(train(everywhere)),
            "parts": summary(split := train(in_parts)),
        }
        weight = split[1].flow_map.net.hidden[0].weight
        found["share"] = weight.addressable_shards[0].data.size / weight.size
    if run is None:
        found["accumulated"] = summary(train(everywhere, accumulate=2))
        found["alone"] = summary(train(None))
        found["alone, long"] = summary(train(None, num_steps=LONG))
        found["alone, accumulated"] = summary(train(None, accumulate=2))
        devices = jax.devices()[:3]
        try:
            train(fd.train.DataParallel(devices))
        except ValueError as error:
            found["error"] = str(error)
    print(json.dumps(found), flush=True)
    if run is not None:
        if not run.steps:
            end_at = 2 if jax.process_index() == 0 else None
            train(in_parts, num_steps=LONG, run=run, end_at=end_at)
        jax.distributed.shutdown()
