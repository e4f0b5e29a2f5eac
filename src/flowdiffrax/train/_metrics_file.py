"""A file with one line of JSON for each report."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from .._io import write_whole
from ._json import plain


class MetricsFile:
    def __init__(self, path: pathlib.Path):
        self._path = path

    def append(self, report: Mapping[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(_line(plain(report, "report")))

    def read(self) -> list[dict[str, Any]]:
        """**Raises:** `ValueError` if a line other than the last is not a report."""
        if not self._path.is_file():
            return []
        lines, reports = self._path.read_text().split("\n"), []
        for number, line in enumerate(lines, 1):
            try:
                reports += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                # The last line is incomplete if the run was killed while writing it.
                if number < len(lines):
                    raise ValueError(
                        f"Line {number} of {self._path} is not a report: {error}. "
                        "Remove it to continue."
                    ) from error
        return reports

    def cut_after(self, step: int) -> None:
        """Removes the reports of later steps, which will be made again."""
        if self._path.is_file():
            kept = [report for report in self.read() if report["step"] <= step]
            write_whole(self._path, "".join(map(_line, kept)).encode())


def _line(report: dict[str, Any]) -> str:
    return json.dumps(report) + "\n"
