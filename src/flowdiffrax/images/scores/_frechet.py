import dataclasses
import io
import json
import pathlib
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from ..._io import StrPath, write_whole
from ..sets._arrays import read_npz
from ..sets._files import reading
from ..sets._images import Images
from ._features import AbstractFeatures, feature_batches

# The names in our files and those of EDM, pytorch-fid, clean-fid and ADM; MeanFlow's.
_KEYS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))


_ABOUT = "provenance"


# What the features of two statistics must have in common, where it is known.
_IDENTITY = ("features", "fingerprint", "settings")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureStatistics:
    """The mean and covariance of the features of a set of images, with their provenance.

    **Arguments:**

    - `mean`, `covariance`: the mean and the unbiased covariance of the features.
    - `num_images`: the number of images; `None` if a file does not state it.
    - `features`: the name of the network, or `None`.
    - `fingerprint`: the network's fingerprint, see
      [`flowdiffrax.images.AbstractFeatures`][], or `None`.
    - `settings`: the network's settings, or `None`.
    - `source`: a name for the images, such as `"CIFAR-10 train"`.

    **Raises:** `ValueError` if the mean or the covariance is not finite, if their shapes
    do not match, or if the covariance is not symmetric.
    """

    mean: Float64[np.ndarray, " features"]
    covariance: Float64[np.ndarray, "features features"]
    num_images: int | None = None
    features: str | None = None
    fingerprint: str | None = None
    settings: Mapping[str, str] | None = None
    source: str = "unknown"

    def __post_init__(self):
        mean, covariance = self.mean, self.covariance
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(
                "Mean and covariance must have shapes (features,) and (features, "
                f"features); got {mean.shape} and {covariance.shape}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("Mean and covariance must be finite.")
        size = np.abs(covariance).max(initial=0.0)
        if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-5 * size):
            raise ValueError("The covariance must be symmetric.")

    @classmethod
    def of(
        cls,
        features: AbstractFeatures,
        images: Images | UInt8[np.ndarray | Array, "n height width channels"],
        *,
        source: str | None = None,
        batch_size: int = 256,
    ) -> "FeatureStatistics":
        """Computes the statistics of images, a batch at a time.

        **Arguments:**

        - `features`: the network.
        - `images`: 8-bit images, at least two.
        - `source`: a name for the images. `None` for the name of
          [`flowdiffrax.images.Images`][].
        - `batch_size`: the number of images at a time, at least 1.

        **Raises:** as [`flowdiffrax.images.image_features`][]; `ValueError` if `images`
        is an array and there is no `source`, if there is only one image, or if a feature
        is not finite.
        """
        batches = feature_batches(features, images, batch_size)
        return statistics_of(batches, features, source_of(images, source))

    @classmethod
    def of_vectors(
        cls,
        vectors: Float[np.ndarray | Array, "n features"],
        *,
        features: AbstractFeatures | None = None,
        source: str = "unknown",
    ) -> "FeatureStatistics":
        """Computes the statistics of feature vectors, such as those of another library.

        **Arguments:**

        - `vectors`: one vector per image, at least two.
        - `features`: the network that computed them, if it is an `AbstractFeatures`.
        - `source`: a name for the images.

        **Raises:** `ValueError` for other shapes, or if a value is not finite.
        """
        rows = np.asarray(vectors)
        blocks = (rows[start : start + 4096] for start in range(0, len(rows), 4096))
        return statistics_of(blocks, features, source)

    def save(self, path: StrPath) -> None:
        """Writes the statistics to an `.npz`.

        It holds `mu` and `sigma`, as other code reads them, and the provenance. The file
        appears whole or not at all.
        """
        about = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("mean", "covariance")
        }
        if self.settings is not None:
            about["settings"] = dict(self.settings)
        file = io.BytesIO()
        text = np.asarray(json.dumps(about))
        arrays = {"mu": self.mean, "sigma": self.covariance, _ABOUT: text}
        np.savez(file, allow_pickle=False, **arrays)
        write_whole(pathlib.Path(path), file.getvalue())

    @classmethod
    def load(cls, path: StrPath) -> "FeatureStatistics":
        """Reads statistics written by `save`, or published with other code.

        Other code publishes `.npz` files with `mu` and `sigma` (EDM, pytorch-fid,
        clean-fid, and ADM, whose spatial statistics are ignored) or `ref_mu` and
        `ref_sigma` (MeanFlow). They state neither the features nor the number of images.
        You have to know that the network, the resizing and the images are the same.

        **Arguments:**

        - `path`: the file.

        **Raises:** `FileNotFoundError` if there is no file; `ValueError` if it is
        damaged, is a pickle, or has no statistics.
        """
        path = pathlib.Path(path)
        arrays = read_npz(path)
        for mu, sigma in _KEYS:
            if mu in arrays and sigma in arrays:
                break
        else:
            raise ValueError(
                f"{path} has no `mu` and `sigma`, but {sorted(arrays)}. If these are "
                "images, use `FeatureStatistics.of`."
            )
        with reading(path, TypeError):
            about = json.loads(str(arrays[_ABOUT])) if _ABOUT in arrays else {}
            about = {"source": f"file {path.name}", **about}
            mean, covariance = arrays[mu].astype(float), arrays[sigma].astype(float)
            return cls(mean, covariance, **about)

    def __repr__(self) -> str:
        known = self.fingerprint and f" {self.fingerprint}"
        return (
            f"FeatureStatistics({self.source!r}: {self.num_images or 'unknown'} images, "
            f"{len(self.mean)} features of {self.features or 'unknown'}{known or ''})"
        )


