"""Scores of every sampler, in features that the options name."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import UInt8

from ...flow_maps._base import AbstractFlowMap
from .._recipe import Recipe
from ..scores._alexnet import AlexNetFeatures
from ..scores._classifier import fit_classifier
from ..scores._features import AbstractFeatures, RandomFeatures
from ..scores._frechet import FeatureStatistics
from ..scores._inception import InceptionFeatures
from ..scores._nearest import nearest_neighbours
from ..scores._scores import ImageReference, ImageScores, score_images
from ..sets._images import Images
from ._options import Options
from ._samplers import draw_all, noise, samplers

_COLUMNS = {
    "evaluations": "evaluations",
    "seconds for 1,000": "seconds for 1,000",
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
    "sliced": "sliced Wasserstein",
    "coupling": "to Tsit5, rms",
    "near the training set": "near the training set",
}


class Scorer:
    """What samples are compared with, computed when it is first needed."""

    def __init__(self, options: Options, images: Images, held_out: Images):
        self.images = images
        self._options = options
        self._held_out = held_out

    @functools.cached_property
    def features(self) -> AbstractFeatures:
        """The features in which distances are computed."""
        options, images = self._options, self.images
        if options.features == "random":
            return random_features(images.images.shape[1:])
        if options.features == "classifier":
            print("Training the classifier whose features are the proxy")
            return fit_classifier(images.images, images.labels, key=jr.key(0))
        return features_of_file(options.features)

    @functools.cached_property
    def reference(self) -> ImageReference | FeatureStatistics:
        if self._options.statistics is not None:
            return FeatureStatistics.load(self._options.statistics)
        return ImageReference.of(self.features, self.images)

    def held_out(self, number: int) -> UInt8[np.ndarray, "_ height width channels"]:
        """As many held-out images as there are samples, if there are as many."""
        return self._held_out.images[:number]

    def __call__(
        self, samples: UInt8[np.ndarray, "_ height width channels"]
    ) -> ImageScores:
        return score_images(
            samples, self.reference, self.features, seed=self._options.seed
        )


def random_features(shape: tuple[int, ...]) -> RandomFeatures:
    """Features of an untrained network, the same for all runs."""
    return RandomFeatures(shape, key=jr.key(0))


@functools.cache
def features_of_file(path: str) -> AbstractFeatures:
    """Features of a file of weights, which is read once."""
    if pathlib.Path(path).name.startswith("alexnet"):
        return AlexNetFeatures.load(path)
    return InceptionFeatures.load(path)


def score(
    recipe: Recipe,
    options: Options,
    flow_map: AbstractFlowMap,
    teacher: AbstractFlowMap | None,
    scorer: Scorer,
) -> list[dict[str, Any]]:
    """A row of scores for each sampler; the last row is for held-out images."""
    images, others = scorer.images, scorer.held_out(options.num_samples)
    x0, labels = noise(recipe, options.num_samples, images, options.seed)
    rows, exact = [], None
    for name, draw in samplers(recipe, options, flow_map, teacher).items():
        drawn, evaluations, seconds = draw_all(draw, x0, labels, options.sample_batch)
        exact = drawn if exact is None and options.ode is not None else exact
        scores = scorer(drawn)
        near = nearest_neighbours(drawn, images.images, others)
        rows.append(
            {
                "sampler": name,
                "evaluations": evaluations,
                "seconds for 1,000": seconds,
                "coupling": None if exact is None else rms(drawn, exact),
                "near the training set": near.share,
                **scores.as_dict(),
            }
        )
        print(f"{name}: {scores}", flush=True)
    rows.append({"sampler": "held-out images", **scorer(others).as_dict()})
    (options.folder / "scores.json").write_text(json.dumps(rows, indent=1))
    return rows


def rms(
    x: UInt8[np.ndarray, " number *image"], y: UInt8[np.ndarray, " number *image"]
) -> float:
    """The rms difference of pixels in [-1, 1]."""
    difference = np.subtract(x, y, dtype=np.float32) / 127.5
    return float(np.sqrt(np.mean(difference**2)))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scores as a Markdown table."""
    form = lambda value: "" if value is None else f"{value:.4g}"
    lines = [
        "| | " + " | ".join(_COLUMNS.values()) + " |",
        "| --- " * (1 + len(_COLUMNS)) + "|",
    ]
    for row in rows:
        values = " | ".join(form(row.get(name)) for name in _COLUMNS)
        lines.append(f"| {row['sampler']} | {values} |")
    return "\n".join(lines)
