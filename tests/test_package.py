"""The package as a whole: light imports, documented names, abstract or final classes."""

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import equinox as eqx
import pytest

import flowdiffrax as fd
import flowdiffrax.testing

ROOMS = {
    name: getattr(fd, name)
    for name in ("data", "exact", "metrics", "nn", "plot", "testing", "train")
}


def public(module):
    names = [name for name in vars(module) if not name.startswith("_")]
    return {name: getattr(module, name) for name in names}


NAMES = {
    f"{prefix}{name}": value
    for prefix, module in [("", fd), *((f"{key}.", room) for key, room in ROOMS.items())]
    for name, value in public(module).items()
    if not inspect.ismodule(value)
}
CLASSES = {name: value for name, value in NAMES.items() if inspect.isclass(value)}
MODULES = {
    name: value for name, value in CLASSES.items() if issubclass(value, eqx.Module)
}


def test_import_is_light():
    extras = {"tqdm", "matplotlib", "scipy.stats", "ott", "orbax", "pandas", "torch"}
    extras |= {"grain", "PIL", "pyarrow", "tensorboardX", "wandb", "hypothesis", "tyro"}
    code = f"import sys, flowdiffrax; print(sorted({extras!r} & set(sys.modules)))"
    # `python -c` would otherwise find whatever lies in the working directory.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_import_computes_nothing():
    # A backend that starts at import would take the device, and ignore later settings.
    # Optimistix 0.0.11, which Diffrax imports, starts one; later ones don't.
    code = (
        "import jax._src.xla_bridge as bridge;"
        "import diffrax; before = bridge.backends_are_initialized();"
        "import flowdiffrax; print(bridge.backends_are_initialized() and not before)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_one_meaning_for_a_name():
    found = {}
    for name, value in NAMES.items():
        first = found.setdefault(name.rpartition(".")[2], value)
        assert first is value, name


def test_typed():
    assert importlib.resources.files("flowdiffrax").joinpath("py.typed").is_file()


def test_version():
    assert fd.__version__ == importlib.metadata.version("flowdiffrax")


def test_names_are_ours():
    for name, value in NAMES.items():
        module = getattr(value, "__module__", "flowdiffrax")
        assert module.startswith("flowdiffrax"), name


@pytest.mark.parametrize("name", sorted({*NAMES} - {"__version__"}))
def test_documented(name):
    value = NAMES[name]
    # Of a class, not a docstring that is inherited or that a dataclass writes.
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text and len(text) > 20 and not text.startswith(f"{value.__name__}(")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_documented(room):
    assert ROOMS[room].__doc__


@pytest.mark.parametrize("name", MODULES)
def test_abstract_or_final(name):
    cls = MODULES[name]
    ours = [base for base in cls.__mro__[1:] if base.__module__.startswith("flowdiffrax")]
    for base in ours:
        assert base.__name__.lstrip("_").startswith("Abstract"), base
        assert inspect.isabstract(base) or eqx.is_abstract_module(base), base
    assert cls.__name__.startswith("Abstract") == inspect.isabstract(cls)
