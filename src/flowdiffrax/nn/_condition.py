"""The conditioning of networks: two times, a class label or a vector, and guidance."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Integer, Key

from .._check import check_between, check_bools, check_count, check_scalar
from .._types import Args, AugmentationArgs, GuidanceArgs, Time
from ._embedding import MagnitudePreservingEmbedding, TwoTimeEmbedding, waves
from ._layers import Linear
from ._magnitude import ForcedLinear, ForcedWeight, gained
from ._mlp import as_vector


class VectorEmbedding(eqx.Module):
    """Embeds a vector of parameters."""

    first: Linear
    last: Linear
    args_size: int = eqx.field(static=True)

    def __init__(self, size: int, args_size: int, *, key: Key[Array, ""]):
        first_key, last_key = jr.split(key)
        self.first = Linear(args_size, size, key=first_key)
        self.last = Linear(size, size, key=last_key)
        self.args_size = args_size

    def __call__(self, args: Args, dtype: jnp.dtype) -> Float[Array, " size"]:
        cure = (
            "From a dictionary, pick them in a function: "
            '`FlowMap(lambda s, t, x, args: net(s, t, x, args["viscosity"]))`.'
        )
        args = as_vector(args, self.args_size, dtype, cure)
        return self.last(jax.nn.silu(self.first(args)))


class Condition(eqx.Module):
    """Embeds both times and `args` in one vector, in the precision of the times.

    The vector is the sum of the embeddings of the inputs.

    **Arguments:**

    - `size`, `num_features`, `two_times`, `max_frequency`: the settings of the time
      embedding.
    - `num_classes`: the number of classes; 0 for none.
    - `guidance`: whether the guidance scale is an input.
    - `args_size`: the length of the vector `args`, in place of a label; 0 for none.
    - `augment_size`: the number of labels of an augmentation; 0 for none.
    - `preserving`: whether all layers preserve magnitudes.
    """

    times: TwoTimeEmbedding | MagnitudePreservingEmbedding
    classes: Float[Array, "classes size"] | ForcedWeight | None
    vector: VectorEmbedding | None
    guidance: Linear | ForcedLinear | None
    augmentation: "_Augmentation | None"
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        num_features: int,
        num_classes: int,
        guidance: bool,
        two_times: bool,
        max_frequency: float,
        args_size: int = 0,
        *,
        augment_size: int = 0,
        preserving: bool = False,
        key: Key[Array, ""],
    ):
        check_count(num_classes, 0, "num_classes")
        check_count(args_size, 0, "args_size")
        check_count(augment_size, 0, "augment_size")
        check_bools(guidance=guidance)
        if num_classes > 0 and args_size > 0:
            raise ValueError(
                "`args` are a label or a vector, so give `num_classes` or `args_size`; "
                f"got {num_classes} and {args_size}."
            )
        time_key, class_key, guidance_key, augment_key = jr.split(key, 4)
        embedding = MagnitudePreservingEmbedding if preserving else TwoTimeEmbedding
        self.times = embedding(
            size,
            num_features,
            max_frequency=max_frequency,
            two_times=two_times,
            key=time_key,
        )
        self.classes = self.guidance = self.vector = self.augmentation = None
        if args_size > 0:
            self.vector = VectorEmbedding(size, args_size, key=class_key)
        if num_classes > 0:
            # The last row is the null class.
            table = ForcedWeight(num_classes + 1, size, key=class_key)
            self.classes = table if preserving else table.value
        if guidance:
            linear = ForcedLinear if preserving else Linear
            self.guidance = linear(self.times.num_features, size, key=guidance_key)
        if augment_size > 0:
            self.augmentation = _Augmentation(
                augment_size, size, preserving, key=augment_key
            )
        self.num_classes = num_classes

    def __call__(self, s: Time, t: Time, args: Args) -> Float[Array, " size"]:
        scale = None
        if isinstance(args, GuidanceArgs) and self.guidance is not None:
            args, scale = args
        labels = None
        if isinstance(args, AugmentationArgs) and self.augmentation is not None:
            args, labels = args
        parts = [self.times(s, t)]
        dtype = parts[0].dtype
        if self.vector is not None:
            parts.append(self.vector(args, dtype))
        else:
            label = self._label(args)
            if isinstance(self.classes, ForcedWeight):
                parts.append(_row(self.classes(dtype), label))
            elif self.classes is not None:
                parts.append(_row(self.classes.astype(dtype), label))
        if self.guidance is not None:
            scale = 1.0 if scale is None else scale
            check_scalar(scale, "scale")
            scale = jnp.asarray(scale).astype(dtype)
            # Scales span several orders of magnitude, and may be zero.
            features = waves(jnp.log1p(scale), self.times.num_features)
            parts.append(self.guidance(features))
        total = sum(parts[1:], parts[0])
        if isinstance(self.times, MagnitudePreservingEmbedding):
            total = total / math.sqrt(len(parts))
        if labels is None or self.augmentation is None:
            return total
        return total + self.augmentation(labels.astype(dtype))

    def _label(self, args: Args) -> Integer[Array, ""]:
        if args is None:
            return jnp.asarray(self.num_classes)
        wrapped = isinstance(args, GuidanceArgs | AugmentationArgs)
        if self.num_classes == 0 or wrapped:
            raise ValueError(
                f"This network cannot take {_kind(args)} as `args`. For labels, make it "
                "with `num_classes`; for `GuidanceArgs`, with `guidance=True`; for "
                "`AugmentationArgs`, with `augment_size`."
            )
        is_scalar = eqx.is_array_like(args) and jnp.shape(args) == ()
        if not is_scalar or not jnp.issubdtype(jnp.result_type(args), jnp.integer):
            raise TypeError(
                f"`args` must be one label, an integer, or `None`; got {_kind(args)}. "
                "Pick it from a dictionary; for a batch of them, use `jax.vmap`."
            )
        # The number of classes stands for no class.
        check_between(args, 0, self.num_classes, "args")
        return jnp.asarray(args)


class _Augmentation(eqx.Module):
    """Embeds the labels of an augmentation; zero for labels that are zero."""

    weight: Linear | ForcedLinear
    gain: Float[Array, ""] | None

    def __init__(self, number: int, size: int, preserving: bool, *, key: Key[Array, ""]):
        if preserving:
            # These weights cannot start at zero, but their gain can.
            self.weight, self.gain = ForcedLinear(number, size, key=key), jnp.zeros(())
        else:
            self.weight, self.gain = Linear(number, size, bias=False, key=None), None

    def __call__(self, labels: Float[Array, " labels"]) -> Float[Array, " size"]:
        vector = self.weight(labels)
        return vector if self.gain is None else gained(vector, self.gain)


def _row(
    table: Float[Array, "classes size"], label: Integer[Array, ""]
) -> Float[Array, " size"]:
    # A traced label outside the table must not be clipped to the nearest class. With NaN,
    # training reports a loss that is not finite.
    label = jnp.where(label < 0, table.shape[0], label)
    return table.at[label].get(mode="fill", fill_value=jnp.nan)


def _kind(args: Args) -> str:
    if hasattr(args, "dtype") and hasattr(args, "shape"):
        return f"{args.dtype} of shape {args.shape}"
    return type(args).__name__
