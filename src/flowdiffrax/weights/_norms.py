import jax.numpy as jnp
from jax import lax

from .._check import check_at_least, check_positive
from .._types import Scalar, Time
from ._base import AbstractWeight


class PowerWeight(AbstractWeight):
    r"""The adaptive weight: the squared error $e$ divided by $\mathrm{sg}(e + c)^p$.

    It reduces the weight of examples with large errors. With $p = 1/2$ it resembles a
    Huber loss; with $p = 1$ the gradients of all examples have about the same size.

    When learning from data, whose rates scatter around their mean, this moves the
    minimiser towards the most frequent rates. The effect is small in high dimensions,
    where all errors have about the same size, and large in low dimensions. The divisor is
    held fixed. With $p = 1$ the loss is close to 1 for every error much above $c$:
    monitor the samples, not the loss.

    **Arguments:**

    - `power`: the power $p$, at least 0.
    - `floor`: the constant $c$, positive, for the squared error summed over all entries.
    - `scale`: the size of the data relative to the data that `floor` is meant for. The
      floor becomes `floor * scale**2`.

    **Raises:** `ValueError` if `power` is negative, or if `floor` or `scale` is not
    positive.

    ??? cite "Reference"

        MeanFlow, [arXiv:2505.13447](https://arxiv.org/abs/2505.13447).
    """

    power: float = 1.0
    floor: float = 1e-3
    scale: float = 1.0

    def __check_init__(self):
        check_positive(self.floor, "floor")
        check_positive(self.scale, "scale")
        check_at_least(self.power, 0, "power")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        floor = self.floor * self.scale**2
        return squared_error / lax.stop_gradient(squared_error + floor) ** self.power


class NormalisedTangent(AbstractWeight):
    r"""The squared error $|g|^2$ divided by $\mathrm{sg}(|g| + c)$.

    For an objective $|v - \mathrm{sg}(v - g)|^2$, this has the same gradient as replacing
    the tangent $g$ by $g / (|g| + c)$.

    **Arguments:**

    - `floor`: the constant $c$, positive. The paper uses 0.1, for data with a standard
      deviation of 0.5.
    - `scale`: the size of the data relative to the data that `floor` is meant for. The
      floor becomes `floor * scale`.

    **Raises:** `ValueError` if `floor` or `scale` is not positive.

    ??? cite "Reference"

        sCM, [arXiv:2410.11081](https://arxiv.org/abs/2410.11081).
    """

    floor: float = 0.1
    scale: float = 1.0

    def __check_init__(self):
        check_positive(self.floor, "floor")
        check_positive(self.scale, "scale")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        size = lax.stop_gradient(jnp.sqrt(squared_error))
        return squared_error / (size + self.floor * self.scale)


class PseudoHuber(AbstractWeight):
    r"""The metric $\sqrt{|e|^2 + c^2} - c$: quadratic for small errors, linear for large.

    If the targets scatter, it moves the minimiser from the mean towards the median.

    **Arguments:**

    - `c`: the error at which the metric turns from quadratic to linear, at least 0, in
      units of the data. At 0 the metric is the distance $|e|$, which suits data in any
      units. For a state of $d$ entries, the paper uses $0.00054 \sqrt d$, for data with a
      standard deviation of 0.5.

    **Raises:** `ValueError` if `c` is negative.

    ??? cite "Reference"

        iCT, [arXiv:2310.14189](https://arxiv.org/abs/2310.14189).
    """

    c: float = 0.0

    def __check_init__(self):
        check_at_least(self.c, 0, "c")

    def __call__(self, s: Time, t: Time, squared_error: Scalar) -> Scalar:
        del s, t
        # Keeps the derivative of the root finite at an error of zero.
        tiny = jnp.finfo(squared_error.dtype).tiny
        root = jnp.sqrt(jnp.maximum(squared_error + self.c**2, tiny))
        # Equals sqrt(e + c^2) - c, without cancellation.
        return squared_error / (root + self.c)
