import hashlib
import importlib.resources
import pathlib

import numpy as np

from ..._io import StrPath
from ._arrays import load_images
from ._files import damaged, missing
from ._images import Images

# Hashes values and labels, and so does not depend on how the file is compressed.
_TWEMOJI = "e978f5740eed82752fe6fd500224a0c55f0d9105b15aed57114e1f1e2e5f7e8d"


def digits() -> Images:
    """The handwritten digits that come with the package: 1797 grey images of 8x8.

    They are the test set of "Optical Recognition of Handwritten Digits" by Alpaydin and
    Kaynak (UCI Machine Learning Repository, CC BY 4.0). Each value is the number of inked
    pixels in a block of 4x4, from 0 to 16. These counts are scaled to 0 to 255 and
    rounded, so that they scale to [-1, 1] like all other images.
    """
    folder = importlib.resources.files("flowdiffrax.images.sets")
    resource = folder.joinpath("files/digits.npz")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        counts, labels = arrays["images"], arrays["labels"]
    images = np.round(counts * (255 / 16)).astype(np.uint8)
    return Images(images[..., None], labels, tuple("0123456789"), name="digits")


def twemoji(path: StrPath) -> Images:
    """Twemoji-32: 1873 emoji in colour, 32x32 on white, in nine classes.

    They are ordered by a hash of their code points, so a slice is a random part of them,
    and the same one in every build. Most of each image is flat, and a model can memorise
    all 1873. Use this set to try programs, not to rank methods.

    The graphics are by Twitter, Inc. and other contributors, CC BY 4.0. Credit them
    where you show the images.

    **Arguments:**

    - `path`: the `.npz` that `tests/files/make_twemoji.py`, in the source repository,
      makes from the npm package `emoji-datasource-twitter` 16.0.0.

    **Raises:** `FileNotFoundError` if there is no file; `ValueError` for other contents.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise missing(
            "Twemoji-32",
            path,
            "Fetch emoji-datasource-twitter-16.0.0.tgz (61,683,754 bytes, sha256 "
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877) from the "
            "npm registry, with `npm pack emoji-datasource-twitter@16.0.0`, and convert "
            "it with `tests/files/make_twemoji.py` of the source repository.",
        )
    images = load_images(path)
    if (found := content_hash(images)) != _TWEMOJI:
        raise damaged(path, f"contents of sha256 {found} instead of {_TWEMOJI}")
    return images


def content_hash(images: Images) -> str:
    """Returns the sha256 of values and labels, whatever the file's compression."""
    found = hashlib.sha256(images.images.tobytes())
    if images.labels is not None:
        found.update(images.labels.astype("<i4").tobytes())
    return found.hexdigest()
