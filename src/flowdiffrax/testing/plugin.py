"""A pytest plugin: each map that is named becomes a test.

```bash
pytest -p flowdiffrax.testing.plugin --flow-map "my_maps.py:learned --state 2"
```

The words are those of `python -m flowdiffrax.testing`. Give `--flow-map` once for each
map, or list the lines as `flow_maps` in pytest's settings:

```toml
[tool.pytest.ini_options]
addopts = ["-p", "flowdiffrax.testing.plugin"]
flow_maps = ["my_maps.py:learned --state 2 --budget 0.01"]
```
"""

import argparse
import shlex
from typing import Any

import pytest

from ._command import check_line, parser
from ._failure import IdentityError


def pytest_addoption(parser: Any) -> None:
    """Adds `--flow-map` and the setting `flow_maps`."""
    text = "a map, and how to check it, as for `python -m flowdiffrax.testing`"
    group = parser.getgroup("flow maps")
    group.addoption("--flow-map", action="append", default=[], metavar="LINE", help=text)
    parser.addini("flow_maps", text, type="linelist", default=[])


def pytest_collection_modifyitems(session: Any, config: Any, items: list) -> None:
    """Adds a test for each line."""
    lines = [*config.getini("flow_maps"), *config.getoption("flow_map")]
    items += [FlowMapItem.from_parent(session, name=line) for line in lines]


class FlowMapItem(pytest.Item):
    """A map whose identities are checked."""

    def runtest(self) -> None:
        """Checks it; the report of a map that passes is shown with `-rA`."""
        try:
            options = _parser().parse_args(shlex.split(self.name))
        except argparse.ArgumentError as error:
            raise ValueError(
                f"{error} See `python -m flowdiffrax.testing -h`."
            ) from error
        self.add_report_section("call", "flow map", str(check_line(options)))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """Shows what does not hold, without the stack of the search."""
        if excinfo.errisinstance((IdentityError, ImportError, OSError, ValueError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """The line is the name of the test."""
        return self.path, None, f"flow map: {self.name}"


def _parser() -> argparse.ArgumentParser:
    made = parser("--flow-map")

    def error(message):
        raise argparse.ArgumentError(None, message)

    made.error = error
    return made
