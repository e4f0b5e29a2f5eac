"""What fixes a run of a paper."""

import dataclasses
import enum
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Key

from .._check import check_callable
from .._types import State
from ..data import ConditionDropout, ConditionedPoints, GaussianBase, InterpolantBatches
from ..objectives._base import AbstractObjective
from ..objectives._mixture import Mixture
from ..objectives._scheduled import Scheduled
from ..paths._base import AbstractInterpolant
from ..paths._interpolants import LinearInterpolant
from ._device import DeviceImages
from .sets._images import Images


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Recipe:
    """Everything that fixes a training run, as a paper has it or as near as we know.

    [`flowdiffrax.images.recipe`][] returns one by name. `print(recipe)` shows all of it;
    `dataclasses.replace` makes another one.

    **Attributes:**

    - `name`: by which it is found.
    - `source`: the paper, and where in it.
    - `data`: the loader in `flowdiffrax.data`.
    - `num_classes`: of class-conditional recipes; `None` for the others.
    - `flip`: whether images are mirrored at random.
    - `label_dropout`: the rate at which labels are dropped, for guidance.
    - `interpolant`, `base_std`: of the paths.
    - `architecture`: makes the network, given a key; see `network`.
    - `precision`: the paper's. Here it is float32, and `network` takes a `dtype`.
    - `objective`: what is minimised.
    - `teacher`: the recipe that trains the teacher, or `None`.
    - `starts_from_teacher`: whether the network starts as the teacher's, with
      [`flowdiffrax.nn.two_times`][].
    - `optimiser`: makes the optimiser; see `optim`.
    - `batch_size`, `num_steps`, `ema_decay`: as for [`flowdiffrax.train.fit`][].
    - `metric`, `figures`: the paper's results, by the number of jumps. Empty where we
      know of none.
    - `notes`: what differs from the paper, and what it does not state.
    """

    name: str
    source: str
    data: str
    num_classes: int | None = None
    flip: bool = False
    label_dropout: float = 0.0
    interpolant: AbstractInterpolant = LinearInterpolant()
    base_std: float
    architecture: Callable[..., Any]
    precision: str = "not known to us"
    objective: AbstractObjective | Mixture | Scheduled
    teacher: str | None = None
    starts_from_teacher: bool = False
    optimiser: Callable[[], optax.GradientTransformation]
    batch_size: int
    num_steps: int
    ema_decay: tuple[float, ...]
    metric: str = "FID"
    figures: Mapping[int, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def network(self, *, key: Key[Array, ""], **settings: Any) -> Any:
        """The network, untrained.

        **Arguments:**

        - `key`: for the initial weights.
        - `settings`: what is to differ: `dtype=jax.numpy.bfloat16`, `remat=True`, or
          `shape` and `channels` for a small one.
        """
        return self.architecture(key=key, **settings)

    def optim(self) -> optax.GradientTransformation:
        """The optimiser."""
        return self.optimiser()

    def batches(
        self,
        data: Images | Callable[[Key[Array, ""], int], State | ConditionedPoints],
        batch_size: int | None = None,
    ) -> InterpolantBatches | ConditionDropout:
        """Batches of paths to the data, with labels if the recipe has classes.

        **Arguments:**

        - `data`: images as a loader returns them; or a function
          `(key, batch_size) -> points`, taken as it is.
        - `batch_size`: `None` for the recipe's.

        **Raises:** `ValueError` for images without the labels that the recipe needs, or
        with more classes than it has; `TypeError` for data that are neither.
        """
        if isinstance(data, Images):
            if self.num_classes is not None and data.labels is None:
                raise ValueError(
                    f"The recipe {self.name!r} has classes, and {data.name} no labels."
                )
            found = data.num_classes or 0
            if self.num_classes is not None and found > self.num_classes:
                raise ValueError(
                    f"The recipe {self.name!r} is for {self.num_classes} classes, and "
                    f"{data.name} has {found}: labels would be taken for the one that "
                    "stands for none. Use `dataclasses.replace(recipe, "
                    f"num_classes={found})`."
                )
            labels = None if self.num_classes is None else data.labels
            data = DeviceImages(data.images, labels, flip=self.flip)
        check_callable(data, "data", "data(key, batch_size)")
        batches = InterpolantBatches(
            self.interpolant,
            data,
            self.batch_size if batch_size is None else batch_size,
            base=GaussianBase(self.base_std),
        )
        if self.num_classes is None:
            return batches
        return ConditionDropout(batches, null=self.num_classes, rate=self.label_dropout)

    def __repr__(self) -> str:
        return f"recipe({self.name!r})"

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        width = max(len(field.name) for field in fields) + 4
        lines = ["Recipe"]
        for field in fields:
            value = getattr(self, field.name)
            notes = value if field.name == "notes" else (value,)
            texts = (_described(note, 90 - width) for note in notes)
            block = textwrap.indent("\n".join(texts), " " * width)
            lines.append(f"  {field.name}".ljust(width) + block[width:])
        return "\n".join(lines)


def _described(value: Any, room: int) -> str:
    """A value with all its settings, those at their defaults too."""
    if isinstance(value, str):
        return textwrap.fill(value, room)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, functools.partial):
        bound = inspect.signature(value.func).bind_partial(*value.args, **value.keywords)
        bound.apply_defaults()
        return _called(value.func, bound.arguments, room)
    if isinstance(value, jax.Array):
        return f"{value.dtype}{list(value.shape)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        settings = {name: getattr(value, name) for name in names}
        return _called(type(value), settings, room)
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return "(" + ", ".join(_described(item, room) for item in value) + ")"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    return value.__name__ if callable(value) else str(value)


def _called(fn: Callable, settings: Mapping[str, Any], room: int) -> str:
    """On one line if there is room, and otherwise on a line for each setting."""
    parts = []
    for name, value in settings.items():
        parts.append(f"{name}={_described(value, room - len(name) - 6)}")
    name = fn.__name__.lstrip("_")
    text = f"{name}({', '.join(parts)})"
    if len(text) <= room and "\n" not in text:
        return text
    lines = textwrap.indent(",\n".join(parts), "    ")
    return f"{name}(\n{lines},\n)"
