"""The sections of the page, one function each: `Report` -> HTML, empty if there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sentei.report import formats, plots
from sentei.report.markup import (
    bench_command,
    callout,
    command,
    dot,
    esc,
    eval_command,
    minus,
    pairs,
    row,
    scroll,
    sub,
    table_of,
    value_text,
)
from sentei.report.reading import Child, Key, Measurement, Report, dicts, dig, first, number, text
from sentei.report.table import ideal_speedup, name

BAR = 0.85  # a prefill speed-up below this part of the ideal one is pointed out
QUANTITIES = (("prefill", "prefill"), ("first_token", "time to first token"), ("decode", "decode"))
MOST_PLOTS = 4  # per stage
# Fields of a log that say where a run was, not how it went.
NOT_CURVES = ("step", "steps", "progress", "seconds", "time", "elapsed", "eta", "tokens", "epoch", "lr", "seed")
NOT_CURVES += ("lora_tokens", "slice_tokens")
FIRST_CURVES = ("loss", "perplexity", "ce", "kept", "reward", "lasso", "flips")
# Drawn dashed beside the quantity they belong to.
HELD_OUT = ("validation_", "eval_", "test_", "held_", "slice_", "wanted_")


# ---------------------------------------------------------------------------------------------------------- quality


def quality(report: Report) -> str:
    """Every measurement in a row, every model in a column."""
    missing = [callout(f"{c.label} was not measured", eval_command(c)) for c in report.children if not c.measurements]
    if not report.parent_measurements:
        remedy = command("sentei", "eval", report.parent, "--data", "TEXT", "--context", "128")
        missing.append(callout("The dense parent was not measured, so nothing can be compared with it", remedy))
    keys = report.rows()
    if not keys:
        return "".join(missing)
    names = [_model_head(position, child) for position, child in enumerate(report.children)]
    rows = [_quality_row(key, report) for key in keys]
    if len(report.tasks()) > 1:
        rows.append(_mean_row(report))
    how = "Perplexity: lower is better, with its factor over the parent. Accuracies in percent."
    return f'<p class="muted">{how}</p>{table_of(["", "dense parent", *names], rows)}{"".join(missing)}'


def _model_head(position: int, child: Child) -> str:
    return f'<span class="name">{dot(position)}{esc(child.label)}</span>{sub(minus(child.removed("parameters")))}'


def _quality_row(key: Key, report: Report) -> str:
    sample = report.measurement(key)
    said = dict(key[2])
    details = [f"{formats.count(sample.tokens)} tokens"] if sample.tokens is not None else []
    details += [f"{said[what]} {what}" for what in ("blocks",) if what in said]
    if "limit" in said:
        details.append(f"first {said['limit']} questions")
    elif sample.samples is not None:
        details.append(f"all {sample.samples:.0f} questions")
    details += [f"{said['num_fewshot']}-shot"] if "num_fewshot" in said else []
    details += [f"split {said['split']}"] if "split" in said else []
    details += [f"{said['part']} part"] if said.get("part", "whole") != "whole" else []
    details += (
        [{"True": "with BOS", "False": "without BOS"}.get(said["bos"], f"BOS {said['bos']}")] if "bos" in said else []
    )
    dense = report.parent_measurements.get(key)
    cells = [_value(dense, None), *(_value(child.measurements.get(key), dense) for child in report.children)]
    return f"<tr><th>{esc(name(key))}{sub(', '.join(details))}</th>{''.join(cells)}</tr>"


def _value(measurement: Measurement | None, dense: Measurement | None) -> str:
    change = formats.compared(measurement, dense) if measurement and dense else ""
    return f"<td>{esc(formats.measured(measurement))}{sub(change)}</td>"


def _mean_row(report: Report) -> str:
    dense = report.mean_accuracy(report.parent_measurements)
    means = [report.mean_accuracy(child.measurements) for child in report.children]
    cells = [f"<td>{formats.MISSING if dense is None else f'{100 * dense:.1f}'}</td>"]
    for mean in means:
        change = "" if mean is None or dense is None else formats.points(mean - dense)
        cells.append(f"<td>{formats.MISSING if mean is None else f'{100 * mean:.1f}'}{sub(change)}</td>")
    return f'<tr class="sum"><th>mean accuracy of {len(report.tasks())} tasks</th>{"".join(cells)}</tr>'


# ------------------------------------------------------------------------------------------------------- size, speed


def sizes(report: Report) -> str:
    """Parameters, bytes and memory, with bars against the parent."""
    head = ["", "layers", "whole model", "weights on disk", "memory, weights loaded", "memory, peak"]
    on_gpu = any(number(child.bench, "child", "memory", "cuda_peak_bytes") is not None for child in report.children)
    head += ["GPU memory, peak"] if on_gpu else []
    whole, layers = report.parent_size("parameters"), report.parent_size("layer_parameters")
    head += ["of the parent"] if whole and layers else []
    measured = next((child for child in report.children if child.bench), None)
    rows = []
    for position, child in ((None, None), *enumerate(report.children)):
        side = "parent" if child is None else "child"
        timed = child or measured
        bench = timed.bench if timed else {}
        size: Callable[[str], float | None] = report.parent_size if child is None else child.size
        label = "dense parent" if child is None or position is None else dot(position) + esc(child.label)
        cells = [label]
        for what, show in (("layer_parameters", formats.count), ("parameters", formats.count), ("bytes", formats.size)):
            gone = "" if child is None else minus(child.removed(what))
            value = size(what)
            exact = "" if value is None else f' title="{value:,.0f}"'
            cells.append(f"<span{exact}>{show(value)}</span>{sub(gone)}")
        loaded, imports = (number(bench, side, "memory", what) for what in ("loaded_bytes", "imports_bytes"))
        net = None if loaded is None or imports is None else loaded - imports
        pairs = [(net, "loaded_memory"), (number(bench, side, "memory", "peak_bytes"), "peak_memory")]
        for value, ratio in pairs:
            relative = None if child is None else number(bench, "ratios", ratio)
            cells.append(formats.size(value) + sub("" if relative is None else formats.change(relative)))
        if on_gpu:
            cells.append(formats.size(number(bench, side, "memory", "cuda_peak_bytes")))
        if whole and layers:
            inner, total = size("layer_parameters"), size("parameters")
            drawn = inner is not None and total is not None and total >= inner >= 0
            cells.append(plots.size_bar(inner, total - inner, whole) if drawn else "")  # pyright: ignore
        rows.append(row(cells))
    how = (
        "Peak: the largest resident size of a process that does nothing but load the model and answer once, imports "
        "included. Loaded: what the process grew by when the weights came in."
    )
    legend = (
        '<p class="sub">Bars: parameters of the layers (green), then embeddings, norms and head; grey: gone.</p>'
        if whole and layers
        else ""
    )
    return f'<p class="muted">{how if measured else ""}</p>{table_of(head, rows)}{legend}'


def speed(report: Report) -> str:
    """Each child against its parent, next to the ideal."""
    missing = [
        callout(f"{child.label} was not timed, nor its memory measured", bench_command(child, report))
        for child in report.children
        if not child.bench
    ]
    timed = [
        (p, c) for p, c in enumerate(report.children) if number(c.bench, "speedups", "prefill", "median") is not None
    ]
    if not timed:
        return "".join(missing)
    edges = [number(c.bench, "speedups", q, what) for _, c in timed for q, _ in QUANTITIES for what in ("min", "max")]
    edges += [ideal_speedup(c, q) for _, c in timed for q, _ in QUANTITIES]
    shown = [min(max(edge, 0), 50) for edge in edges if edge is not None]
    axis = min([0.95, *shown]), max([1.2, *shown])
    rows = []
    for position, child in timed:
        if len(report.children) > 1:
            note = _reached(child)
            rows.append(f'<tr class="group"><th colspan="7">{dot(position)}<b>{esc(child.label)}</b>{note}</th></tr>')
        rows += [_speed_row(child, quantity, title, axis) for quantity, title in QUANTITIES]
    head = ["", "dense parent", "child", "speed-up", "lowest to highest", "ideal", ""]
    only = _reached(timed[0][1], "p") if len(report.children) == 1 else ""
    how = (
        "Parent and child measured in turns in one run; the speed-up is the median over rounds of neighbouring "
        "measurements. Ideal (green tick): the ratio of linear weights that a token passes through, LM head included. "
        "The dashed line is the parent's speed, the whisker the range over rounds."
    )
    return f'<p class="muted">{how}</p>{only}{table_of(head, rows)}{"".join(missing)}'


def _reached(child: Child, tag: str = "span") -> str:
    reached = number(child.bench, "speedup_of_ideal")
    if reached is None:
        return ""
    fine = reached >= BAR
    said = f"prefill reaches {reached:.2f} of the ideal speed-up" + ("" if fine else f", below the bar of {BAR}")
    share = number(child.bench, "parent", "attention_share")
    said += "" if share is None else f"; attention's own products are {share:.0%} of the parent's prefill"
    return f'<{tag} class="sub {"good" if fine else "warn"}">{esc(said)}</{tag}>'


def _speed_row(child: Child, quantity: str, title: str, axis: tuple[float, float]) -> str:
    low, median, high = (number(child.bench, "speedups", quantity, what) for what in ("min", "median", "max"))
    if low is None or median is None or high is None or not 0 < low <= median <= high:
        return ""
    values = []
    for side in ("parent", "child"):
        if quantity == "first_token":
            values.append(formats.seconds(number(child.bench, side, "first_token_seconds", "median")))
        else:
            speed = number(child.bench, side, f"{quantity}_tokens_per_second", "median")
            values.append(formats.MISSING if speed is None else f"{formats.plain(speed)} tokens/s")
    ideal = ideal_speedup(child, quantity)
    least, most = axis
    drawn = [min(value, most) for value in (low, median, high)]
    tick = None if ideal is None else min(max(ideal, least), most)
    bar = plots.speed_bar(*drawn, tick, least, most)
    ranged = f"{low:.2f} to {high:.2f}"
    return row([title, *values, f"<b>{formats.times(median)}</b>", ranged, formats.times(ideal), bar])


# ------------------------------------------------------------------------------------------------- where, and curves


def removed(report: Report) -> str:
    """The heat map: layer x kind of unit."""
    drawings, missing = [], []
    for position, child in enumerate(report.children):
        accounts = child.kept()
        if not accounts:
            missing.append(callout(f"{child.label}: compression.json does not say what was kept in which layer"))
        for stage, account in accounts:
            bands = _bands(account)
            if not bands:
                continue
            several = len(report.children) > 1 or len(accounts) > 1
            said = f"{dot(position)}{esc(child.label)}" if len(report.children) > 1 else ""
            said += f' <span class="muted">{esc(plots.short(stage, 60))}</span>' if len(accounts) > 1 else ""
            caption = f"<figcaption>{said}</figcaption>" if several else ""
            title = f"units removed from each layer of {child.label}"
            drawings.append(f"<figure>{caption}{scroll(plots.heat_map(bands, title))}</figure>")
    if not drawings:
        return "".join(missing)
    how = (
        "Percent of each kind of unit removed from each layer, numbered as before the cut. "
        "A head is a KV group: one KV head with its query heads."
    )
    scale = '<p class="sub">none removed<span class="scale"></span>all removed</p>'
    return f'<p class="muted">{how}</p>{"".join(drawings)}{scale}{"".join(missing)}'


def _bands(account: dict[str, Any]) -> list[plots.Band]:
    """structure.kept -> rows of the heat map; sub-layers become a row for attention and one for the MLP."""
    layers = dicts(account.get("layers"))
    kinds = dict.fromkeys(kind for layer in layers for kind, entry in layer.items() if isinstance(entry, dict))
    bands = []
    for kind in list(kinds)[:8]:
        if kind == "sublayers":
            bands += [
                plots.Band(part, [_part_cell(layer, number, part) for number, layer in enumerate(layers)])
                for part in ("attention", "mlp")
            ]
            continue
        cells = [_cell(layer.get(kind), number, kind) for number, layer in enumerate(layers)]
        bands.append(plots.Band(plots.short(kind, 12), cells))
    return [band for band in bands if any(band.cells)]


def _cell(entry: Any, layer: int, kind: str) -> tuple[float, float, str] | None:
    of, kept = number(entry, "of"), number(entry, "kept")
    if of is None or kept is None or of <= 0 or not 0 <= kept <= of:
        return None
    units = dig(entry, "units")
    which = f": {plots.short(units, 80)}" if isinstance(units, str) and units and kept < of else ""
    return of - kept, of, f"layer {layer}, {kind}: {of - kept:.0f} of {of:.0f} removed; kept{which or f' {kept:.0f}'}"


def _part_cell(layer: dict[str, Any], position: int, part: str) -> tuple[float, float, str] | None:
    kept = dig(layer, "sublayers", "units")
    if not isinstance(kept, list):
        return None
    gone = part not in kept
    return float(gone), 1.0, f"layer {position}, {part}: {'removed' if gone else 'kept'}"


def quality_against_size(report: Report) -> str:
    """Scatter plots, when there are several children to compare."""
    if len(report.children) < 2:
        return ""
    drawings = []
    for key in report.language()[:2]:
        columns = [child.measurements.get(key) for child in report.children]
        values = [None if m is None else m.value for m in columns]
        dense = report.parent_measurements.get(key)
        drawings.append(_scatter(report, name(key), values, None if dense is None else dense.value, log=True))
    means = [report.mean_accuracy(child.measurements) for child in report.children]
    dense = report.mean_accuracy(report.parent_measurements)
    title = f"mean accuracy of {len(report.tasks())} tasks, percent"
    percent = [None if mean is None else 100 * mean for mean in means]
    drawings.append(_scatter(report, title, percent, None if dense is None else 100 * dense, log=False))
    drawn = "".join(drawings)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def _scatter(report: Report, title: str, values: list[float | None], dense: float | None, log: bool) -> str:
    sizes = [child.size("parameters") for child in report.children]
    points = [
        (child.label, position, size, value)
        for position, (child, size, value) in enumerate(zip(report.children, sizes, values, strict=True))
        if size is not None and value is not None
    ]
    if len(points) < 2:
        return ""
    whole = report.parent_size("parameters")
    parent = None if whole is None or dense is None else (whole, dense)
    drawing = plots.scatter(points, parent, title, "parameters", formats.count, formats.plain, formats.plain, log)
    return f"<figure><figcaption>{esc(title)}</figcaption>{drawing}</figure>"


def curves(report: Report) -> str:
    """Search and healing over steps, one plot per quantity, all children in it."""
    stages: dict[str, dict[str, dict[tuple[int, str], list[plots.Point]]]] = {}
    for position, child in enumerate(report.children):
        for record in child.steps():
            step = number(record, "step")
            stage = _first_text(record, "stage", "method")
            for field in record:
                value = number(record, field)
                if step is not None and value is not None and field not in NOT_CURVES:
                    family = stages.setdefault(stage, {}).setdefault(_family(field), {})
                    family.setdefault((position, field), []).append((step, value))
    body = [_stage_curves(stage, families, report) for stage, families in stages.items()]
    legend = "".join(f"<span>{dot(p)}{esc(child.label)}</span>" for p, child in enumerate(report.children))
    shown = f'<div class="legend">{legend}</div>' if len(report.children) > 1 and any(body) else ""
    return shown + "".join(body)


def _first_text(record: dict[str, Any], *fields: str) -> str:
    return next((found for found in (text(record, field) for field in fields) if found), "")


def _family(field: str) -> str:
    for prefix in HELD_OUT:
        field = field.removeprefix(prefix)
    return field


def _stage_curves(stage: str, families: dict[str, dict[tuple[int, str], list[plots.Point]]], report: Report) -> str:
    order = sorted(families, key=lambda f: FIRST_CURVES.index(f) if f in FIRST_CURVES else len(FIRST_CURVES))
    drawings = []
    for family in order:
        curves = families[family]
        if all(len({value for _, value in points}) == 1 for points in curves.values()):
            continue  # a constant tells nothing
        fields = {field for _, field in curves}
        lines = [
            plots.Line(
                f"{report.children[position].label} {field}",
                position,
                points,
                dashed=field != family and len(fields) > 1,
            )
            for (position, field), points in curves.items()
        ]
        also = " and ".join(sorted((field.replace("_", " ") for field in fields), key=len))
        also += " (dashed)" if len(fields) > 1 else ""
        title = plots.short(also, 80)
        drawings.append(f"<figure><figcaption>{esc(title)}</figcaption>{plots.curves(lines, title)}</figure>")
        if len(drawings) == MOST_PLOTS:
            break
    heading = f"<h3>{esc(plots.short(stage, 80))}</h3>" if stage else ""
    return f'{heading}<div class="plots">{"".join(drawings)}</div>' if drawings else ""


# ---------------------------------------------------------------------------------------------- samples, how, notes


def samples(report: Report) -> str:
    """What parent and children answer to the same prompt."""
    said: dict[str, list[str]] = {}
    for position, child in enumerate(report.children):
        for sample in child.generations[:20]:
            prompt = text(sample, "prompt") or ""
            texts = said.setdefault(prompt, [])
            if not texts and (dense := text(sample, "parent")):
                texts.append(f'<div><span class="who">dense parent</span><p>{esc(dense)}</p></div>')
            own = text(sample, "child") or "(nothing)"
            texts.append(f'<div><span class="who">{dot(position)}{esc(child.label)}</span><p>{esc(own)}</p></div>')
    return "".join(
        f'<div class="sample"><p class="prompt">{esc(prompt)}</p><div class="said">{"".join(texts)}</div></div>'
        for prompt, texts in said.items()
    )


def made(report: Report) -> str:
    """The stages with every field, seed, data and cost."""
    alone = len(report.children) == 1
    blocks = []
    for position, child in enumerate(report.children):
        if not child.compression:
            blocks.append(callout(f"{child.label}: no compression.json, so nothing is known about how it was made"))
            continue
        stages = "".join(_stage(number_, stage) for number_, stage in enumerate(child.stages, 1))
        facts = [
            ("shape", text(child.compression, "result", "shape")),
            ("model type", text(child.compression, "result", "model_type")),
            ("versions", pairs(child.compression.get("versions"))),
        ]
        body = (stages or callout(f"{child.label}: no stage is recorded")) + _facts(facts)
        if alone:
            blocks.append(body)
            continue
        names = " \N{RIGHTWARDS ARROW} ".join(text(stage, "method") or "?" for stage in child.stages)
        heading = f'{dot(position)}{esc(child.label)} <span class="muted">{esc(plots.short(names, 100))}</span>'
        blocks.append(f"<details><summary>{heading}</summary>{body}</details>")
    return "".join(blocks)


def _stage(position: int, stage: dict[str, Any]) -> str:
    fields = stage.get("fields")
    fields = fields if isinstance(fields, dict) else {}
    shown = "".join(
        f"<div><span>{esc(key)}</span><span>{esc(value_text(value))}</span></div>" for key, value in fields.items()
    )
    peak = first(number(stage, "record", "peak_memory_bytes"), number(stage, "record", "peak_memory"))
    took = number(stage, "record", "seconds")
    seed = number(stage, "seed")
    facts = [
        ("data", text(stage, "data", "name")),
        ("data sha256", text(stage, "data", "sha256")),
        ("seed", None if seed is None else f"{seed:.0f}"),
        ("took", None if took is None else formats.seconds(took)),
        ("peak memory", None if peak is None else formats.size(peak)),
    ]
    heading = f"<h3>{position}. {esc(plots.short(text(stage, 'method') or 'unnamed stage', 80))}</h3>"
    return f'{heading}<div class="fields">{shown}</div>{_facts(facts)}'


def _facts(facts: Iterable[tuple[str, str | None]]) -> str:
    rows = "".join(f"<dt>{esc(key)}</dt><dd>{_fact(key, value)}</dd>" for key, value in facts if value)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _fact(key: str, value: str) -> str:
    return f"<code>{esc(value)}</code>" if "sha256" in key or key == "path" else esc(value)


def way_back(report: Report) -> str:
    """Where the dense parent lies and how to know it again."""
    parents: dict[tuple[str, str], list[str]] = {}
    for child in report.children:
        if dig(child.compression, "parent"):
            known = (text(child.compression, "parent", "path") or "", text(child.compression, "parent", "sha256") or "")
            parents.setdefault(known, []).append(child.label)
    if not parents:
        return callout("No compression.json names the parent and its sha256")
    blocks = []
    for (path, sha256), labels in parents.items():
        child = next(child for child in report.children if child.label == labels[0])
        whole = formats.count(child.parent_size("parameters"))
        facts = [
            ("path", path or None),
            ("sha256", sha256 or None),
            ("size", f"{whole} parameters, {formats.size(child.parent_size('bytes'))}"),
            ("parent of", ", ".join(labels) if len(report.children) > 1 else None),
        ]
        blocks.append(_facts(facts))
    said = "Compression wrote a new folder and left the parent as it was. The weights to go back to, and their sha256:"
    return f"<p>{said}</p>{''.join(blocks)}"
