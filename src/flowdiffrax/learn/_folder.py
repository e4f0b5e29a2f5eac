import io
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from .._io import as_folder, write_whole
from ..train import Run
from ._plan import Plan
from ._pool import Pool


class Folder:
    """What a call keeps in a folder, to resume from it.

    `config` is what the user stated, as numbers, strings and lists. Choices are kept
    instead of made again: some depend on measured seconds, and would come out otherwise.
    """

    def __init__(self, folder: str | os.PathLike, config: dict[str, Any]):
        self._folder = as_folder(folder, "run")
        config = json.loads(json.dumps(config))
        path = self._folder / "problem.json"
        if not path.exists():
            write_whole(path, json.dumps(config).encode())
        kept = _read_json(path)
        names = [name for name in config if not _is_same(kept.get(name), config[name])]
        if names:
            raise ValueError(
                f"The run in {self._folder} is for another problem or other settings: "
                f"{names} differ. Use another folder."
            )

    def kept(self) -> tuple[Plan, Pool, Pool] | None:
        """The plan, and the trajectories to train on and to validate with."""
        path = self._folder / "trajectories.npz"
        if not path.is_file():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:
                plan = Plan.from_json(json.loads(str(file["plan"])))
                return plan, _read_pool(file, "train"), _read_pool(file, "fresh")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(path) from error

    def keep(self, plan: Plan, pool: Pool, fresh: Pool) -> None:
        """Writes what `kept` reads, in one piece."""
        arrays: dict[str, Any] = {"plan": json.dumps(plan.to_json())}
        for name, each in (("train", pool), ("fresh", fresh)):
            rows = {"ts": each.ts, "ys": each.ys, "dropped": each.num_dropped}
            rows |= {} if each.args is None else {"args": each.args}
            arrays |= {f"{name}_{key}": np.asarray(row) for key, row in rows.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_whole(self._folder / "trajectories.npz", buffer.getvalue())

    def num_steps(self) -> int | None:
        """The number of training steps that was chosen before, if any."""
        path = self._folder / "num_steps.json"
        return _read_json(path) if path.is_file() else None

    def keep_num_steps(self, num_steps: int) -> None:
        """Writes the number of training steps."""
        write_whole(self._folder / "num_steps.json", json.dumps(num_steps).encode())

    def training(self) -> Run:
        """The run of the training itself."""
        return Run(self._folder / "training", best_by="error")


def as_config(**values: Any) -> dict[str, Any]:
    """What the user stated as numbers, strings and lists."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int | float):
            return value
        # A Diffrax solver, or else numbers.
        has_numbers = isinstance(value, list | tuple) or hasattr(value, "__array__")
        return np.asarray(value).tolist() if has_numbers else repr(value)

    return {name: plain(value) for name, value in values.items()}


def _read_pool(file: Any, name: str) -> Pool:
    args = file[f"{name}_args"] if f"{name}_args" in file else None
    dropped = int(file[f"{name}_dropped"])
    return Pool(file[f"{name}_ts"], file[f"{name}_ys"], args, dropped)


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path) from error


def _damaged(path: pathlib.Path) -> ValueError:
    return ValueError(f"{path} is damaged. Delete its folder to begin anew.")


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list) and one and other:
        same_shape = np.shape(one) == np.shape(other)
        # Rates may differ in the last digits on another machine.
        return same_shape and np.allclose(one, other, 1e-6, 0, equal_nan=True)
    return one == other
