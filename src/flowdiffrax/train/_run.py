import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._io import import_extra, write_whole
from ._json import differences, plain
from ._leaves import by_name, describe, impl, random_keys, read_sums, without_keys
from ._step import TrainState

_FORMAT = 1


_ABOUT = "about.json"


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
    too small, NaN in the configuration, or a folder with another configuration;
    `TypeError` if the configuration cannot be stored as JSON; `OSError` if the folder
    cannot be created.
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
        if min(save_every, newest) < 1 or best < 0:
            raise ValueError(
                "`save_every` and `newest` must be at least 1, `best` not negative; got "
                f"{save_every}, {newest} and {best}."
            )
        if profile is not None and not (
            len(profile) == 2 and 0 <= profile[0] < profile[1]
        ):
            raise ValueError(
                "`profile` must be two numbers of steps, the first not negative and "
                f"smaller than the second; got {profile}."
            )
        self._ocp = import_extra("orbax.checkpoint", "train", "Run")
        self.folder = pathlib.Path(folder).absolute()
        self.config = json.loads(json.dumps(config, allow_nan=False))
        self.save_every = save_every
        self.newest = newest
        self.best = best
        self.best_by = best_by
        self.profile = profile
        self._opened: Any = None
        self._lock: Any = None
        self._profiling = False
        self._looked = 0
        self._check_folder()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, in order."""
        names = [path.name for path in self._checkpoints.glob("*") if path.is_dir()]
        # Checkpoints that are being written or deleted have other names.
        return tuple(sorted(int(name) for name in names if name.isdigit()))

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint; `None` if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; `None` if there are no checkpoints.

        **Raises:** `ValueError` if no checkpoint has the number that `best_by` names.
        """
        best = self._from_the_best()
        if self.steps and not best:
            raise ValueError(
                f"No checkpoint in {self.folder} has a number {self.best_by!r} in its "
                f"report; the newest has {sorted(self._about(self.steps[-1])['report'])}."
            )
        return next(iter(best), None)

    def metrics(self) -> list[dict[str, Any]]:
        """All reports so far, in order.

        **Raises:** `ValueError` if a line is not a report. The last line is exempt, since
        it may be incomplete if the run was interrupted.
        """
        if not self._metrics.is_file():
            return []
        lines, reports = self._metrics.read_text().split("\n"), []
        for number, line in enumerate(lines, 1):
            try:
                reports += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(
                        f"Line {number} of {self._metrics} is not a report: {error}. "
                        "Remove it to continue."
                    ) from error
        return reports

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
        self._keep_others_out()
        step = self.newest_step
        if step is not None and step < int(state.step):
            raise ValueError(
                f"The checkpoints in {self.folder} end at step {step}, before step "
                f"{int(state.step)} of the state that was given, so they belong to "
                "another run. Use another folder."
            )
        resumed = state if step is None else self.restore(state, step)
        impl = str(state.key_impl)
        same = step is None or self._about(step)["key_impl"] == impl
        if not (same and np.array_equal(resumed.key_data, state.key_data)):
            raise ValueError(
                f"The run in {self.folder} began with another root key: "
                f"{np.asarray(resumed.key_data)}, not {np.asarray(state.key_data)} of "
                f"{impl}. "
                "Resume it with the same key, or start a new run in another folder."
            )
        self._looked = int(resumed.step)
        if jax.process_index() == 0:
            self._clean(self._looked)
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
        if step not in self.steps:
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint of step {step}; there are "
                f"{list(self.steps)}."
            )
        about = self._about(step)
        arrays, numbers = by_name(like)
        self._check_leaves(step, about["leaves"], describe(arrays, numbers))
        # Do not use the saved devices: this machine may have others.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda leaf: getattr(leaf, "sharding", None) or here
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))
            for name, leaf in without_keys(arrays).items()
        }
        args = self._ocp.args
        try:
            found = self._checkpointer.restore(
                self._checkpoints / str(step),
                args=args.Composite(state=args.StandardRestore(wanted)),
            ).state
        # Orbax and TensorStore raise errors of many types.
        except Exception as error:
            raise self._damaged(step, error) from error
        sums = read_sums(found)
        wrong = [name for name, value in about["sums"].items() if sums[name] != value]
        if wrong:
            raise self._damaged(step, f"checksums differ in {wrong[:3]}")
        for name in random_keys(arrays):
            found[name] = jr.wrap_key_data(found[name], impl=impl(arrays[name]))
        put = lambda path, leaf: found.get(jtu.keystr(path), leaf)
        return jtu.tree_map_with_path(put, like)

    def save(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background, unless the step already has one.

        **Arguments:**

        - `state`: the state to save.
        - `report`: the numbers of its report. It need not have the entry `best_by`.

        **Raises:** `OSError` if this checkpoint or the previous one could not be written;
        `ValueError` if the entry `best_by` is not a number; `TypeError` if the report
        cannot be stored as JSON.
        """
        step = int(state.step)
        # The previous checkpoint must be complete first.
        self.wait()
        if step in self.steps:
            return
        report = plain(report, "report")
        if not isinstance(report.get(self.best_by), float | int | None):
            raise ValueError(
                f"`best_by` must name a number; {self.best_by!r} is "
                f"{report[self.best_by]!r} in the report."
            )
        arrays, numbers = by_name(state)
        leaves = describe(arrays, numbers)
        # A copy: the next step reuses the memory while Orbax still reads.
        arrays = jtu.tree_map(jnp.array, without_keys(arrays))
        about = {
            "format": _FORMAT,
            "version": importlib.metadata.version("flowdiffrax"),
            "key_impl": str(state.key_impl),
            "leaves": leaves,
            "sums": read_sums(arrays),
            "report": report,
        }
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(arrays), about=args.JsonSave(about)
        )
        try:
            self._checkpointer.save(self._checkpoints / str(step), args=items)
        except Exception as error:
            raise self._not_written(step, error) from error

    def is_due(self, step: int) -> bool:
        """Whether a multiple of `save_every` was passed since the last time asked."""
        before, self._looked = self._looked, step
        return step // self.save_every > before // self.save_every

    def log(self, report: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`. Numbers that are not finite become `null`.

        **Raises:** `TypeError` if the report cannot be stored as JSON.
        """
        if jax.process_index() == 0:
            with open(self._metrics, "a") as file:
                file.write(json.dumps(plain(report, "report")) + "\n")

    def profile_at(self, made: int, state: PyTree) -> None:
        """Starts or stops the profiler, if this is the step to do so.

        **Arguments:**

        - `made`: how many steps have been made in this call.
        - `state`: the training state. Stopping waits until it is computed.
        """
        first, last = self.profile or (None, None)
        if made == first:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self._profiling = True
        elif made == last and self._profiling:
            jax.block_until_ready(eqx.filter(state, eqx.is_array))
            self._end_profile()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete, and deletes old checkpoints.

        **Raises:** `OSError` if it could not be written.
        """
        if self._opened is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            self._opened = None
            raise self._not_written(None, error) from error
        self._delete_old()

    def close(self) -> None:
        """Waits for the last checkpoint, ends the threads, and unlocks the folder."""
        try:
            self._end_profile()
            self.wait()
        finally:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _end_profile(self) -> None:
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()

    @property
    def _metrics(self) -> pathlib.Path:
        return self.folder / "metrics.jsonl"

    @property
    def _checkpoints(self) -> pathlib.Path:
        return self.folder / "checkpoints"

    @property
    def _checkpointer(self) -> Any:
        if self._opened is None:
            handler = self._ocp.CompositeCheckpointHandler(
                state=self._ocp.StandardCheckpointHandler(),
                about=self._ocp.JsonCheckpointHandler(_ABOUT),
            )
            self._opened = self._ocp.AsyncCheckpointer(handler)
        return self._opened

    def _from_the_best(self) -> list[int]:
        values = {}
        for step in self.steps:
            # An unreadable checkpoint cannot be the best, and must not stop a run.
            with contextlib.suppress(ValueError):
                values[step] = self._about(step)["report"].get(self.best_by)
        scored = [step for step in values if isinstance(values[step], float | int)]
        return sorted(scored, key=lambda step: values[step])

    def _delete_old(self) -> None:
        if jax.process_index() != 0:
            return
        kept = {*self.steps[-self.newest :], *self._from_the_best()[: self.best]}
        for step in sorted({*self.steps} - kept):
            # Rename it first: a folder named by a number must be a complete checkpoint.
            doomed = self._checkpoints / f"{step}.deleted"
            os.replace(self._checkpoints / str(step), doomed)
            shutil.rmtree(doomed)

    def _clean(self, step: int) -> None:
        """Removes the leftovers of a run that was killed."""
        for path in self._checkpoints.glob("*"):
            if re.fullmatch(r"\d+\.(deleted|orbax-checkpoint-tmp.*)", path.name):
                shutil.rmtree(path)
        if self._metrics.is_file():
            kept = [line for line in self.metrics() if line["step"] <= step]
            lines = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self._metrics, lines.encode())

    def _keep_others_out(self) -> None:
        if self._lock is not None or jax.process_index() != 0:
            return
        try:
            import fcntl
        except ImportError:  # not available on Windows
            return
        lock = open(self.folder / ".lock", "w")
        try:
            # The system releases the lock when the process ends, even if it is killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ValueError(
                f"Another process is training in {self.folder}. Wait for it to end, or "
                "use another folder."
            ) from error
        except OSError:  # some network drives do not support locks
            lock.close()
            return
        self._lock = lock

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

    def _about(self, step: int) -> dict[str, Any]:
        try:
            path = self._checkpoints / str(step) / "about" / _ABOUT
            about = json.loads(path.read_text())
            newer = about["format"] > _FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error
        if newer:
            raise ValueError(
                f"The checkpoint of step {step} in {self.folder} was written by "
                f"flowdiffrax {about['version']}, in a newer format than this version "
                "reads. Update flowdiffrax."
            )
        return about

    def _check_leaves(self, step: int, found: dict, own: dict) -> None:
        if found == own:
            return
        raise ValueError(
            f"The checkpoint of step {step} in {self.folder} belongs to another model, "
            f"optimiser or number of averages: {differences(found, own)}."
        )

    def _damaged(self, step: int, what: object) -> ValueError:
        others = [other for other in self.steps if other != step]
        return ValueError(
            f"The checkpoint of step {step} in {self.folder} is damaged: {what}. Remove "
            f"its folder to continue from another; there are {others}."
        )

    def _not_written(self, step: int | None, error: Exception) -> OSError:
        which = "A checkpoint" if step is None else f"The checkpoint of step {step}"
        return OSError(
            f"{which} could not be written to {self.folder}: {error}. If the disk is "
            f"full, free some space. The checkpoints of steps {list(self.steps)} are "
            "complete: the same call resumes from the newest."
        )
