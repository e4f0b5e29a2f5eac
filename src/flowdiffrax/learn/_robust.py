import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._check import check_positive
from .._tree import Frozen
from ..nn._log_units import LogUnits


class RobustDifference(eqx.Module):
    r"""A difference of states in which large errors count less.

    With the difference $d$ of an entry in the given units and the width $c$, it returns
    $r$ with $r^2 = 2c\,(\sqrt{c^2 + d^2} - c)$, the pseudo-Huber loss: the squared error
    where it is small, and otherwise the absolute error. Trajectories that pass close to a
    threshold, and are hard to learn, then do not dominate the others. The sum of squares
    over all entries is their mean. Entries of the second state that are NaN were not
    observed, and count as equal.

    If observations have errors of known size, $d$ is measured in units of it, and $c$ is
    1: the loss is then a Gaussian log-likelihood near zero. Where the noise is less than
    `width`, in the given units, `width` takes its place.

    Pass it as `difference` to [`flowdiffrax.TrajectoryMatching`][].

    **Arguments:**

    - `units`: the units, in which positive entries have relative errors.
    - `width`: the positive width $c$.
    - `noise`: the standard deviation of the errors of the second state, one number for
      each entry or for all; `None` for exact states.
    """

    frozen_units: Frozen
    width: float
    noise: Frozen | None

    def __init__(
        self, units: LogUnits, width: float = 0.02, noise: ArrayLike | None = None
    ):
        check_positive(width, "width")
        self.frozen_units = Frozen(units)
        self.width = width
        self.noise = None if noise is None else Frozen(jnp.asarray(noise))

    def __call__(
        self, x: Float[Array, " size"], y: Float[Array, " size"]
    ) -> Float[Array, " size"]:
        units, c = self.frozen_units.thaw(), self.width
        y = jnp.where(jnp.isnan(y), x, y)
        if self.noise is None:
            difference = units.difference(x, y)
        else:
            # Not by logarithms, whose mean is not that of what was observed.
            size = jnp.where(units.is_positive, jnp.abs(y), units.std.astype(y.dtype))
            noise = self.noise.thaw().astype(y.dtype)
            difference, c = (x - y) / jnp.hypot(c * size, noise), 1.0
        shrunk = jnp.sqrt(2 * c / (jnp.sqrt(c**2 + difference**2) + c))
        return difference * shrunk / x.size**0.5
