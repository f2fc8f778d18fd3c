"""Whole blocks: how alike they are, which went by which score, and which share weights."""

from __future__ import annotations

from typing import Any

from sentei.report import plots
from sentei.report.markup import esc, row, scroll, table_of
from sentei.report.reading import Report, dicts, dig, number, text

Matrix = list[list[float]]
MOST = 128  # rows of a matrix that is drawn


def blocks(report: Report) -> str:
    """One part per stage that says something of whole blocks."""
    parts = []
    for child in report.children:
        for stage in child.stages:
            record = dig(stage, "record")
            body = _alike(record) + _scores(record) + _sharing(record)
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
