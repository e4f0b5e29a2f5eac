import collections
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from .._misc import check_callable
from .._times import check_batch_size
from ._device import DeviceImages
from ._files import import_extra
from ._images import Images

# Batches on their way to the device besides those of the step.
_AHEAD = 2


def stream(
    images: Images,
    batch_size: int,
    *,
    seed: int = 0,
    start: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int = 4,
    prefetch: int = 8,
) -> Iterator[
    tuple[
        UInt8[np.ndarray, "batch height width channels"],
        Int32[np.ndarray, " batch"] | None,
    ]
]:
    """Batches from the host without end, for sets that the device has no room for.

    Each epoch is a new order of all images, and a batch may span two. Batch `k` is a
    function of `seed` and `k` alone: a run that is resumed at its step sees the same
    batches, on any number of processes.

    Needs grain: `pip install "flowdiffrax[train]"`. The iterator is one of grain's, whose
    threads read ahead; its `get_state` and `set_state` count from `start`.

    **Arguments:**

    - `images`: the set, for example one that [`flowdiffrax.data.load_images`][] maps
      into memory.
    - `batch_size`: images a batch, over all processes.
    - `seed`: of the orders, not negative.
    - `start`: the number of the first batch: the step at which a run is resumed.
    - `process_index`, `process_count`: which process this is, of how many; `None` for
      JAX's. Each gets consecutive rows of the batch, which it must divide.
    - `num_threads`, `prefetch`: how many threads read, and how many batches ahead.

    **Returns:** an iterator of pairs: a batch of images, and their labels or `None`. See
    [`flowdiffrax.data.DeviceImages`][] for how to train with them.

    **Raises:** `ImportError` without grain, and `ValueError` for a batch size that the
    processes do not divide, or settings that are too small.
    """
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
    batches = _Batches(images, batch_size, seed, start, rows)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


class _Batches:
    """All batches as a sequence that grain reads from, in any order and many threads.

    Grain could shuffle and collect single rows itself, at ten times the cost.
    """

    def __init__(
        self, images: Images, batch_size: int, seed: int, start: int, rows: slice
    ):
        self._images = images
        self._batch_size = batch_size
        self._start = start
        self._rows = rows
        # A batch may span two epochs, and the threads several more of a small set.
        order = functools.partial(_order, seed, len(images))
        self._order = functools.lru_cache(maxsize=4)(order)

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        first = (self._start + index) * self._batch_size
        positions = np.arange(first, first + self._batch_size)[self._rows]
        epochs, within = np.divmod(positions, len(self._images))
        rows = np.empty_like(positions)
        for epoch in range(epochs[0], epochs[-1] + 1):
            now = epochs == epoch
            rows[now] = self._order(epoch)[within[now]]
        batch = self._images.images[rows]
        labels = self._images.labels
        return batch, None if labels is None else labels[rows]


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
    make = lambda source: fd.data.InterpolantBatches(fd.LinearInterpolant(), source, 256)
    batches = fd.data.StreamBatches(images, 256, make, flip=True)
    ```

    **Arguments:**

    - `images`: the set, as for [`flowdiffrax.data.stream`][].
    - `batch_size`: images a batch, over all processes.
    - `make`: called with the [`flowdiffrax.data.DeviceImages`][] of a batch, returns the
      function of a key that draws paths and conditions. It must build the same
      functions each time: a lambda made inside would be compiled anew for each step.
    - `seed`: of the orders, not negative.
    - `flip`: as for [`flowdiffrax.data.DeviceImages`][].
    - `num_threads`, `prefetch`: as for [`flowdiffrax.data.stream`][].

    **Raises:** `ValueError` for a batch size below 1, `TypeError` for what are no images
    or if `make` cannot be called; and as [`flowdiffrax.data.stream`][], when training
    begins.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        make: Callable[[DeviceImages], Callable],
        *,
        seed: int = 0,
        flip: bool = False,
        num_threads: int = 4,
        prefetch: int = 8,
    ):
        check_callable(make, "make", "make(source)", may_be_class=True)
        check_batch_size(batch_size)
        if not isinstance(images, Images):
            raise TypeError(
                "`images` must be `Images`, as a loader returns them; got "
                f"{type(images).__name__}. Of an array: `Images(array, labels)`."
            )
        self._make = make
        self._flip = flip
        self._stream = functools.partial(
            stream,
            images,
            batch_size,
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

        def load():
            images, labels = next(batches)
            source = DeviceImages(*place((images, labels)), flip=self._flip, draw=False)
            return self._make(source)

        batches = self._stream(start=step * accumulate)
        ahead = collections.deque()
        while True:
            while len(ahead) < _AHEAD + accumulate:
                ahead.append(load())
            now = tuple(ahead.popleft() for _ in range(accumulate))
            yield now[0] if accumulate == 1 else now
