"""The command line for images, and its scripts: options, data, mistakes, short runs."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

import flowdiffrax as fd
from flowdiffrax.images import command
from flowdiffrax.images.command import (
    _checks,
    _maps,
    _pictures,
    _presets,
    _run,
    _samplers,
    _scores,
    _train,
)
from flowdiffrax.images.command._flops import count_products

pytest.importorskip("tyro")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import cifar10  # noqa: E402
import digits  # noqa: E402
import imagenet32  # noqa: E402

SMALL = ["--channels", "8", "--batch-size", "8"]


def pictures(size=32, channels=3, number=20, **settings):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (number, size, size, channels), np.uint8)
    return fd.images.Images(values, np.arange(number) % 10, **settings)


def digits_options(*words):
    return command.parse("digits", "", digits.presets(), "lsd", list(words))


def recipe_of(script, options):
    """The recipe that is run."""
    found = _presets.recipe_of(script.presets(), options.preset)
    return _presets.with_options(found, options)


# --- options --------------------------------------------------------------------------


def test_presets_are_the_recipes_of_the_data():
    names = set(fd.images.recipes())
    for script, prefix in ((cifar10, "cifar10-"), (imagenet32, "imagenet32-")):
        found = {prefix + name for name in script.presets()} - {"cifar10-smoke"}
        assert found == {name for name in names if name.startswith(prefix)}


def test_options_change_what_is_printed():
    options = digits_options(
        "--steps", "70", "--channels", "8", "--precision", "bfloat16", "--objective",
        "meanflow", "--both-directions",
    )  # fmt: skip
    recipe = recipe_of(digits, options)
    assert recipe.num_steps == 70 and "num_steps=70" in str(recipe)
    assert "EitherDirection" in str(recipe) and "MeanFlow" in str(recipe)
    net = recipe.network(key=jr.key(0))
    assert net.first.weight.shape[-1] == 8 and net.dtype == "bfloat16"
    # The rate falls to zero at the end of the steps that are made.
    optim = recipe.optim()
    one = jnp.ones(())
    state = optim.init(one)
    sizes = []
    for _ in range(recipe.num_steps + 1):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes them
            update, state = optim.update(one, state)
        sizes.append(abs(float(update)))
    assert sizes[-1] < 1e-3 * max(sizes) < sizes[35]


def test_distillation_from_another_objective_needs_a_teacher():
    options = digits_options("--objective", "eulerian-distillation")
    recipe = recipe_of(digits, options)
    with pytest.raises(ValueError, match="`--preset lsd --objective flow-matching` fir"):
        _checks.check(recipe, options)
    own = recipe_of(digits, digits_options("--preset", "lmd", "--objective", "lsd"))
    assert own.teacher is None and not own.starts_from_teacher


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        cifar10.main(["--help"])
    shown = capsys.readouterr().out
    assert "align-your-flow" in shown and "--num-samples" in shown


def never():
    raise AssertionError("images were read before the options were checked")


def refused(script, words, message, load=never):
    """Ends in one line that says this, before images are read."""
    made = script.presets()
    options = command.parse(script.__name__, "", made, next(iter(made)), words)
    with pytest.raises(SystemExit, match=message) as end:
        command.run(options, made, load)
    assert "\n" not in end.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accumulate", "3"], "must divide the batch of 128"),
        (["--accumulate", "0"], "--accumulate must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--save-every", "0"], "--save-every must be at least 1"),
        (["--jumps", "2", "0"], "--jumps must be at least 1"),
        (["--sample-batch", "0"], "--sample-batch must be at least 1"),
        (["--score-every", "0"], "--score-every must be at least 1"),
        (["--keep", "0"], "--keep must be at least 1"),
        (["--at-step", "5"], "leave `train` out of --do"),
        (["--do", "grid", "--average", "0.9", "--out", "absent"], "absent has no run"),
        (["--score-samples", "0"], "--score-samples must be at least 1"),
        (["--score-every", "150"], "--score-every must be a multiple of --report-every"),
        (["--do", "train", "--score-every", "100", "--features", "absent.pth"], "absent"),
        (["--restarts", "0.5", "1"], r"--restarts must lie in \[0, 1\)"),
        (["--ode", "0"], "--ode must be a positive tolerance; got 0"),
        (["--out", __file__], "--out: .*test_command.py is a file; give a folder"),
        (["--out", f"{__file__}/run", "--dry-run"], "--out: .*test_command.py is a file"),
        (["--teacher", "somewhere"], "--teacher: .*lsd learns without a teacher"),
        (["--channels", "-1"], "channels"),
        (["--preset", "lmd"], "train `--preset teacher` first"),
        (["--preset", "lmd", "--teacher", "absent"], "absent.map.safetensors is not"),
        (["--features", "absent.pth"], "weights is not at absent.pth"),
        (["--features", __file__], "neither a .safetensors nor an .npz file"),
        (["--statistics", "absent.npz"], "No such file .*absent.npz"),
        (["--do", "scores", "--out", "absent"], "absent.map.safetensors is not"),
    ],
)
def test_bad_settings_are_refused_before_images_are_read(words, message):
    refused(digits, words, message)


@pytest.mark.parametrize("script", [cifar10, digits, imagenet32])
def test_a_teacher_is_asked_for_by_its_preset(script):
    presets, needed = script.presets(), 0
    for name in presets:
        options = command.parse(script.__name__, "", presets, name, [])
        recipe = recipe_of(script, options)
        if recipe.teacher is not None:
            with pytest.raises(ValueError) as end:
                _checks.check(recipe, options)
            found = re.search("train `--preset (.*)` first", str(end.value))[1]
            teacher = _presets.recipe_of(presets, found)
            is_map = isinstance(
                recipe.objective, fd.objectives.ProgressiveFlowMapMatching
            )
            kind = fd.objectives.FlowMapMatching if is_map else fd.FlowMatching
            assert isinstance(teacher.objective, kind)
            needed += 1
    assert needed > 0


@pytest.mark.parametrize(
    ("words", "images", "message"),
    [
        ([], pictures(8, 3), "for images of"),
        ([], pictures(8, 1, num_classes=12), "has 10 classes"),
        (
            ["--features", "classifier"],
            fd.images.Images(pictures(8, 1).images),
            "classes",
        ),
    ],
)
def test_bad_images_are_refused_before_training(words, images, message):
    options = digits_options(*words)
    recipe = recipe_of(digits, options)
    with pytest.raises(ValueError, match=message):
        _checks.check_images(recipe, options, images)


def test_the_proxy_needs_labels():
    options = command.parse("cifar10", "", cifar10.presets(), "smoke", [])
    images = fd.images.Images(pictures().images)
    with pytest.raises(ValueError, match="--features classifier needs labels"):
        _checks.check_images(cifar10.smoke(), options, images)


def test_statistics_of_other_features(tmp_path):
    features = fd.images.RandomFeatures((8, 8, 1), key=jr.key(1))
    images = pictures(8, 1, name="mine")
    fd.images.FeatureStatistics.of(features, images).save(tmp_path / "s.npz")
    words = ["--features", "random", "--statistics", str(tmp_path / "s.npz")]
    refused(digits, words, f"is of the features {features.fingerprint}, and --features")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((20, 9, 8, 1), np.uint8)}, r"of \(8, 8, 1\).*are \(9, 8, 1"),
        ({"images": np.zeros((20, 8, 8), np.float32)}, "must be uint8; .* has float32"),
        ({"images": np.zeros((20, 8, 8), np.uint8)}, "has 10 classes, and .* no labels"),
        (
            {"images": np.zeros((20, 8, 8), np.uint8), "labels": np.zeros(19, int)},
            r"has 20 images and labels of shape \(19,\)",
        ),
        ({"pictures": np.zeros((20, 8, 8), np.uint8)}, "has no array `images`"),
    ],
)
def test_files_are_refused_by_their_headers(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    refused(digits, ["--data", str(tmp_path / "mine.npz")], message)


def test_data_that_are_not_there_or_damaged(tmp_path):
    for words in (["absent.npz"], ["absent", "--dry-run"]):
        refused(digits, ["--data", *words], "--data: absent.* is not there")
    for name in ("bad.npz", "bad.npy"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        refused(digits, ["--data", str(tmp_path / name)], name)
    (tmp_path / "empty").mkdir()
    for words in ([], ["--dry-run"]):
        words = ["--data", str(tmp_path / "empty"), *words]
        refused(cifar10, words, "--data: the folder .*empty is empty")


def test_headers_of_good_files(tmp_path):
    np.savez(tmp_path / "mine.npz", np.zeros((25, 8, 8), np.uint8), np.arange(25) % 10)
    np.save(tmp_path / "mine.npy", np.zeros((30, 32, 32, 3), np.uint8))
    options = digits_options("--data", str(tmp_path / "mine.npz"))
    # Every tenth is held out: three of 25.
    assert _checks.check_data(recipe_of(digits, options), options) == 22
    line = ["--data", str(tmp_path / "mine.npy")]
    options = command.parse("cifar10", "", cifar10.presets(), "smoke", line)
    assert _checks.check_data(cifar10.smoke(), options) == 27
    options = dataclasses.replace(options, data=tmp_path)
    assert _checks.check_data(cifar10.smoke(), options) is None


def blank_pictures(folder, number, size=(32, 32)):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for row in range(number):
        image.new("RGB", size).save(folder / f"{row}.png")


def test_headers_of_folders(tmp_path):
    line = ["--data", str(tmp_path)]
    options = command.parse("cifar10", "", cifar10.presets(), "smoke", line)
    check = lambda name: _checks.check_data(
        cifar10.smoke(), dataclasses.replace(options, data=tmp_path / name)
    )
    for name in ("cat", "dog"):
        blank_pictures(tmp_path / "classes" / name, 15)
        blank_pictures(tmp_path / "split" / "train" / name, 4)
    fd.images.save_images(tmp_path / "saved", pictures(number=21))
    (tmp_path / "own" / "format").mkdir(parents=True)
    assert [check(x) for x in ("classes", "split", "saved", "own")] == [27, 8, 18, None]
    blank_pictures(tmp_path / "classes" / "eel", 1, size=(32, 30))
    with pytest.raises(ValueError, match=r"one size; .*eel.0.png has \(30, 32\)"):
        check("classes")
    # Headers are all that is read: what follows may be damaged.
    file = tmp_path / "split" / "train" / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:60])
    assert check("split") == 8
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="3.png is truncated, damaged or not"):
        check("split")


def test_headers_of_parquet_files(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    blank_pictures(tmp_path / "png", 1)
    body = (tmp_path / "png" / "0.png").read_bytes()
    for index, number in enumerate((3, 4)):
        # Only the first picture of each file is looked at.
        rows = [{"bytes": body}] + [{"bytes": b"damaged"}] * (number - 1)
        table = arrow.table({"img": rows, "label": [0] * number})
        parquet.write_table(table, tmp_path / f"train-{index}.parquet")
    line = ["--data", str(tmp_path)]
    options = command.parse("cifar10", "", cifar10.presets(), "smoke", line)
    assert _checks.check_data(cifar10.smoke(), options) == 7
    refused(digits, line, r"of \(8, 8, 1\).*are \(32, 32, 3\)")


def test_own_files_with_a_split(tmp_path):
    for name, number in (("train", 20), ("test", 7)):
        np.savez(tmp_path / f"{name}.npz", np.zeros((number, 8, 8), np.uint8))
    train, held_out = command.load_split(tmp_path)
    assert (len(train), len(held_out)) == (20, 7)


def test_another_run_in_the_folder_is_refused_before_images_are_read(tmp_path):
    options = digits_options("--out", str(tmp_path), "--steps", "70")
    config = _maps.config_of(recipe_of(digits, options), options)
    about = {"config": config | {"training_images": "1234", "teacher_weights": None}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    _checks.check_same_run(options, config)
    words = ["--out", str(tmp_path), "--steps", "80"]
    refused(digits, words, "--out: .* has a run with other options: .*steps")


def test_dry_run_of_no_training():
    refused(digits, ["--dry-run", "--do", "grid"], "--dry-run describes training")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lsd", "lmd"])
def test_dry_run(tmp_path, capsys, preset):
    made = digits.presets()
    words = ["--preset", preset, "--dry-run", "--platform", "cuda", *SMALL]
    words += ["--num-blocks", "1", "--accumulate", "2", "--out", str(tmp_path / "run")]
    options = command.parse("digits", "", made, "lsd", words)
    # Neither images nor a teacher are needed, and nothing is written.
    assert command.run(options, made, never, teach="teacher") == []
    shown = capsys.readouterr().out
    assert "lowers for cuda" in shown and "parameters" in shown
    flops = float(re.search(r"operations +(\S+) a step", shown)[1])
    assert flops > 1e6
    assert not (tmp_path / "run").exists()


DRY_RUNS = """
import jax, sys
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, sys.argv[1])
import digits
words = ["--preset", "teacher", "--dry-run", "--channels", "8", "--batch-size", "256"]
digits.main([*words, "--platform", "cuda"])
digits.main([*words, "--platform", "cuda", "--all-devices"])
"""


@pytest.mark.slow
def test_dry_run_on_all_devices():
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, str(pathlib.Path(digits.__file__).parent)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, four = done.stdout.split("Dry run:")[1:]
    assert "cuda, one device" in one and "cuda, divided among 4 devices" in four
    kept, temporary = (
        [float(re.search(rf"{name} +(\S+) GiB", text)[1]) for text in (one, four)]
        for name in ("kept", "temporary")
    )
    # All have the weights and images, and a quarter of the batch.
    assert kept[0] == pytest.approx(kept[1], rel=0.01)
    assert 0.2 < temporary[1] / temporary[0] < 0.4


def test_operations_of_a_loop_count_as_often_as_it_runs():
    square = lambda x, _: (x @ x, None)
    loop = lambda x: jax.lax.scan(square, x, None, length=5)[0]
    x, kernel = jnp.ones((3, 3)), jnp.ones((3, 3, 2, 7))
    assert count_products(jax.make_jaxpr(loop)(x).jaxpr) == 5 * 2 * 3**3
    # Each of 6 x 6 x 7 outputs is a product with 3 x 3 x 2 weights.
    convolve = lambda image: jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    made = jax.make_jaxpr(convolve)(jnp.ones((1, 6, 6, 2)))
    assert count_products(made.jaxpr) == 2 * (6 * 6 * 7) * (3 * 3 * 2)


def test_guidance_needs_classes():
    refused(cifar10, ["--guidance", "2"], "--guidance needs a preset with classes; smoke")


def test_digits_have_their_own_data():
    with pytest.raises(SystemExit, match="--data: the digits come with the package"):
        digits.main(["--data", "mine.npz"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cifar10.py --preset lmd --data absent", "train `--preset teacher` first"),
        ("digits.py --distributed", "--distributed: .*give --coordinator, --num"),
    ],
)
def test_a_mistake_ends_in_one_line_and_a_status(line, message):
    outside = {name: os.environ[name] for name in os.environ if "SLURM" not in name}
    done = subprocess.run(
        [sys.executable, *line.split()], capture_output=True, text=True, env=outside,
        cwd=pathlib.Path(digits.__file__).parent,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert re.search(message, said)


def test_missing_images():
    words = ["--preset", "teacher", *SMALL, "--data", "absent"]
    load = lambda: imagenet32.load(types.SimpleNamespace(data="absent", checksums=True))
    message = "ImageNet-32 is not at absent. Fetch Imagenet32_train.* and Imagenet32_val"
    refused(imagenet32, words, message, load)


@pytest.mark.parametrize("script", [imagenet32, cifar10])
def test_data_are_needed(script):
    with pytest.raises(SystemExit, match="--data is needed"):
        script.main(["--preset", "teacher"])


@pytest.mark.parametrize("module", ["tyro", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(module, monkeypatch):
    options = digits_options("--do", "scores")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}.*flowdiffrax\[command\]"):
        _checks.check(recipe_of(digits, options), digits_options())


# --- forms of data --------------------------------------------------------------------


def write_npz(path):
    np.savez(path / "mine.npz", images=pictures().images, labels=np.arange(20) % 10)
    return path / "mine.npz"


def write_folders(path):
    for part, rows in (("train", slice(0, 18)), ("test", slice(18, 20))):
        fd.images.save_images(path / part, pictures()[rows])
    return path


def write_pictures(path):
    image = pytest.importorskip("PIL.Image")
    for index, values in enumerate(pictures().images):
        folder = path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        image.fromarray(values).save(folder / f"{index:02}.png")
    return path


@pytest.mark.parametrize("write", [write_npz, write_folders, write_pictures])
def test_forms_of_data(tmp_path, write):
    train, test = command.load_split(write(tmp_path), fd.images.cifar10)
    assert len(train) == 18 and len(test) == 2
    together = np.concatenate([train.images, test.images]).reshape(20, -1)
    assert_close(np.sort(together.sum(axis=1)),
                 np.sort(pictures().images.reshape(20, -1).sum(axis=1)))  # fmt: skip


def test_the_archive_is_asked_for_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="CIFAR-10"):
        command.load_split(tmp_path / "absent", fd.images.cifar10)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_is_noticed_before_the_other_is_read(part, tmp_path, monkeypatch):
    fd.images.save_images(tmp_path / part, pictures())
    names = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
    for name in names[part]:
        (tmp_path / f"{name}.bin").write_bytes(bytes(3073))
    read, cifar = [], fd.images.cifar10

    def counted(path, split, **settings):
        found = cifar(path, split, **settings)
        read.append(split)
        return found

    with pytest.raises(FileNotFoundError, match="CIFAR-10"):
        command.load_split(tmp_path, counted, checksums=False)
    # The small part may have been read, and the large one never.
    assert read == ["test"] * (part == "test")


def test_files_of_ones_own_in_the_format_of_imagenet(tmp_path):
    for name in [*(f"train_data_batch_{k}" for k in range(1, 11)), "val_data"]:
        rows = pictures(number=2).images.reshape(2, -1)
        np.savez(tmp_path / f"{name}.npz", data=rows, labels=np.asarray([1, 1000]))
    words = ["--preset", "teacher", *SMALL, "--data", str(tmp_path)]
    parse = functools.partial(
        command.parse, "imagenet32", "", imagenet32.presets(), "teacher"
    )
    load = lambda: imagenet32.load(parse(words))
    refused(imagenet32, words, "md5 .*in this format, pass `--no-checksums`", load)
    train, val = imagenet32.load(parse([*words, "--no-checksums"]))
    assert len(train) == 20 and len(val) == 2


def test_digits_are_split_once():
    train, test = digits.load()
    assert (len(train), len(test)) == (1347, 450)
    rows = np.concatenate([train.images, test.images]).reshape(1797, -1)
    whole = fd.images.digits().images.reshape(1797, -1)
    assert_close(np.sort(rows @ np.arange(64)), np.sort(whole @ np.arange(64)))


# --- maps and samples -----------------------------------------------------------------


def test_a_saved_map_is_rebuilt_from_its_options(tmp_path):
    words = ["--channels", "8", "--num-blocks", "2", "--objective", "psd"]
    options = digits_options(*words, "--both-directions", "--out", str(tmp_path))
    recipe = recipe_of(digits, options)
    flow_map = fd.FlowMap(recipe.network(key=jr.key(3)), time_range=(0.0, 1.0))
    config = _maps.config_of(recipe, options)
    fd.train.save(tmp_path / "map.safetensors", config, flow_map)
    found, loaded = command.load_map(tmp_path, digits.presets())
    own = {"step": 1500, "average": "0.998"}
    assert found == json.loads(json.dumps(config)) | own
    assert jax.tree_util.tree_structure(loaded) == jax.tree_util.tree_structure(flow_map)
    for ours, theirs in zip(
        *map(jax.tree_util.tree_leaves, (loaded, flow_map)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_maps_of_checkpoints_and_averages(tmp_path):
    decays = (0.9, fd.train.PowerAverage(0.1))
    small = lambda shape, key: fd.nn.Ravelled(fd.nn.MLP(64, 4, 1, key=key))
    lsd = dataclasses.replace(
        digits.self_distilled(), ema_decay=decays,
        architecture=functools.partial(small, shape=(8, 8, 1)),
    )  # fmt: skip
    presets, options = {"lsd": lsd}, digits_options("--out", str(tmp_path))
    recipe = _presets.with_options(lsd, options)
    state = fd.train.TrainState.create(
        _maps.untrained(recipe, options, None), recipe.optim(), key=jr.key(0),
        objective=recipe.objective, ema_decay=decays,
    )  # fmt: skip
    bias = lambda flow_map: flow_map.net.net.first.bias
    with fd.train.Run(tmp_path, _maps.config_of(recipe, options)) as run:
        for step in (3, 5):
            # The first biases tell the step and the average.
            like = jnp.ones_like(bias(state.flow_map))
            marked = lambda s: (s.step, *map(bias, s.averages))
            values = (jnp.asarray(step), step * like, 10 * step * like)
            run.save(eqx.tree_at(marked, state, values), {})
            run.wait()
    for chosen, step, average, value in [
        ({"step": 3}, 3, "0.9", 3),
        ({"step": 3, "average": 0.1}, 3, "0.1", 30),
        ({"average": 0.9}, 5, "0.9", 5),
        ({"step": 5, "average": 0.1}, 5, "0.1", 50),
    ]:
        config, found = command.load_map(tmp_path, presets, **chosen)
        assert (config["step"], config["average"]) == (step, average)
        assert set(bias(found).ravel().tolist()) == {value}
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4; .*\[3, 5\]"):
        command.load_map(tmp_path, presets, step=4)
    with pytest.raises(ValueError, match=r"--average must be one of 0.9, 0.1; got 0.5"):
        command.load_map(tmp_path, presets, average=0.5)


def without_training(monkeypatch):
    """Runs end at once, with the map that they begin with."""
    keep = lambda recipe, options, flow_map, *_: types.SimpleNamespace(ema_map=flow_map)
    monkeypatch.setattr(_run, "train", keep)


def test_a_run_goes_on_with_its_own_images_and_teacher(tmp_path, monkeypatch):
    without_training(monkeypatch)
    words = [*SMALL, "--steps", "2", "--features", "random", "--do", "train"]
    words += ["--out", str(tmp_path)]
    digits.main(words)
    digits.main(words)
    images, held_out = digits.load()
    images.images[700, 3, 3] ^= 1
    with monkeypatch.context() as other:
        other.setattr(digits, "load", lambda: (images, held_out))
        # That of the teacher, which comes first.
        with pytest.raises(SystemExit, match="`training_images` is [0-9a-f]{16} there"):
            digits.main(words)
    config, teacher = command.load_map(tmp_path / "teacher", digits.presets())
    teacher = jax.tree.map(lambda x: x + 0.1 if eqx.is_array(x) else x, teacher)
    fd.train.save(tmp_path / "other" / "map.safetensors", config, teacher)
    named = ["--preset", "lmd", "--teacher", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="`teacher_weights` is [0-9a-f]{16} there"):
        digits.main([*words, *named])
    # Nor are its scores compared with another teacher's.
    with pytest.raises(SystemExit, match="other did not teach the map in"):
        digits.main([*words, *named, "--do", "grid"])
    with pytest.raises(SystemExit, match="has a run of `--preset lmd`, not of lsd"):
        digits.main([*words, "--preset", "lsd", "--do", "grid"])
    # Taken by default, in the place where the run looks for it.
    saved = tmp_path / "other" / "map.safetensors"
    saved.replace(tmp_path / "teacher" / saved.name)
    with pytest.raises(SystemExit, match="teacher did not teach the map in"):
        digits.main([*words, "--do", "grid"])


def test_a_student_has_its_own_settings_and_its_teachers_weights(tmp_path):
    teacher = digits_options(*SMALL, "--preset", "teacher")
    recipe = recipe_of(digits, teacher)
    flow_map = fd.FlowMap(recipe.network(key=jr.key(3)), time_range=(0.0, 1.0))
    config = _maps.config_of(recipe, teacher)
    fd.train.save(tmp_path / "map.safetensors", config, flow_map)
    words = ["--preset", "lmd", "--teacher", str(tmp_path), "--precision", "bfloat16"]
    options = digits_options(*SMALL, *words)
    recipe = recipe_of(digits, options)
    start = _maps.untrained(recipe, options, flow_map)
    assert start.net.dtype == jnp.bfloat16 and flow_map.net.dtype != jnp.bfloat16
    np.testing.assert_array_equal(start.net.first.weight, flow_map.net.first.weight)
    words += ["--out", str(tmp_path / "run"), "--channels", "16"]
    refused(digits, words, "of another size.*same --channels")


@pytest.mark.parametrize(
    ("script", "preset", "message"),
    [
        (digits, "teacher", "is of the script digits, preset teacher: another script's"),
        (imagenet32, "class-teacher", "whose num_classes is 1000; .*-lmd has None"),
    ],
)
def test_a_teacher_of_another_flow(script, preset, message, tmp_path):
    made = script.presets()
    options = command.parse(script.__name__, "", made, preset, SMALL)
    recipe = recipe_of(script, options)
    flow_map = fd.FlowMap(recipe.network(key=jr.key(3)), time_range=(0.0, 1.0))
    config = _maps.config_of(recipe, options)
    fd.train.save(tmp_path / "map.safetensors", config, flow_map)
    words = [*SMALL, "--preset", "lmd", "--teacher", str(tmp_path)]
    refused(imagenet32, words, message)


def test_samplers_agree_on_an_exact_map():
    flow_map, x0 = GAUSSIAN, jr.normal(jr.key(0), (6, 1))
    one, calls = _samplers.by_jumps(flow_map, 4)(x0, None, None)
    two, evaluations = _samplers.by_tsit5(flow_map.velocity, 1e-8)(x0, None, None)
    assert_close(one, two, 1e-6)
    assert calls == 4 and evaluations > 6
    drawn, mean, seconds = _samplers.draw_all(
        _samplers.by_jumps(flow_map, 2), x0, None, 4, x0.sharding
    )
    assert drawn.shape == x0.shape and drawn.dtype == np.uint8
    assert mean == 2 and seconds > 0


def test_samples_that_are_no_numbers_are_not_scored():
    broken = lambda x0, labels, key: (x0.at[1].set(jnp.nan), 1)
    x0 = jnp.zeros((4, 8, 8, 1))
    with pytest.raises(ValueError, match="1 of 4 images hold values that are not fin"):
        _samplers.draw_all(broken, x0, None, 4, x0.sharding)


GAUSSIAN = fd.exact.GaussianFlowMap(fd.LinearInterpolant(), base_std=1.0, target_std=0.5)


def test_restarts_keep_the_distribution():
    x0 = jr.normal(jr.key(0), (10_000, 1))
    draw = _samplers.by_restarts(GAUSSIAN, digits.self_distilled(), (0.3, 0.6))
    x1, calls = draw(x0, None, jr.key(1))
    # Standard errors of 10,000 draws: 0.005 of the mean, 0.0035 of the deviation.
    assert calls == 3 and abs(float(x1.mean())) < 0.02
    assert abs(float(x1.std()) - 0.5) < 0.014


def written(folder):
    """The scores in a folder, without what differs from one time to the next."""
    rows = fd.images.read_scores(folder)
    about = ("date", "versions", "device")
    return [{name: row[name] for name in row if name not in about} for row in rows]


def test_scores_and_pictures_of_an_exact_map(tmp_path, capsys):
    options = digits_options(
        "--out", str(tmp_path), "--num-samples", "80", "--sample-batch", "40",
        "--features", "random", "--jumps", "1", "4", "--ode", "1e-5",
    )  # fmt: skip
    recipe, (train, test) = recipe_of(digits, options), digits.load()
    scorer = _scores.Scorer(options, train, test)
    config = {"preset": "lsd", "step": 9, "average": "0.998"}
    rows = _scores.score(recipe, options, config, GAUSSIAN, None, scorer)
    assert rows == written(tmp_path)
    tsit5, one, four, held_out = rows
    assert (one["step"], one["average"], one["seed"]) == (9, "0.998", 0)
    assert one["config"] == {"preset": "lsd"}
    assert one["weights"] == fd.train.fingerprint(GAUSSIAN)
    # Scores of one map are not in the way of those of another.
    _scores.score(recipe, options, config | {"step": 10}, GAUSSIAN, None, scorer)
    assert [row["step"] for row in fd.images.read_scores(tmp_path)] == [9] * 4 + [10] * 4
    assert tsit5["sampler"] == "Tsit5 on its own velocity" and tsit5["coupling"] == 0
    assert (one["evaluations"], four["evaluations"]) == (1, 4) and one["coupling"] < 0.01
    # Noise is further from the digits than digits are.
    assert held_out["frechet"] < one["frechet"]
    lines = _scores.table(rows).splitlines()
    assert len(lines) == 6 and lines[-1].startswith("| held-out images |  |  | ")
    _pictures.grid(recipe, options, GAUSSIAN, None, train)
    assert _pictures.inversion(recipe, options, GAUSSIAN, test) < 1e-4
    assert "8 of 8 images were solved for" in capsys.readouterr().out
    both = dataclasses.replace(options, both_directions=True)
    assert _pictures.inversion(recipe, both, GAUSSIAN, test) < 1e-4
    for name in ("samples.png", "inversion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_scores_during_training_have_the_settings_of_the_options(tmp_path, monkeypatch):
    options = digits_options(
        *SMALL, "--out", str(tmp_path), "--features", "random", "--score-every", "7",
        "--score-samples", "80", "--jumps", "1", "--steps", "14", "--seed", "5",
    )  # fmt: skip
    recipe, (train, test) = recipe_of(digits, options), digits.load()
    flow_map = _maps.untrained(recipe, options, None)
    state = fd.train.TrainState.create(
        flow_map, recipe.optim(), key=jr.key(0), objective=recipe.objective,
        ema_decay=recipe.ema_decay,
    )  # fmt: skip
    calls = []

    def fit(*args, on_report, **kwargs):
        calls.extend(on_report)
        return state

    monkeypatch.setattr(_train, "fit", fit)
    folder = fd.train.Run(tmp_path, _maps.config_of(recipe, options))
    scorer = _scores.Scorer(options, train, test)
    _train.train(recipe, options, flow_map, None, train, scorer, folder)
    _, curves = calls
    assert curves(state, {"step": 6}) is None
    assert curves(state, {"step": 7})["scored_step"] == 7
    row, other = fd.images.read_scores(tmp_path)
    assert row["num_samples"] == row["num_held_out"] == 80 and row["seed"] == 5
    assert (row["average"], other["average"]) == ("0.998", "0.9")
    assert row["num_reference"] == len(train) and row["weights"] == other["weights"]
    config, best = command.load_map(tmp_path, digits.presets(), step="best")
    assert (config["step"], config["average"]) == (7, "0.998")
    assert fd.train.fingerprint(best) == row["weights"]
    with pytest.raises(FileNotFoundError, match="with `--score-every` first"):
        command.load_map(tmp_path / "x", digits.presets(), step="best")


# --- whole runs -----------------------------------------------------------------------

SHORT = [
    *SMALL, "--steps", "2", "--report-every", "1", "--save-every", "2", "--grid-every",
    "2", "--jumps", "1", "--num-samples", "80", "--sample-batch", "40", "--features",
    "random",
]  # fmt: skip


@pytest.mark.slow
def test_teacher_then_distillation_then_scores_again(tmp_path):
    folder = lambda name: ["--out", str(tmp_path / name)]
    rows = digits.main([*SHORT, *folder("s")])
    assert (tmp_path / "s" / "teacher" / "map.safetensors").exists()
    names = ["Tsit5 on the teacher", "1 jump", "held-out images"]
    assert [row["sampler"] for row in rows] == names
    assert rows == written(tmp_path / "s")
    for name in ("samples.png", "inversion.png", "samples/samples-2.png"):
        assert (tmp_path / "s" / name).stat().st_size > 1000
    again = digits.main(
        [*SHORT, "--preset", "lmd", "--teacher", str(tmp_path / "s" / "teacher"),
         *folder("s"), "--do", "scores", "--restarts", "0.5", "--guidance", "1.5"]
    )  # fmt: skip
    assert [row["sampler"] for row in again][2] == "1 jump, restarts at 0.5"
    assert again[1]["frechet"] != rows[1]["frechet"]
    # The last checkpoint has the final map.
    (one, _) = digits.main(
        [*SHORT, *folder("s"), "--do", "grid", "scores", "--at-step", "2", "--average",
         "0.998", "--ode", "None"]
    )  # fmt: skip
    assert (one["step"], one["weights"]) == (2, rows[1]["weights"])
    assert (tmp_path / "s" / "samples-2-0.998.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["psd", "improved-meanflow"])
def test_siblings_train(preset, tmp_path):
    words = [*SHORT, "--preset", preset, "--out", str(tmp_path), "--do", "train"]
    digits.main(words)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert np.isfinite([json.loads(line)["loss"] for line in lines]).all()


@pytest.mark.slow
def test_smoke_with_stream_and_both_directions(tmp_path):
    words = [*SHORT, "--stream", "--both-directions", "--out", str(tmp_path)]
    # A solve is a loop, in which XLA's convolutions for CPUs are slow.
    rows = cifar10.main([*words, "--ode", "None", "--do", "train", "scores", "inversion"])
    assert np.isfinite(rows[0]["frechet"])


def script_of_page():
    """The script for your own images on the page about scale, as it stands there."""
    page = (pathlib.Path(digits.__file__).parents[1] / "docs" / "scale.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"__name__": "photographs"}
    exec(code, names)
    return types.SimpleNamespace(**names)


def test_the_script_of_the_page_reads_its_options():
    script = script_of_page()
    with pytest.raises(SystemExit, match="--data is needed"):
        script.main([*SMALL, "--preset", "psd"])
    with pytest.raises(SystemExit, match="No such file or directory: .absent."):
        script.main([*SMALL, "--data", "absent"])


@pytest.mark.slow
def test_the_script_of_the_page_trains_a_teacher_and_distils(tmp_path):
    words = [*SHORT, "--preset", "lmd", "--data", str(write_npz(tmp_path))]
    words += ["--num-blocks", "1", "--do", "train", "--out", str(tmp_path / "out")]
    script = script_of_page()
    script.main(words)
    config, _ = command.load_map(tmp_path / "out", script.presets)
    _, teacher = command.load_map(tmp_path / "out" / "teacher", script.presets)
    assert config["script"] == "photographs"
    assert config["teacher_weights"] == fd.train.fingerprint(teacher)
