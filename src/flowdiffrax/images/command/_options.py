"""What the command line can change, and how it is read."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from ... import objectives
from ..._io import import_extra

OBJECTIVES = {
    "flow-matching": objectives.FlowMatching,
    "lagrangian-distillation": objectives.LagrangianMapDistillation,
    "eulerian-distillation": objectives.EulerianMapDistillation,
    "progressive-distillation": objectives.ProgressiveFlowMapMatching,
    "align-your-flow": objectives.AlignYourFlowEMD,
    "consistency-distillation": objectives.ConsistencyDistillation,
    "flow-map-matching": objectives.FlowMapMatching,
    "lsd": objectives.LagrangianSelfDistillation,
    "esd": objectives.EulerianSelfDistillation,
    "psd": objectives.ProgressiveSelfDistillation,
    "meanflow": objectives.MeanFlow,
    "improved-meanflow": objectives.ImprovedMeanFlow,
    "terminal-velocity": objectives.TerminalVelocityMatching,
    "split-meanflow": objectives.split_mean_flow,
    "consistency-training": objectives.ConsistencyTraining,
}
FROM_TEACHER = (
    "lagrangian-distillation", "eulerian-distillation", "progressive-distillation",
    "align-your-flow", "consistency-distillation",
)  # fmt: skip
Task: TypeAlias = Literal["train", "grid", "scores", "inversion"]


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to change in a preset, and what to do with the map.

    [`flowdiffrax.images.command.parse`][] returns them. `--help` of a script lists them
    all, with the same texts.
    """

    script: str = ""
    """Name of the script, which is saved with each map."""
    preset: str = ""
    """All settings of the run; printed before it starts."""

    data: pathlib.Path | None = None
    """The images: the script's own archive or folder, a folder of Parquet files or of
    pictures, or a file written by `flowdiffrax.images.save_images`."""
    checksums: bool = True
    """Require the files of the release. Use `--no-checksums` for your own files in the
    same format."""
    out: pathlib.Path | None = None
    """Folder of the run; `out/<script>-<preset>` if not given. The same command continues
    from the newest checkpoint in it, and skips what is done."""
    dry_run: bool = False
    """Check everything, and print the run with the memory and cost of a step, without
    reading images. Compiling the step may take minutes."""
    platform: Literal["cpu", "cuda", "rocm", "tpu"] | None = None
    """With `--dry-run`, the platform to lower the step for; by default this machine's."""
    do: tuple[Task, ...] = ("train", "grid", "scores", "inversion")
    """Which parts to do. Without `train`, the map is read from the folder."""
    at_step: int | Literal["best"] | None = None
    """Without `train`: sample and score the checkpoint of this step, or the `best` map by
    the scores during training, instead of the final map."""
    average: float | None = None
    """Without `train`: the average to sample and score, by its decay or relative width;
    by default the first."""

    teacher: pathlib.Path | None = None
    """Folder of a finished run to use as the teacher, if the objective needs one."""
    objective: Literal[tuple(OBJECTIVES)] | None = None  # type: ignore
    """Objective to use instead of the preset's, with its own defaults."""
    both_directions: bool = False
    """Learn the map from images back to noise as well."""

    steps: int | None = None
    """Number of training steps."""
    batch_size: int | None = None
    """Number of images per step."""
    accumulate: int = 1
    """Number of parts to split each batch into, to save memory."""
    channels: int | None = None
    """Channels of the network's first resolution."""
    num_blocks: int | None = None
    """Residual blocks at each resolution."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's products."""
    remat: bool = False
    """Compute activations twice, to save memory."""
    stream: bool = False
    """Read batches from the host instead of keeping all images on the device."""
    all_devices: bool = False
    """Divide each batch among all devices, of all processes if there are several."""
    distributed: bool = False
    """Join the other processes first. They are found automatically under SLURM, Open MPI
    and on TPUs; elsewhere, give the next three options. Only the first process samples
    and scores."""
    coordinator: str | None = None
    """`host:port` of the first process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""
    seed: int = 0
    """Seed of the weights, the batches and the samples."""
    report_every: int = 100
    """Steps between reports."""
    save_every: int = 1000
    """Steps between checkpoints; a multiple of the steps between reports."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the one with the smallest loss."""
    grid_every: int = 1000
    """Steps between pictures of samples; a multiple of the steps between reports."""
    score_every: int | None = None
    """Steps between scores of every average; a multiple of the steps between reports.
    `None` for no scores during training."""
    score_samples: int = 2500
    """Number of samples for each of these scores; preferably more than features."""

    jumps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of jumps to sample in."""
    restarts: tuple[float, ...] = ()
    """Also sample with jumps to the end, with noise added at these times in between."""
    ode: float | None = 1e-3
    """Also integrate the velocity with Tsit5, to this tolerance; `None` to skip this."""
    guidance: float = 1.0
    """Scale of classifier-free guidance in sampling, for presets with classes."""
    num_samples: int = 10_000
    """Number of samples to score. The literature uses 50,000."""
    sample_batch: int = 250
    """Number of samples drawn at a time."""
    features: str = "classifier"
    """Features for the distance: a file of Inception weights, for the FID, or
    `alexnet.safetensors`, as `convert_weights.py` writes them; `classifier`, for one
    trained on these images; `random`."""
    statistics: pathlib.Path | None = None
    """A file of reference statistics in the same features. By default, the statistics of
    the training images."""

    def picture(self, name: str) -> pathlib.Path:
        """The path of a picture of samples: each map that is sampled has its own."""
        which = [
            name,
            *(part for part in (self.at_step, self.average) if part is not None),
        ]
        return self.folder / f"{'-'.join(map(str, which))}.png"

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the run: `out`, or its default."""
        return self.out or pathlib.Path("out", f"{self.script}-{self.preset}")


def parse(
    script: str,
    doc: str | None,
    presets: Mapping[str, Any],
    default: str,
    line: Sequence[str] | None = None,
    *,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **defaults: Any,
) -> Options:
    """Reads the options from the command line.

    It does not start JAX. Options that cannot be read end the program with a message.
    Needs tyro: `pip install "flowdiffrax[command]"`.

    **Arguments:**

    - `script`: the name of the script. By default, its runs are in
      `out/<script>-<preset>`.
    - `doc`: the text above the options in `--help`, usually `__doc__`.
    - `presets`: the presets that `--preset` selects from, by name. Only their names are
      read.
    - `default`: the preset to use if none is given.
    - `line`: the words of the command line; `None` for those of this process.
    - `own`: options whose defaults are different for single presets, by the name of the
      preset.
    - `defaults`: options whose defaults are different for all presets.

    **Returns:** the options.

    **Raises:** `ImportError` without tyro.
    """
    tyro = import_extra("tyro", "command", "images.command.parse")
    fields = [
        ("script", Annotated[str, tyro.conf.Suppress], script),
        ("preset", Literal[tuple(presets)], default),  # type: ignore
    ]
    chosen = dataclasses.make_dataclass("Chosen", fields, bases=(Options,), kw_only=True)
    read = functools.partial(
        tyro.cli, chosen, prog=f"python {sys.argv[0]}", description=doc, args=line
    )
    of = lambda preset: chosen(
        **defaults | dict((own or {}).get(preset, {})), preset=preset
    )
    # Parse once to learn the preset, and again with its own defaults.
    return read(default=of(read(default=of(default)).preset))
