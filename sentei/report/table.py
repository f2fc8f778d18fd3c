"""The Markdown table: one row per model, one column per thing that at least one of them has."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sentei.report import formats
from sentei.report.reading import Child, Key, Measurement, Report, number

MOST_PERPLEXITIES = 4


def markdown(report: Report) -> str:
    columns: list[list[str]] = [["model", "dense parent", *(child.label for child in report.children)]]
    columns.append(
        ["layer parameters removed", "0 %", *(formats.percent(c.removed("layer_parameters")) for c in report.children)]
    )
    for title, what, show in (("parameters", "parameters", formats.count), ("weights on disk", "bytes", formats.size)):
        columns.append([title, show(report.parent_size(what)), *(show(c.size(what)) for c in report.children)])
    for key in report.language()[:MOST_PERPLEXITIES]:
        columns.append([name(key), *(formats.measured(column.get(key)) for column in _measurements(report))])
    tasks = report.tasks()
    if len(tasks) == 1:
        columns.append([name(tasks[0]), *(formats.measured(column.get(tasks[0])) for column in _measurements(report))])
    elif tasks:
        means = [report.mean_accuracy(column) for column in _measurements(report)]
        shown = [formats.MISSING if mean is None else f"{100 * mean:.1f}" for mean in means]
        columns.append([f"mean accuracy of {len(tasks)} tasks", *shown])
    for title, quantity in (("prefill", "prefill"), ("first token", "first_token"), ("decode", "decode")):
        columns.append([f"{title} speed-up", "1", *(_speedup(child, quantity) for child in report.children)])
    memory = [formats.change(number(child.bench, "ratios", "peak_memory")) for child in report.children]
    columns.append(["peak memory", "", *memory])
    columns = [column for column in columns if any(value != formats.MISSING for value in column[2:])]
    rows = list(zip(*columns, strict=True))
    lines = [_row(rows[0]), _row(["---", *["---:"] * (len(columns) - 1)]), *(_row(row) for row in rows[1:])]
    return "\n".join(lines) + "\n\n" + _footer(report)


def _footer(report: Report) -> str:
    notes = []
    limits = sorted({dict(key[2])["limit"] for key in report.tasks() if "limit" in dict(key[2])})
    if limits:
        notes.append(f"Accuracies in percent, on the first {' or '.join(limits)} questions of each task.")
    if any(child.bench for child in report.children):
        notes.append(
            "Speed-ups are the median of interleaved rounds (lowest to highest; ideal: parameters touched per token)."
        )
    return _plain(" ".join(notes)) + "\n" if notes else ""


def _speedup(child: Child, quantity: str) -> str:
    low, median, high = (number(child.bench, "speedups", quantity, what) for what in ("min", "median", "max"))
    if median is None:
        return formats.MISSING
    ideal = ideal_speedup(child, quantity)
    spread = [] if low is None or high is None else [f"{low:.2f} to {high:.2f}"]
    return f"{formats.times(median)} ({'; '.join(spread + ([] if ideal is None else [f'ideal {ideal:.2f}']))})"


def ideal_speedup(child: Child, quantity: str) -> float | None:
    """What the weights touched promise: for the first token the LM head runs once, for the rest once per token."""
    what = "speedup_first_token" if quantity == "first_token" else "speedup"
    return number(child.bench, "ideal", what)


def name(key: Key) -> str:
    """A measurement in words: wikitext-2 perplexity, context 128."""
    metric, dataset, conditions = key
    said = dict(conditions)
    part = f" [{said['slice']}]" if "slice" in said else ""
    where = [f"{what} {said[what]}" for what in ("context", "stride") if what in said]
    return ", ".join([f"{dataset}{part} {metric}".strip(), *where])


def _measurements(report: Report) -> list[dict[Key, Measurement]]:
    return [report.parent_measurements, *(child.measurements for child in report.children)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(content: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    return (
        re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(content.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")
    )
