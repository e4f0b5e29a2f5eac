"""The scripts as processes: nothing starts JAX too early, and SLURM's lines work."""

import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import time

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from run_small import small

import flowdiffrax as fd
from flowdiffrax.images import command
from flowdiffrax.images.command import _maps, _presets

pytest.importorskip("tyro")
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import imagenet32  # noqa: E402


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | environment,
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


# --- before JAX starts ------------------------------------------------------------------

# Without a platform of this name, whatever starts a backend raises.
NO_BACKEND = {"JAX_PLATFORMS": "none_such"}

HELP = """
import pathlib, runpy, sys
for path in map(pathlib.Path, sys.argv[1:]):
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), "--help"]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        assert not end.code, (path, end.code)
    except RuntimeError as error:
        raise RuntimeError(f"{path} starts JAX before it has read its options") from error
"""


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_no_script_starts_jax_to_show_its_options(folder):
    scripts = sorted((ROOT / folder).glob("*.py"))
    done = run_python("-c", HELP, *scripts, **NO_BACKEND)
    assert done.returncode == 0, done.stderr[-2000:]


JOINS = """
import json, sys
import jax
import cifar10, digits, imagenet32

class Joined(Exception):
    pass

def initialize(*arguments):
    raise Joined

jax.distributed.initialize = initialize
for script in (cifar10, digits, imagenet32):
    data = [] if script is digits else ["--data", "absent"]
    for preset in script.presets():
        for more in ([], ["--objective", "consistency-training"]):
            line = ["--preset", preset, *data, "--distributed", *more]
            try:
                script.main(line)
            except Joined:
                print(script.__name__, preset)
    try:
        script.main(json.loads(sys.argv[1])[script.__name__])
    except Joined:
        print("a command of SLURM")
"""


