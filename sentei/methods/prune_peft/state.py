"""What a killed search goes on from; written after the warm-up, after each round, and when it is found."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sentei.adapters import Unit
from sentei.atomic import write_text
from sentei.train import processes


class State:
    """Values that go into JSON, and the folder they go to; None keeps them in memory.

    Every process has the same values, but for times; the first one writes.
    """

    def __init__(self, folder: Path | None, values: dict[str, Any]):
        self.folder, self.values = folder, values

    @staticmethod
    def open(folder: Path | None, method: Any, space: list[Unit], data: str) -> State:
        """The state of a new search, or of the one that `folder` holds. ValueError where that is another search."""
        same = json.loads(json.dumps({"fields": asdict(method), "units": [asdict(u) for u in space], "data": data}))
        living = [unit.id for unit in space]
        start = {"of": same, "living": living, "rounds": [], "seconds": {}, "status": "searching"}
        if folder is None or not (folder / "state.json").exists():
            return State(folder, start)
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if values["of"] != same:
            old = values["of"]["fields"]
            fields = [name for name, value in same["fields"].items() if old.get(name) != value]
            raise ValueError(
                f"{folder} holds a search with other {', '.join(fields) or 'data or model'}; use another folder, or "
                "delete it"
            )
        return State(folder, values)

    def spend(self, phase: str, seconds: float) -> None:
        self.values["seconds"][phase] = self.values["seconds"].get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """All that happens inside counts as this phase."""
        begun = time.monotonic()
        yield
        self.spend(phase, time.monotonic() - begun)

    def save(self) -> None:
        if self.folder is None or not processes().is_main_process:
            return
        write_text(self.folder / "state.json", json.dumps(self.values))

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.folder is None or not processes().is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.folder / name)
