"""What the scripts here share: a table written whole after each row, mean and spread, and peak memory."""

from __future__ import annotations

import json
import math
import resource
import statistics
from pathlib import Path
from typing import Any


def write(out: Path, table: dict[str, Any]) -> None:
    """Whole or not at all: a script that is stopped leaves the rows it has made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(out)


def spread(values: list[float], digits: int = 1, count: bool = True) -> str:
    """Mean ± standard deviation of the finite values, and their number; empty without any."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" + (f" (n={len(values)})" if count else "")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Peak resident megabytes since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
