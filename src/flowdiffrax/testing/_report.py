"""How far a map is from each identity, over a grid of times."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float

from .._check import check_count
from .._io import import_extra
from .._time import time_dtype
from .._tree import num_rows
from .._types import Args, State
from ._assess import check_names, prepare
from ._identity import IDENTITIES, Jump

_REPORTED = (
    "starts_as_identity",
    "semigroup",
    "inverse",
    "tangent",
    "lagrangian",
    "eulerian",
)


@dataclasses.dataclass(frozen=True, repr=False)
class DefectReport:
    """The defects of a flow map, which print as a table.

    A defect is the norm of an identity's residual, over all entries of a state.

    **Attributes:**

    - `times`: the grid of times.
    - `by_times`: for each identity, the root mean square over the states, by start time
      and end time. Identities with one time have values on the diagonal only, and NaN
      elsewhere.
    - `worst_by_times`: the same for the largest defect over the states.
    """

    times: Float[np.ndarray, " times"]
    by_times: dict[str, np.ndarray]
    worst_by_times: dict[str, np.ndarray]

    @property
    def rms(self) -> dict[str, float]:
        """For each identity, the root mean square over times and states."""
        return {
            name: float(np.sqrt(np.mean(_asked(name, values) ** 2)))
            for name, values in self.by_times.items()
        }

    def table(self) -> str:
        """A row for each identity: rms, the largest defect, and its times."""
        lines = [f"{'identity':<20}{'rms':>11}{'worst':>11}{'s':>8}{'t':>8}"]
        for name, rms in self.rms.items():
            values = self.worst_by_times[name]
            order = np.nan_to_num(_asked(name, values), nan=np.inf)
            index = int(np.argmax(order))
            is_alone = order.ndim == 1
            i, j = (index, index) if is_alone else np.unravel_index(index, values.shape)
            lines.append(
                f"{name:<20}{rms:>11.2e}{values[i, j]:>11.2e}"
                f"{self.times[i]:>8.3g}{self.times[j]:>8.3g}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    def plot(self, axes: Any = None) -> Any:
        """A heat-map for each identity: start times to the right, end times upwards.

        The colour scale is logarithmic, brighter for larger defects, and the same in all
        panels. It goes from the smallest defect of a jump between different times, but no
        less than 1/10,000 of the largest, to the largest.

        **Arguments:**

        - `axes`: Matplotlib axes, one for each identity, as `plt.subplots` returns them;
          `None` for a new figure.

        **Returns:** the figure.

        **Raises:** `ImportError` without Matplotlib.
        """
        colours = import_extra("matplotlib.colors", "plot", "DefectReport.plot")
        mappables = import_extra("matplotlib.cm", "plot", "DefectReport.plot")
        if axes is None:
            # Avoid `pyplot`, which keeps figures and may open windows.
            figures = import_extra("matplotlib.figure", "plot", "DefectReport.plot")
            rows = 1 + (len(self.by_times) > 3)
            columns = -(-len(self.by_times) // rows)
            figure = figures.Figure(
                figsize=(3.2 * columns, 2.8 * rows), layout="constrained"
            )
            axes = figure.subplots(rows, columns, squeeze=False)
        axes = np.ravel(np.asarray(axes, object))
        panels = axes[: len(self.by_times)]
        norm = colours.LogNorm(*_colour_range(self.by_times))
        for panel, (name, values) in zip(panels, self.by_times.items(), strict=True):
            # Give zero, an identity that holds exactly, a colour too.
            values = np.maximum(values, np.finfo(np.float32).tiny)
            panel.pcolormesh(
                self.times,
                self.times,
                values.T,
                norm=norm,
                cmap="magma",
                shading="nearest",
            )
            panel.set(title=name, xlabel="start s", ylabel="end t", aspect="equal")
        scale = mappables.ScalarMappable(norm, "magma")
        axes[0].figure.colorbar(scale, ax=[*panels], extend="min")
        for panel in axes[len(self.by_times) :]:
            panel.set_axis_off()
        return axes[0].figure


def defect_report(
    flow_map: Callable,
    vector_field: Callable | None = None,
    *,
    states: State | Callable[[float], State],
    t0: float | None = None,
    t1: float | None = None,
    num_times: int = 9,
    identities: Sequence[str] = _REPORTED,
    args: Args = None,
) -> DefectReport:
    """How far a map is from its identities, by start and end time.

    The intermediate time of the semigroup identity is the midpoint. On the same jumps,
    the root mean squares are those of [`flowdiffrax.metrics.defects`][].

    **Arguments:**

    - `flow_map`, `vector_field`: as for
      [`flowdiffrax.testing.assert_starts_as_identity`][]. Without a field, the map is
      compared with its own velocity, and `tangent` is omitted.
    - `states`: a batch of states at time `t0`, with the batch axis on every leaf, which
      the map itself takes to the other times; or a function `t -> batch`, such as the
      samples of an interpolant at `t`, with the same shape for all times.
    - `t0`, `t1`: the interval of times; `None` for the map's `time_range`, or [0, 1] if
      it declares none.
    - `num_times`: the number of times along each side of the grid, at least 2, including
      both ends.
    - `identities`: names of identities: the names of the assertions without `assert_`.
    - `args`: conditions with the batch axis, or `None`.

    **Raises:** `ValueError` for fewer than two times, unknown names, or states and
    conditions without a common batch axis.
    """
    check_names(identities)
    check_count(num_times, 2, "num_times")
    low, high = getattr(flow_map, "time_range", None) or (0.0, 1.0)
    low, high = low if t0 is None else t0, high if t1 is None else t1
    times = np.linspace(low, high, num_times)
    start = states(low) if callable(states) else states
    start = jtu.tree_map(jnp.asarray, start)
    batch = num_rows((start, eqx.filter(args, eqx.is_array)), "States and conditions")
    spread = lambda time: jnp.full(batch, time, time_dtype(start))
    prepared = prepare(flow_map, vector_field, start, spread(low), args, once=False)
    compute, known_map, field, settings, *_ = prepared
    if callable(states):
        clouds = [jtu.tree_map(jnp.asarray, states(float(time))) for time in times]
    else:
        axes = eqx.if_array(0)
        move = eqx.filter_jit(eqx.filter_vmap(known_map, in_axes=(0, 0, axes, axes)))
        clouds = [move(spread(low), spread(time), start, args) for time in times]
    names = [name for name in identities if name != "tangent" or vector_field is not None]
    alone = tuple(name for name in names if len(IDENTITIES[name].times) == 1)
    paired = tuple(name for name in names if len(IDENTITIES[name].times) > 1)
    shape = (num_times, num_times)
    rms = {name: np.full(shape, np.nan) for name in names}
    worst = {name: np.full(shape, np.nan) for name in names}
    for i, x in enumerate(clouds):
        for j in range(num_times):
            s, t = spread(times[i]), spread(times[j])
            jump = Jump(known_map, field, s, (s + t) / 2, t, x, args, settings)
            for asked in (alone,) * (i == j) + (paired,):
                for name, (residual, _) in compute(asked, jump).items():
                    norms = _squared_norms(residual)
                    rms[name][i, j] = np.sqrt(np.mean(norms))
                    worst[name][i, j] = np.sqrt(np.max(norms))
    return DefectReport(times, rms, worst)


def _asked(name: str, values: np.ndarray) -> np.ndarray:
    """The diagonal if the identity has one time, otherwise all values."""
    return np.diagonal(values) if len(IDENTITIES[name].times) == 1 else values


def _colour_range(by_times: dict[str, np.ndarray]) -> tuple[float, float]:
    """The range of the map's defects, without those that are only rounding."""
    high, low = 1e-30, np.inf
    for name, values in by_times.items():
        values = np.where(np.isfinite(values), values, np.nan)
        high = np.nanmax(values, initial=high)
        if len(IDENTITIES[name].times) > 1:
            # A jump from a time to itself satisfies most identities exactly.
            jumps = values[~np.eye(len(values), dtype=bool)]
            low = np.nanmin(jumps, initial=low)
    return float(np.clip(low, 1e-4 * high, 0.1 * high)), float(high)


def _squared_norms(residual: State) -> np.ndarray:
    """The squared norm of each row of a batch."""
    total: Any = 0.0
    for leaf in jtu.tree_leaves(residual):
        magnitude = np.asarray(jnp.abs(leaf).astype(float))
        total = total + np.sum(magnitude.reshape(len(magnitude), -1) ** 2, axis=1)
    return total
