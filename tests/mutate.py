"""Seeded mistakes: one line of the library changed, in a running process."""

import importlib
import inspect
import sys
import types

import jax
import pytest


def mutate(monkeypatch, name, line, mistake):
    """Replaces a function or class everywhere by one with a mistake."""
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    assert source.count(line) == 1, f"{line!r} is not a line of {name} any more"
    mutant = types.ModuleType(name)
    mutant.__dict__.update(__package__=module.__package__, __file__=module.__file__)
    exec(compile(source.replace(line, mistake), module.__file__, "exec"), vars(mutant))
    # Only what the line is part of is replaced, and classes keep their identity.
    changed = {}
    for key, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != name or not hasattr(value, "__name__"):
            continue
        mistaken = vars(mutant)[key]
        vars(mutant)[key] = value
        if line in inspect.getsource(value) and isinstance(value, type):
            for method, function in vars(mistaken).items():
                if method in vars(value) and inspect.isfunction(getattr(value, method)):
                    monkeypatch.setattr(value, method, function)
        elif line in inspect.getsource(value):
            changed[id(value)] = mistaken
    for other in [m for n, m in sys.modules.items() if n.startswith("flowdiffrax")]:
        for key, value in list(vars(other).items()):
            if id(value) in changed:
                monkeypatch.setattr(other, key, changed[id(value)])


def assert_noticed(monkeypatch, name, line, mistake, notices):
    """Compiles everything anew, with the mistake and after it."""
    jax.clear_caches()
    mutate(monkeypatch, name, line, mistake)
    with pytest.raises(AssertionError):
        notices()
    monkeypatch.undo()
    jax.clear_caches()
