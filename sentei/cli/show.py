"""What the commands print: tables on stdout, progress on stderr."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

SECONDS_BETWEEN_LINES = 5.0


def sizes(parent: dict[str, Any], child: dict[str, Any]) -> str:
    """Before and after, a line each. A .gguf parent is mostly quantised: its file is not what to compare bytes with."""
    before_bytes, name = parent["bytes"], "weights on disk"
    if str(parent["path"]).endswith(".gguf"):
        before_bytes, name = child["bytes"] / child["parameters"] * parent["parameters"], "in one dtype"
    lines = []
    for label, before, after, unit in (
        ("parameters", parent["parameters"], child["parameters"], "M"),
        ("of the layers", parent["layer_parameters"], child["layer_parameters"], "M"),
        (name, before_bytes, child["bytes"], "MB"),
    ):
        change = f"{before / 1e6:9.1f} {unit} -> {after / 1e6:.1f} {unit}  ({after / before - 1:+.1%})"
        lines.append(f"{label:16}{change}")
    if before_bytes != parent["bytes"]:
        lines.append(f"{'':16}(the parent's own file, quantised: {parent['bytes'] / 1e6:.1f} MB)")
    return "\n".join(lines)


def adapter_sizes(record: dict[str, Any]) -> str:
    """What a search for PEFT modules kept, a line each."""
    parameters, metric, adapter = record["parameters"], record["metric"], record["adapter"]
    value = "not measured" if metric["value"] is None else f"{metric['value']:.4f} on {metric['rows']} rows"
    lines = [
        ("units", f"{len(record['living'])} of {len(record['units'])}"),
        ("parameters", f"{parameters['living']:,} of {parameters['supernet']:,} (budget {parameters['budget']:,})"),
        ("and the head", f"{parameters['head']:,}"),
        (metric["name"], value),
        ("modules", f"matched {adapter['pattern_check']['matched']}, {adapter['pattern_check']['others']} others"),
        ("expression", adapter["pattern"]),
        ("status", "; ".join([record["status"], *record["rejected"]])),
    ]
    return "\n".join(f"{label:16}{text}" for label, text in lines)


def print_measurements(measurements: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("model", "measured on", "metric", "value", box=None, pad_edge=False)
    for model, rows in measurements.items():
        for row in rows:
            how = [str(row["dataset"])]
            how += [f"context {row['context']}"] if row.get("context") else []
            how += ["BOS in every window" if row["bos"] == "every window" else "no BOS"] if row.get("bos") else []
            table.add_row(model, ", ".join(how), row["metric"], f"{row['value']:.4g}")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a log or a pipe has room for a line of its own each
    console.print(table)


def print_benchmark(result: dict[str, Any]) -> None:
    table = Table("", "parent", "small", "ratio", box=None, pad_edge=False)
    parent, child, ideal = result["parent"], result["child"], result["ideal"]
    for name, quantity in (("prefill", "tokens/s"), ("decode", "tokens/s")):
        key = f"{name}_tokens_per_second"
        if key in child:
            values = [f"{side[key]['median']:.1f}" for side in (parent, child)]
            table.add_row(
                f"{name} {quantity}", *values, f"{result[f'speedup_{name}']:.2f} (ideal {ideal['speedup']:.2f})"
            )
    if "first_token_seconds" in child:
        values = [f"{1000 * side['first_token_seconds']['median']:.0f}" for side in (parent, child)]
        table.add_row("first token ms", *values, f"{result['speedup_first_token']:.2f}")
    values = [f"{side['memory']['peak_bytes'] / 1e6:.0f}" for side in (parent, child)]
    table.add_row("peak memory MB", *values, f"{result['ratios']['peak_memory']:.2f}")
    Console().print(table)


class Progress:
    """Draws what the work reports on stderr: a bar with the time left on a terminal, else a line every few seconds.

    An event with a message alone is a line. With "step" and "of" it moves a bar; another "of" or an earlier step begins
    a new one.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: RichProgress | None = None
        self.of = self.step = self.first = 0
        self.started = self.printed = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def __call__(self, event: dict[str, Any]) -> None:
        message = str(event.get("message", ""))
        if not event.get("of"):
            self._close()
            self.console.print(message, markup=False, soft_wrap=True)
            return
        step, of = event["step"], event["of"]
        if of != self.of or step < self.step:
            self._close()
            self.started, self.of, self.first = time.monotonic(), of, step
        self.step = step
        if self.console.is_terminal:
            self._draw(step, of, message)
        elif time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            spent = self.printed - self.started
            done = step - self.first  # a run that goes on does not begin at 0
            left = f", {spent / done * (of - step):.0f} s left" if done and spent > 1 else ""
            self.console.print(f"{step}/{of} {message}{left}", markup=False, soft_wrap=True)

    def _draw(self, step: int, of: int, message: str) -> None:
        if self.bar is None:
            columns = (
                BarColumn(20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*columns, TextColumn("{task.description}", markup=False), console=self.console)
            self.bar.start()
            self.bar.add_task(message, total=of, completed=step)
        self.bar.update(self.bar.task_ids[0], completed=step, description=message)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.of, self.step = None, 0, 0
