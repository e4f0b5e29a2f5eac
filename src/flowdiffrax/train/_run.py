import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._check import check_count
from .._io import as_folder, write_whole
from ._checkpoints import Checkpoints
from ._json import differences
from ._lock import FolderLock
from ._metrics_file import MetricsFile
from ._profile import Profile
from ._step import TrainState


class Run:
    """The folder of a run, with its checkpoints and metrics.

    Pass it to [`flowdiffrax.train.fit`][]. However the run ends, the same call resumes
    from the newest checkpoint. On the same device, it reaches the same weights, bit for
    bit. The folder contains:

    - `config.json`: the configuration, and the version of this library.
    - `metrics.jsonl`: one line of JSON for each report. When a run resumes, the lines of
      steps that it will repeat are removed first, so each step appears once.
    - `checkpoints/<step>`: a checkpoint, either complete or absent. Orbax writes it in
      the background, from any number of devices and processes, which must share the
      folder.
    - `profile`: the trace of `jax.profiler`.

    Needs orbax: `pip install "flowdiffrax[train]"`.

    **Arguments:**

    - `folder`: the folder of the run, created if missing.
    - `config`: a description of the run that can be stored as JSON. A folder with another
      configuration is refused.
    - `save_every`: the minimum number of steps between checkpoints. They are written at
      reports, when a run ends, and when it is stopped or an error ends it.
    - `newest`: how many of the newest checkpoints to keep, at least 1.
    - `best`: how many of the best checkpoints to keep in addition.
    - `best_by`: the number in the report that ranks checkpoints; the smallest is the
      best. The loss is the loss of one batch only, so a distance between samples is a
      better choice.
    - `profile`: a pair `(start, stop)`. `jax.profiler` starts tracing after `start` of
      the steps made in this call, and stops after `stop` of them.

    **Raises:** `ImportError` if orbax is not installed; `ValueError` for numbers that are
    too small, NaN in the configuration, a folder with another configuration, or a file in
    its place; `TypeError` for numbers that are not whole, or if the configuration cannot
    be stored as JSON; `OSError` if the folder cannot be created.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: Any = None,
        *,
        save_every: int = 1000,
        newest: int = 2,
        best: int = 1,
        best_by: str = "loss",
        profile: tuple[int, int] | None = None,
    ):
        check_count(save_every, 1, "save_every")
        check_count(newest, 1, "newest")
        check_count(best, 0, "best")
        self.folder = as_folder(folder).absolute()
        self.config = json.loads(json.dumps(config, allow_nan=False))
        self.save_every = save_every
        self._checkpoints = Checkpoints(self.folder, newest, best, best_by)
        self._metrics = MetricsFile(self.folder / "metrics.jsonl")
        self._profile = Profile(self.folder / "profile", profile)
        self._lock = FolderLock(self.folder)
        self._asked = 0
        self._check_folder()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, in order."""
        return self._checkpoints.steps

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint; `None` if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; `None` if there are no checkpoints.

        **Raises:** `ValueError` if no checkpoint has the number that `best_by` names.
        """
        return self._checkpoints.best_step

    def metrics(self) -> list[dict[str, Any]]:
        """All reports so far, in order.

        **Raises:** `ValueError` if a line is not a report. The last line is exempt, since
        it may be incomplete if the run was interrupted.
        """
        return self._metrics.read()

    def resume(self, state: TrainState) -> TrainState:
        """Returns the state of the newest checkpoint, or `state` if there is none.

        It removes the reports after that checkpoint, and locks the folder against other
        processes until `close`.

        **Arguments:**

        - `state`: the state that the run began with. It determines the devices on which
          arrays are placed.

        **Raises:** as `restore`; and `ValueError` if the root key differs, the
        checkpoints end before the step of `state`, or another process is training in the
        folder.
        """
        if jax.process_index() == 0:
            self._lock.acquire()
        step = self.newest_step
        if step is not None and step < int(state.step):
            raise ValueError(
                f"The checkpoints in {self.folder} end at step {step}, before step "
                f"{int(state.step)} of the state that was given, so they belong to "
                "another run. Use another folder."
            )
        resumed = state if step is None else self.restore(state, step)
        impl = str(state.key_impl)
        same = step is None or self._checkpoints.about(step)["key_impl"] == impl
        if not (same and np.array_equal(resumed.key_data, state.key_data)):
            raise ValueError(
                f"The run in {self.folder} began with another root key: "
                f"{np.asarray(resumed.key_data)}, not {np.asarray(state.key_data)} of "
                f"{impl}. "
                "Resume it with the same key, or start a new run in another folder."
            )
        self._asked = int(resumed.step)
        if jax.process_index() == 0:
            self._checkpoints.remove_leftovers()
            self._metrics.cut_after(self._asked)
        return resumed

    def restore(self, like: PyTree, step: int | None = None) -> PyTree:
        """Returns the state of a checkpoint.

        **Arguments:**

        - `like`: a state of the same structure. Its arrays are replaced by the saved
          ones, on the same devices. Use `equinox.filter_eval_shape` to build it without
          allocating memory.
        - `step`: the step of the checkpoint; `None` for the newest.

        **Raises:** `FileNotFoundError` if there is no such checkpoint; `ValueError` if it
        is damaged, was written by a newer version of this library, or belongs to another
        model or optimiser.
        """
        step = self.newest_step if step is None else step
        if step is None:
            raise FileNotFoundError(f"{self.folder} has no checkpoint yet.")
        return self._checkpoints.restore(like, step)

    def save(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background, unless the step already has one.

        **Arguments:**

        - `state`: the state to save.
        - `report`: the numbers of its report. It need not have the entry `best_by`.

        **Raises:** `OSError` if this checkpoint or the previous one could not be written;
        `ValueError` if the entry `best_by` is not a number; `TypeError` if the report
        cannot be stored as JSON.
        """
        self._checkpoints.save(state, report)

    def is_due(self, step: int) -> bool:
        """Whether a multiple of `save_every` was passed since the last time asked."""
        before, self._asked = self._asked, step
        return step // self.save_every > before // self.save_every

    def log(self, report: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`. Numbers that are not finite become `null`.

        **Raises:** `TypeError` if the report cannot be stored as JSON.
        """
        if jax.process_index() == 0:
            self._metrics.append(report)

    def profile_at(self, made: int, state: PyTree) -> None:
        """Starts or stops the profiler, if this is the step to do so.

        **Arguments:**

        - `made`: how many steps have been made in this call.
        - `state`: the training state. Stopping waits until it is computed.
        """
        self._profile.at(made, state)

    def wait(self) -> None:
        """Waits until the last checkpoint is complete, and deletes old checkpoints.

        **Raises:** `OSError` if it could not be written.
        """
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits for the last checkpoint, ends the threads, and unlocks the folder."""
        try:
            self._profile.end()
            self._checkpoints.close()
        finally:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_folder(self) -> None:
        path = self.folder / "config.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text())["config"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} cannot be read: {error!r}. Restore the file, or use another "
                    "folder."
                ) from error
            if found != self.config:
                raise ValueError(
                    f"{self.folder} has a run with another configuration: "
                    f"{differences(found, self.config)}. Use another folder."
                )
        elif jax.process_index() == 0:
            version = importlib.metadata.version("flowdiffrax")
            about = {"flowdiffrax": version, "config": self.config}
            write_whole(path, (json.dumps(about, indent=2) + "\n").encode())
