import contextlib
import importlib.metadata
import json
import math
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
from jaxtyping import Array, PyTree, UInt32

from .._io import import_extra, write_whole
from ._step import TrainState

_FORMAT = 1


_ABOUT = "about.json"


class Run:
    """The folder of a run: its checkpoints, and its numbers.

    Give it to [`flowdiffrax.train.fit`][]. Whatever ends the run, the same call goes on
    from the newest checkpoint, and on the same device to the same weights, bit for bit.

    - `config.json`: the configuration, and the version of this library.
    - `metrics.jsonl`: one line of JSON a report. Lines of steps that a resumed run makes
      again are cut first, so that each step is there once.
    - `checkpoints/<step>`: whole, or absent. Orbax writes them in the background, of any
      number of devices and processes, which must share the folder.
    - `profile`: what `jax.profiler` saw.

    Needs orbax: `pip install "flowdiffrax[train]"`.

    **Arguments:**

    - `folder`: where; made if missing.
    - `config`: what the run is, in anything that JSON can hold. A folder with another
      configuration is refused.
    - `save_every`: how many steps lie between checkpoints, at least; they are written at
      reports, when a run ends, and when it is stopped or an error ends it.
    - `newest`: how many of the newest to keep, at least 1.
    - `best`: how many of the best to keep besides.
    - `best_by`: the number in the report that tells the best; the smallest is. The loss
      is that of one batch: a distance of samples tells more.
    - `profile`: two numbers: after how many of the steps made here `jax.profiler` begins
      to trace, and after how many it ends.

    **Raises:** `ImportError` without orbax; `ValueError` for numbers that are too small,
    NaN in the configuration, or a folder that belongs to another one; `TypeError` for a
    configuration that JSON cannot hold; `OSError` where there can be no folder.
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
        """The steps of the checkpoints that are there."""
        names = [path.name for path in self._checkpoints.glob("*") if path.is_dir()]
        # Those that are being written or deleted have other names.
        return tuple(sorted(int(name) for name in names if name.isdigit()))

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint; `None` if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; `None` if there is none at all.

        **Raises:** `ValueError` if none has the number that `best_by` names.
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

        **Raises:** `ValueError` for a line that is none, other than the last, which
        may be torn by what ended the run.
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
                        f"Line {number} of {self._metrics} is no report: {error}. Remove "
                        "it to go on."
                    ) from error
        return reports

    def resume(self, state: TrainState) -> TrainState:
        """The state of the newest checkpoint, or the one given if there is none.

        Cuts the reports that come after it, and keeps others out until `close`.

        **Arguments:**

        - `state`: the state with which the run began; it says where arrays belong.

        **Raises:** as `restore`, and `ValueError` for another root key, checkpoints that
        end before the state, or a folder in which another process is training.
        """
        self._keep_others_out()
        step = self.newest_step
        if step is not None and step < int(state.step):
            raise ValueError(
                f"The checkpoints in {self.folder} end at step {step}, before step "
                f"{int(state.step)} of the state that was given: they are of another "
                "run. Use another folder."
            )
        resumed = state if step is None else self.restore(state, step)
        impl = str(state.key_impl)
        same = step is None or self._about(step)["key_impl"] == impl
        if not (same and np.array_equal(resumed.key_data, state.key_data)):
            raise ValueError(
                f"The run in {self.folder} began with another root key: "
                f"{np.asarray(resumed.key_data)}, not {np.asarray(state.key_data)} of "
                f"{impl}. "
                "Resume it with its own, or begin another in another folder."
            )
        self._looked = int(resumed.step)
        if jax.process_index() == 0:
            self._clean(self._looked)
        return resumed

    def restore(self, like: PyTree, step: int | None = None) -> PyTree:
        """A checkpoint.

        **Arguments:**

        - `like`: a state of the same structure, whose arrays are replaced. They say on
          which devices, if they are there; `equinox.filter_eval_shape` makes a state
          without memory.
        - `step`: which; `None` for the newest.

        **Raises:** `FileNotFoundError` if there is none; `ValueError` if it is damaged,
        of a newer version of this library, or of another model or optimiser.
        """
        step = self.newest_step if step is None else step
        if step not in self.steps:
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint of step {step}; there are "
                f"{list(self.steps)}."
            )
        about = self._about(step)
        arrays, numbers = _by_name(like)
        self._check_leaves(step, about["leaves"], _describe(arrays, numbers))
        # Not where they were: that machine may have had other devices.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda leaf: getattr(leaf, "sharding", None) or here
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf))
            for name, leaf in _without_keys(arrays).items()
        }
        args = self._ocp.args
        try:
            found = self._checkpointer.restore(
                self._checkpoints / str(step),
                args=args.Composite(state=args.StandardRestore(wanted)),
            ).state
        # Orbax and TensorStore raise whatever they stumble over.
        except Exception as error:
            raise self._damaged(step, error) from error
        sums = _read_sums(found)
        wrong = [name for name, value in about["sums"].items() if sums[name] != value]
        if wrong:
            raise self._damaged(step, f"checksums differ in {wrong[:3]}")
        for name in _keys(arrays):
            found[name] = jr.wrap_key_data(found[name], impl=_impl(arrays[name]))
        put = lambda path, leaf: found.get(jtu.keystr(path), leaf)
        return jtu.tree_map_with_path(put, like)

    def save(self, state: TrainState, report: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background; of a step that has one, does nothing.

        **Arguments:**

        - `state`: what to save.
        - `report`: numbers that belong to it, among them what `best_by` names, or not.

        **Raises:** `OSError` if this checkpoint or the one before could not be written,
        `ValueError` if `best_by` names what is no number, `TypeError` for a report that
        JSON cannot hold.
        """
        step = int(state.step)
        # Also waits for the one before.
        self.wait()
        if step in self.steps:
            return
        report = _plain(report, "report")
        if not isinstance(report.get(self.best_by), float | int | None):
            raise ValueError(
                f"`best_by` must name a number; {self.best_by!r} is "
                f"{report[self.best_by]!r} in the report."
            )
        arrays, numbers = _by_name(state)
        leaves = _describe(arrays, numbers)
        # A copy: the next step reuses the memory while Orbax still reads.
        arrays = jtu.tree_map(jnp.array, _without_keys(arrays))
        about = {
            "format": _FORMAT,
            "version": importlib.metadata.version("flowdiffrax"),
            "key_impl": str(state.key_impl),
            "leaves": leaves,
            "sums": _read_sums(arrays),
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
        """Whether `save_every` steps have gone by, in this call or since the last."""
        before, self._looked = self._looked, step
        return step // self.save_every > before // self.save_every

    def log(self, report: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`; numbers that are not finite become `null`.

        **Raises:** `TypeError` for what JSON cannot hold.
        """
        if jax.process_index() == 0:
            with open(self._metrics, "a") as file:
                file.write(json.dumps(_plain(report, "report")) + "\n")

    def profile_at(self, made: int, state: PyTree) -> None:
        """Begins or ends the profile, if it is time.

        **Arguments:**

        - `made`: how many steps have been made here.
        - `state`: the state, for which the end waits.
        """
        first, last = self.profile or (None, None)
        if made == first:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self._profiling = True
        elif made == last and self._profiling:
            jax.block_until_ready(eqx.filter(state, eqx.is_array))
            self._end_profile()

    def wait(self) -> None:
        """Waits until the last checkpoint is whole, and deletes what is not to be kept.

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
        """Waits, ends the threads that write, and lets others in."""
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
            # One that cannot be read is nobody's best, and must not stop a run.
            with contextlib.suppress(ValueError):
                values[step] = self._about(step)["report"].get(self.best_by)
        scored = [step for step in values if isinstance(values[step], float | int)]
        return sorted(scored, key=lambda step: values[step])

    def _delete_old(self) -> None:
        if jax.process_index() != 0:
            return
        kept = {*self.steps[-self.newest :], *self._from_the_best()[: self.best]}
        for step in sorted({*self.steps} - kept):
            # By another name first: a checkpoint is whole as long as it has a number.
            doomed = self._checkpoints / f"{step}.deleted"
            os.replace(self._checkpoints / str(step), doomed)
            shutil.rmtree(doomed)

    def _clean(self, step: int) -> None:
        """Removes what a run that was killed left behind."""
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
        except ImportError:  # Windows has none
            return
        lock = open(self.folder / ".lock", "w")
        try:
            # The system releases it when the process ends, however it does.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ValueError(
                f"Another process is training in {self.folder}. Wait for it to end, or "
                "use another folder."
            ) from error
        except OSError:  # some network drives have none
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
                    f"{path} cannot be read: {error!r}. Put back what it was, or use "
                    "another folder."
                ) from error
            if found != self.config:
                raise ValueError(
                    f"{self.folder} has a run of another configuration: "
                    f"{_differences(found, self.config)}. Use another folder."
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
                f"The checkpoint of step {step} in {self.folder} is of flowdiffrax "
                f"{about['version']}, in a newer format than this version reads. Update "
                "flowdiffrax."
            )
        return about

    def _check_leaves(self, step: int, found: dict, own: dict) -> None:
        if found == own:
            return
        raise ValueError(
            f"The checkpoint of step {step} in {self.folder} is of another model, "
            f"optimiser or number of averages: {_differences(found, own)}."
        )

    def _damaged(self, step: int, what: object) -> ValueError:
        others = [other for other in self.steps if other != step]
        return ValueError(
            f"The checkpoint of step {step} in {self.folder} is damaged: {what}. Remove "
            f"its folder to go on from another; there are {others}."
        )

    def _not_written(self, step: int | None, error: Exception) -> OSError:
        which = "A checkpoint" if step is None else f"The checkpoint of step {step}"
        return OSError(
            f"{which} could not be written to {self.folder}: {error}. If the disk is "
            f"full, make room. The checkpoints of steps {list(self.steps)} are whole: "
            "the same call goes on from the newest."
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _by_name(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the Python numbers of a tree, by their path."""
    leaves = {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(tree)}
    arrays = {name: leaf for name, leaf in leaves.items() if _is_array(leaf)}
    number = (bool, int, float, complex)
    return arrays, {
        name: leaf for name, leaf in leaves.items() if isinstance(leaf, number)
    }


def _keys(arrays: Mapping[str, Any]) -> list[str]:
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [name for name, leaf in arrays.items() if is_key(leaf)]


def _impl(key: Any) -> Any:
    # Of an array, or of a shape alone.
    return key.dtype._impl.name


def _without_keys(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that are written: keys as numbers, and none that are empty."""
    keys = _keys(arrays)
    numbers = lambda leaf: (
        jr.key_data(leaf)
        if isinstance(leaf, jax.Array)
        else jax.eval_shape(jr.key_data, leaf)
    )
    return {
        name: numbers(leaf) if name in keys else leaf
        for name, leaf in arrays.items()
        if leaf.size > 0
    }


def _describe(arrays: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, str]:
    shapes = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
    return shapes | {name: repr(number) for name, number in numbers.items()}


def _read_sums(arrays: Mapping[str, Array]) -> dict[str, int]:
    return {name: int(value) for name, value in _sums(dict(arrays)).items()}


@jax.jit
def _sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return jtu.tree_map(_sum, arrays)


def _sum(leaf: Array) -> UInt32[Array, ""]:
    """A checksum of the bits: the same on any device, and of any sharding."""
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # Odd factors, so that no flipped bit is lost, and other ones elsewhere.
    factors = jnp.ones((), jnp.uint32)
    for axis in range(words.ndim):
        places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        factors = factors * jnp.uint32(2654435761) + 2 * places
    return jnp.sum(words * factors, dtype=jnp.uint32)


def _plain(value: Any, name: str) -> Any:
    """What JSON can hold, in every reader of it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        # bfloat16 is none of NumPy's own.
        value = np.asarray(value, np.float64 if is_float else None).tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry, name) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int | None):
        return value
    raise TypeError(
        f"`{name}` must be a number, a text, or a list or dictionary of these; got "
        f"{type(value).__name__}."
    )


def _differences(found: Any, own: Any) -> str:
    if not (isinstance(found, dict) and isinstance(own, dict)):
        return f"{found} there, {own} here"
    absent = "absent"
    differing = [
        f"`{name}` is {found.get(name, absent)} there, {own.get(name, absent)} here"
        for name in sorted(found.keys() | own.keys())
        if found.get(name, absent) != own.get(name, absent)
    ]
    more = len(differing) - 3
    return "; ".join(differing[:3]) + (f"; and {more} more" if more > 0 else "")