def test_processes_join_before_anything_starts_jax():
    # With each preset, and with an objective whose times are an array.
    path = os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    commands = {
        name: shlex.split(line)[shlex.split(line).index(f"examples/{name}.py") + 1 :]
        for name, line in printed_commands().items()
    }
    done = run_python("-c", JOINS, json.dumps(commands), **NO_BACKEND, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("a command of SLURM\n") == 3
    number = 3 + 2 * (1 + len(fd.images.recipes()) - len(["checkerboard-lsd"]) + 5)
    assert len(done.stdout.splitlines()) == number


# --- SLURM ------------------------------------------------------------------------------

# Stands in for SLURM: two tasks on this machine, each told what SLURM tells it.
SRUN = """#!/bin/bash
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" >"task$task.txt" 2>&1 &
  echo $! >"task$task.pid"
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
STEPS = 16
TOY = (
    "--channels 8 --num-blocks 1 --batch-size 8 --report-every 1 --save-every 1000 "
    "--grid-every 1000 --jumps 1 --no-checksums --steps"
)


def printed_commands():
    """The commands of `srun` on the page, by the script that they run."""
    page = (ROOT / "docs" / "scale.md").read_text().replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith("srun ")]
    return {re.search(r"examples/(\w+)\.py", line)[1]: line for line in lines}


def write_cifar10(folder):
    rng = np.random.default_rng(0)
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
            records = rng.integers(0, 256, (2, 1 + 3072), np.uint8)
            records[:, 0] %= 10
            (folder / name).write_bytes(records.tobytes())
            archive.add(folder / name, f"cifar-10-batches-bin/{name}.bin")
    return path


def write_imagenet32(folder):
    """The images, and the teacher that the page names."""
    rng = np.random.default_rng(0)
    for name in [*(f"train_data_batch_{k}" for k in range(1, 11)), "val_data"]:
        data = rng.integers(0, 256, (2, 3072), np.uint8)
        np.savez(folder / f"{name}.npz", data=data, labels=rng.integers(1, 1001, 2))
    words = ["--channels", "8", "--num-blocks", "1"]
    made = imagenet32.presets()
    options = command.parse("imagenet32", "", made, "class-teacher", words)
    recipe = _presets.with_options(made["class-teacher"](), options)
    teacher = fd.FlowMap(small(recipe, key=jr.key(0)), time_range=(0.0, 1.0))
    # The tests have float64, and the scripts have not.
    single = lambda x: x.astype("float32") if eqx.is_inexact_array(x) else x
    fd.train.save(
        folder / "out" / "imagenet32-class-teacher" / "map.safetensors",
        _maps.config_of(recipe, options),
        jax.tree.map(single, teacher),
    )
    return folder


def free_job():
    """A number for the job whose port, which JAX derives from it, is free."""
    for number in range(os.getpid() % 4096, 8192):
        with socket.socket() as free:
            try:
                free.bind(("localhost", 61_440 + number % 4096))
            except OSError:
                continue
            return str(number)
    raise AssertionError("no port is free")


class Cluster:
    """A folder in which the page's commands run as they stand, on small networks."""

    def __init__(self, folder, data):
        self.folder = folder
        (folder / "examples").symlink_to(ROOT / "examples")
        tools = folder / "tools"
        tools.mkdir()
        words = shlex.join([sys.executable, str(ROOT / "tests/images/run_small.py")])
        python = f'#!/bin/bash\nexec {words} "$@"\n'
        for name, text in (("srun", SRUN), ("python", python)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "DATA": str(data),
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            # The run that goes on has compiled it all before.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, command):
        return subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder,
            env=self.environment | {"SLURM_JOB_ID": free_job()},
        )  # fmt: skip

    def signal(self, task, number):
        os.kill(int((self.folder / f"task{task}.pid").read_text()), number)

    def kill(self, job):
        if job.poll() is None:
            for task in (0, 1):
                self.signal(task, signal.SIGKILL)

    def said(self):
        files = sorted(self.folder.glob("task*.txt"))
        return "\n".join(file.read_text()[-2000:] for file in files)


def prepared(script, folder):
    """A cluster, the command that the page prints for it, and the folder of its run."""
    write = {"cifar10": write_cifar10, "imagenet32": write_imagenet32}.get(script)
    cluster = Cluster(folder, write(folder) if write else "")
    command = printed_commands()[script]
    preset = re.search(r"--preset (\S+)", command)[1]
    return cluster, f"{command} {TOY}", folder / "out" / f"{script}-{preset}"


def check_run(run, steps):
    """Every step once, and a map at the end."""
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [*range(1, steps + 1)]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert (run / "map.safetensors").is_file()


def test_printed_command_of_slurm_trains(tmp_path):
    cluster, command, run = prepared("cifar10", tmp_path)
    job = cluster.start(f"{command} 3")
    try:
        assert job.wait(300) == 0, cluster.said()
    finally:
        cluster.kill(job)
    check_run(run, 3)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["digits", "cifar10", "imagenet32"])
def test_printed_command_of_slurm_is_stopped_and_goes_on(script, tmp_path):
    cluster, command, run = prepared(script, tmp_path)
    command = f"{command} {STEPS}"
    job = cluster.start(command)
    try:
        metrics = run / "metrics.jsonl"
        late = time.monotonic() + 300
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
            assert job.poll() is None and time.monotonic() < late, cluster.said()
            time.sleep(0.01)
        # JAX looks for the signal once a second: without the other task, no step is made
        # meanwhile, however fast the machine.
        cluster.signal(1, signal.SIGSTOP)
        cluster.signal(0, signal.SIGTERM)
        time.sleep(2)
        cluster.signal(1, signal.SIGCONT)
        assert job.wait(300) == 128 + signal.SIGTERM, cluster.said()
        (stopped,) = fd.train.Run(run, json_config(run)).steps
        assert 2 <= stopped < STEPS and not (run / "map.safetensors").exists()
        job = cluster.start(command)
        assert job.wait(300) == 0, cluster.said()
    finally:
        cluster.kill(job)
    check_run(run, STEPS)
    for task in (0, 1):
        assert f"{stopped}/{STEPS}" in (tmp_path / f"task{task}.txt").read_text()


def json_config(run):
    return json.loads((run / "config.json").read_text())["config"]
