"""How often `testing.check` finds a fault in a narrow band, by one identity alone.

    python benchmarks/detection.py                            # all, four minutes
    python benchmarks/detection.py --identities semigroup --num 50

A rotation of the plane is wrong by a smooth bump in a band of one quantity: 2 % of the
interval of start times, of end times or of the lengths of jumps in one direction, or 1 %
of the range of an entry of the state. For each identity and each kind of band, there are
200 positions of the band, and as many seeds. Each run checks a single identity.
`solver_equals_map` and `dense_output` are omitted: they compare a solver with the map,
and a solver that steps with a wrong map agrees with it.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import flowdiffrax as fd
from flowdiffrax import testing

IDENTITIES = (
    "starts_as_identity",
    "semigroup",
    "inverse",
    "tangent",
    "lagrangian",
    "eulerian",
    "average_velocity",
    "both_directions",
    "positive_jacobian",
)
# The quantity of each band, its lowest and highest value, and the width of the band.
BANDS = {
    "start": (lambda s, t, x: s, 0.0, 1.0, 0.02),
    "end": (lambda s, t, x: t, 0.0, 1.0, 0.02),
    "length": (lambda s, t, x: t - s, -1.0, 1.0, 0.02),
    "state": (lambda s, t, x: x[0], -2.0, 2.0, 0.04),
}
# A jump of length zero has one time and no length.
MEANINGLESS = {("starts_as_identity", "length"), ("tangent", "length")}


class WrongRotation(fd.AbstractFlowMap):
    """A rotation that is wrong in one band, in the way that an identity should see."""

    centre: jax.Array
    band: str = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def jump(self, s, t, x, args):
        bump = self.bump(s, t, x)
        if self.identity == "positive_jacobian":
            return rotate(t - s, x * jnp.stack([1 - 2 * bump, jnp.ones_like(bump)]))
        size = 1 if self.identity == "starts_as_identity" else t - s
        return rotate(t - s, x) + 0.05 * size * bump

    def chord(self, s, t, x, args):
        if self.identity != "average_velocity":
            return super().chord(s, t, x, args)
        gap = jnp.where(s == t, 1, t - s)
        return jnp.where(s == t, velocity(t, x), (rotate(t - s, x) - x) / gap)

    def bump(self, s, t, x):
        quantity, _, _, width = BANDS[self.band]
        from_centre = (quantity(s, t, x) - self.centre) / (width / 2)
        inside = jnp.clip(from_centre, -1, 1)
        return (1 + jnp.cos(jnp.pi * inside)) / 2


def rotate(angle, x):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * x[0] - s * x[1], s * x[0] + c * x[1]])


def velocity(t, x):
    return jnp.stack([-x[1], x[0]])


def is_found(identity, band, seed):
    _, low, high, width = BANDS[band]
    rng = np.random.default_rng(seed)
    centre = rng.uniform(low + width / 2, high - width / 2)
    flow_map = WrongRotation(jnp.asarray(centre), band, identity)
    try:
        testing.check(
            flow_map, velocity, state=jnp.zeros(2), identities=[identity], seed=seed
        )
    except testing.IdentityError:
        return True
    return False


def main(identities=IDENTITIES, bands=tuple(BANDS), num=200):
    """Prints and returns the share of the faults that each identity finds."""
    found = {}
    print(f"{'identity':<20}" + "".join(f"{band:>9}" for band in bands) + "  seconds")
    for identity in identities:
        start, shares = time.monotonic(), []
        for band in bands:
            if (identity, band) in MEANINGLESS:
                shares.append("-")
                continue
            share = np.mean([is_found(identity, band, seed) for seed in range(num)])
            found[identity, band] = float(share)
            shares.append(f"{share:.3f}")
        cells = "".join(f"{share:>9}" for share in shares)
        print(f"{identity:<20}{cells}{time.monotonic() - start:>9.0f}", flush=True)
    print(f"smallest: {min(found.values()):.3f}, of {num} positions each")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--identities", nargs="+", default=IDENTITIES)
    parser.add_argument("--bands", nargs="+", default=tuple(BANDS))
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--float32", action="store_true")
    options = vars(parser.parse_args())
    jax.config.update("jax_enable_x64", not options.pop("float32"))
    main(**options)
