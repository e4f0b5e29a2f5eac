"""The recipes of published training runs, by name."""

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._check import check_instance
from ..nn._ddpm_unet import DDPMUNet
from ..nn._magnitude_unet import MagnitudePreservingUNet
from ..nn._mlp import MLP
from ..objectives._align_your_flow import AlignYourFlowEMD
from ..objectives._base import AbstractObjective
from ..objectives._consistency import ContinuousConsistency
from ..objectives._eulerian import EulerianMapDistillation
from ..objectives._flow_matching import FlowMapMatching, FlowMatching
from ..objectives._lagrangian import LagrangianMapDistillation, LagrangianSelfDistillation
from ..objectives._mean_flow import ImprovedMeanFlow, MeanFlow
from ..objectives._progressive import (
    ProgressiveFlowMapMatching,
    ProgressiveSelfDistillation,
)
from ..objectives._scheduled import Scheduled
from ..times._base import AbstractTimes
from ..times._changes import EndAt
from ..times._logit_normal import LogitNormal, LogitNormalPair
from ..times._mixtures import DiagonalMixture
from ..times._uniform import Diagonal, UniformSquare
from ..weights._learned import LearnedWeight
from ..weights._norms import NormalisedTangent, PowerWeight
from ._augmentation import Augmentation
from ._optim import decayed_radam
from ._recipe import Recipe


def recipe(name: str) -> Recipe:
    """Returns a recipe by its name, such as `"cifar10-lsd"`.

    **Arguments:**

    - `name`: one of [`flowdiffrax.images.recipes`][].

    **Raises:** `ValueError` if there is no recipe of this name, `TypeError` for what is
    not a name.
    """
    check_instance(name, str, "name", "the name of a recipe, see `images.recipes()`")
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, 1, 0)
        raise ValueError(
            f"There is no recipe {name!r}; did you mean {near[0]!r}? The recipes are "
            f"{', '.join(_RECIPES)}."
        )
    return _RECIPES[name](name=name)


def recipes() -> tuple[str, ...]:
    """Returns the names of all recipes."""
    return tuple(_RECIPES)


def _warm_adam(
    learning_rate: float, *, warm_up_steps: int, b1: float, b2: float
) -> optax.GradientTransformation:
    return optax.adam(optax.linear_schedule(0.0, learning_rate, warm_up_steps), b1, b2)


class _TangentWarmUp(eqx.Module):
    """An objective whose tangent's scale is `step / num_steps`, up to `high`."""

    objective: AlignYourFlowEMD | ContinuousConsistency
    high: float
    num_steps: int = eqx.field(static=True)

    def __call__(self, step: Int[Array, ""]) -> AlignYourFlowEMD | ContinuousConsistency:
        scale = jnp.minimum(step / self.num_steps, self.high)
        return eqx.tree_at(
            lambda objective: objective.tangent_scale, self.objective, scale
        )


# --- settings and notes shared by several recipes -------------------------------------

_SELF_DISTILLATION = "arXiv:2505.18825 v2"


_NOT_STATED = (
    "We chose the network, optimiser, training length and learned weight of "
    "arXiv:2505.18825, since we do not know the paper's."
)


_LEARNED_WEIGHT = (
    "The learned weight is linear in eight cosines and sines of each time; the authors' "
    "is linear in embeddings of size 128."
)


_BATCHES = (
    "Images are drawn with replacement; the authors' loader shuffles them and repeats. "
    "They are not mirrored, as in the authors' code."
)


_NO_FIGURE = "We know of no result of the paper on these data that we could check."


_FROM_TEACHER = "Initialising the network from the teacher is our choice."


def _preserving_unet(dropout: float = 0.13, **settings: Any) -> Callable[..., Any]:
    return functools.partial(
        MagnitudePreservingUNet,
        shape=(32, 32, 3),
        channels=128,
        multipliers=(2, 2, 2),
        num_blocks=4,
        attention=(16,),
        scale=0.5,
        dropout=dropout,
        **settings,
    )


def _images(name: str, **settings: Any) -> Recipe:
    """The run of arXiv:2505.18825 on CIFAR-10, with `settings` replaced."""
    shared: dict[str, Any] = {
        "data": "cifar10",
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
        source="arXiv:2210.02747, as used for the teacher in arXiv:2406.07507",
        **_classes(data, num_classes),
        architecture=_preserving_unet(two_times=False, num_classes=num_classes or 0),
        objective=FlowMatching(weight=LearnedWeight()),
        notes=(
            "This velocity is the teacher for distillation on this data set.",
            _NOT_STATED,
            *_without_figure(data, num_classes),
        ),
    )


