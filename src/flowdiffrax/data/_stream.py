import collections
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._check import check_callable, check_count, check_instance
from .._io import import_extra
from .._tree import num_rows
from ..times._base import check_batch_size
from ._batches import check_finite

# The number of batches in transfer to the device, in addition to those of the step.
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
    """Streams batches from the host without end, for data that do not fit on the device.

    Each epoch visits all rows in a new random order, and a batch may span two epochs.
    Batch `k` depends only on `seed` and `k`, so a run that resumes at its step sees the
    same batches, on any number of processes.

    Needs grain: `pip install "flowdiffrax[train]"`. The returned iterator belongs to
    grain, whose threads read ahead. Its `get_state` and `set_state` count from `start`.

    **Arguments:**

    - `source`: the data set, one of these:

        - an array or a PyTree of arrays with a common leading axis, such as the states
          and parameters of trajectories. They may be memory maps (`numpy.memmap`), of
          which only the rows of a batch are read;
        - an object with such a PyTree as its attribute `arrays`, for example
          [`flowdiffrax.images.Images`][]: images, and labels or `None`;
        - for any other file, a function that takes an array of row numbers and returns
          these rows, as an array or a PyTree of arrays. It is called from several
          threads.
    - `batch_size`: the number of rows per batch, over all processes.
    - `size`: the number of rows, needed only if `source` is a function.
    - `seed`: the seed of the row orders, not negative.
    - `start`: the number of the first batch: the step at which a run resumes.
    - `process_index`, `process_count`: the index of this process, and the number of
      processes; `None` for JAX's. Each process gets consecutive rows of the batch. The
      number of processes must divide the batch size.
    - `num_threads`, `prefetch`: how many threads read, and how many batches ahead.

    **Returns:** an iterator over batches with the structure of the arrays. To train on
    a batch of images and labels, convert it to [`flowdiffrax.images.DeviceImages`][].

    **Raises:** `ImportError` if grain is not installed; `ValueError` for a batch size
    that the number of processes does not divide, a negative seed, arrays without a common
    leading axis, or a function without `size`; `TypeError` for any other source. When a
    batch is drawn, `ValueError` for rows that are not finite.
    """
    read, size = _reader(source, size)
    check_batch_size(batch_size)
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size % count != 0 or not 0 <= index < count:
        raise ValueError(
            f"A batch of {batch_size} has no equal share for process {index} of {count}."
        )
    check_count(seed, 0, "seed")
    grain = import_extra("grain", "train", "stream")
    share = batch_size // count
    rows = slice(index * share, (index + 1) * share)
    batches = _Batches(read, size, batch_size, seed, start, rows)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _reader(source: Any, size: int | None) -> tuple[_Read, int]:
    """Returns a function of row numbers, and the number of rows."""
    source = getattr(source, "arrays", source)
    if callable(source):
        check_callable(source, "source", "source(rows)")
        if size is None:
            raise ValueError("A function needs `size`, the number of rows.")
        check_count(size, 1, "size")
        return lambda rows: _checked(source(rows), rows), size
    what = "arrays, memory maps, or a function of row numbers with `size`"
    for leaf in jtu.tree_leaves(source):
        check_instance(leaf, Array | np.ndarray, "source", what)
    size = num_rows(source, "What is streamed")
    # Copy a device array: otherwise its rows would be fetched from the device in turn.
    as_numpy = lambda leaf: leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
    arrays = jtu.tree_map(as_numpy, source)
    take = lambda rows: jtu.tree_map(lambda leaf: np.asarray(leaf[rows]), arrays)
    return lambda rows: _checked(take(rows), rows), size


def _checked(batch: PyTree, rows: np.ndarray) -> PyTree[np.ndarray]:
    """**Raises:** `ValueError` for another number of rows, or for NaN or infinity."""
    if num_rows(batch, "A batch") != rows.size:
        raise ValueError(f"The function must return the {rows.size} rows it is given.")
    check_finite(batch, "Streamed rows", rows)
    return batch


class _Batches:
    """The sequence of all batches, which grain reads in any order, from many threads.

    Grain could shuffle and collate single rows itself, but at ten times the cost.
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
        # A batch may span two epochs. If the set is small, the threads span several more.
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
    # NumPy guarantees the raw bits of its generators across versions, but not the result
    # of `permutation`.
    bits = np.random.PCG64([seed, epoch]).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


class StreamBatches:
    """Batches of a stream, one for each step of [`flowdiffrax.train.fit`][].

    While a step runs, grain's threads read the next batches, and the next two are being
    transferred to the device.

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

    - `source`: the data set, as for [`flowdiffrax.data.stream`][].
    - `batch_size`: the number of rows per batch, over all processes.
    - `make`: a function that takes a batch of the stream, on the device, and returns the
      function of a key that draws paths and conditions. Functions inside its result must
      be the same objects each time: a lambda created inside `make` would be recompiled
      at each step.
    - `size`: as for [`flowdiffrax.data.stream`][].
    - `seed`: the seed of the row orders, not negative.
    - `num_threads`, `prefetch`: as for [`flowdiffrax.data.stream`][].

    **Raises:** `TypeError` if `make` is not callable; otherwise as
    [`flowdiffrax.data.stream`][], partly when training begins.
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
        """Yields the function that each step draws from, without end.

        **Arguments:**

        - `step`: the first step.
        - `accumulate`: the number of batches per step. If it is above 1, each step gets
          a tuple of this many functions.
        - `place`: a function that moves the arrays of a batch to the devices.
        """

        batches = self._stream(start=step * accumulate)
        ahead = collections.deque()
        while True:
            while len(ahead) < _AHEAD + accumulate:
                ahead.append(self._make(place(next(batches))))
            now = tuple(ahead.popleft() for _ in range(accumulate))
            yield now[0] if accumulate == 1 else now
