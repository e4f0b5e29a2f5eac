import jax.numpy as jnp
from jax import lax

from .._tree import is_concrete
from .._types import Scalar, Time
from ._base import AbstractWeight, check_positive


class PowerWeight(AbstractWeight):
    r"""The squared error $e$ over $\mathrm{sg}(e + c)^p$, the adaptive weight.

    It takes weight from examples with large errors; $p = 1/2$ resembles a Huber loss, and
    with $p = 1$ every example has a gradient of about the same size. Along data, whose
    rate is scattered around its mean, that moves the minimiser towards the most frequent
    rates: little in high dimensions, where all errors are of one size, and much in few.
    The divisor is held fixed. The loss is close to 1 for every error much above $c$:
    watch the samples, not the loss.

    **Arguments:**

    - `power`: the power $p$, at least 0.
    - `floor`: the $c$, positive, for the squared error summed over all entries.
    - `scale`: for data in other units, how many times as large they are as those that
      `floor` is for: the floor becomes `floor * scale**2`.

    **Raises:** `ValueError` for a negative power, or a floor or scale that is not
    positive.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447).
    """

    power: float = 1.0
    floor: float = 1e-3
    scale: float = 1.0

    def __check_init__(self):
        check_positive("floor", self.floor)
        check_positive("scale", self.scale)
        if is_concrete(self.power) and self.power < 0:
            raise ValueError(f"`power` must be at least 0; got {self.power}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        floor = self.floor * self.scale**2
        return squared_error / lax.stop_gradient(squared_error + floor) ** self.power


class NormalisedTangent(AbstractWeight):
    r"""The squared error $|g|^2$ over $\mathrm{sg}(|g| + c)$.

    For an objective $|v - \mathrm{sg}(v - g)|^2$ its gradient is the one with the tangent
    $g$ replaced by $g / (|g| + c)$.

    **Arguments:**

    - `floor`: the $c$, positive; 0.1 in the paper, for data with a standard deviation of
      0.5.
    - `scale`: for data in other units, how many times as large they are as those that
      `floor` is for: the floor becomes `floor * scale`.

    **Raises:** `ValueError` if one of them is not positive.

    ??? cite "Reference"

        sCM, [arXiv:2410.11081](https://arxiv.org/abs/2410.11081).
    """

    floor: float = 0.1
    scale: float = 1.0

    def __check_init__(self):
        check_positive("floor", self.floor)
        check_positive("scale", self.scale)

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        size = lax.stop_gradient(jnp.sqrt(squared_error))
        return squared_error / (size + self.floor * self.scale)


class PseudoHuber(AbstractWeight):
    r"""The metric $\sqrt{|e|^2 + c^2} - c$: quadratic for small errors, linear for large.

    Along scattered data it moves the minimiser from the mean towards the median.

    **Arguments:**

    - `c`: where quadratic turns into linear, at least 0, in units of the data. With 0 it
      is the distance $|e|$, which suits data in any units. For a state of $d$ entries,
      the paper has $0.00054 \sqrt d$, for data with a standard deviation of 0.5.

    **Raises:** `ValueError` if it is negative.

    ??? cite "Reference"

        iCT, [arXiv:2310.14189](https://arxiv.org/abs/2310.14189).
    """

    c: float = 0.0

    def __check_init__(self):
        if is_concrete(self.c) and self.c < 0:
            raise ValueError(f"`c` must be at least 0; got {self.c}.")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        # The derivative of the root is finite at an error of zero, too.
        tiny = jnp.finfo(squared_error.dtype).tiny
        root = jnp.sqrt(jnp.maximum(squared_error + self.c**2, tiny))
        # sqrt(e + c^2) - c without its cancellation.
        return squared_error / (root + self.c)
