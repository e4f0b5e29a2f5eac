import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from ...metrics import kernel_distance, sliced_wasserstein
from .._device import from_uint8
from ..sets._images import Images
from ._features import AbstractFeatures, as_images, feature_batches, image_features
from ._frechet import FeatureStatistics, frechet_distance, source_of, statistics_of
from ._inception import InceptionFeatures

# The number of reference images that are kept, which bounds the memory. The kernel
# distance draws subsets of 1,000 from them.
_KEPT = 50_000

_Pictures = Images | UInt8[np.ndarray | Array, "_ height width channels"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageReference:
    """The images that samples are compared with, and their features, computed once.

    Pass it to [`flowdiffrax.images.score_images`][] to score several samplers. The
    statistics are of all images. Of more than 50,000 images, only 50,000 at equal
    distances are kept, for the kernel and sliced distances. For ImageNet-32, this saves
    most of the 10 GB of Inception's features.

    **Attributes:**

    - `images`: the images that are kept.
    - `vectors`: the features of each of them.
    - `statistics`: the statistics of the features of all images.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    vectors: Float[np.ndarray, "n features"]
    statistics: FeatureStatistics

    @classmethod
    def of(
        cls,
        features: AbstractFeatures,
        images: _Pictures,
        *,
        source: str | None = None,
        batch_size: int = 256,
    ) -> "ImageReference":
        """Computes the features of the images, a batch at a time.

        **Arguments:**

        - `features`: the network.
        - `images`: 8-bit images, at least two.
        - `source`: a name for the images. `None` for the name of
          [`flowdiffrax.images.Images`][].
        - `batch_size`: the number of images at a time, at least 1.

        **Raises:** as [`flowdiffrax.images.FeatureStatistics`][]`.of`.
        """
        rows, vectors = as_images(images), []
        number = min(len(rows), _KEPT)
        kept = np.arange(number) * len(rows) // number

        def batches():
            start = 0
            for batch in feature_batches(features, rows, batch_size):
                stop = start + len(batch)
                first, last = np.searchsorted(kept, (start, stop))
                vectors.append(batch[kept[first:last] - start])
                start = stop
                yield batch

        statistics = statistics_of(batches(), features, source_of(images, source))
        rows = rows if number == len(rows) else rows[kept]
        return cls(rows, np.concatenate(vectors), statistics)


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """Scores of samples against a set of images, and everything that they depend on.

    `str(scores)` is a line for a log, and `scores.as_dict()` is for JSON.

    **Attributes:**

    - `frechet`: the Fréchet distance of the features.
    - `frechet_name`: `"FID"` for Inception features; for others, a name that contains the
      network's.
    - `kernel`, `kernel_std`: the kernel distance of the features (KID) and its standard
      deviation over subsets; `None` if the reference has no images.
    - `sliced`: the sliced 2-Wasserstein distance of the pixels in [-1, 1]; `None` if the
      reference has no images.
    - `floor`: the Fréchet distance from held-out images to the reference, which is what
      new images of the same kind score; `None` if there are no held-out images.
    - `num_samples`, `num_reference`, `num_held_out`: the numbers of images. A Fréchet
      distance falls as they grow.
    - `source`: the name of the reference images, with their split.
    - `seed`: the seed of the samples, subsets and projections.
    - `features`, `fingerprint`, `settings`: the network's name, fingerprint and settings.
    - `values`: `"uint8"`, the dtype that samples were rounded to.
    """

    frechet: float
    frechet_name: str
    kernel: float | None
    kernel_std: float | None
    sliced: float | None
    floor: float | None
    num_samples: int
    num_reference: int | None
    num_held_out: int | None
    source: str
    seed: int
    features: str
    fingerprint: str
    settings: dict[str, str]
    values: str = "uint8"

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields, in a form for `json.dumps`."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        numbers = [f"{self.frechet_name} {self.frechet:.4g}"]
        if self.floor is not None:
            numbers.append(f"floor {self.floor:.4g} ({self.num_held_out} held out)")
        if self.kernel is not None:
            numbers.append(f"KID {self.kernel:.3g} +- {self.kernel_std:.2g}")
        if self.sliced is not None:
            numbers.append(f"sliced W2 {self.sliced:.4g}")
        return (
            f"{', '.join(numbers)}: {self.num_samples} samples (seed {self.seed}, "
            f"{self.values}) against {self.num_reference or 'unknown number'} of "
            f"{self.source}; {self.features} {self.fingerprint}, "
            f"resize {self.settings.get('resize', 'unknown')}"
        )


def score_images(
    samples: _Pictures,
    reference: _Pictures | ImageReference | FeatureStatistics,
    features: AbstractFeatures,
    *,
    seed: int,
    source: str | None = None,
    held_out: _Pictures | None = None,
    batch_size: int = 256,
    num_subsets: int = 100,
    num_projections: int = 256,
) -> ImageScores:
    """Scores samples, and records how the scores were computed.

    **Arguments:**

    - `samples`: 8-bit images, from [`flowdiffrax.images.to_uint8`][].
    - `reference`: the images to compare with, usually the training set; an
      [`flowdiffrax.images.ImageReference`][], which already has their features; or a
      [`flowdiffrax.images.FeatureStatistics`][], for which only the Fréchet distance is
      computed.
    - `features`: the network.
    - `seed`: the seed that the samples were drawn with. It is recorded, and it draws the
      subsets and projections.
    - `source`: a name for the reference images, with their split. `None` for the name
      that the reference has; arrays have none.
    - `held_out`: images of the same kind that are not in the reference, for the floor.
      Use as many as there are samples, because the floor depends on their number.
    - `batch_size`: the number of images at a time, at least 1.
    - `num_subsets`: the number of subsets for the kernel distance.
    - `num_projections`: the number of projections for the sliced Wasserstein distance.

    **Raises:** as [`flowdiffrax.images.image_features`][] and
    [`flowdiffrax.images.frechet_distance`][].
    """
    rows = as_images(samples)
    vectors = image_features(features, rows, batch_size=batch_size)
    made = FeatureStatistics.of_vectors(vectors, features=features, source="samples")
    if not isinstance(reference, ImageReference | FeatureStatistics):
        reference = ImageReference.of(
            features, reference, source=source, batch_size=batch_size
        )
    with_images = isinstance(reference, ImageReference)
    target = reference.statistics if with_images else reference
    if source is not None:
        target = dataclasses.replace(target, source=source)
    # This refuses features of another network, before their vectors are used.
    frechet = frechet_distance(made, target)
    kernel = sliced = None
    if with_images:
        kernel = kernel_distance(
            vectors, reference.vectors, num_subsets=num_subsets, seed=seed
        )
        sliced = sliced_wasserstein(
            *(np.asarray(from_uint8(images)) for images in (rows, reference.images)),
            num_projections=num_projections,
            seed=seed,
        )
    floor = None
    if held_out is not None:
        kept = FeatureStatistics.of(
            features, held_out, source="held out", batch_size=batch_size
        )
        floor = frechet_distance(kept, target)
    is_inception = isinstance(features, InceptionFeatures)
    return ImageScores(
        frechet=frechet,
        frechet_name="FID" if is_inception else f"Fréchet {features.name} distance",
        kernel=None if kernel is None else kernel.mean,
        kernel_std=None if kernel is None else kernel.std,
        sliced=sliced,
        floor=floor,
        num_samples=len(rows),
        num_reference=target.num_images,
        num_held_out=None if held_out is None else len(held_out),
        source=target.source,
        seed=seed,
        features=features.name,
        fingerprint=features.fingerprint,
        settings=features.settings,
    )
