"""The error raised when an identity does not hold."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._derivative import FiniteDifference
from .._types import Args, State
from ._identity import IDENTITIES, rounding_unit

# One number for all identities, or a mapping from their names.
Tolerance = float | Mapping[str, float] | None


class Failure(NamedTuple):
    """One identity that does not hold, at one point.

    **Attributes:**

    - `identity`: the name of the identity, as in `assert_<name>`.
    - `times`: its times, by name.
    - `x`, `args`: the state, and the `args` of the map.
    - `defect`: the largest entry of the residual, by magnitude; for
      `positive_jacobian` the determinant.
    - `tolerance`: the largest defect allowed.
    - `entry`: the entry of the state with the largest error.
    - `row`: the row of the batch, `None` for a single point.
    - `has_field`: whether the map was compared with a vector field. Otherwise, it was
      compared with its own velocity.
    - `worst`: the worst failure that a search found, of which this is the simplest clear
      one; `None` without a search.
    - `share`: the share of the points of a search at which the identity does not hold.
    """

    identity: str
    times: dict[str, Any]
    x: State
    args: Args
    defect: float
    tolerance: float
    entry: str = ""
    row: int | None = None
    has_field: bool = True
    worst: "Failure | None" = None
    share: float | None = None

    def __str__(self) -> str:
        identity = IDENTITIES[self.identity]
        lines = [
            f"The identity `{self.identity}` does not hold: {identity.formula}",
            f"  by how much: {self._said()}",
            f"  where:       {self._place()}",
            f"               x = {literal(self.x)}",
        ]
        worst = self.worst
        if worst is not None and worst.command() != self.command():
            lines += [
                f"  at worst:    {worst._said()}",
                f"               {worst._place()}",
                f"               x = {literal(worst.x)}",
            ]
        if self.share is not None:
            lines += [f"  how often:   at {100 * self.share:.2g} % of the jumps"]
        lines += [
            f"  often it is: {identity.causes}",
            f"  to repeat:   {self.command()}",
        ]
        return "\n".join(lines)

    def _said(self) -> str:
        entry = f", at entry {self.entry}" if self.entry else ""
        if self.identity == "positive_jacobian":
            is_known = not np.isnan(self.defect)
            value = f"{self.defect:.3g}" if is_known else "zero or undefined"
            return f"the determinant is {value}{entry}"
        write = lambda digits: [f"{x:.{digits}g}" for x in (self.defect, self.tolerance)]
        # As many digits as it takes to tell the two apart.
        differ = [digits for digits in range(3, 18) if len({*write(digits)}) == 2]
        defect, allowed = write(min(differ, default=3))
        return f"off by {defect}, where {allowed} is allowed{entry}"

    def _place(self) -> str:
        place = "" if self.row is None else f"row {self.row}, "
        return place + ", ".join(
            f"{name} = {time!s}" for name, time in self.times.items()
        )

    def command(self) -> str:
        """A line of Python that reproduces the failure."""
        field = ["vector_field" if self.has_field else "None"]
        field = field if IDENTITIES[self.identity].needs_field else []
        point = [str(value) for value in self.times.values()] + [literal(self.x)]
        args = [] if self.args is None else [f"args={literal(self.args)}"]
        inputs = ", ".join(["flow_map", *field, *point, *args])
        return f"assert_{self.identity}({inputs})"


class IdentityError(AssertionError):
    """An identity of flow maps does not hold.

    **Attributes:**

    - `failures`: one [`flowdiffrax.testing.Failure`][] for each identity that is broken.
    """

    def __init__(self, *failures: Failure, note: str = ""):
        self.failures = failures
        super().__init__("\n\n".join([*map(str, failures), *([note] if note else [])]))


class _Code(str):
    """Text that is its own `repr`, and so appears unquoted in the `repr` of a PyTree."""

    def __repr__(self) -> str:
        return str(self)


def literal(tree: Any) -> str:
    """A PyTree as Python code, with arrays of more than 64 entries abbreviated."""

    def write(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            return leaf
        dtype, values = jnp.result_type(leaf), np.asarray(leaf)
        # NumPy does not know how many digits to print for non-native floats, such as
        # bfloat16.
        if values.dtype.kind == "V":
            values = values.astype(np.float32)
        text = np.array2string(
            values, separator=", ", floatmode="unique", threshold=64, max_line_width=10**6
        )
        return _Code(f"jnp.asarray({' '.join(text.split())}, jnp.{dtype})")

    return repr(jtu.tree_map(write, tree))


def tolerances(
    name: str, x: State, jvp: Callable, rtol: Tolerance, atol: Tolerance
) -> tuple[float, float]:
    """The relative and the absolute tolerance of an identity, given or by default.

    **Raises:** `ValueError` for unknown names.
    """
    named = [tol for tol in (rtol, atol) if isinstance(tol, Mapping)]
    unknown = {key for tol in named for key in tol} - {*IDENTITIES}
    if unknown:
        raise ValueError(
            f"Tolerances are for {', '.join(IDENTITIES)}; got {sorted(unknown)}."
        )
    pick = lambda tol: tol.get(name) if isinstance(tol, Mapping) else tol
    relative, absolute = pick(rtol), pick(atol)
    if relative is None:
        relative = _default_rtol(name, x, jvp)
    return relative, relative if absolute is None else absolute


def _default_rtol(name: str, x: State, jvp: Callable) -> float:
    identity = IDENTITIES[name]
    by_differences = identity.differentiates and isinstance(jvp, FiniteDifference)
    # The third derivative of a smooth map may easily be a hundred times its value.
    return rounding_unit(x) ** identity.accuracy * (100 if by_differences else 1)
