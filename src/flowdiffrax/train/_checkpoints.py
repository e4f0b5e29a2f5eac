"""The folder of a run's checkpoints, which Orbax writes in the background."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._io import import_extra
from ._json import differences, plain
from ._leaves import by_name, describe, impl, random_keys, read_sums, without_keys
from ._step import TrainState

_FORMAT = 1


_ABOUT = "about.json"


class Checkpoints:
    """Complete checkpoints in folders named by their steps, `newest` and `best` of them.

    Orbax's `CheckpointManager` does part of this. It removes the folder of an old
    checkpoint in place, so after a kill it lists what is left of it as a checkpoint; with
    `todelete_subdir`, which avoids that, it never frees the space.
    """

    def __init__(self, run: pathlib.Path, newest: int, best: int, best_by: str):
        self._ocp = import_extra("orbax.checkpoint", "train", "Run")
        self._run = run
        self._folder = run / "checkpoints"
        self._newest = newest
        self._best = best
        self._best_by = best_by
        self._opened: Any = None

    @property
    def steps(self) -> tuple[int, ...]:
        names = [path.name for path in self._folder.glob("*") if path.is_dir()]
        # Checkpoints that are being written or deleted have other names.
        return tuple(sorted(int(name) for name in names if name.isdigit()))

    @property
    def best_step(self) -> int | None:
        best = self._from_the_best()
        if self.steps and not best:
            raise ValueError(
                f"No checkpoint in {self._run} has a number {self._best_by!r} in its "
                f"report; the newest has {sorted(self.about(self.steps[-1])['report'])}."
            )
        return next(iter(best), None)

    def about(self, step: int) -> dict[str, Any]:
        """What is known of a checkpoint: its leaves, their checksums, and its report."""
        try:
            path = self._folder / str(step) / "about" / _ABOUT
            about = json.loads(path.read_text())
            newer = about["format"] > _FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error
        if newer:
            raise ValueError(
                f"The checkpoint of step {step} in {self._run} was written by "
                f"flowdiffrax {about['version']}, in a newer format than this version "
                "reads. Update flowdiffrax."
            )
        return about

    def restore(self, like: PyTree, step: int) -> PyTree:
        if step not in self.steps:
            raise FileNotFoundError(
                f"{self._run} has no checkpoint of step {step}; there are "
                f"{list(self.steps)}."
            )
        about = self.about(step)
        arrays, leaves = _described(like)
        if about["leaves"] != leaves:
            raise ValueError(
                f"The checkpoint of step {step} in {self._run} belongs to another model, "
                "optimiser or averages: "
                f"{differences(about['leaves'], leaves)}."
            )
        found = self._read(step, arrays)
        sums = read_sums(found)
        wrong = [name for name, value in about["sums"].items() if sums[name] != value]
        if wrong:
            raise self._damaged(step, f"checksums differ in {wrong[:3]}")
        for name in random_keys(arrays):
            found[name] = jr.wrap_key_data(found[name], impl=impl(arrays[name]))
        put = lambda path, leaf: found.get(jtu.keystr(path), leaf)
        return jtu.tree_map_with_path(put, like)

    def save(self, state: TrainState, report: Mapping[str, Any]) -> None:
        step = int(state.step)
        # The previous checkpoint must be complete first.
        self.wait()
        if step in self.steps:
            return
        report = plain(report, "report")
        if not isinstance(report.get(self._best_by), float | int | None):
            raise ValueError(
                f"`best_by` must name a number; {self._best_by!r} is "
                f"{report[self._best_by]!r} in the report."
            )
        arrays, leaves = _described(state)
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
            self._checkpointer.save(self._folder / str(step), args=items)
        except Exception as error:
            raise self._not_written(step, error) from error

    def wait(self) -> None:
        if self._opened is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            self._opened = None
            raise self._not_written(None, error) from error
        self._delete_old()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def remove_leftovers(self) -> None:
        """Removes what a run that was killed had begun to write or to delete."""
        for path in self._folder.glob("*"):
            if re.fullmatch(r"\d+\.(deleted|orbax-checkpoint-tmp.*)", path.name):
                shutil.rmtree(path)

    def _read(self, step: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
        # Do not use the saved devices: this machine may have others.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda leaf: getattr(leaf, "sharding", None) or here
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))
            for name, leaf in without_keys(arrays).items()
        }
        args = self._ocp.args
        items = args.Composite(state=args.StandardRestore(wanted))
        try:
            return self._checkpointer.restore(self._folder / str(step), args=items).state
        # Orbax and TensorStore raise errors of many types.
        except Exception as error:
            raise self._damaged(step, error) from error

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
                values[step] = self.about(step)["report"].get(self._best_by)
        scored = [step for step in values if isinstance(values[step], float | int)]
        return sorted(scored, key=lambda step: values[step])

    def _delete_old(self) -> None:
        if jax.process_index() != 0:
            return
        kept = {*self.steps[-self._newest :], *self._from_the_best()[: self._best]}
        for step in sorted({*self.steps} - kept):
            # Rename it first: a folder named by a number must be a complete checkpoint.
            doomed = self._folder / f"{step}.deleted"
            os.replace(self._folder / str(step), doomed)
            shutil.rmtree(doomed)

    def _damaged(self, step: int, what: object) -> ValueError:
        others = [other for other in self.steps if other != step]
        return ValueError(
            f"The checkpoint of step {step} in {self._run} is damaged: {what}. Remove "
            f"its folder to continue from another; there are {others}."
        )

    def _not_written(self, step: int | None, error: Exception) -> OSError:
        which = "A checkpoint" if step is None else f"The checkpoint of step {step}"
        return OSError(
            f"{which} could not be written to {self._run}: {error}. If the disk is "
            f"full, free some space. The checkpoints of steps {list(self.steps)} are "
            "complete: the same call resumes from the newest."
        )


def _described(tree: PyTree) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a tree, and a description of it that a resumed run must match."""
    arrays, numbers = by_name(tree)
    leaves = describe(arrays, numbers)
    if isinstance(tree, TrainState):
        # The arrays of two averages cannot tell which is which.
        leaves |= {".ema_decay": repr(tree.ema_decay)}
        leaves |= {".teacher_decay": repr(tree.teacher_decay)}
    return arrays, leaves
