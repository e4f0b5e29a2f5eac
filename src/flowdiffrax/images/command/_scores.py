"""Scores of every sampler, in features that the options name."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.random as jr
import numpy as np
from jaxtyping import UInt8

from ...flow_maps._base import AbstractFlowMap
from ...train import fingerprint
from ...train._reports import placed
from .._recipe import Recipe
from .._scores_file import append_score
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
    config: Mapping[str, Any],
    flow_map: AbstractFlowMap,
    teacher: AbstractFlowMap | None,
    scorer: Scorer,
) -> list[dict[str, Any]]:
    """A row of scores for each sampler; the last row is for held-out images.

    The rows are added to `scores.jsonl`, with everything that they depend on.

    **Arguments:**

    - `recipe`, `options`, `teacher`: those of the run.
    - `config`, `flow_map`: what to score, from [`flowdiffrax.images.command.load_map`][].
    - `scorer`: what to compare with.
    """
    images, others = scorer.images, scorer.held_out(options.num_samples)
    x0, labels = noise(recipe, options.num_samples, images, options.seed)
    where = {name: config[name] for name in ("step", "average")}
    about = {
        "guidance": options.guidance,
        "ode": options.ode,
        "starts": fingerprint((x0, labels)),
        "weights": fingerprint(flow_map),
        "config": {name: config[name] for name in config if name not in where},
    }
    sharding = own_devices(options)
    flow_map, teacher = placed((flow_map, teacher), sharding)
    rows, exact, known = [], None, others
    for name, draw in samplers(recipe, options, flow_map, teacher).items():
        drawn, evaluations, seconds = draw_all(
            draw, x0, labels, options.sample_batch, sharding
        )
        exact = drawn if exact is None and options.ode is not None else exact
        scores = scorer(drawn)
        # The distances of the held-out images are computed once.
        known = nearest_neighbours(drawn, images.images, known)
        row = {
            "sampler": name,
            "evaluations": evaluations,
            "seconds for 1,000": seconds,
            "coupling": None if exact is None else rms(drawn, exact),
            "near the training set": known.share,
            **scores.as_dict(),
        }
        rows.append(where | row | about)
        append_score(options.folder, rows[-1])
        print(f"{name}: {scores}", flush=True)
    rows.append(where | {"sampler": "held-out images", **scorer(others).as_dict()})
    append_score(options.folder, rows[-1])
    return rows


def own_devices(options: Options) -> jax.sharding.Sharding:
    """A copy on each device of this process, or on one; the others may not sample."""
    devices = jax.local_devices()
    if not options.all_devices:
        return jax.sharding.SingleDeviceSharding(devices[0])
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


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
