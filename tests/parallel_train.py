"""Runs of a small training, printed for `test_parallel.py`: `jax` must not have started.

    python tests/parallel_train.py 8                          # simulated devices
    python tests/parallel_train.py 2 localhost:1234 2 0       # one of two processes

Prints the loss and some weights after each of a few steps, for each way to train.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import flowdiffrax as fd


def begin(devices, address=None, processes=1, index=0):
    """Before the first use of JAX, which fixes its devices."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    if address is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(index))


def train(parallel, **settings):
    """Losses and final weights of a few steps of self-distillation."""
    losses, data = [], jr.normal(jr.key(3), (200, 2)) + 1.0
    state = fd.train.fit(
        fd.FlowMap(fd.nn.MLP(2, 64, 3, key=jr.key(0))),
        fd.LagrangianSelfDistillation(),
        fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 32),
        optax.adam(1e-2),
        num_steps=4,
        key=jr.key(1),
        parallel=parallel,
        report_every=1,
        on_report=lambda state, report: losses.append(report["loss"]),
        progress=False,
        **settings,
    )
    return losses, state


def summary(run):
    losses, state = run
    whole = fd.train.DataParallel().replicate(state.ema_map.net.hidden[0].weight)
    return [*losses, *jnp.ravel(whole)[:3].tolist()]


if __name__ == "__main__":
    begin(*sys.argv[1:])
    everywhere, in_parts = fd.train.DataParallel(), fd.train.DataParallel(None, True)
    found = {
        "whole": summary(train(everywhere)),
        "parts": summary(split := train(in_parts)),
    }
    weight = split[1].flow_map.net.hidden[0].weight
    found["share"] = weight.addressable_shards[0].data.size / weight.size
    if len(sys.argv) == 2:
        found["accumulated"] = summary(train(everywhere, accumulate=2))
        found["alone"] = summary(train(None))
        found["alone, accumulated"] = summary(train(None, accumulate=2))
        devices = jax.devices()[:3]
        try:
            train(fd.train.DataParallel(devices))
        except ValueError as error:
            found["error"] = str(error)
    print(json.dumps(found))
    if len(sys.argv) > 2:
        jax.distributed.shutdown()
