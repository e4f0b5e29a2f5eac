import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._check import check_positive
from .._tree import Frozen
from ..nn._log_units import LogUnits


class RobustDifference(eqx.Module):
    r"""A difference of states in which large errors count less.

    With the difference $d$ of an entry in the given units and the width $c$, it returns
    $r$ with $r^2 = 2c\,(\sqrt{c^2 + d^2} - c)$, the pseudo-Huber loss: the squared error
    where it is small, and otherwise the absolute error. Trajectories that pass close to a
    threshold, and are hard to learn, then do not dominate the others. The sum of squares
    over all entries is their mean.

    Pass it as `difference` to [`flowdiffrax.TrajectoryMatching`][].

    **Arguments:**

    - `units`: the units, in which positive entries have relative errors.
    - `width`: the positive width $c$.
    """

    frozen_units: Frozen
    width: float

    def __init__(self, units: LogUnits, width: float = 0.02):
        check_positive(width, "width")
        self.frozen_units = Frozen(units)
        self.width = width

    def __call__(
        self, x: Float[Array, " size"], y: Float[Array, " size"]
    ) -> Float[Array, " size"]:
        difference = self.frozen_units.thaw().difference(x, y)
        c = self.width
        shrunk = jnp.sqrt(2 * c / (jnp.sqrt(c**2 + difference**2) + c))
        return difference * shrunk / x.size**0.5