def statistics_of(
    batches: Iterable[np.ndarray],
    features: AbstractFeatures | None,
    source: str,
) -> FeatureStatistics:
    """Statistics of the vectors of all batches, with one batch at a time in memory."""
    number, shift, total, squares = 0, None, 0.0, 0.0
    for batch in batches:
        rows = batch.astype(np.float64)
        # Centre the vectors on the first batch's mean, or the squares would cancel.
        shift = rows.mean(axis=0) if shift is None else shift
        rows -= shift
        number += len(rows)
        total = total + rows.sum(axis=0)
        squares = squares + rows.T @ rows
    if shift is None or number < 2:
        raise ValueError(f"A covariance needs at least two images; got {number}.")
    offset = total / number
    covariance = (squares - number * np.outer(offset, offset)) / (number - 1)
    found = FeatureStatistics(shift + offset, covariance, number, source=source)
    if features is None:
        return found
    return dataclasses.replace(
        found,
        features=features.name,
        fingerprint=features.fingerprint,
        settings=features.settings,
    )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    r"""The squared Fréchet distance of two Gaussians with these means and covariances.

    It is $\|\mu_a - \mu_b\|^2 + \mathrm{tr}\,(\Sigma_a + \Sigma_b - 2 (\Sigma_a^{1/2}
    \Sigma_b \Sigma_a^{1/2})^{1/2})$. For Inception features, it is the FID. It falls
    towards its limit as the number of images grows, so compare only distances of equal
    numbers of images.

    !!! info "Numerics"

        Uses the eigenvalues of symmetric matrices, in float64. No complex numbers appear,
        and a singular covariance needs no added diagonal.

    **Arguments:**

    - `a`, `b`: the statistics. The distance is symmetric in them.

    **Raises:** `ValueError` if the statistics are known to be of different features, or
    if a matrix is not a covariance. Warns if there are fewer images than features.

    ??? cite "Reference"

        [arXiv:1706.08500](https://arxiv.org/abs/1706.08500).
    """
    _check_same(a, b)
    for one in (a, b):
        if one.num_images is not None and one.num_images < len(one.mean):
            warnings.warn(
                f"{one.num_images} images ({one.source}) for {len(one.mean)} features: "
                "their covariance is singular, and the distance too large. Use more.",
                stacklevel=2,
            )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(_non_negative(values))) @ vectors.T
    product = root @ b.covariance @ root
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    values = np.linalg.eigvalsh((product + product.T) / 2)
    trace -= 2 * np.sqrt(_non_negative(values)).sum()
    # For equal statistics, rounding leaves a small number of either sign.
    return float(max(0.0, np.sum((a.mean - b.mean) ** 2) + trace))


def _non_negative(values: np.ndarray) -> np.ndarray:
    if values[0] < -1e-4 * max(abs(values[-1]), 1e-300):
        raise ValueError(
            f"A covariance has no negative eigenvalues; got {values[0]:.3g}, where the "
            f"largest is {values[-1]:.3g}."
        )
    return np.maximum(values, 0.0)


def _check_same(a: FeatureStatistics, b: FeatureStatistics) -> None:
    known = [(what, getattr(a, what), getattr(b, what)) for what in _IDENTITY]
    for what, one, other in [*known, ("number", len(a.mean), len(b.mean))]:
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"The statistics are of different features: {what} {one!r} for "
                f"{a.source} and {other!r} for {b.source}. Compute both with the same "
                "network."
            )


def source_of(images: Images | np.ndarray | Array, source: str | None) -> str:
    """Returns the name of the images for reports.

    **Raises:** `ValueError` if they have none.
    """
    if source is None and isinstance(images, Images):
        return images.name
    if not source:
        raise ValueError(
            "Say which images these are, for example `source='CIFAR-10 train'`: every "
            "score reports it. `images.Images` have a name."
        )
    return source
