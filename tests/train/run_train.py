"""A small run with a folder, for `test_run.py` to kill and to begin again.

    python tests/train/run_train.py FOLDER NUM_STEPS

Prints `report STEP` at each report, and at the end a hash of all weights.
"""

import hashlib
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import flowdiffrax as fd

OPTIM = optax.adam(1e-2)


def digest(tree):
    """A hash of all arrays of a tree."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)):
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()


def begin(width=16, seed=0):
    return fd.FlowMap(fd.nn.MLP(2, width, 2, key=jr.key(seed)))


def train(
    run,
    num_steps=12,
    *,
    flow_map=None,
    width=16,
    optim=None,
    key=1,
    batches=None,
    **settings,
):
    """Flow matching on a few points, saved every third step and at the last."""
    data = jnp.linspace(-1.0, 1.0, 64).reshape(32, 2)
    source = fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 8)
    return fd.train.fit(
        begin(width) if flow_map is None else flow_map,
        fd.FlowMatching(),
        source if batches is None else batches,
        OPTIM if optim is None else optim,
        num_steps=num_steps,
        key=jr.key(key) if isinstance(key, int) else key,
        run=run,
        **{"report_every": 1, "progress": False} | settings,
    )


if __name__ == "__main__":

    def on_report(state, report):
        print("report", report["step"], flush=True)
        time.sleep(0.05)

    run = fd.train.Run(sys.argv[1], {"width": 16}, save_every=3)
    print(digest(train(run, int(sys.argv[2]), on_report=on_report)))
