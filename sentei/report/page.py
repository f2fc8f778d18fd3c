"""The HTML page: its frame, what is seen at first glance, and the notes at its end; the rest is in sections.py."""

from __future__ import annotations

import time
from typing import Any

from sentei.report import depth, formats, plots, sections
from sentei.report.markup import dot, esc, minus, pairs, row, section, sub, table_of
from sentei.report.reading import Child, Key, Report, dig, number, strings, text
from sentei.report.sections import QUANTITIES
from sentei.report.style import CSS
from sentei.report.table import ideal_speedup, name


def html(report: Report) -> str:
    """The whole page. No scripts, no addresses: the policy in its head also forbids what an escaping bug could add."""
    children = report.children
    parts = [
        _tiles(children[0], report) if len(children) == 1 else _overview(report),
        section("Quality", sections.quality(report)),
        section("Size and memory", sections.sizes(report)),
        section("Speed", sections.speed(report)),
        section("What was removed, and where", sections.removed(report)),
        section("Whole blocks", depth.blocks(report)),
        section("Quality against size", sections.quality_against_size(report)),
        section("The runs", sections.curves(report)),
        section("The same prompt, before and after", sections.samples(report)),
        section("How it was made", sections.made(report)),
        section("The way back", sections.way_back(report)),
        section("Read with care", _notes(report)),
    ]
    title = f"{_base(report.parent)} \N{RIGHTWARDS ARROW} {', '.join(child.label for child in children)}"
    heading = (
        title if len(children) <= 3 else f"{_base(report.parent)} \N{RIGHTWARDS ARROW} {len(children)} smaller models"
    )
    version = next((v for v in (text(child.compression, "sentei") for child in children) if v), None)
    made = f"sentei {version}" if version else "sentei"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(plots.short(title, 120))}</title><style>{CSS}</style></head>
