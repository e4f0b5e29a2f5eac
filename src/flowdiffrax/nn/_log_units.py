import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# An error is relative to an entry that varies by at least this share of its size.
LEAST_SPREAD = 0.1


class LogUnits(eqx.Module):
    r"""Units in which positive entries are measured by their logarithms.

    Concentrations span many orders of magnitude, and what matters about them is their
    relative error. A positive entry is $z = (\log(x + f) - \mu) / \sigma$ in these units,
    and any other entry, such as a temperature, is $z = (x - \mu) / \sigma$. Time is
    measured by its logarithm too, since a stiff system has fast and slow parts.

    Methods take one state; use `jax.vmap` for a batch.

    **Arguments:**

    - `is_positive`: which entries are positive.
    - `floor`: the positive number $f$ below which an entry counts as zero.
    - `mean`, `std`: the mean and the standard deviation, of the logarithm where an entry
      is positive.
    - `duration`: the longest jump.
    - `shortest`: the shortest jump that matters, positive and less than `duration`.
    - `args`: the units of a vector `args`, in which times have no meaning; `None` to
      leave it as it is.
    """

    is_positive: Bool[Array, " size"]
    floor: Float[Array, " size"]
    mean: Float[Array, " size"]
    std: Float[Array, " size"]
    duration: Float[Array, ""]
    shortest: Float[Array, ""]
    args: "LogUnits | None" = None

    @classmethod
    def of(
        cls,
        ts: Array | np.ndarray,
        ys: Array | np.ndarray,
        is_positive: Array | np.ndarray | None = None,
        args: Array | np.ndarray | None = None,
        floor: Array | np.ndarray | float = 0.0,
    ) -> "LogUnits":
        """Computes the units of a pool of trajectories.

        **Arguments:**

        - `ts`: increasing times, of shape `(times,)` or `(pool, times)`.
        - `ys`: the states at these times, of shape `(pool, times, size)`.
        - `is_positive`: which entries are positive; `None` for those that are never
          negative in the pool.
        - `args`: vectors `args`, of shape `(pool, args_size)`, whose units are computed
          as well: by the logarithm if an entry spans more than a decade.
        - `floor`: the number below which an entry counts as zero, or one for each; at
          least a ten-billionth of its largest value.

        **Raises:** `ValueError` if an entry that should be positive is negative.
        """
        ys = np.asarray(ys, np.float64)
        ts = np.asarray(ts, np.float64)
        least, largest = ys.min((0, 1)), np.abs(ys).max((0, 1))
        never_negative = least >= 0
        positive = never_negative if is_positive is None else np.asarray(is_positive)
        wrong = np.flatnonzero(positive & ~never_negative)
        if wrong.size > 0:
            raise ValueError(
                f"Entries {wrong[:5].tolist()} should be positive, but the trajectories "
                f"reach {least[wrong[:5]].tolist()}. Solve to a tighter absolute "
                "tolerance, or leave these entries out of `is_positive`."
            )
        # Not zero in float32.
        floor = np.maximum(np.maximum(1e-10 * largest, 1e-36), floor)
        values = np.where(positive, np.log(np.maximum(ys, 0) + floor), ys)
        mean, std = values.mean((0, 1)), values.std((0, 1))
        # An entry that does not vary would divide by zero, and keeps its value to the
        # precision of float32 instead.
        least = 1e-6 * np.where(positive, 1.0, np.abs(mean))
        std = np.where(largest > 0, np.maximum(std, least), 1.0)
        gaps, duration = np.diff(ts), (ts[..., -1] - ts[..., 0]).max()
        of_args = None
        if args is not None:
            rows = np.asarray(args, np.float64)
            least, most = rows.min(0), rows.max(0)
            spans_decades = (least > 0) & (most > 10 * least)
            of_args = cls.of(ts, rows[:, None], spans_decades)
            # Nothing is known about a parameter that never varies, and little must follow
            # from another value.
            size = np.maximum(np.abs(rows).max(0), 1e-36)
            wide = np.where(most - least > 1e-6 * size, np.asarray(of_args.std), size)
            wide = jnp.asarray(wide, of_args.std.dtype)
            of_args = dataclasses.replace(of_args, std=wide)
        array = lambda x: jnp.asarray(x, jnp.result_type(float))
        return cls(
            jnp.asarray(positive),
            array(floor),
            array(mean),
            array(std),
            array(duration),
            array(np.minimum(gaps.min(), duration / 2)),
            of_args,
        )

    def state(self, x: Float[Array, " size"]) -> Float[Array, " size"]:
        """Returns the state in these units."""
        floor, mean, std = self._like(x)
        size = self._size(mean)
        # A sum of logarithms would round off what an entry of 1e6 +- 1 does.
        away = jnp.maximum(x, 0) + (floor - size)
        is_near = jnp.abs(away) < size / 2
        near = jnp.log1p(jnp.where(is_near, away / size, 0))
        log = jnp.log(jnp.where(is_near, size, jnp.maximum(x, 0) + floor)) - mean
        log = jnp.where(is_near, near, log)
        return jnp.where(self.is_positive, log, x - mean) / std

    def undo_state(self, z: Float[Array, " size"]) -> Float[Array, " size"]:
        """Returns the state whose logarithms are given, positive where it should be.

        The floor is not subtracted, so this is the inverse of `state` to within it.
        """
        _, mean, std = self._like(z)
        away = std * z
        # The other branch of `where` must not overflow, nor the factor on its own.
        root = jnp.exp(jnp.where(self.is_positive, away, 0) / 2)
        return jnp.where(self.is_positive, self._size(mean) * root * root, mean + away)

    def saturation(self, x: Float[Array, " size"]) -> Float[Array, " size"]:
        """Returns $x / (|x| + m)$ with the typical size $m$ of each entry."""
        _, mean, std = self._like(x)
        size = jnp.where(self.is_positive, self._size(mean), jnp.abs(mean) + std)
        return x / (jnp.abs(x) + size)

    def step(self, h: Float[Array, ""]) -> Float[Array, " 2"]:
        """Returns the length of a jump in two units: its logarithm, and itself."""
        duration = self.duration.astype(h.dtype)
        shortest = self.shortest.astype(h.dtype) / duration
        h = h / duration
        # From -1 for the shortest to 1 for the longest jump.
        log = 1 - 2 * jnp.log((h + shortest) / (1 + shortest)) / jnp.log(shortest)
        return jnp.stack([log, h])

    def difference(
        self, x: Float[Array, " size"], y: Float[Array, " size"]
    ) -> Float[Array, " size"]:
        """Returns the relative error where an entry is positive, and else the error in
        standard deviations.

        For an entry that varies by less than a tenth of its size, the error is relative
        to ten standard deviations instead.
        """
        _, _, std = self._like(x)
        weight = jnp.where(self.is_positive, jnp.maximum(std, LEAST_SPREAD), 1)
        return weight * (self.state(x) - self.state(y))

    def _size(self, mean):
        """The geometric mean of each positive entry, and 1 for the others."""
        return jnp.exp(jnp.where(self.is_positive, mean, 0))

    def _like(self, x):
        return tuple(a.astype(x.dtype) for a in (self.floor, self.mean, self.std))
