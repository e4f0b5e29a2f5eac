"""The scripts for images: options, forms of data, bad settings, and whole short runs."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

import flowdiffrax as fd

pytest.importorskip("tyro")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import cifar10  # noqa: E402
import digits  # noqa: E402
import image_runs  # noqa: E402
import imagenet32  # noqa: E402

SMALL = ["--channels", "8", "--batch-size", "8"]


def pictures(size=32, channels=3, number=20, **settings):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (number, size, size, channels), np.uint8)
    return fd.data.Images(values, np.arange(number) % 10, **settings)


def digits_options(*words):
    return image_runs.parse("digits", "", digits.presets(), "lsd", list(words))


# --- options --------------------------------------------------------------------------


def test_presets_are_the_recipes_of_the_data():
    names = set(fd.train.recipes())
    for script, prefix in ((cifar10, "cifar10-"), (imagenet32, "imagenet32-")):
        found = {prefix + name for name in script.presets()} - {"cifar10-smoke"}
        assert found == {name for name in names if name.startswith(prefix)}


def test_options_change_what_is_printed():
    options = digits_options(
        "--steps", "70", "--channels", "8", "--precision", "bfloat16", "--objective",
        "meanflow", "--both-directions",
    )  # fmt: skip
    recipe = image_runs.with_options(digits.presets()["lsd"], options)
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
    recipe = image_runs.with_options(digits.presets()["lsd"], options)
    with pytest.raises(SystemExit, match="learns from a teacher"):
        image_runs.check(recipe, options, digits.load()[0])
    own = image_runs.with_options(
        digits.presets()["lmd"], digits_options("--objective", "lsd")
    )
    assert own.teacher is None and not own.starts_from_teacher


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        cifar10.main(["--help"])
    shown = capsys.readouterr().out
    assert "align-your-flow" in shown and "--num-samples" in shown


@pytest.mark.parametrize(
    ("words", "images", "message"),
    [
        ([], pictures(8, 3), "for images of"),
        ([], pictures(8, 1, num_classes=12), "has 10 classes"),
        (["--accumulate", "3"], pictures(8, 1), "must divide the batch of 128"),
        (["--accumulate", "0"], pictures(8, 1), "--accumulate must be at least 1"),
        (["--steps", "0"], pictures(8, 1), "--steps must be at least 1"),
        (["--jumps", "2", "0"], pictures(8, 1), "--jumps must be at least 1"),
        (["--sample-batch", "0"], pictures(8, 1), "--sample-batch must be at least 1"),
        (["--preset", "lmd"], pictures(8, 1), "train `--preset teacher` first"),
        (["--features", "absent.pth"], pictures(8, 1), "no weights at absent.pth"),
    ],
)
def test_bad_settings_are_refused_before_training(words, images, message):
    options = digits_options(*words)
    recipe = image_runs.with_options(digits.presets()[options.preset], options)
    with pytest.raises(SystemExit, match=message):
        image_runs.check(recipe, options, images)


def test_guidance_needs_classes():
    options = image_runs.parse(
        "cifar10", "", cifar10.presets(), "smoke", ["--guidance", "2"]
    )
    with pytest.raises(SystemExit, match="--guidance needs a preset with classes; smoke"):
        image_runs.check(cifar10.presets()["smoke"], options, pictures())


@pytest.mark.parametrize("script", [imagenet32, cifar10])
def test_data_are_needed(script):
    with pytest.raises(SystemExit, match="--data is needed"):
        script.main(["--preset", "teacher"])


# --- forms of data --------------------------------------------------------------------


def write_npz(path):
    np.savez(path / "mine.npz", images=pictures().images, labels=np.arange(20) % 10)
    return path / "mine.npz"


def write_folders(path):
    for part, rows in (("train", slice(0, 18)), ("test", slice(18, 20))):
        fd.data.save_images(path / part, pictures()[rows])
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
    train, test = image_runs.load_split(write(tmp_path), fd.data.cifar10)
    assert len(train) == 18 and len(test) == 2
    together = np.concatenate([train.images, test.images]).reshape(20, -1)
    assert_close(np.sort(together.sum(axis=1)),
                 np.sort(pictures().images.reshape(20, -1).sum(axis=1)))  # fmt: skip


def test_the_archive_is_asked_for_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="CIFAR-10"):
        image_runs.load_split(tmp_path / "absent", fd.data.cifar10)


def test_digits_are_split_once():
    train, test = digits.load()
    assert (len(train), len(test)) == (1347, 450)
    rows = np.concatenate([train.images, test.images]).reshape(1797, -1)
    whole = fd.data.digits().images.reshape(1797, -1)
    assert_close(np.sort(rows @ np.arange(64)), np.sort(whole @ np.arange(64)))


# --- maps and samples -----------------------------------------------------------------


def test_a_saved_map_is_rebuilt_from_its_options(tmp_path):
    words = ["--channels", "8", "--num-blocks", "2", "--objective", "psd"]
    options = digits_options(*words, "--both-directions", "--out", str(tmp_path))
    recipe = image_runs.with_options(digits.presets()["lsd"], options)
    flow_map = fd.FlowMap(recipe.network(key=jr.key(3)), time_range=(0.0, 1.0))
    config = image_runs.config_of("digits", options, recipe)
    fd.train.save(tmp_path / "map.fdx", config, flow_map)
    loaded, found = image_runs.load_map(tmp_path, digits.presets())
    assert found == json.loads(json.dumps(config))
    assert jax.tree_util.tree_structure(loaded) == jax.tree_util.tree_structure(flow_map)
    for ours, theirs in zip(
        *map(jax.tree_util.tree_leaves, (loaded, flow_map)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_samplers_agree_on_an_exact_map():
    flow_map = fd.exact.GaussianFlowMap(
        fd.LinearInterpolant(), base_std=1.0, target_std=0.5
    )
    x0 = jr.normal(jr.key(0), (6, 1))
    one, calls = image_runs.by_jumps(flow_map, 4)(x0, None, None)
    two, evaluations = image_runs.by_tsit5(flow_map.velocity, 1e-8)(x0, None, None)
    assert_close(one, two, 1e-6)
    assert calls == 4 and evaluations > 6
    drawn, mean, seconds = image_runs.draw_all(
        image_runs.by_jumps(flow_map, 2), x0, None, 4
    )
    assert drawn.shape == x0.shape and drawn.dtype == np.uint8
    assert mean == 2 and seconds > 0


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
    assert (tmp_path / "s" / "teacher" / "map.fdx").exists()
    names = ["Tsit5 on the teacher", "1 jump", "held-out images"]
    assert [row["sampler"] for row in rows] == names
    assert rows == json.loads((tmp_path / "s" / "scores.json").read_text())
    for name in ("samples.png", "inversion.png", "samples/samples-2.png"):
        assert (tmp_path / "s" / name).stat().st_size > 1000
    again = digits.main(
        [*SHORT, "--preset", "lmd", "--teacher", str(tmp_path / "s" / "teacher"),
         *folder("s"), "--do", "scores", "--restarts", "0.5", "--guidance", "1.5"]
    )  # fmt: skip
    assert [row["sampler"] for row in again][2] == "1 jump, restarts at 0.5"
    assert again[1]["frechet"] != rows[1]["frechet"]


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