<body><main>
<p class="eyebrow">compression report</p>
<h1>{esc(plots.short(heading, 160))}</h1>
<p class="lead">{_lead(report)}</p>
{"".join(parts)}
<footer>Made by {esc(made)} on {time.strftime("%Y-%m-%d")} from the JSON files beside the checkpoints.</footer>
</main></body></html>
"""


def _base(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or path


def _lead(report: Report) -> str:
    parts = [f"Dense parent <code>{esc(report.parent)}</code>"]
    if (parameters := report.parent_size("parameters")) is not None:
        parts.append(f"{formats.count(parameters)} parameters")
    if len(report.children) == 1:
        child = report.children[0]
        stages = " \N{RIGHTWARDS ARROW} ".join(text(stage, "method") or "?" for stage in child.stages)
        parts.append(f"child <code>{esc(child.path)}</code>")
        parts += [f"by {esc(stages)}"] if stages else []
    return " \N{MIDDLE DOT} ".join(parts)


# ----------------------------------------------------------------------------------------------------- first glance


def _tiles(child: Child, report: Report) -> str:
    tiles = [_tile("layer parameters removed", *_removed_in_words(child))]
    perplexity = next(iter(report.language()), None)
    if perplexity is not None:
        short_name, _, where = name(perplexity).partition(", ")
        value, under = _value_in_words(perplexity, child, report)
        tiles.append(_tile(short_name, value, f"{under}; {where}" if under and where else under or where))
    else:
        tiles.append(_tile("perplexity", None, ""))
    tasks = report.tasks()
    mean, dense = report.mean_accuracy(child.measurements), report.mean_accuracy(report.parent_measurements)
    if mean is not None:
        change = None if dense is None else formats.points(mean - dense)
        was = "" if dense is None else f"{100 * dense:.1f} \N{RIGHTWARDS ARROW} {100 * mean:.1f} %"
        tiles.append(_tile(f"mean accuracy of {len(tasks)} tasks", change or f"{100 * mean:.1f} %", was))
    elif tasks:
        tiles.append(_tile(name(tasks[0]), *_value_in_words(tasks[0], child, report)))
    for quantity, title in QUANTITIES:
        speedup = number(child.bench, "speedups", quantity, "median")
        if speedup is not None or quantity == "prefill":
            shown = None if speedup is None else formats.times(speedup)
            tiles.append(_tile(f"{title} speed-up", shown, _spread(child, quantity)))
    peak = number(child.bench, "ratios", "peak_memory")
    before, after = (number(child.bench, side, "memory", "peak_bytes") for side in ("parent", "child"))
    was = (
        ""
        if before is None
        else f"{formats.size(before)} \N{RIGHTWARDS ARROW} {formats.size(after)}, the whole process"
    )
    tiles.append(_tile("peak memory", None if peak is None else formats.change(peak), was))
    return f'<div class="tiles">{"".join(tiles)}</div>\n'


def _tile(what: str, value: str | None, under: str) -> str:
    none = "" if value is not None else " none"
    shown = "not measured" if value is None else value
    return f'<div class="tile{none}"><span class="what">{esc(what)}</span><b>{esc(shown)}</b>{sub(under)}</div>'


def _removed_in_words(child: Child) -> tuple[str | None, str]:
    layers, whole = child.removed("layer_parameters"), child.removed("parameters")
    if layers is None:
        return None, ""
    before, after = child.parent_size("parameters"), child.size("parameters")
    said = f"; {formats.percent(whole)} of the whole" if whole is not None else ""
    return formats.percent(layers), f"{formats.count(before)} \N{RIGHTWARDS ARROW} {formats.count(after)}{said}"


def _value_in_words(key: Key, child: Child, report: Report) -> tuple[str | None, str]:
    own, dense = child.measurements.get(key), report.parent_measurements.get(key)
    if own is None:
        return None, "" if dense is None else f"dense {formats.measured(dense)}"
    if dense is None:
        return formats.measured(own), "the dense parent was not measured"
    was = f"{formats.measured(dense)} \N{RIGHTWARDS ARROW} {formats.measured(own)}"
    return formats.compared(own, dense), was


def _overview(report: Report) -> str:
    """Several children: a row each, the numbers of the tiles as columns."""
    perplexity = next(iter(report.language()), None)
    tasks = report.tasks()
    dense = report.mean_accuracy(report.parent_measurements)
    head = ["", "layer parameters removed", "parameters", esc(name(perplexity)) if perplexity else "perplexity"]
    head += [f"mean accuracy of {len(tasks)} tasks"] if len(tasks) > 1 else []
    head += ["prefill speed-up", "decode speed-up", "peak memory"]
    cells = ["dense parent", "", formats.count(report.parent_size("parameters"))]
    cells.append(formats.measured(report.parent_measurements.get(perplexity)) if perplexity else formats.MISSING)
    cells += [formats.MISSING if dense is None else f"{100 * dense:.1f}"] if len(tasks) > 1 else []
    rows = [row([*cells, "", "", ""])]
    for position, child in enumerate(report.children):
        stages = " \N{RIGHTWARDS ARROW} ".join(text(stage, "method") or "?" for stage in child.stages)
        own = child.measurements.get(perplexity) if perplexity else None
        was = report.parent_measurements.get(perplexity) if perplexity else None
        line = [dot(position) + esc(child.label) + sub(plots.short(stages, 80))]
        line.append(formats.percent(child.removed("layer_parameters")))
        line.append(formats.count(child.size("parameters")) + sub(minus(child.removed("parameters"))))
        line.append(esc(formats.measured(own)) + sub(formats.compared(own, was) if own and was else ""))
        if len(tasks) > 1:
            mean = report.mean_accuracy(child.measurements)
            change = "" if mean is None or dense is None else formats.points(mean - dense)
            line.append((formats.MISSING if mean is None else f"{100 * mean:.1f}") + sub(change))
        for quantity in ("prefill", "decode"):
            speedup = number(child.bench, "speedups", quantity, "median")
            line.append(formats.times(speedup) + sub(_spread(child, quantity)))
        line.append(formats.change(number(child.bench, "ratios", "peak_memory")))
        rows.append(row(line))
    return section("At a glance", table_of(head, rows))


def _spread(child: Child, quantity: str) -> str:
    low, high = (number(child.bench, "speedups", quantity, what) for what in ("min", "max"))
    ideal = ideal_speedup(child, quantity)
    parts = [] if low is None or high is None else [f"{low:.2f} to {high:.2f}"]
    return "; ".join(parts + ([] if ideal is None else [f"ideal {formats.times(ideal)}"]))


def _notes(report: Report) -> str:
    notes: dict[str, None] = {}
    parents = {sha for sha in (text(child.compression, "parent", "sha256") for child in report.children) if sha}
    if len(parents) > 1:
        notes["The children come from parents with different weights: their rows are not comparable."] = None
    limits = {dict(key[2])["limit"] for key in report.rows() if "limit" in dict(key[2])}
    if limits:
        asked = " or ".join(sorted(limits))
        notes[f"Tasks were scored on a subset, the first {asked} questions: mind the standard errors."] = None
    if any("blocks" in dict(key[2]) for key in report.rows()):
        notes["Perplexity was taken on the number of blocks stated, which may be less than the whole test text."] = None
    if report.rows() and not any(key[0] == "acc" for key in report.rows()):
        notes[
            "Only perplexity was measured. A pruned model can keep its perplexity and lose abilities: score tasks too."
        ] = None
    for child in report.children:
        notes.update(dict.fromkeys(_child_notes(child)))
    listed = "".join(f"<li>{esc(plots.short(note, 600))}</li>" for note in notes)
    return f'<ul class="notes">{listed}</ul>' if listed else ""


def _child_notes(child: Child) -> list[str]:
    notes = []
    if not child.steps():
        notes.append(f"{child.label}: no log.jsonl, so no curves of its search or healing are shown.")
    if not child.generations:
        notes.append(
            f"{child.label}: no generation.json, so no text of its own is shown; a recipe with `prompts` writes one."
        )
    if child.bench:
        settings = child.bench.get("settings")
        notes.append(f"{child.label}: timed on {_machine(child.bench)}; {pairs(settings) or 'settings not recorded'}.")
        load, cores = (number(child.bench, "machine", what) for what in ("load_average_before", "cores"))
        if load is not None and cores and load > 0.5 * cores:
            busy = f"the machine was busy before the timing (load {load:.1f} on {cores:.0f} cores)"
            notes.append(f"{child.label}: {busy}; trust the ratios more than the speeds.")
    if child.measurements and isinstance(child.evaluation.get("machine"), dict):
        notes.append(f"{child.label}: evaluated on {_machine(child.evaluation)}.")
    for stage in child.stages:
        method = text(stage, "method") or "a stage"
        notes += [f"{child.label}, {method}: {said}" for said in strings(dig(stage, "record", "warnings"))[:20]]
    for source in (child.bench, child.evaluation, child.compression):
        notes += [f"{child.label}: {said}" for said in strings(source.get("notes"))[:20]]
    return notes


def _machine(content: dict[str, Any]) -> str:
    machine = dict(content["machine"]) if isinstance(content.get("machine"), dict) else {}
    memory, cores = number(machine, "memory_bytes"), number(machine, "cores")
    said = [text(machine, "cpu"), None if cores is None else f"{cores:.0f} cores"]
    said.append(None if memory is None else f"{formats.size(memory)} of memory")
    told = ("cpu", "cores", "memory_bytes", "load_average_before")
    said.append(pairs({key: value for key, value in machine.items() if key not in told}))
    return ", ".join(filter(None, said)) or "a machine that was not recorded"
