import collections
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._check import check_callable
from .._io import import_extra
from .._tree import num_rows, rows_not_finite
from ..times._base import check_batch_size

# Batches on their way to the device besides those of the step.
_AHEAD = 2


# A function of row numbers.
_Read = Callable[[np.ndarray], PyTree[np.ndarray]]


_Source = _Read | PyTree[Array | np.ndarray]


def stream(
    source: _Source | Any,
    batch_size: int,
    *,
    size: int | None = None,
    seed: int = 0,
    start: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int = 4,
    prefetch: int = 8,
) -> Iterator[PyTree[np.ndarray]]:
    """Batches from the host without end, for sets that the device has no room for.

    Each epoch is a new order of all rows, and a batch may span two. Batch `k` is a
    function of `seed` and `k` alone: a run that is resumed at its step sees the same
    batches, on any number of processes.

    Needs grain: `pip install "flowdiffrax[train]"`. The iterator is one of grain's, whose
    threads read ahead; its `get_state` and `set_state` count from `start`.

    **Arguments:**

    - `source`: the set, one of these:

        - an array or a PyTree of arrays with a common leading axis, such as the states
          and parameters of trajectories. They may be memory maps (`numpy.memmap`), of
          which only the rows of a batch are read;
        - an object with such a PyTree as its `arrays`, for example
          [`flowdiffrax.images.Images`][]: images, and labels or `None`;
        - for any other file, a function of an array of row numbers that returns these
          rows, an array or a PyTree of arrays. It is called in several threads.
    - `batch_size`: rows a batch, over all processes.
    - `size`: the number of rows; for a function, which does not tell.
    - `seed`: of the orders, not negative.
    - `start`: the number of the first batch: the step at which a run is resumed.
    - `process_index`, `process_count`: which process this is, of how many; `None` for
      JAX's. Each gets consecutive rows of the batch, which it must divide.
    - `num_threads`, `prefetch`: how many threads read, and how many batches ahead.

    **Returns:** an iterator over batches of the same structure as the arrays. To train on
    a batch of images and labels, make it [`flowdiffrax.images.DeviceImages`][].

    **Raises:** `ImportError` without grain; `ValueError` for a batch size that the
    processes do not divide, settings that are too small, arrays without a common leading
    axis, or a function without `size`; `TypeError` for other sets; and when a batch is
    drawn, `ValueError` for rows that are not finite.
    """
    read, size = _reader(source, size)
    check_batch_size(batch_size)
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size % count != 0 or not 0 <= index < count:
        raise ValueError(
            f"A batch of {batch_size} does not divide among {count} processes, or "
            f"{index} is none of them."
        )
    if min(seed, start) < 0 or min(num_threads, prefetch) < 1:
        raise ValueError(
            "`seed` and `start` must not be negative, `num_threads` and `prefetch` at "
            f"least 1; got {seed}, {start}, {num_threads} and {prefetch}."
        )
    grain = import_extra("grain", "train", "stream")
    share = batch_size // count
    rows = slice(index * share, (index + 1) * share)
    batches = _Batches(read, size, batch_size, seed, start, rows)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _reader(source: Any, size: int | None) -> tuple[_Read, int]:
    """A function of row numbers, and how many rows there are."""
    source = getattr(source, "arrays", source)
    if callable(source):
        check_callable(source, "source", "source(rows)")
        if size is None or size < 1:
            raise ValueError(
                "A function of row numbers needs `size`, the number of rows, at least 1; "
                f"got {size}."
            )
        return lambda rows: _checked(source(rows), rows), size
    leaves = jtu.tree_leaves(source)
    if not leaves or not all(isinstance(leaf, Array | np.ndarray) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves})
        raise TypeError(
            f"A stream is of arrays or memory maps; got {kinds}. "
            "For other files, give a function of row numbers that reads them, and `size`."
        )
    size = num_rows(source, "What is streamed")
    # Of a device array, the rows would come from the device one by one.
    as_numpy = lambda leaf: leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    arrays = jtu.tree_map(as_numpy, source)
    take = lambda rows: jtu.tree_map(lambda leaf: np.asarray(leaf[rows]), arrays)
    return lambda rows: _checked(take(rows), rows), size


