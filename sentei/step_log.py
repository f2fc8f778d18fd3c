"""A file with one JSON object per line and step of a long run: for `tail -f` while it goes on, for plots afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentei.atomic import write_text


class StepLog:
    """Lines of a run, each with its "step"; a run that goes on after a stop writes the steps that it makes again anew.

    Args:
        path: of the file; None writes nothing.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self._opened = False

    def write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        if not self._opened:
            self._opened = True
            self._keep_before(entry["step"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _keep_before(self, step: int) -> None:
        """Forget the lines of this step and later ones, of a killed run or of another one."""
        assert self.path is not None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        write_text(self.path, "".join(f"{line}\n" for line in lines if _step(line) < step))


def _step(line: str) -> float:
    """Of a line; one that a kill cut short has none that counts."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
