import equinox as eqx
import jax.numpy as jnp

from .._check import check_between
from ._base import AbstractTimes, Times
from ._shares import check_shares, split_by_shares
from ._uniform import Diagonal


class DiagonalMixture(AbstractTimes):
    r"""A fixed share of each batch on the diagonal $s = t$, the rest off it.

    The share is a number of rows, not a probability: the first
    `round(fraction * batch_size)` pairs lie on the diagonal. Unless the fraction is 0 or
    1, at least one pair lies on the diagonal and at least one off it. A loss can
    therefore treat the two parts differently without computing both for every example.

    **Arguments:**

    - `times`: the distribution off the diagonal, on [0, 1]. For another interval, put the
      mixture into [`flowdiffrax.times.OnInterval`][], not the other way round.
    - `fraction`: the share on the diagonal, in [0, 1].
    - `diagonal`: the distribution on the diagonal, uniform by default for any `times`.

    **Raises:** `ValueError` for a fraction outside [0, 1]; when used, for a batch of one
    pair, which cannot hold both parts.
    """

    times: AbstractTimes
    fraction: float = eqx.field(static=True, default=0.75)
    diagonal: Diagonal = Diagonal()

    def __check_init__(self):
        check_between(self.fraction, 0, 1, "fraction")

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        cut = self.num_diagonal(first.shape[0])
        s_on, t_on = self.diagonal.from_uniform(first[:cut], second[:cut])
        if cut == first.shape[0]:
            return s_on, t_on
        s_off, t_off = self.times.from_uniform(first[cut:], second[cut:])
        return jnp.concatenate([s_on, s_off]), jnp.concatenate([t_on, t_off])

    def num_diagonal(self, batch_size: int) -> int:
        if batch_size == 1 and 0 < self.fraction < 1:
            raise ValueError(
                f"A batch of 1 has no room for a share of {self.fraction} on the "
                "diagonal and the rest off it. Use a larger batch."
            )
        # In a small batch, rounding must not drop a part that was asked for.
        least, most = int(self.fraction > 0), batch_size - int(self.fraction < 1)
        return min(max(round(self.fraction * batch_size), least), most)


class MixedTimes(AbstractTimes):
    r"""Several distributions, each on a fixed share of the batch.

    The shares are numbers of rows, as in [`flowdiffrax.times.DiagonalMixture`][]. The
    rows of each distribution are consecutive.

    **Arguments:**

    - `distributions`: the distributions.
    - `shares`: their shares of the batch, positive. They are normalised to sum to one.

    **Raises:** `ValueError` if a share is not positive, or if there is not one share for
    each distribution; when used, for a batch that is too small for the shares.
    """

    distributions: tuple[AbstractTimes, ...]
    shares: tuple[float, ...] = eqx.field(static=True)

    def __check_init__(self):
        check_shares(self.shares, self.distributions)

    def from_uniform(self, first: Times, second: Times) -> tuple[Times, Times]:
        pairs = [
            times.from_uniform(first[rows], second[rows])
            for times, rows in self._parts(first.shape[0])
        ]
        s, t = zip(*pairs, strict=True)
        return jnp.concatenate(s), jnp.concatenate(t)

    def num_diagonal(self, batch_size: int) -> int:
        total = 0
        for times, rows in self._parts(batch_size):
            size = rows.stop - rows.start
            on_diagonal = times.num_diagonal(size)
            total += on_diagonal
            # Only rows at the start of the batch count.
            if on_diagonal < size:
                break
        return total

    def _parts(self, batch_size: int):
        slices = split_by_shares(batch_size, self.shares)
        return zip(self.distributions, slices, strict=True)
