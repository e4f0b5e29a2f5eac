"""What bfloat16 costs in accuracy: image networks and their derivatives in time.

    python benchmarks/precision.py                 # three minutes
    python benchmarks/precision.py --networks DiT

Each network is created twice with the same weights, perturbed at random from their
initial values: once in float32 and once with `dtype=jnp.bfloat16`. The script prints
relative errors against float32, in root mean square over four images of 32x32 and four
pairs of times. The errors are those of the velocity, of its derivative in the end time,
and of its derivative along the flow. The Lagrangian and the Eulerian objectives contain
these derivatives.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import flowdiffrax as fd

SHAPE = (32, 32, 3)
NETWORKS = {
    "UNet": lambda **how: fd.nn.UNet(SHAPE, 64, (2, 2, 2), 2, attention=(16,), **how),
    "MagnitudePreservingUNet": lambda **how: fd.nn.MagnitudePreservingUNet(
        SHAPE, 64, (2, 2, 2), 2, attention=(16,), **how
    ),
    "DiT": lambda **how: fd.nn.DiT(SHAPE, 2, 384, 12, **how),
}


def moved(net):
    """The network with every weight perturbed, since its initial output is zero."""
    leaves, structure = jax.tree_util.tree_flatten(net)
    keys = jr.split(jr.key(1), len(leaves))
    return structure.unflatten(map(move, leaves, keys))


def move(leaf, key):
    if leaf.ndim == 0:
        return leaf + 1
    if leaf.ndim == 1:
        return leaf + 0.1 * jr.normal(key, leaf.shape)
    # The last axes are (height, width, inputs, outputs) for convolutions, and
    # (inputs, outputs) for matrices.
    inputs = leaf.shape[-4:-1] if leaf.ndim >= 4 else leaf.shape[-2:-1]
    fan_in = jnp.prod(jnp.asarray(inputs)).astype(leaf.dtype)
    return leaf + 0.5 * jr.normal(key, leaf.shape) / jnp.sqrt(fan_in)


@eqx.filter_jit
def values(net, s, t, x):
    """The velocity, and its derivatives in the end time and along the flow."""

    def one(s, t, x):
        velocity, end = jax.jvp(lambda t: net(s, t, x), (t,), (jnp.ones_like(t),))
        direction = jnp.ones_like(s), net(s, s, x)
        _, along = jax.jvp(lambda s, x: net(s, t, x), (s, x), direction)
        return velocity, end, along

    return jax.vmap(one)(s, t, x)


def main(networks):
    x = 0.5 * jr.normal(jr.key(2), (4, *SHAPE))
    s, t = jnp.asarray([[0.0, 0.1, 0.5, 0.3], [1.0, 0.4, 0.6, 0.3]])
    print("| network | velocity | in the end time | along the flow |")
    print("| --- | --- | --- | --- |")
    for name in networks:
        exact, rounded = (
            values(moved(NETWORKS[name](dtype=dtype, key=jr.key(0))), s, t, x)
            for dtype in (None, jnp.bfloat16)
        )
        errors = (
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for a, b in zip(rounded, exact, strict=True)
        )
        print(f"| {name} |", " | ".join(f"{error:.1%}" for error in errors), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = list(NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=choices, default=choices)
    main(parser.parse_args().networks)
