"""Signatures of Equinox modules: their fields are the arguments of `__init__`."""

import re
from typing import Any

import griffe


class ModuleSignatures(griffe.Extension):
    """Gives each class of fields the `__init__` that Equinox writes for it."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        del kwargs
        for cls in list(_classes(pkg)):
            parameters = _parameters(cls)
            if parameters and "__init__" not in cls.members and not _is_tuple(cls):
                this = griffe.Parameter("self", kind=_KIND)
                init = griffe.Function(
                    "__init__", parameters=griffe.Parameters(this, *parameters.values())
                )
                cls.set_member("__init__", init)


_KIND = griffe.ParameterKind.positional_or_keyword


def _classes(parent: griffe.Module | griffe.Class):
    for member in parent.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Class):
            yield member
        elif isinstance(member, griffe.Module):
            yield from _classes(member)


def _is_tuple(cls: griffe.Class) -> bool:
    return any("NamedTuple" in str(base) for base in cls.bases)


def _parameters(cls: griffe.Class) -> dict[str, griffe.Parameter]:
    found: dict[str, griffe.Parameter] = {}
    for parent in reversed(cls.mro()):
        found.update(_parameters(parent))
    for name, member in cls.members.items():
        is_field = isinstance(member, griffe.Attribute) and member.annotation is not None
        if not is_field or "instance-attribute" not in member.labels:
            continue
        if re.search("AbstractVar|ClassVar", str(member.annotation)):
            continue
        is_argument, default = _default(member.value)
        if is_argument:
            found[name] = griffe.Parameter(
                name, annotation=member.annotation, kind=_KIND, default=default
            )
        else:
            found.pop(name, None)
    return found


def _default(value: Any) -> tuple[bool, Any]:
    """Whether a field is an argument, and its default if it has one."""
    if not isinstance(value, griffe.ExprCall):
        return True, value
    function = str(value.function)
    if function == "stop_gradient_field":
        return True, value.arguments[0]
    if function != "eqx.field":
        return True, value
    settings = {argument.name: argument.value for argument in value.arguments}
    default = settings.get("default", settings.get("default_factory"))
    if isinstance(default, griffe.ExprLambda):
        default = default.body
    return settings.get("init") != "False", default
