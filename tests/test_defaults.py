"""Every default of the public interface, pinned in `data/defaults.txt`.

A default is changed in two places, on purpose. After a change, look at the difference:

    python tests/test_defaults.py > tests/files/defaults.txt
"""

import dataclasses
import enum
import inspect
import pathlib

import equinox as eqx
from test_package import NAMES, public

from flowdiffrax import testing

TESTING = {f"testing.{name}": value for name, value in public(testing).items()}
TABLE = pathlib.Path(__file__).parent / "files" / "defaults.txt"


def shown(value):
    """On one line, without addresses and without the settings of other libraries."""
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        inner = ", ".join(map(shown, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if eqx.is_array(value):
        low, high = float(value.min()), float(value.max())
        return f"{list(value.shape)} from {low:.4g} to {high:.4g}"
    if isinstance(value, enum.Enum):
        return str(value)
    if inspect.isroutine(value) or isinstance(value, type) or hasattr(value, "__name__"):
        return value.__name__
    own = type(value).__module__.startswith("flowdiffrax")
    if own and dataclasses.is_dataclass(value):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        inner = ", ".join(f"{name}={shown(field)}" for name, field in fields)
        return f"{type(value).__name__}({inner})"
    known = isinstance(value, bool | int | float | str | None)
    return repr(value) if known else f"{type(value).__name__}()"


def factories(value):
    """What the fields without a default value are made by."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    missing = dataclasses.MISSING
    return {f.name: f.default_factory for f in fields if f.default_factory is not missing}


def of_callable(name, value):
    made = factories(value)
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name in made:
            yield f"{name}({parameter.name}) = {shown(made[parameter.name]())}"
        elif parameter.default is not parameter.empty and parameter.name != "args":
            yield f"{name}({parameter.name}) = {shown(parameter.default)}"


def defaults():
    lines = set()
    for name, value in {**NAMES, **TESTING}.items():
        if (
            not callable(value)
            or isinstance(value, type)
            and issubclass(value, enum.Enum)
        ):
            continue
        lines |= {*of_callable(name, value)}
        for method in vars(value) if isinstance(value, type) else ():
            is_public = method == "__call__" or not method.startswith("_")
            bound = getattr(value, method)  # of whatever kind
            is_field = method in getattr(value, "__dataclass_fields__", ())
            if is_public and callable(bound) and not is_field:
                lines |= {*of_callable(f"{name}.{method}", bound)}
    return sorted(lines)


def test_defaults_are_those_of_the_table():
    table = TABLE.read_text().splitlines()
    gone, new = {*table} - {*defaults()}, {*defaults()} - {*table}
    assert not gone and not new, f"in the table: {gone}; in the library: {new}"


if __name__ == "__main__":
    print(*defaults(), sep="\n")
