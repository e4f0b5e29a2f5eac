"""What fixes a run of a paper, by name."""

import dataclasses
import difflib
import enum
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Int, Key

from .._custom_types import State
from .._interpolant import AbstractInterpolant, LinearInterpolant
from .._misc import check_callable
from .._objective import (
    AbstractObjective,
    AlignYourFlowEMD,
    ContinuousConsistency,
    FlowMatching,
    ImprovedMeanFlow,
    LagrangianMapDistillation,
    LagrangianSelfDistillation,
    LearnedWeight,
    MeanFlow,
    Mixture,
    NormalisedTangent,
    PowerWeight,
    ProgressiveSelfDistillation,
    Scheduled,
)
from .._times import Diagonal, DiagonalMixture, EndAt, LogitNormal
from ..data import (
    ConditionDropout,
    ConditionedPoints,
    DeviceImages,
    GaussianBase,
    Images,
    InterpolantBatches,
)
from ..nn import MLP, MagnitudePreservingUNet, UNet, normalise_weights


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Recipe:
    """Everything that fixes a training run, as a paper has it or as near as we know.

    [`flowdiffrax.train.recipe`][] returns those that are there. `print(recipe)` shows all
    of it; `dataclasses.replace` makes another one.

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


def recipe(name: str) -> Recipe:
    """A recipe by its name, such as `"cifar10-lsd"`.

    **Arguments:**

    - `name`: one of [`flowdiffrax.train.recipes`][].

    **Raises:** `ValueError` for another name.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, 1, 0)
        raise ValueError(
            f"There is no recipe {name!r}; did you mean {near[0]!r}? There are "
            f"{', '.join(_RECIPES)}."
        )
    return _RECIPES[name](name=name)


def recipes() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(_RECIPES)


def decayed_radam(
    learning_rate: float, *, constant_steps: int = 35_000, max_norm: float = 1.0
) -> optax.GradientTransformation:
    r"""RAdam as magnitude-preserving networks are trained with.

    The rate is constant at first, and falls as $\sqrt{k_0 / k}$ from step $k_0$ on.
    Gradients are clipped, and [`flowdiffrax.nn.normalise_weights`][] follows each step.
    That does nothing to other networks.

    **Arguments:**

    - `learning_rate`: the rate at the start.
    - `constant_steps`: the $k_0$, positive.
    - `max_norm`: to which the norm of the whole gradient is clipped.

    **Raises:** `ValueError` if `constant_steps` is not positive.

    ??? cite "Reference"

        EDM2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696);
        [arXiv:2505.18825](https://arxiv.org/abs/2505.18825), table 2.
    """
    if constant_steps <= 0:
        raise ValueError(f"`constant_steps` must be positive; got {constant_steps}.")
    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.radam(_square_root_decay(learning_rate, constant_steps)),
        optax.stateless(_to_length),
    )


def _square_root_decay(learning_rate: float, constant_steps: int) -> optax.Schedule:
    return lambda step: learning_rate / jnp.sqrt(jnp.maximum(step / constant_steps, 1))


def _to_length(updates, weights):
    new = normalise_weights(optax.apply_updates(weights, updates))
    return jtu.tree_map(lambda new, old: new - old, new, weights)


def _warm_adam(
    learning_rate: float, *, warm_up_steps: int, b1: float, b2: float
) -> optax.GradientTransformation:
    return optax.adam(optax.linear_schedule(0.0, learning_rate, warm_up_steps), b1, b2)


class _TangentWarmUp(eqx.Module):
    """An objective whose tangent's scale is the step over `num_steps`, up to `high`."""

    objective: AlignYourFlowEMD | ContinuousConsistency
    high: float
    num_steps: int = eqx.field(static=True)

    def __call__(self, step: Int[Array, ""]) -> AlignYourFlowEMD | ContinuousConsistency:
        scale = jnp.minimum(step / self.num_steps, self.high)
        return eqx.tree_at(
            lambda objective: objective.tangent_scale, self.objective, scale
        )


# --- what several recipes have in common ----------------------------------------------

_SELF_DISTILLATION = "arXiv:2505.18825 v2"
_NOT_STATED = (
    "The network, the optimiser, the length of training and the learned weight are ours, "
    "those of arXiv:2505.18825: the paper's are not known to us."
)
_NO_DROPOUT = (
    "No dropout. The paper has 0.13, on the diagonal only: objectives compare several "
    "evaluations of one function."
)
_LEARNED_WEIGHT = (
    "The learned weight is linear in eight cosines and sines of each time; in the paper, "
    "in embeddings of 128."
)
_FLIPPED = "Whether the paper mirrors images is not known to us; here they are."
_NO_FIGURE = "We know of no figure of the paper on these data that we could check."
_FROM_TEACHER = "That the network starts as the teacher is ours."


def _preserving_unet(**settings: Any) -> Callable[..., Any]:
    return functools.partial(
        MagnitudePreservingUNet,
        shape=(32, 32, 3),
        channels=128,
        multipliers=(2, 2, 2),
        num_blocks=4,
        attention=(16,),
        scale=0.5,
        **settings,
    )


