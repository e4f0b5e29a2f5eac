import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequests:
    """Records SIGTERM and Ctrl-C, so that a run stops between two steps.

    With several processes, all must stop at the same step: JAX's own service passes on a
    SIGTERM to all of them, and Ctrl-C ends the process at once.
    """

    def __init__(self, active: bool = True):
        self._active = active
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopRequests":
        # In Python, only the main thread can handle signals.
        main = threading.current_thread() is threading.main_thread()
        if self._active and self._alone and main:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # The signal may have come while the last checkpoint was being written.
        if kind is None and self._received is not None:
            self.stop()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == number:
            raise KeyboardInterrupt
        self._received = number
        if number == signal.SIGINT:
            print(
                "\nSaving after this step; Ctrl-C again to stop at once.", file=sys.stderr
            )

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def stops(self, step: int) -> bool:
        """Whether the run must stop after this step."""
        if not self._active:
            return False
        if self._alone:
            return self._received is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def stop(self) -> None:
        """Ends the program as the signal requests."""
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