def _checked(batch: PyTree, rows: np.ndarray) -> PyTree[np.ndarray]:
    """**Raises:** `ValueError` for another number of rows, or for NaN or infinity."""
    if num_rows(batch, "A batch") != rows.size:
        raise ValueError(
            f"The function must return the {rows.size} rows that it is given; got "
            f"{num_rows(batch, 'A batch')}."
        )
    bad = rows_not_finite(batch)
    if bad.any():
        raise ValueError(
            f"What is streamed must be finite; {bad.sum()} of a batch of {rows.size} "
            f"rows are not, the first of them row {rows[bad.argmax()]}. Leave them out."
        )
    return batch


class _Batches:
    """All batches as a sequence that grain reads from, in any order and many threads.

    Grain could shuffle and collect single rows itself, at ten times the cost.
    """

    def __init__(
        self,
        read: _Read,
        size: int,
        batch_size: int,
        seed: int,
        start: int,
        rows: slice,
    ):
        self._read = read
        self._size = size
        self._batch_size = batch_size
        self._start = start
        self._rows = rows
        # A batch may span two epochs, and the threads several more of a small set.
        order = functools.partial(_order, seed, size)
        self._order = functools.lru_cache(maxsize=4)(order)

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> PyTree[np.ndarray]:
        first = (self._start + index) * self._batch_size
        positions = np.arange(first, first + self._batch_size)[self._rows]
        epochs, within = np.divmod(positions, self._size)
        rows = np.empty_like(positions)
        for epoch in range(epochs[0], epochs[-1] + 1):
            now = epochs == epoch
            rows[now] = self._order(epoch)[within[now]]
        return self._read(rows)


def _order(seed: int, num_rows: int, epoch: int) -> np.ndarray:
    # NumPy keeps the bits of its generators from version to version, but not what
    # `permutation` makes of them.
    bits = np.random.PCG64([seed, epoch]).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


class StreamBatches:
    """Batches of a stream, one for each step of [`flowdiffrax.train.fit`][].

    While a step runs, grain's threads read the next batches, and the next two are on
    their way to the device.

    ```python
    def make(batch):
        images = fd.images.DeviceImages(*batch, flip=True, draw=False)
        return fd.data.InterpolantBatches(fd.LinearInterpolant(), images, 256)

    batches = fd.data.StreamBatches(images, 256, make)
    ```

    Trajectories from a file, with their parameters:

    ```python
    pool = {"ys": np.load("ys.npy", mmap_mode="r"), "args": np.load("args.npy")}
    make = lambda rows: fd.data.TrajectoryBatches(
        ts, rows["ys"], 256, rows["args"], draw=False
    )
    batches = fd.data.StreamBatches(pool, 256, make)
    ```

    **Arguments:**

    - `source`: the set, as for [`flowdiffrax.data.stream`][].
    - `batch_size`: rows a batch, over all processes.
    - `make`: called with a batch of the stream, on the device. Returns the function of
      a key that draws paths and conditions. It must build the same functions each time:
      a lambda made inside would be compiled anew for each step.
    - `size`: as for [`flowdiffrax.data.stream`][].
    - `seed`: of the orders, not negative.
    - `num_threads`, `prefetch`: as for [`flowdiffrax.data.stream`][].

    **Raises:** `TypeError` if `make` cannot be called; and as
    [`flowdiffrax.data.stream`][], some of it when training begins.
    """

    def __init__(
        self,
        source: _Source | Any,
        batch_size: int,
        make: Callable[[Any], Callable],
        *,
        size: int | None = None,
        seed: int = 0,
        num_threads: int = 4,
        prefetch: int = 8,
    ):
        check_callable(make, "make", "make(source)", may_be_class=True)
        check_batch_size(batch_size)
        _reader(source, size)
        self._make = make
        self._stream = functools.partial(
            stream,
            source,
            batch_size,
            size=size,
            seed=seed,
            num_threads=num_threads,
            prefetch=prefetch,
        )

    def each_step(
        self, step: int, accumulate: int = 1, place: Callable[[Any], Any] = jax.device_put
    ) -> Iterator[Callable | tuple[Callable, ...]]:
        """What each step draws from, without end.

        **Arguments:**

        - `step`: the first step.
        - `accumulate`: batches a step; above 1, a tuple of as many.
        - `place`: puts the arrays of a batch on the devices.
        """

        batches = self._stream(start=step * accumulate)
        ahead = collections.deque()
        while True:
            while len(ahead) < _AHEAD + accumulate:
                ahead.append(self._make(place(next(batches))))
            now = tuple(ahead.popleft() for _ in range(accumulate))
            yield now[0] if accumulate == 1 else now