def _images(name: str, **settings: Any) -> Recipe:
    """The run of arXiv:2505.18825 on CIFAR-10, with what is to differ."""
    shared: dict[str, Any] = {
        "data": "cifar10",
        "flip": True,
        "base_std": 0.5,
        "architecture": _preserving_unet(),
        "optimiser": functools.partial(
            decayed_radam, 1e-2, constant_steps=35_000, max_norm=1.0
        ),
        "batch_size": 512,
        "num_steps": 400_000,
        "ema_decay": (0.9999, 0.999),
    }
    return Recipe(name=name, **(shared | settings))


def _classes(data: str, num_classes: int | None) -> dict[str, Any]:
    rate = 0.0 if num_classes is None else 0.1
    return {"data": data, "num_classes": num_classes, "label_dropout": rate}


def _teacher(name: str, data: str = "cifar10", num_classes: int | None = None) -> Recipe:
    return _images(
        name,
        source="arXiv:2210.02747, as the teacher in arXiv:2406.07507",
        **_classes(data, num_classes),
        architecture=_preserving_unet(two_times=False, num_classes=num_classes or 0),
        objective=FlowMatching(weight=LearnedWeight()),
        notes=(
            "A velocity, the teacher of the distillations of this data set.",
            _NOT_STATED,
            _FLIPPED,
            *_without_figure(data, num_classes),
        ),
    )


def _lmd(name: str, data: str = "cifar10", num_classes: int | None = None) -> Recipe:
    return _images(
        name,
        source="arXiv:2406.07507, equation (3.1)",
        **_classes(data, num_classes),
        architecture=_preserving_unet(num_classes=num_classes or 0),
        objective=LagrangianMapDistillation(weight=LearnedWeight()),
        teacher=name.replace("lmd", "teacher"),
        starts_from_teacher=True,
        notes=(
            _NOT_STATED,
            _FROM_TEACHER,
            _FLIPPED,
            *_without_figure(data, num_classes),
        ),
    )


def _without_figure(data: str, num_classes: int | None) -> tuple[str, ...]:
    if data == "cifar10":
        return (_NO_FIGURE,)
    same = "Batch and length are those of CIFAR-10: ours too."
    if num_classes is None:
        return same, _NO_FIGURE
    classes = (
        "The classes are ours, with one label in ten dropped; the teacher is not guided."
    )
    return same, classes, _NO_FIGURE


def _self_distillation(
    name: str, objective: AbstractObjective, figures: Mapping[int, float], *notes: str
) -> Recipe:
    return _images(
        name,
        source=f"{_SELF_DISTILLATION}, tables 1 and 2",
        precision="float32",
        objective=objective,
        figures=figures,
        notes=(
            *notes,
            _NO_DROPOUT,
            _LEARNED_WEIGHT,
            _FLIPPED,
            "The figures are each of the best checkpoint for its number of jumps.",
        ),
    )


def _lsd(name: str) -> Recipe:
    return _self_distillation(
        name,
        LagrangianSelfDistillation(weight=LearnedWeight()),
        {1: 8.10, 2: 4.37, 4: 3.34, 8: 3.33, 16: 3.57},
        "Three quarters of a batch are on the diagonal, as in table 2. A run in the "
        "authors' notebook is named for nine tenths.",
    )


def _psd(name: str, split: float | None, figures: Mapping[int, float]) -> Recipe:
    objective = ProgressiveSelfDistillation(weight=LearnedWeight(), split=split)
    return _self_distillation(name, objective, figures)


def _mean_flow_images(name: str, **settings: Any) -> Recipe:
    # 48 whole batches of 1024 an epoch of 50,000 images.
    steps_an_epoch = 48
    return Recipe(
        name=name,
        data="cifar10",
        flip=True,
        base_std=1.0,
        architecture=functools.partial(
            UNet,
            shape=(32, 32, 3),
            channels=128,
            multipliers=(2, 2, 2),
            num_blocks=4,
            attention=(16,),
        ),
        optimiser=functools.partial(
            _warm_adam, 6e-4, warm_up_steps=200 * steps_an_epoch, b1=0.9, b2=0.999
        ),
        batch_size=1024,
        num_steps=16_000 * steps_an_epoch,
        ema_decay=(0.9999, 0.99995, 0.9996),
        **settings,
    )


# On our clock, and three quarters off the diagonal, as in the authors' code. (On
# ImageNet it is one quarter.)
_PAIRS = DiagonalMixture(
    LogitNormal(2.0, 2.0), 0.25, Diagonal(LogitNormal(2.0, 2.0), start=True)
)
_UNET = (
    "The network is ADM's kind of U-Net at the sizes of the authors', which is NCSN++; "
    "without its dropout of 0.2."
)
_AUGMENTATION = "Images are mirrored only; the authors have the augmentation of EDM."


def _mean_flow(name: str) -> Recipe:
    return _mean_flow_images(
        name,
        source="arXiv:2505.13447; settings of the authors' py-meanflow, cifar10_v0",
        precision="float32, with products of TF32",
        objective=MeanFlow(times=_PAIRS, weight=PowerWeight(0.75, 1e-3)),
        figures={1: 2.92},
        notes=(
            _UNET,
            _AUGMENTATION,
            "16,000 epochs of 48 steps; the authors' page rounds them to 800,000 steps.",
        ),
    )


