"""The trace of a few steps of training."""

import pathlib

import equinox as eqx
import jax
from jaxtyping import PyTree


class Profile:
    """Traces the steps from the first to the second number of `steps`, if there are."""

    def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None):
        if steps is not None and not (len(steps) == 2 and 0 <= steps[0] < steps[1]):
            raise ValueError(
                "`profile` must be two numbers of steps, the first not negative and "
                f"smaller than the second; got {steps}."
            )
        self._folder = folder
        self._first, self._last = steps or (None, None)
        self._is_running = False

    def at(self, made: int, state: PyTree) -> None:
        if made == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True
        elif made == self._last and self._is_running:
            jax.block_until_ready(eqx.filter(state, eqx.is_array))
            self.end()

    def end(self) -> None:
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
