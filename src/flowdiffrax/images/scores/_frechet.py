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
from ..sets._files import damaged
from ..sets._images import Images
from ._features import AbstractFeatures, feature_batches

# The names of ours, EDM's, pytorch-fid's, clean-fid's and ADM's; then MeanFlow's.
_KEYS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))


_ABOUT = "provenance"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images, and what they are of.

    **Arguments:**

    - `mean`, `covariance`: of the features, the covariance unbiased.
    - `num_images`: of how many images; `None` if a file did not say.
    - `features`: the name of the network, or `None`.
    - `fingerprint`: its fingerprint, see [`flowdiffrax.images.AbstractFeatures`][], or
      `None`.
    - `settings`: its settings, or `None`.
    - `source`: which images, such as `"CIFAR-10 train"`.

    **Raises:** `ValueError` if mean and covariance are not finite, not symmetric, or do
    not go together.
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
        """Of images, a batch at a time.

        **Arguments:**

        - `features`, `images`, `batch_size`: as for
          [`flowdiffrax.images.image_features`][]. There must be two images.
        - `source`: which images. Those of [`flowdiffrax.images.Images`][] have a name.

        **Raises:** as [`flowdiffrax.images.image_features`][]; `ValueError` for arrays
        without a source, for one image, or for features that are not finite.
        """
        return cls._of_batches(
            feature_batches(features, images, batch_size),
            features=features.name,
            fingerprint=features.fingerprint,
            settings=features.settings,
            source=source_of(images, source),
        )

    @classmethod
    def of_vectors(
        cls,
        vectors: Float[np.ndarray | Array, "n features"],
        *,
        features: AbstractFeatures | None = None,
        source: str = "unknown",
    ) -> "FeatureStatistics":
        """Of feature vectors, such as those of a network that is none of ours.

        **Arguments:**

        - `vectors`: one an image, at least two.
        - `features`: the network they are of, if it is one of ours.
        - `source`: of which images.

        **Raises:** `ValueError` for other shapes, or values that are not finite.
        """
        rows = np.asarray(vectors)
        if rows.ndim != 2:
            raise ValueError(f"Vectors must have shape (n, features); got {rows.shape}.")
        blocks = (rows[start : start + 4096] for start in range(0, len(rows), 4096))
        return cls._of_batches(
            blocks,
            features=None if features is None else features.name,
            fingerprint=None if features is None else features.fingerprint,
            settings=None if features is None else features.settings,
            source=source,
        )

    @classmethod
    def _of_batches(cls, batches: Iterable[np.ndarray], **about) -> "FeatureStatistics":
        number, shift, total, squares = 0, None, 0.0, 0.0
        for batch in batches:
            rows = batch.astype(np.float64)
            # About a point among them, or the squares would cancel.
            shift = rows.mean(axis=0) if shift is None else shift
            rows -= shift
            number += len(rows)
            total = total + rows.sum(axis=0)
            squares = squares + rows.T @ rows
        if shift is None or number < 2:
            raise ValueError(f"A covariance needs two images at least; got {number}.")
        offset = total / number
        covariance = (squares - number * np.outer(offset, offset)) / (number - 1)
        return cls(shift + offset, covariance, number, **about)

    def save(self, path: StrPath) -> None:
        """Writes an `.npz` with `mu` and `sigma`, as others read it, and the provenance.

        The file appears whole or not at all.
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
        """Reads statistics of ours, or those that other code publishes.

        These are `.npz` with `mu` and `sigma` (EDM, pytorch-fid, clean-fid, and ADM,
        whose spatial ones are left out) or `ref_mu` and `ref_sigma` (MeanFlow). They say
        neither which features they are of nor of how many images: that the network, the
        resizing and the images are the same ones, you have to know.

        **Arguments:**

        - `path`: the file.

        **Raises:** `FileNotFoundError`, or `ValueError` for a damaged file, one without
        statistics, and pickles.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There are no statistics at {path}.")
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        if not is_zip:
            raise ValueError(
                f"{path} is no .npz, and not read: statistics in pickles, as EDM2 has "
                "them, may run code. Write `mu` and `sigma` with `numpy.savez`."
            )
        arrays = read_npz(path)
        for mu, sigma in _KEYS:
            if mu in arrays and sigma in arrays:
                break
        else:
            raise ValueError(
                f"{path} has no `mu` and `sigma`, but {sorted(arrays)}. Images in it are "
                "for `FeatureStatistics.of`."
            )
        try:
            about = json.loads(str(arrays[_ABOUT])) if _ABOUT in arrays else {}
            about = {"source": f"file {path.name}", **about}
            mean, covariance = arrays[mu].astype(float), arrays[sigma].astype(float)
            return cls(mean, covariance, **about)
        except (TypeError, ValueError) as error:
            raise damaged(path, error) from error

    def __repr__(self) -> str:
        known = self.fingerprint and f" {self.fingerprint}"
        return (
            f"FeatureStatistics({self.source!r}: {self.num_images or 'unknown'} images, "
            f"{len(self.mean)} features of {self.features or 'unknown'}{known or ''})"
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    r"""The squared Fréchet distance of two Gaussians with these means and covariances.

    $\|\mu_a - \mu_b\|^2 + \mathrm{tr}\,(\Sigma_a + \Sigma_b
    - 2 (\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2})$. Of Inception's features it is
    the FID. It falls with the number of images, towards a limit from above: compare equal
    numbers only.

    !!! info "Numerics"

        By eigenvalues of symmetric matrices, in float64. Nothing complex appears, and
        nothing need be added to a singular covariance.

    **Arguments:**

    - `a`, `b`: the statistics. It is symmetric in them.

    **Raises:** `ValueError` for statistics of different features, as far as these are
    known, or for a matrix that is no covariance. It warns of fewer images than features.

    ??? cite "Reference"

        [arXiv:1706.08500](https://arxiv.org/abs/1706.08500).
    """
    _check_same(a, b)
    for one in (a, b):
        if one.num_images is not None and one.num_images < len(one.mean):
            warnings.warn(
                f"{one.num_images} images ({one.source}) for {len(one.mean)} features: "
                "their covariance is singular, and the distance too large. Take more.",
                stacklevel=2,
            )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(_non_negative(values))) @ vectors.T
    product = root @ b.covariance @ root
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    values = np.linalg.eigvalsh((product + product.T) / 2)
    trace -= 2 * np.sqrt(_non_negative(values)).sum()
    # Of equal ones, rounding leaves a little on either side of zero.
    return float(max(0.0, np.sum((a.mean - b.mean) ** 2) + trace))


def _non_negative(values: np.ndarray) -> np.ndarray:
    if values[0] < -1e-4 * max(abs(values[-1]), 1e-300):
        raise ValueError(
            f"A covariance has no negative eigenvalues; got {values[0]:.3g}, beside "
            f"{values[-1]:.3g}."
        )
    return np.maximum(values, 0.0)


def _check_same(a: FeatureStatistics, b: FeatureStatistics) -> None:
    for what in ("features", "fingerprint", "settings"):
        one, other = getattr(a, what), getattr(b, what)
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"The statistics are of different features: {what} {one!r} of {a.source} "
                f"and {other!r} of {b.source}. Make both with the same network."
            )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"The statistics are of different features: {len(a.mean)} of {a.source} and "
            f"{len(b.mean)} of {b.source}."
        )


def source_of(images: Images | np.ndarray | Array, source: str | None) -> str:
    """What a report should call the images.

    **Raises:** `ValueError` if nobody said.
    """
    if source is None and isinstance(images, Images):
        return images.name
    if not source:
        raise ValueError(
            "Say which images these are, such as `source='CIFAR-10 train'`: it is "
            "written beside every score. `images.Images` have a name."
        )
    return source
