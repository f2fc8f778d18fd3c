"""What the scripts here share: flags, a table written whole after each row, mean and spread, and peak memory."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sentei.atomic import write_text


def flags(doc: str | None, out: str | None = None) -> argparse.ArgumentParser:
    """The flags of every table: where it is (required without a default), and printing the one that is there."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", default=out, required=out is None)
    made.add_argument("--markdown", action="store_true", help="print the table of an existing file and stop")
    return made


def printed(args: argparse.Namespace, markdown: Callable[[dict[str, Any]], str]) -> bool:
    """Whether only the table of an existing file was asked for; it is printed then."""
    if args.markdown:
        print(markdown(json.loads(Path(args.out).read_text())))
    return args.markdown


def name_of(model: str) -> str:
    """A folder's or file's last part; a hub id whole."""
    return Path(model).name if Path(model).exists() else model


def resumed(out: Path, asked: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """The table in a file, or a new one with the settings that are asked for and no rows (or what `empty` names).

    Raises:
        SystemExit: its rows were made with other settings; says which.
    """
    if not out.exists():
        return (empty or {"rows": []}) | asked
    table = json.loads(out.read_text())
    different = []
    for part, value in asked.items():
        old = table.get(part)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            old, value = {part: old}, {part: value}
        for name in dict.fromkeys([*old, *value]):
            if old.get(name) != value.get(name):
                different.append(f"{name} {old.get(name)!r} there, {value.get(name)!r} here")
    if different:
        raise SystemExit(f"{out} was made with other settings ({'; '.join(different)}); give another --out")
    return table


def made_on() -> dict[str, Any]:
    """The machine and the version of what computes, of whoever adds rows last."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"machine": machine, "versions": {"torch": torch.__version__}}


def write(out: Path, table: dict[str, Any]) -> None:
    """Whole or not at all: a script that is stopped leaves the rows it has made."""
    write_text(out, json.dumps(table, indent=1) + "\n")


def add(out: Path, table: dict[str, Any], row: dict[str, Any], *silent: str) -> None:
    """Append a row, write the table, and print the row without its `silent` parts."""
    table["rows"].append(row)
    write(out, table)
    print(json.dumps({key: row[key] for key in row if key not in silent}), flush=True)


def shown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A title and a Markdown table under it."""
    head = [title, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


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
