import io
import json
import os
import pathlib
from typing import Any

import numpy as np

from .._io import write_whole
from ..train import Run
from ._plan import Plan
from ._pool import Pool
from ._problem import Domain


class Folder:
    """What a call keeps in a folder, to resume from it."""

    def __init__(self, folder: str | os.PathLike, config: dict[str, Any]):
        self._folder = pathlib.Path(folder)
        self._config = json.loads(json.dumps(config))
        path = self._folder / "problem.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept != self._config:
                names = [k for k in self._config if kept.get(k) != self._config[k]]
                raise ValueError(
                    f"The run in {self._folder} is for another problem or other "
                    f"settings: {names} differ. Use another folder."
                )
        else:
            write_whole(path, json.dumps(self._config).encode())

    def pools(self) -> tuple[Pool, Pool] | None:
        """The trajectories to train on and to validate with, if they are there."""
        path = self._folder / "trajectories.npz"
        if not path.is_file():
            return None
        with np.load(path) as file:
            ts = file["ts"]

            def read(name: str) -> Pool:
                args = file[f"{name}_args"] if f"{name}_args" in file else None
                return Pool(ts, file[f"{name}_ys"], args, int(file[f"{name}_dropped"]))

            return read("train"), read("fresh")

    def keep_pools(self, pools: tuple[Pool, Pool]) -> None:
        """Writes the trajectories."""
        arrays: dict[str, Any] = {"ts": pools[0].ts}
        for name, pool in zip(("train", "fresh"), pools, strict=True):
            arrays |= {f"{name}_ys": pool.ys}
            arrays[f"{name}_dropped"] = np.asarray(pool.num_dropped)
            if pool.args is not None:
                arrays[f"{name}_args"] = pool.args
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_whole(self._folder / "trajectories.npz", buffer.getvalue())

    def num_steps(self) -> int | None:
        """The number of training steps that was chosen before, if any."""
        path = self._folder / "num_steps.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def keep_num_steps(self, num_steps: int) -> None:
        """Writes the number of training steps."""
        write_whole(self._folder / "num_steps.json", json.dumps(num_steps).encode())

    def training(self) -> Run:
        """The run of the training itself."""
        return Run(self._folder / "training", self._config, best_by="error")


def describe_run(domain: Domain, plan: Plan) -> dict[str, Any]:
    shown = {"t0": domain.t0, "t1": domain.t1, "size": domain.size}
    shown |= {"args_size": domain.args_size, "ts": plan.ts.tolist()}
    names = "solver", "form", "is_autonomous", "width", "depth", "batch_size"
    shown |= {name: getattr(plan, name) for name in (*names, "both_directions")}
    return shown | {"minutes": plan.minutes, "pool_size": plan.pool_size}
