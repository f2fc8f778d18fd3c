"""Whole blocks: how alike they are, how their gates closed, which went by which score, and which share weights."""

from __future__ import annotations

from typing import Any

from sentei.report import formats, plots
from sentei.report.markup import esc, row, scroll, table_of
from sentei.report.reading import Report, dicts, dig, number, text

Matrix = list[list[float]]
MOST = 128  # rows of a matrix, gates or windows that are drawn


def blocks(report: Report) -> str:
    """One part per stage that says something of whole blocks."""
    parts = []
    for child in report.children:
        for stage in child.stages:
            record = dig(stage, "record")
            body = "".join(part(record) for part in (_alike, _gates, _scores, _windows, _sharing, _cache))
            if body:
                title = f'<p class="muted">{esc(child.label)}</p>' if len(report.children) > 1 else ""
                parts.append(title + body)
    return "".join(parts)


def _alike(record: Any) -> str:
    drawings = []
    for name, title in (("outputs", "what blocks put out"), ("updates", "what blocks add to the residual stream")):
        matrix = _matrix(dig(record, "similarity", name))
        if matrix:
            caption = f"cosine between {title}, mean over tokens"
            drawing = scroll(plots.square(matrix, caption))
            drawings.append(f"<figure><figcaption>{esc(caption)}</figcaption>{drawing}</figure>")
    if not drawings:
        return ""
    how = (
        "Outputs of neighbours are alike because a block adds little to the stream: a reason to remove blocks. Only "
        "blocks whose updates are alike could share weights for that reason alone."
    )
    return f'<p class="muted">{how}</p><div class="plots">{"".join(drawings)}</div>'


def _matrix(content: Any) -> Matrix:
    """A square list of lists of numbers, or nothing."""
    if not isinstance(content, list) or not 0 < len(content) <= MOST:
        return []
    rows = [[number({"x": value}, "x") for value in line] if isinstance(line, list) else [] for line in content]
    if any(len(line) != len(content) for line in rows):
        return []
    found = [[value for value in line if value is not None] for line in rows]
    return found if all(len(line) == len(content) for line in found) else []


def _gates(record: Any) -> str:
    """Every gate over the steps, and what the budget asked of them together."""
    history = dicts(dig(record, "gates"))
    lines: list[plots.Line] = []
    for unit in range(min(MOST, max((len(_gate_row(entry)) for entry in history), default=0))):
        points = _points([(number(entry, "step"), number({"g": _at(entry, unit)}, "g")) for entry in history])
        if points:
            lines.append(plots.Line(f"gate {unit}", int(points[-1][1] < 0.5), points))
    together = [
        plots.Line(name, colour, _points([(number(entry, "step"), number(entry, name)) for entry in history]))
        for colour, name in enumerate(("kept", "budget"))
    ]
    if not lines or not all(line.points for line in together):
        return ""
    drawings, captions = [], ("each gate: 1 open, 0 the block is gone", "kept by all gates, and the budget")
    for caption, drawn in zip(captions, (lines, together), strict=True):
        drawings.append(f"<figure><figcaption>{esc(caption)}</figcaption>{plots.curves(drawn, caption)}</figure>")
    decided = number(record, "gates_polarised")
    said = "" if decided is None else f'<p class="muted">{decided:.0%} of the gates ended outside 0.05 to 0.95.</p>'
    return f'{said}<div class="plots">{"".join(drawings)}</div>'


def _gate_row(entry: dict[str, Any]) -> list[Any]:
    gates = entry.get("gates")
    return gates if isinstance(gates, list) else []


def _at(entry: dict[str, Any], unit: int) -> Any:
    row_ = _gate_row(entry)
    return row_[unit] if unit < len(row_) else None


def _points(pairs: list[tuple[float | None, float | None]]) -> list[plots.Point]:
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _windows(record: Any) -> str:
    """What it costs to fold each window alone, by the block that it begins with."""
    origin = dig(record, "fold", "origin")
    costs = []
    for entry in dicts(dig(record, "fold", "singles"))[:MOST]:
        members = entry.get("members")
        start = number({"x": members[0]}, "x") if isinstance(members, list) and members else None
        if start is not None and isinstance(origin, list) and 0 <= start < len(origin):
            start = number({"x": origin[int(start)]}, "x")
        costs.append((start, number(entry, "kl")))
    points = _points(costs)
    if not points:
        return ""
    caption = "cost of folding each window alone: KL to the dense model, by its first block"
    drawn = plots.curves([plots.Line("KL", 0, points, dashed=True)], caption, "first block of the window")
    return f'<div class="plots"><figure><figcaption>{esc(caption)}</figcaption>{drawn}</figure></div>'


def _cache(record: Any) -> str:
    """What folding cannot shrink, beside what it did."""
    dense, now = (number(record, "kv_bytes_per_token", side) for side in ("dense", "now"))
    stored, outside = number(record, "stored_of_model"), number(record, "outside_of_model")
    if dense is None or now is None or stored is None or outside is None:
        return ""
    said = (
        f"{formats.percent(stored)} of the dense model's parameters are stored. The KV cache takes {formats.size(now)} "
        f"per token, the dense one {formats.size(dense)}: removal shortens it, sharing does not. Embeddings, final "
        f"norm and head, {formats.percent(outside)} of the dense model, do not shrink either."
    )
    return f"<p>{esc(said)}</p>"


def _scores(record: Any) -> str:
    rows = []
    for entry in dicts(dig(record, "scores"))[:16]:
        figures = [number(entry, key) for key in ("held_loss", "rank_correlation", "overlap", "tokens", "seconds")]
        shown = ["" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in figures]
        rows.append(row([esc(text(entry, "score") or ""), esc(plots.short(text(entry, "dropped") or "", 80)), *shown]))
    if not rows:
        return ""
    head = ("ranked by", "drops (from 0)", "held-out loss", "rank correlation", "overlap", "tokens", "seconds")
    return table_of(head, rows)


def _sharing(record: Any) -> str:
    owner, origin = dig(record, "fold", "owner"), dig(record, "fold", "origin")
    if not isinstance(owner, list) or not all(isinstance(i, int) and 0 <= i < len(owner) for i in owner):
        return ""
    numbers = origin if isinstance(origin, list) and len(origin) == len(owner) else list(range(len(owner)))
    groups: dict[int, list[str]] = {}
    for position, holder in enumerate(owner):
        groups.setdefault(holder, []).append(f"{numbers[position]}" + ("*" if holder == position else ""))
    shared = [" ".join(members) for members in groups.values() if len(members) > 1]
    said = f"Blocks that share weights (numbers of the dense model, * holds them): {'; '.join(shared)}. "
    return f"<p>{esc(said)}{len(groups)} of {len(owner)} blocks are stored.</p>" if shared else ""