def _improved_mean_flow(name: str) -> Recipe:
    return _mean_flow_images(
        name,
        source="arXiv:2512.02012",
        objective=ImprovedMeanFlow(times=_PAIRS, weight=PowerWeight(0.75, 1e-3)),
        notes=(
            "The paper is about ImageNet. All but the objective is that of "
            "cifar10-meanflow: ours.",
            _UNET,
            _AUGMENTATION,
            _NO_FIGURE,
        ),
    )


def _align_your_flow(name: str) -> Recipe:
    return _images(
        name,
        source="arXiv:2506.14603, AYF-EMD",
        objective=Scheduled(
            _TangentWarmUp(AlignYourFlowEMD(weight=NormalisedTangent()), 0.99, 10_000)
        ),
        teacher="cifar10-teacher",
        starts_from_teacher=True,
        notes=(
            "The law of times, and the 10,000 steps in which the tangent's scale rises, "
            "are from re-implementations: not checked against the paper.",
            "The teacher is not guided by a weaker one, as it is in the paper; no "
            "adversarial training follows.",
            "Network, optimiser, batch and length are ours, those of arXiv:2505.18825.",
            _FLIPPED,
            _NO_FIGURE,
        ),
    )


def _sct(name: str) -> Recipe:
    base_std = 0.5
    # The noise level is base_std (1 - t) / t on this clock, and its logarithm has mean
    # -1 and standard deviation 1.4 in the paper.
    times = EndAt(LogitNormal(1.0 + math.log(base_std), 1.4, sort=False), 1.0)
    objective = ContinuousConsistency(times=times, weight=NormalisedTangent())
    return _images(
        name,
        source="arXiv:2410.11081, sCT; FID of table 1",
        base_std=base_std,
        objective=Scheduled(_TangentWarmUp(objective, 1.0, 10_000)),
        figures={1: 2.85, 2: 2.06},
        notes=(
            "The interpolant is linear, at the paper's noise levels; there it is "
            "trigonometric. The two differ by a factor in time.",
            "Network, optimiser, batch and length are ours, those of arXiv:2505.18825, "
            "and so is that training starts at random weights.",
            "The law of noise levels is from a note on the paper: not checked.",
            "No learned weight: the paper's is of a loss that normalised tangents bring "
            "near 1 at all times.",
            "The second figure is with noise added between two jumps to the data; it is "
            "no sample of two jumps.",
            _FLIPPED,
        ),
    )


def _checkerboard(name: str) -> Recipe:
    base_std = 3**-0.5
    return Recipe(
        name=name,
        source=f"{_SELF_DISTILLATION}, tables 1 and 2",
        data="checkerboard",
        base_std=base_std,
        architecture=functools.partial(
            MLP,
            size=2,
            width=512,
            depth=5,
            scale=base_std,
            frequencies=(),
            time_frequencies=(),
        ),
        objective=LagrangianSelfDistillation(),
        optimiser=functools.partial(
            decayed_radam, 1e-3, constant_steps=35_000, max_norm=10.0
        ),
        batch_size=100_000,
        num_steps=150_000,
        ema_decay=(0.999, 0.9999),
        metric="KL divergence, of 64,000 samples in 50x50 bins",
        figures={1: 0.086, 2: 0.077, 4: 0.071, 8: 0.070, 16: 0.071},
        notes=(
            "150,000 steps as in table 2; the authors' configuration has 250,000.",
            "Points are drawn anew, not from ten million.",
            "Hidden layers are residual here; the number of parameters is the authors'.",
            "These bins cut the squares in two: a perfect sampler has 0.066 by our "
            "measurement.",
        ),
    )


# Made when asked for: a learned weight has arrays.
_RECIPES: dict[str, Callable[..., Recipe]] = {
    "checkerboard-lsd": _checkerboard,
    "cifar10-align-your-flow": _align_your_flow,
    "cifar10-improved-meanflow": _improved_mean_flow,
    "cifar10-lmd": _lmd,
    "cifar10-lsd": _lsd,
    "cifar10-meanflow": _mean_flow,
    "cifar10-psd-m": functools.partial(
        _psd,
        split=0.5,
        figures={1: 12.81, 2: 8.43, 4: 5.96, 8: 5.07, 16: 4.64},
    ),
    "cifar10-psd-u": functools.partial(
        _psd,
        split=None,
        figures={1: 13.61, 2: 7.95, 4: 6.03, 8: 5.32, 16: 5.16},
    ),
    "cifar10-sct": _sct,
    "cifar10-teacher": _teacher,
    "imagenet32-class-lmd": functools.partial(_lmd, data="imagenet32", num_classes=1000),
    "imagenet32-class-teacher": functools.partial(
        _teacher, data="imagenet32", num_classes=1000
    ),
    "imagenet32-lmd": functools.partial(_lmd, data="imagenet32"),
    "imagenet32-teacher": functools.partial(_teacher, data="imagenet32"),
}


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
