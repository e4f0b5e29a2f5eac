"""The `Recipe` class: the settings of a paper's training run."""

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
from ..train._power_average import PowerAverage
from ._augmentation import Augmentation
from ._device import DeviceImages
from .sets._images import Images


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Recipe:
    """All the settings of a training run, as in a paper or as close to it as we know.

    [`flowdiffrax.images.recipe`][] returns a recipe by name. `print(recipe)` shows all
    settings, and `dataclasses.replace` changes them.

    **Attributes:**

    - `name`: the name of the recipe.
    - `source`: the paper, and the place in it.
    - `data`: the name of the function that makes the data, in `flowdiffrax.images` or
      `flowdiffrax.data`.
    - `num_classes`: the number of classes; `None` if the recipe is not class-conditional.
    - `flip`: whether images are mirrored at random.
    - `augmentation`: the augmentation of images, whose labels the network takes as an
      input; `None` for none.
    - `label_dropout`: the rate at which labels are dropped, for guidance.
    - `interpolant`, `base_std`: the interpolant of the paths, and the standard deviation
      of their base.
    - `architecture`: a function that makes the network from a key; see `network`.
    - `precision`: the precision in the paper. Here the default is float32, and `network`
      takes a `dtype`.
    - `objective`: the objective to minimise.
    - `teacher`: the name of the recipe that trains the teacher, or `None`.
    - `starts_from_teacher`: whether the network is initialised from the teacher, with
      [`flowdiffrax.nn.two_times`][].
    - `optimiser`: a function that makes the optimiser; see `optim`.
    - `batch_size`: the number of paths in a batch.
    - `num_steps`, `ema_decay`: see [`flowdiffrax.train.fit`][].
    - `metric`, `figures`: the paper's metric, and its results by number of jumps.
      `figures` is empty if we know of none.
    - `notes`: what differs from the paper, and what the paper does not state.
    """

    name: str
    source: str
    data: str
    num_classes: int | None = None
    flip: bool = False
    augmentation: Augmentation | None = None
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
    ema_decay: tuple[float | PowerAverage, ...]
    metric: str = "FID"
    figures: Mapping[int, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def network(self, *, key: Key[Array, ""], **settings: Any) -> Any:
        """Returns the untrained network.

        **Arguments:**

        - `key`: for the initial weights.
        - `settings`: the settings to override, such as `dtype=jax.numpy.bfloat16`,
          `remat=True`, or `shape` and `channels` for a small network.
        """
        return self.architecture(key=key, **settings)

    def optim(self) -> optax.GradientTransformation:
        """Returns the optimiser."""
        return self.optimiser()

    def batches(
        self,
        data: Images | Callable[[Key[Array, ""], int], State | ConditionedPoints],
        batch_size: int | None = None,
    ) -> InterpolantBatches | ConditionDropout:
        """Returns batches of paths to the data, with labels if the recipe has classes.

        **Arguments:**

        - `data`: images, as returned by a loader; or a function
          `(key, batch_size) -> points`, which is used unchanged.
        - `batch_size`: `None` for the recipe's batch size.

        **Raises:** `ValueError` if the recipe needs labels and the images have none, or
        if the images have more classes than the recipe; `TypeError` if `data` is neither
        images nor a function.
        """
        if isinstance(data, Images):
            if self.num_classes is not None and data.labels is None:
                raise ValueError(
                    f"The recipe {self.name!r} needs labels, but {data.name} has none."
                )
            found = data.num_classes or 0
            if self.num_classes is not None and found > self.num_classes:
                raise ValueError(
                    f"The recipe {self.name!r} is for {self.num_classes} classes, but "
                    f"{data.name} has {found}: label {self.num_classes} would be read as "
                    "a dropped label. Use `dataclasses.replace(recipe, "
                    f"num_classes={found})`."
                )
            labels = None if self.num_classes is None else data.labels
            data = DeviceImages(
                data.images, labels, flip=self.flip, augmentation=self.augmentation
            )
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
    """Describes a value with all its settings, including the default ones."""
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
    """Formats a call, on one line if it fits and on one line per setting if not."""
    parts = []
    for name, value in settings.items():
        parts.append(f"{name}={_described(value, room - len(name) - 6)}")
    name = fn.__name__.lstrip("_")
    text = f"{name}({', '.join(parts)})"
    if len(text) <= room and "\n" not in text:
        return text
    lines = textwrap.indent(",\n".join(parts), "    ")
    return f"{name}(\n{lines},\n)"