def _distilled(
    name: str,
    source: str,
    objective: AbstractObjective,
    teacher: str,
    *notes: str,
    data: str = "cifar10",
    num_classes: int | None = None,
) -> Recipe:
    return _images(
        name,
        source=f"arXiv:2406.07507, {source}",
        **_classes(data, num_classes),
        architecture=_preserving_unet(num_classes=num_classes or 0),
        objective=objective,
        teacher=teacher,
        starts_from_teacher=True,
        notes=(
            *notes,
            _NOT_STATED,
            _FROM_TEACHER,
            *_without_figure(data, num_classes),
        ),
    )


def _lmd(name: str, **settings: Any) -> Recipe:
    objective = LagrangianMapDistillation(weight=LearnedWeight())
    teacher = name.replace("lmd", "teacher")
    return _distilled(name, "equation (3.1)", objective, teacher, **settings)


def _emd(name: str, **settings: Any) -> Recipe:
    objective = EulerianMapDistillation(weight=LearnedWeight())
    teacher = name.replace("emd", "teacher")
    return _distilled(name, "section 3", objective, teacher, **settings)


# The length of the jumps that `fmm` learns, and how many of them `pfmm` composes.
_NUM_PIECES = 4


_CHECKERBOARD = "The paper trains this on the checkerboard only, with jumps of a quarter."


def _fmm(name: str, data: str = "cifar10") -> Recipe:
    times = UniformSquare(max_gap=1 / _NUM_PIECES)
    return _images(
        name,
        source="arXiv:2406.07507, proposition 3.11",
        data=data,
        objective=FlowMapMatching(times=times, weight=LearnedWeight()),
        notes=(
            _CHECKERBOARD + " Sample in four jumps or more.",
            _NOT_STATED,
            *_without_figure(data, None),
        ),
    )


def _pfmm(name: str, **settings: Any) -> Recipe:
    objective = ProgressiveFlowMapMatching(num_jumps=_NUM_PIECES, weight=LearnedWeight())
    teacher, source = name.replace("pfmm", "fmm"), "section 3.3"
    return _distilled(name, source, objective, teacher, _CHECKERBOARD, **settings)


def _without_figure(data: str, num_classes: int | None) -> tuple[str, ...]:
    if data == "cifar10":
        return (_NO_FIGURE,)
    same = "We chose the batch size and training length of the CIFAR-10 recipes."
    if num_classes is None:
        return same, _NO_FIGURE
    classes = (
        "Training with classes is our choice. One label in ten is dropped, and the "
        "teacher is not guided."
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
            _LEARNED_WEIGHT,
            _BATCHES,
            "Each figure is from the best checkpoint for its number of jumps.",
        ),
    )


def _lsd(name: str) -> Recipe:
    return _self_distillation(
        name,
        LagrangianSelfDistillation(weight=LearnedWeight()),
        {1: 8.10, 2: 4.37, 4: 3.34, 8: 3.33, 16: 3.57},
        "Three quarters of each batch are on the diagonal, as in table 2. A run in the "
        "authors' notebook has nine tenths in its name.",
    )


def _psd(name: str, split: float | None, figures: Mapping[int, float]) -> Recipe:
    objective = ProgressiveSelfDistillation(weight=LearnedWeight(), split=split)
    return _self_distillation(name, objective, figures)


def _mean_flow_images(name: str, **settings: Any) -> Recipe:
    # An epoch of 50,000 images has 48 whole batches of 1024.
    steps_an_epoch = 48
    # The authors switch off EDM's flips and rotations.
    augmentation = Augmentation(0.12, flip=False, rotate=False)
    return Recipe(
        name=name,
        data="cifar10",
        flip=True,
        augmentation=augmentation,
        base_std=1.0,
        architecture=functools.partial(
            DDPMUNet,
            shape=(32, 32, 3),
            channels=128,
            multipliers=(2, 2, 2),
            num_blocks=4,
            attention=(16,),
            augment_size=augmentation.size,
            dropout=0.2,
        ),
        optimiser=functools.partial(
            _warm_adam, 6e-4, warm_up_steps=200 * steps_an_epoch, b1=0.9, b2=0.999
        ),
        batch_size=1024,
        num_steps=16_000 * steps_an_epoch,
        ema_decay=(0.9999, 0.99995, 0.9996),
        **settings,
    )


# The times are on our clock. Three quarters are off the diagonal, as in the authors'
# code. (On ImageNet it is one quarter.)
_PAIRS = DiagonalMixture(
    LogitNormal(2.0, 2.0), 0.25, Diagonal(LogitNormal(2.0, 2.0), start=True)
)


# In the authors' second setting, ends near the data are more frequent.
_LATE_PAIRS = DiagonalMixture(
    LogitNormalPair(0.6, 1.6, 4.0, 1.6), 0.25, Diagonal(LogitNormalPair(0.6), start=True)
)


_UNET = (
    "Initial weights, and how the labels of the augmentation enter, are the library's."
)


