import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._check import check_count, check_key
from .._time import times_like
from .._tree import Frozen, is_concrete
from .._types import Args, Time
from ._describe import describe
from ._log_units import LogUnits
from ._mlp import as_vector, check_state

_TIME_FREQUENCIES = 1, 2, 4


class RelaxationMLP(eqx.Module):
    r"""The rates and targets of a [`flowdiffrax.flow_maps.RelaxationFlowMap`][].

    Its inputs are the state in [`flowdiffrax.nn.LogUnits`][] and as $x / (|x| + m)$, the
    length of the jump and its logarithm, and `args`. Targets of positive entries are
    exponentials, and so positive, at most 8 standard deviations from their mean. Rates
    are positive and relative to the jump, $\lambda = 3\,\mathrm{softplus}(n) / (h + h_0)$
    with the shortest jump $h_0$ of the units: in a jump of any length, an entry may reach
    its target.

    Without `time_range`, it depends on the times by their difference only, which is right
    for an ODE whose vector field does not depend on time.

    **Arguments:**

    - `units`: the units of states and times. They are held fixed in training.
    - `width`, `depth`: the width and the number of hidden layers, each at least 1.
    - `args_size`: the length of the vector `args`, or 1 for a number. With 0, `args` is
      ignored.
    - `time_range`: the interval `(low, high)` of times, if the vector field depends on
      time.
    - `activation`: a smooth activation function.
    - `key`: a random key for the initial weights.
    """

    is_network: ClassVar[bool] = True

    first: eqx.nn.Linear
    hidden: list[eqx.nn.Linear]
    last: eqx.nn.Linear
    frozen_units: Frozen
    args_size: int = eqx.field(static=True)
    time_range: tuple[float, float] | None = eqx.field(static=True)
    activation: Callable = eqx.field(static=True)

    def __init__(
        self,
        units: LogUnits,
        width: int = 128,
        depth: int = 4,
        *,
        args_size: int = 0,
        time_range: tuple[float, float] | None = None,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        key: Key[Array, ""],
    ):
        check_count(width, 1, "width")
        check_count(depth, 1, "depth")
        check_key(key)
        size = units.mean.size
        first_key, hidden_key, last_key = jr.split(key, 3)
        num_times = 0 if time_range is None else 1 + len(_TIME_FREQUENCIES)
        num_inputs = 2 * size + 2 + args_size + num_times
        self.first = eqx.nn.Linear(num_inputs, width, key=first_key)
        self.hidden = [
            eqx.nn.Linear(width, width, key=jr.fold_in(hidden_key, index))
            for index in range(depth - 1)
        ]
        self.last = eqx.nn.Linear(width, 2 * size, key=last_key)
        self.frozen_units = Frozen(units)
        self.args_size = args_size
        if time_range is not None:
            time_range = float(time_range[0]), float(time_range[1])
        self.time_range = time_range
        self.activation = activation

    @property
    def units(self) -> LogUnits:
        """The units of states and times."""
        return self.frozen_units.thaw()

    def __call__(
        self, s: Time, t: Time, x: Float[Array, " size"], args: Args = None
    ) -> tuple[Float[Array, " size"], Float[Array, " size"]]:
        units = self.units
        check_state(x, units.mean.size)
        x = jnp.asarray(x)  # NumPy's may be float64 where JAX has none
        s, t = times_like(x, s, t)
        # In NumPy, since under `jit` a comparison by JAX would be traced.
        if is_concrete((s, t)) and np.asarray(t) < np.asarray(s):
            raise ValueError(
                f"This network knows forward jumps only; got s={s}, t={t}. For backward "
                "jumps, learn a map with `both_directions=True`."
            )
        h = (t - s).astype(x.dtype)
        features = [units.state(x), units.saturation(x), units.step(h)]
        if self.args_size > 0:
            vector = as_vector(args, self.args_size, x.dtype)
            features.append(vector if units.args is None else units.args.state(vector))
        if self.time_range is not None:
            low, high = self.time_range
            time = ((s - low) / (high - low)).astype(x.dtype)
            waves = [jnp.cos(math.pi * k * time) for k in _TIME_FREQUENCIES]
            features.append(jnp.stack([time, *waves]))
        # Weights may be of lower precision than states and times.
        inputs = jnp.concatenate(features).astype(self.first.weight.dtype)
        out = self.activation(self.first(inputs))
        for layer in self.hidden:
            out = out + self.activation(layer(out))
        rate, target = jnp.split(self.last(out).astype(x.dtype), 2)
        # Exponentials must not overflow, nor a target be far from all that was seen.
        target = jnp.where(units.is_positive, 8 * jnp.tanh(target / 8), target)
        per_jump = 3 * jax.nn.softplus(rate)
        return per_jump / (h + units.shortest.astype(h.dtype)), units.undo_state(target)

    def __pdoc__(self, **kwargs):
        depth = len(self.hidden) + 1
        size = self.units.mean.size
        return describe(self, f"{size}, width={self.first.out_features}, depth={depth}")
