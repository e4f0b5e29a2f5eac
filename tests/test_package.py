"""The package as a whole: light imports, documented names, abstract or final classes."""

import ast
import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import equinox as eqx
import pytest

import flowdiffrax as fd
import flowdiffrax.testing

ALL = {name: getattr(fd, name) for name in dir(fd)}
ROOMS = {
    name: value
    for name, value in ALL.items()
    if inspect.ismodule(value) and value.__name__ == f"flowdiffrax.{name}"
    if not name.startswith("_")
}
ROOMS["images.command"] = fd.images.command
TOP = {name: value for name, value in ALL.items() if not inspect.ismodule(value)}
TOP = {name: value for name, value in TOP.items() if not name.startswith("_")}


def public(module):
    names = getattr(module, "__all__", vars(module))
    named = {name: getattr(module, name) for name in names if not name.startswith("_")}
    return {name: v for name, v in named.items() if not inspect.ismodule(v)}


# By the name in the documentation: the shortest.
NAMES = TOP | {
    f"{room}.{name}": value
    for room, module in ROOMS.items()
    for name, value in public(module).items()
    if name not in TOP
}
CLASSES = [value for value in NAMES.values() if inspect.isclass(value)]


# With everything that is imported later.
IMPORT = "import flowdiffrax as fd; [getattr(fd, name) for name in dir(fd)]"


def test_import_is_light():
    extras = {"tqdm", "matplotlib", "scipy.stats", "ott", "orbax", "pandas", "torch"}
    extras |= {"grain", "PIL", "pyarrow", "tensorboardX", "wandb", "hypothesis", "tyro"}
    code = f"{IMPORT}; import sys; print(sorted({extras!r} & set(sys.modules)))"
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
        f"{IMPORT}; print(bridge.backends_are_initialized() and not before)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_namespaces_are_imported_when_they_are_used():
    code = (
        "import sys, flowdiffrax as fd; names = lambda: {name.split('.')[1] for name in "
        "sys.modules if name.startswith('flowdiffrax.')}; before = names();"
        "fd.identities; print(before, 'flow_maps' in names(), 'solvers' in names())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set() True False"


def test_type_checkers_see_the_same_names():
    (branch, *_) = [
        node for node in ast.parse(inspect.getsource(fd)).body if isinstance(node, ast.If)
    ]
    seen = {alias.asname: node.module for node in branch.body for alias in node.names}
    rooms = {name for name, module in seen.items() if module is None}
    assert rooms == {*ROOMS} - {"images.command", "testing"}
    assert {*seen} - rooms == {*TOP}
    for name in TOP:
        assert getattr(ROOMS[seen[name]], name) is TOP[name]


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


def test_few_names_at_the_top():
    assert len(TOP) + len(ROOMS) <= 60
    for name, value in TOP.items():
        assert any(public(room).get(name) is value for room in ROOMS.values()), name


def test_a_name_that_is_in_a_namespace_says_so():
    with pytest.raises(AttributeError, match=r"`flowdiffrax\.objectives\.MeanFlow`"):
        fd.MeanFlow  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'$"):
        fd.nothing  # noqa: B018
    assert not hasattr(fd, "__all__")


def test_documented():
    for name, value in NAMES.items():
        # Of a class, not a docstring that is inherited or that a dataclass writes.
        text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert text and len(text) > 20, name
        assert not text.startswith(f"{value.__name__}("), name
    for name, room in ROOMS.items():
        assert room.__doc__, name


def test_abstract_or_final():
    for cls in CLASSES:
        if not issubclass(cls, eqx.Module):
            continue
        bases = cls.__mro__[1:]
        for base in (base for base in bases if base.__module__.startswith("flowdiffrax")):
            assert base.__name__.lstrip("_").startswith("Abstract"), base
            assert inspect.isabstract(base) or eqx.is_abstract_module(base), base
        assert cls.__name__.startswith("Abstract") == inspect.isabstract(cls), cls