_EMA_PERIOD = (
    "Averages move in every step, and early in training with a smaller decay; the "
    "authors' move in every sixteenth."
)


def _mean_flow(
    name: str,
    setting: str = "cifar10_v0",
    times: AbstractTimes = _PAIRS,
    figure: float = 2.92,
    *notes: str,
) -> Recipe:
    return _mean_flow_images(
        name,
        source=f"arXiv:2505.13447; settings of the authors' py-meanflow, {setting}",
        precision="float32, with products in TF32",
        objective=MeanFlow(times=times, weight=PowerWeight(0.75, 1e-3)),
        figures={1: figure},
        notes=(
            *notes,
            _UNET,
            _EMA_PERIOD,
            "There are 16,000 epochs of 48 steps, which the authors' page rounds to "
            "800,000 steps. Images are drawn with replacement.",
        ),
    )


def _mean_flow_v1(name: str) -> Recipe:
    note = (
        "The figure is of the authors' checkpoint of this setting, by their page. It is "
        "an improvement made after the paper."
    )
    return _mean_flow(name, "cifar10_v1", _LATE_PAIRS, 2.80, note)


def _improved_mean_flow(name: str) -> Recipe:
    return _mean_flow_images(
        name,
        source="arXiv:2512.02012",
        objective=ImprovedMeanFlow(times=_PAIRS, weight=PowerWeight(0.75, 1e-3)),
        notes=(
            "The paper is about ImageNet. We chose the settings of cifar10-meanflow for "
            "all but the objective.",
            _UNET,
            "This objective compares two evaluations, so only the diagonal has dropout.",
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
            "The distribution of times, and the 10,000 steps over which the tangent's "
            "scale rises, are from re-implementations and not checked against the paper.",
            "Unlike in the paper, the teacher is not guided by a weaker one, and no "
            "adversarial training follows.",
            "We chose the network, optimiser, batch size and training length of "
            "arXiv:2505.18825.",
            _NO_FIGURE,
        ),
    )


def _sct(name: str) -> Recipe:
    base_std = 0.5
    # On this clock, the noise level is base_std (1 - t) / t. In the paper, its logarithm
    # has mean -1 and standard deviation 1.4.
    times = EndAt(LogitNormal(1.0 + math.log(base_std), 1.4, sort=False), 1.0)
    objective = ContinuousConsistency(times=times, weight=NormalisedTangent())
    return _images(
        name,
        source="arXiv:2410.11081, sCT; FID of table 1",
        base_std=base_std,
        architecture=_preserving_unet(0.2),
        objective=Scheduled(_TangentWarmUp(objective, 1.0, 10_000)),
        figures={1: 2.85, 2: 2.06},
        notes=(
            "The interpolant is linear, with the paper's noise levels; the paper's is "
            "trigonometric. The two differ by a time-dependent factor.",
            "We chose the network, optimiser, batch size and training length of "
            "arXiv:2505.18825, and to start from random weights. The dropout of 0.2 is "
            "that of re-implementations.",
            "The distribution of noise levels is from a note on the paper and not "
            "checked.",
            "There is no learned weight: the paper's applies to a loss that normalised "
            "tangents bring near 1 at all times.",
            "The second figure is for two jumps to the data with noise added in between, "
            "not for two jumps in a row.",
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
        metric="KL divergence of 64,000 samples, in 50x50 bins",
        figures={1: 0.086, 2: 0.077, 4: 0.071, 8: 0.070, 16: 0.071},
        notes=(
            "There are 150,000 steps, as in table 2; the authors' configuration has "
            "250,000.",
            "Each batch has new points; the authors draw from ten million.",
            "Hidden layers are residual here; the number of parameters is the authors'.",
            "These bins do not align with the squares: by our measurement, a perfect "
            "sampler has 0.066.",
        ),
    )


# Recipes are made on demand, because a learned weight has arrays.
_RECIPES: dict[str, Callable[..., Recipe]] = {
    "checkerboard-lsd": _checkerboard,
    "cifar10-align-your-flow": _align_your_flow,
    "cifar10-emd": _emd,
    "cifar10-fmm": _fmm,
    "cifar10-improved-meanflow": _improved_mean_flow,
    "cifar10-lmd": _lmd,
    "cifar10-lsd": _lsd,
    "cifar10-meanflow": _mean_flow,
    "cifar10-meanflow-v1": _mean_flow_v1,
    "cifar10-pfmm": _pfmm,
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
    "imagenet32-emd": functools.partial(_emd, data="imagenet32"),
    "imagenet32-fmm": functools.partial(_fmm, data="imagenet32"),
    "imagenet32-lmd": functools.partial(_lmd, data="imagenet32"),
    "imagenet32-pfmm": functools.partial(_pfmm, data="imagenet32"),
    "imagenet32-teacher": functools.partial(_teacher, data="imagenet32"),
}
