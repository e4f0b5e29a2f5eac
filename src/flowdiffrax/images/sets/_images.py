import dataclasses

import numpy as np
from jaxtyping import Array, Integer, UInt8


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Images in host memory, with their labels. Every loader returns one.

    `images[rows]`, for a slice or an array of rows, is a part of them.

    **Arguments:**

    - `images`: 8-bit values, height before width and channels last. They may be mapped
      from a file (`numpy.memmap`).
    - `labels`: one class per image, stored as int32, or `None`.
    - `class_names`: the names of the classes in the order of their labels, or `None`.
    - `num_classes`: labels lie in `range(num_classes)`. `None` for the number of names
      or, without names, one more than the largest label.
    - `name`: the name of the set, for reports.

    **Raises:** `ValueError` if there are no images, if the shapes do not match, or if a
    label is out of range; `TypeError` for other dtypes.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Integer[np.ndarray, " n"] | None = None
    class_names: tuple[str, ...] | None = None
    num_classes: int | None = None
    name: str = "images"

    def __post_init__(self):
        check_images(self.images)
        names = None if self.class_names is None else len(self.class_names)
        num_classes = names if self.num_classes is None else self.num_classes
        if names not in (None, num_classes):
            raise ValueError(
                f"There must be one name per class; got {names} names for {num_classes} "
                "classes."
            )
        labels = self.labels
        if labels is not None:
            check_labels(labels, len(self))
            num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
            wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
            if wrong.size > 0:
                raise ValueError(
                    f"Labels of {self.name} must lie in range({num_classes}); got "
                    f"{labels[wrong[0]]} at row {wrong[0]}. Subtract 1 if labels start "
                    "at 1, and pass `labels=None` if -1 stands for an unknown label."
                )
            labels = labels.astype(np.int32)
        # The class is frozen, so plain assignment would fail.
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "num_classes", num_classes)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The images and labels, in the form that [`flowdiffrax.data.stream`][] takes."""
        return self.images, self.labels

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> "Images":
        labels = None if self.labels is None else self.labels[rows]
        return dataclasses.replace(self, images=self.images[rows], labels=labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        classes = "" if self.labels is None else f", {self.num_classes} classes"
        return f"Images({self.name!r}: {len(self)} of {size}{classes})"


def check_images(images: np.ndarray | Array) -> None:
    if images.dtype != np.uint8:
        raise TypeError(
            f"`images` must be of dtype uint8; got {images.dtype}. Convert floats in "
            "[-1, 1] with `to_uint8`."
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            "`images` must have shape (images, height, width, channels) and not be "
            f"empty; got {images.shape}. Grey images have one channel."
        )
    # Images with the channels first would otherwise pass, and a model learn stripes.
    if images.shape[3] > 4:
        raise ValueError(
            "`images` must have its channels last, at most 4 of them; got shape "
            f"{images.shape}. If they come first, use `images.transpose(0, 2, 3, 1)`."
        )


def check_labels(labels: np.ndarray | Array, number: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"`labels` must be integers; got {labels.dtype}.")
    if labels.shape != (number,):
        raise ValueError(
            f"There must be one label per image; got labels of shape {labels.shape} for "
            f"{number} images."
        )
