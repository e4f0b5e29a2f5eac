import os
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import export

from .._check import check_count
from .._io import write_whole
from .._tree import nan_where
from .._types import Args, State
from ..flow_maps._base import AbstractFlowMap, times_out_of_range


def export_jump(
    flow_map: AbstractFlowMap,
    x: State,
    args: Args = None,
    *,
    batch_size: int,
    path: str | os.PathLike,
) -> None:
    """Writes a jump of a batch as a compiled function, for programs without this library.

    The file holds the weights as well. A program needs only JAX and `flatbuffers` to call
    it. States are NaN if a time is outside the map's `time_range`.

    ```python
    jump = jax.jit(jax.export.deserialize(open("jump.bin", "rb").read()).call)
    states = jump(0.0, 1.0, states, args)  # args only if `args` was given
    ```

    Without `jax.jit`, a call takes several times longer.

    **Arguments:**

    - `flow_map`: the map.
    - `x`: an example of one state, for its shapes and dtypes.
    - `args`: an example of one `args`, if they vary between states; `None` if not.
    - `batch_size`: the number of states in each call, at least 1.
    - `path`: the file to write.

    **Raises:** `ValueError` if `batch_size` is below 1.
    """
    check_count(batch_size, 1, "batch_size")
    as_batch = lambda leaf: jax.ShapeDtypeStruct(
        (batch_size, *jnp.shape(leaf)), jnp.result_type(leaf)
    )
    time = jax.ShapeDtypeStruct((), jnp.result_type(float))
    batches = jtu.tree_map(as_batch, (x,) if args is None else (x, args))
    # Equinox modules may hold functions, which are no arguments of a compiled function.
    flow_map = eqx.tree_inference(flow_map, True)

    def jump(s: Any, t: Any, *batch: Any) -> Any:
        ends = jax.vmap(lambda *one: flow_map(s, t, *one))(*batch)
        outside = times_out_of_range(flow_map, s, t)
        return ends if outside is None else nan_where(outside, ends)

    exported = export.export(jax.jit(jump))(time, time, *batches)
    write_whole(pathlib.Path(path), bytes(exported.serialize()))
