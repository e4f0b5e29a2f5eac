from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float32, Integer, Key, UInt8

from ..sets._images import Images
from ._features import (
    AbstractFeatures,
    ConvStack,
    as_images,
    check_image,
    check_shape,
    image_features,
)


class ClassifierFeatures(AbstractFeatures):
    """The last features of a small classifier: a proxy where no FID is available.

    [`flowdiffrax.images.fit_classifier`][] trains it on the data that a model is to
    imitate. A distance of these features is a Fréchet classifier distance. It ranks
    models that are scored by the same classifier, and is not comparable with published
    FIDs. Report it with its floor, the distance of the training set from the test set.

    **Attributes:**

    - `shape`: the shape of one image, (height, width, channels).
    - `training`: what it was trained on, and for how long.
    """

    stack: ConvStack
    head: Float32[Array, "features classes"]
    shape: tuple[int, int, int] = eqx.field(static=True)
    training: str = eqx.field(static=True)
    name: str = eqx.field(static=True, default="classifier")

    def __call__(
        self, x: Float32[Array, "height width channels"]
    ) -> Float32[Array, " features"]:
        check_image(x, self.shape)
        return self.stack(x)

    @property
    def settings(self) -> dict[str, str]:
        shape = "x".join(map(str, self.shape))
        return {"resize": "none", "shape": shape, "training": self.training}

    def accuracy(
        self,
        images: Images | UInt8[np.ndarray | Array, "n height width channels"],
        labels: Integer[np.ndarray | Array, " n"] | None = None,
        *,
        batch_size: int = 256,
    ) -> float:
        """Returns the share of images that are classified correctly.

        **Arguments:**

        - `images`, `labels`: 8-bit images with one label each, or
          [`flowdiffrax.images.Images`][] alone.
        - `batch_size`: the number of images at a time.

        **Raises:** as [`flowdiffrax.images.image_features`][]; `ValueError` if labels are
        missing or do not match the images.
        """
        rows, labels, _ = _with_labels(images, labels)
        vectors = image_features(self, rows, batch_size=batch_size)
        logits = vectors @ np.asarray(self.head)
        return float(np.mean(np.argmax(logits, axis=1) == labels))


def fit_classifier(
    images: Images | UInt8[np.ndarray | Array, "n height width channels"],
    labels: Integer[np.ndarray | Array, " n"] | None = None,
    *,
    key: Key[Array, ""],
    num_steps: int = 600,
    batch_size: int = 128,
    width: int = 64,
    learning_rate: float = 1e-2,
) -> ClassifierFeatures:
    """Trains a small convolutional classifier on the training images, for its features.

    It minimises the cross-entropy with AdamW, whose learning rate rises for a tenth of
    the steps and then falls as a cosine. The features are then scaled to mean square 1 on
    the training images.

    The same call gives the same weights on the same machine. On another machine, the last
    digits may differ, and with them the fingerprint. To score on several machines, save
    the module with [`flowdiffrax.train.save`][].

    **Arguments:**

    - `images`, `labels`: 8-bit images with one label each, from 0 on; or
      [`flowdiffrax.images.Images`][] alone.
    - `key`: for the initial weights, and the images of each step.
    - `num_steps`, `batch_size`: the number of steps, and of images in each; at least 1.
    - `width`: the number of features, at least 1.
    - `learning_rate`: the largest learning rate.

    **Raises:** `TypeError` or `ValueError` if the images or labels are invalid;
    `ValueError` if all labels are equal, or if `width` is below 1.
    """
    rows, labels, num_classes = _with_labels(images, labels)
    shape = check_shape(rows.shape[1:], width)
    if labels.min() == labels.max():
        raise ValueError(
            "A classifier needs images of at least two classes; all "
            f"{len(labels)} labels are {labels[0]}. Without classes, use "
            "`RandomFeatures`."
        )
    stack_key, rows_key = jr.split(key)
    name = images.name if isinstance(images, Images) else "images"
    training = f"{num_steps} steps of {batch_size} of {len(rows)} {name}"
    stack = ConvStack(shape, width, key=stack_key)
    head = jnp.zeros((width, num_classes), np.float32)
    features = ClassifierFeatures(stack=stack, head=head, shape=shape, training=training)
    with jax.numpy_dtype_promotion("standard"):
        optim = _optim(learning_rate, num_steps)
        opt_state = optim.init(eqx.filter(features, eqx.is_array))
    device_rows, device_labels = jnp.asarray(rows), jnp.asarray(labels, np.int32)
    # Loop in Python: in an XLA loop, convolutions on CPUs are many times slower.
    for step in range(num_steps):
        drawn = jr.randint(jr.fold_in(rows_key, step), (batch_size,), 0, len(rows))
        batch = device_rows[drawn], device_labels[drawn]
        features, opt_state = _step(
            features, opt_state, *batch, float(learning_rate), num_steps
        )
    return _to_unit_size(features, rows)


def _to_unit_size(features: ClassifierFeatures, rows: np.ndarray) -> ClassifierFeatures:
    """Returns the same classifier, with features of mean square 1 on the training images.

    The size of features after training is arbitrary, and distances would be too.
    """
    vectors = image_features(features, rows[:: max(1, len(rows) // 10_000)])
    size = np.sqrt(np.mean(vectors**2))
    if not (np.isfinite(size) and size > 0):
        raise ValueError(
            f"The classifier diverged: the size of its features is {size}. Use a smaller "
            "`learning_rate`."
        )
    # Only a ReLU and a mean lie between these arrays, so the factors cancel.
    return eqx.tree_at(
        lambda f: (f.stack.kernels[-1], f.stack.biases[-1], f.head),
        features,
        replace_fn=lambda leaf: leaf * size if leaf is features.head else leaf / size,
    )


def _optim(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    warmup = num_steps // 10
    return optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, num_steps + 1)
    )


@eqx.filter_jit
def _step(
    features: ClassifierFeatures,
    opt_state: Any,
    images: Array,
    labels: Array,
    learning_rate: float,
    num_steps: int,
):
    def loss(features: ClassifierFeatures) -> Array:
        vectors = jax.vmap(features)(images.astype(jnp.float32))
        log_shares = jax.nn.log_softmax(vectors @ features.head)
        return -jnp.mean(jnp.take_along_axis(log_shares, labels[:, None], axis=1))

    grads = eqx.filter_grad(loss)(features)
    with jax.numpy_dtype_promotion("standard"):
        optim = _optim(learning_rate, num_steps)
        updates, opt_state = optim.update(
            grads, opt_state, eqx.filter(features, eqx.is_array)
        )
        return eqx.apply_updates(features, updates), opt_state


def _with_labels(
    images: Images | np.ndarray | Array, labels: Sequence[int] | np.ndarray | Array | None
) -> tuple[np.ndarray, np.ndarray, int]:
    if isinstance(images, Images):
        if labels is not None:
            raise ValueError("`Images` carry their labels; do not pass `labels` too.")
        found = images
    else:
        as_labels = None if labels is None else np.asarray(labels)
        found = Images(np.asarray(images), as_labels)
    if found.labels is None or found.num_classes is None:
        raise ValueError("A classifier needs labels, one per image; got none.")
    return as_images(found), np.asarray(found.labels), found.num_classes
