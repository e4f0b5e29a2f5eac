"""The conditioning of image networks: two times, a class label and a guidance scale."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Integer, Key

from .._tree import is_concrete
from .._types import Args, GuidanceArgs, Time
from ._embedding import MagnitudePreservingEmbedding, TwoTimeEmbedding, waves
from ._layers import Linear
from ._magnitude import ForcedLinear, ForcedWeight


class Condition(eqx.Module):
    """Embeds both times and `args` in one vector, in the precision of the times.

    The vector is the sum of the embeddings of the inputs.

    **Arguments:**

    - `size`, `num_features`, `two_times`, `max_frequency`: the settings of the time
      embedding. The number of features is rounded up to an even one.
    - `num_classes`: the number of classes; 0 for none.
    - `guidance`: whether the guidance scale is an input.
    - `preserving`: whether all layers preserve magnitudes.
    """

    times: TwoTimeEmbedding | MagnitudePreservingEmbedding
    classes: Float[Array, "classes size"] | ForcedWeight | None
    guidance: Linear | ForcedLinear | None
    num_classes: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        num_features: int,
        num_classes: int,
        guidance: bool,
        two_times: bool,
        max_frequency: float,
        *,
        preserving: bool = False,
        key: Key[Array, ""],
    ):
        if num_classes < 0:
            raise ValueError(f"`num_classes` must not be negative; got {num_classes}.")
        time_key, class_key, guidance_key = jr.split(key, 3)
        embedding = MagnitudePreservingEmbedding if preserving else TwoTimeEmbedding
        self.times = embedding(
            size,
            num_features + num_features % 2,
            max_frequency=max_frequency,
            two_times=two_times,
            key=time_key,
        )
        self.classes = self.guidance = None
        if num_classes > 0:
            # The last row is the null class.
            table = ForcedWeight(num_classes + 1, size, key=class_key)
            self.classes = table if preserving else table.value
        if guidance:
            linear = ForcedLinear if preserving else Linear
            self.guidance = linear(self.times.num_features, size, key=guidance_key)
        self.num_classes = num_classes

    def __call__(self, s: Time, t: Time, args: Args) -> Float[Array, " size"]:
        scale = None
        if isinstance(args, GuidanceArgs):
            if self.guidance is None:
                raise TypeError(
                    "This network does not take a guidance scale; got `GuidanceArgs`. "
                    "Make it with `guidance=True`, or pass the condition alone."
                )
            args, scale = args
        label = self._label(args)
        parts = [self.times(s, t)]
        dtype = parts[0].dtype
        if isinstance(self.classes, ForcedWeight):
            parts.append(_row(self.classes(dtype), label))
        elif self.classes is not None:
            parts.append(_row(self.classes.astype(dtype), label))
        if self.guidance is not None:
            scale = _scalar(1.0 if scale is None else scale, dtype)
            # Scales span several orders of magnitude, and may be zero.
            features = waves(jnp.log1p(scale), self.times.num_features)
            parts.append(self.guidance(features))
        total = sum(parts[1:], parts[0])
        if isinstance(self.times, MagnitudePreservingEmbedding):
            return total / math.sqrt(len(parts))
        return total

    def _label(self, args: Args) -> Integer[Array, ""]:
        if args is None:
            return jnp.asarray(self.num_classes)
        if self.num_classes == 0:
            raise ValueError(
                "This network was made without classes, so `args` must be `None`; got "
                f"{_kind(args)}. Make it with `num_classes`, or pass `None`."
            )
        is_label = eqx.is_array_like(args) and jnp.issubdtype(
            jnp.result_type(args), jnp.integer
        )
        if not is_label:
            raise TypeError(
                f"`args` must be a label, an integer from 0 to {self.num_classes} (which "
                f"stands for no class), or `None`; got {_kind(args)}. Convert labels "
                "with `.astype(int)`. From a dictionary, pick the label: "
                "`FlowMap(lambda s, t, x, args: net(s, t, x, args['label']))`."
            )
        if jnp.shape(args) != ():
            raise ValueError(
                f"`args` must be one label; got {_kind(args)}. For a batch, use "
                "`jax.vmap`."
            )
        if is_concrete(args) and not 0 <= int(args) <= self.num_classes:
            raise ValueError(
                f"Labels go from 0 to {self.num_classes}, which stands for no class; got "
                f"{args}."
            )
        return jnp.asarray(args)


def _row(
    table: Float[Array, "classes size"], label: Integer[Array, ""]
) -> Float[Array, " size"]:
    # A traced label outside the table must not be clipped to the nearest class. With NaN,
    # training reports a loss that is not finite.
    label = jnp.where(label < 0, table.shape[0], label)
    return table.at[label].get(mode="fill", fill_value=jnp.nan)


def _scalar(scale: Any, dtype: jnp.dtype) -> Float[Array, ""]:
    if jnp.shape(scale) != ():
        raise ValueError(
            f"The guidance scale must be one number; got shape {jnp.shape(scale)}. For a "
            "batch, use `jax.vmap`."
        )
    return jnp.asarray(scale).astype(dtype)


def _kind(args: Args) -> str:
    if hasattr(args, "dtype") and hasattr(args, "shape"):
        return f"{args.dtype} of shape {args.shape}"
    return type(args).__name__
