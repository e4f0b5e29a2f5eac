import hashlib
import importlib.resources
import pathlib

import numpy as np

from ..._io import StrPath
from ._arrays import load_images
from ._files import damaged, missing
from ._images import Images

# Of the values and labels, which do not depend on how well the file is packed.
_TWEMOJI = "e978f5740eed82752fe6fd500224a0c55f0d9105b15aed57114e1f1e2e5f7e8d"


def digits() -> Images:
    """The handwritten digits that come with the package: 1797 grey images of 8x8.

    The test set of "Optical Recognition of Handwritten Digits" by Alpaydin and Kaynak
    (UCI Machine Learning Repository, CC BY 4.0). Each value is a count from 0 to 16 of
    the inked pixels in a block of 4x4. The counts are brought to 0 to 255 and rounded,
    so that they scale to [-1, 1] as all other images do.
    """
    folder = importlib.resources.files("flowdiffrax.images.sets")
    resource = folder.joinpath("files/digits.npz")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        counts, labels = arrays["images"], arrays["labels"]
    images = np.round(counts * (255 / 16)).astype(np.uint8)
    return Images(images[..., None], labels, tuple("0123456789"), name="digits")


def twemoji(path: StrPath) -> Images:
    """Twemoji-32: 1873 emoji in colour, 32x32 on white, in nine classes.

    Their order is that of a hash of their code points: a slice of them is a random part,
    and the same one in every build. Most of an image is flat, and a model can learn all
    1873 by heart: a set to try programs with, not to rank methods by.

    Graphics by Twitter, Inc. and other contributors, CC BY 4.0: name them where you show
    the images.

    **Arguments:**

    - `path`: the `.npz` that `tests/data/make_twemoji.py`, in the source repository,
      makes of the npm package `emoji-datasource-twitter` 16.0.0.

    **Raises:** `FileNotFoundError`, or `ValueError` for other contents.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise missing(
            "Twemoji-32",
            path,
            "Fetch emoji-datasource-twitter-16.0.0.tgz (61,683,754 bytes, sha256 "
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877) from the "
            "npm registry, with `npm pack emoji-datasource-twitter@16.0.0`, and make the "
            "file of it with `tests/data/make_twemoji.py` of the source repository.",
        )
    images = load_images(path)
    if (found := content_hash(images)) != _TWEMOJI:
        raise damaged(path, f"contents of sha256 {found} instead of {_TWEMOJI}")
    return images


def content_hash(images: Images) -> str:
    """The sha256 of values and labels, however a file compresses them."""
    found = hashlib.sha256(images.images.tobytes())
    if images.labels is not None:
        found.update(images.labels.astype("<i4").tobytes())
    return found.hexdigest()
