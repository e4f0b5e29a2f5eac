import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._check import check_at_least, check_callable, check_count
from .._io import StrPath, write_whole
from .._tree import rows_not_finite
from ._batches import ConditionedPoints


class StoredTrajectories(NamedTuple):
    """A pool of trajectories in a folder, of which only the times are in memory.

    **Attributes:**

    - `ts`: the times, of shape `(times,)`.
    - `ys`: the states, a memory map of shape `(pool, times, ...)`.
    - `args`: the conditions, a memory map of shape `(pool, ...)`, or `None`.
    - `num_dropped`: how many trajectories were dropped because they were not finite.
    """

    ts: Float[np.ndarray, " times"]
    ys: Float[np.ndarray, "pool times ..."]
    args: np.ndarray | None
    num_dropped: int


def store_trajectories(
    folder: StrPath,
    teacher: Callable,
    draw: Callable,
    ts: Float[Array, " times"] | np.ndarray,
    num_trajectories: int,
    *,
    key: Key[Array, ""],
    chunk_size: int = 256,
    max_dropped: float = 0.2,
) -> StoredTrajectories:
    """Makes trajectories chunk by chunk and writes them to disk.

    Neither the device nor the host ever holds more than one chunk. Any teacher will do:

    ```python
    solve = functools.partial(
        fd.solve_trajectories, vector_field, args_per_example=True, throw=False
    )
    step = functools.partial(fd.paths.step_trajectories, etdrk4, args_per_example=True)
    pool = fd.data.store_trajectories("pool", solve, draw, ts, 100_000, key=key)
    ```

    Train on the result with [`flowdiffrax.data.StreamBatches`][]. Chunk `k` is a function
    of `key` and `k`. All chunks have the same size, so that nothing is compiled anew.

    **Arguments:**

    - `folder`: a folder that has no pool yet. It gets `ts.npy`, `ys.npy`, `args.npy` if
      there are conditions, and at last `pool.json`.
    - `teacher`: a function `(x0, ts, args) -> ys` that returns the states of a chunk, of
      shape `(chunk, times, ...)`.
    - `draw`: a function `(key, chunk_size) -> x0` that draws initial states, an array
      with the chunk's axis. It may also return
      [`flowdiffrax.data.ConditionedPoints`][], which are states with conditions.
    - `ts`: the times to save, of shape `(times,)`.
    - `num_trajectories`: the number of trajectories to store, at least 1.
    - `key`: a random key.
    - `chunk_size`: the number of trajectories at a time, at least 1.
    - `max_dropped`: how many may be dropped, as a share of `num_trajectories`. Rows that
      are not finite are dropped, and others are drawn in their place.

    **Returns:** the pool, as memory maps.

    **Raises:** `FileExistsError` if the folder has a pool; `TypeError` for functions that
    do not take the arguments above; `ValueError` for a teacher whose states do not have
    the shape above, if too many trajectories are dropped, or for a number that is too
    small.
    """
    check_callable(teacher, "teacher", "teacher(x0, ts, args)")
    check_callable(draw, "draw", "draw(key, chunk_size)")
    check_count(num_trajectories, 1, "num_trajectories")
    check_count(chunk_size, 1, "chunk_size")
    check_at_least(max_dropped, 0, "max_dropped")
    folder = pathlib.Path(folder)
    if (folder / "pool.json").exists():
        raise FileExistsError(
            f"{folder} has a pool already: read it with `data.load_trajectories`, or "
            "choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ts.npy", np.asarray(ts))
    files, done, chunk, dropped = {}, 0, 0, 0
    while done < num_trajectories:
        rows = _chunk(teacher, draw, ts, jr.fold_in(key, chunk), chunk_size)
        good = ~rows_not_finite(rows)
        dropped += int((~good).sum())
        if dropped > max_dropped * num_trajectories:
            raise ValueError(
                f"{dropped} of {(chunk + 1) * chunk_size} trajectories are not finite, "
                f"more than `max_dropped={max_dropped}` of those to store. Look for a "
                "blow-up within the interval, shorten it, or take smaller steps."
            )
        for name, values in rows.items():
            kept = values[good][: num_trajectories - done]
            if chunk == 0:
                shape = (num_trajectories, *values.shape[1:])
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", values.dtype, shape
                )
            files[name][done : done + len(kept)] = kept
        done, chunk = done + int(good.sum()), chunk + 1
    for file in files.values():
        file.flush()
    facts = {"num_dropped": dropped, "has_args": "args" in files}
    write_whole(folder / "pool.json", json.dumps(facts).encode())
    return load_trajectories(folder)


def load_trajectories(folder: StrPath) -> StoredTrajectories:
    """Opens what [`flowdiffrax.data.store_trajectories`][] has written.

    **Arguments:**

    - `folder`: the folder.

    **Returns:** the pool, as memory maps.

    **Raises:** `FileNotFoundError` if the folder has no complete pool.
    """
    folder = pathlib.Path(folder)
    if not (folder / "pool.json").exists():
        raise FileNotFoundError(
            f"{folder} has no complete pool. `data.store_trajectories` writes one; if it "
            "was interrupted, run it again."
        )
    facts = json.loads((folder / "pool.json").read_text())
    read = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
    args = read("args") if facts["has_args"] else None
    return StoredTrajectories(
        np.load(folder / "ts.npy"), read("ys"), args, facts["num_dropped"]
    )


def _chunk(teacher, draw, ts, key, size) -> dict[str, np.ndarray]:
    drawn = draw(key, size)
    has_args = isinstance(drawn, ConditionedPoints)
    x0, args = drawn if has_args else (drawn, None)
    ys = np.asarray(teacher(x0, ts, args))
    expected = (size, len(ts), *np.shape(x0)[1:])
    if ys.shape != expected:
        raise ValueError(
            f"`teacher(x0, ts, args)` must return states of shape {expected}, (chunk, "
            f"times, ...); got {ys.shape}."
        )
    return {"ys": ys} if args is None else {"ys": ys, "args": np.asarray(args)}
