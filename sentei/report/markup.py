"""Pieces of HTML that all sections are built of. Text from files passes through `esc` on its way in."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape
from typing import Any

from sentei.report import formats, plots
from sentei.report.reading import Child, Report

LONGEST = 160  # characters of a field's value that are shown


def esc(content: object) -> str:
    return escape(str(content))


def section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>\n" if body else ""


def callout(what: str, remedy: str = "") -> str:
    """Something is missing, and the command that would supply it."""
    how = f": run <code>{esc(remedy)}</code>" if remedy else ""
    return f'<p class="missing">{esc(what)}{how}</p>'


def command(*words: str) -> str:
    """A shell command for the reader to copy."""
    return shlex.join(words)


def eval_command(child: Child) -> str:
    return command("sentei", "eval", child.path, "--data", "TEXT", "--context", "128")


def bench_command(child: Child, report: Report) -> str:
    return command("sentei", "bench", child.path, "--against", report.parent)


def dot(position: int) -> str:
    """The coloured dot by which a child is known in tables and plots."""
    return f'<span class="key c{position % plots.NUM_COLOURS}"></span>'


def scroll(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


def table_of(head: Iterable[str], rows: Iterable[str]) -> str:
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    return scroll(f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def sub(content: str) -> str:
    return f'<span class="sub">{esc(content)}</span>' if content else ""


def row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def minus(fraction: float | None) -> str:
    """A removed fraction as a change; empty if it is not known."""
    return "" if fraction is None else formats.change(1 - fraction)


def value_text(value: Any) -> str:
    """Any JSON value in a few words; not escaped yet."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return plots.short(str(value), LONGEST)


def pairs(content: Any) -> str | None:
    """An object as "key value, key value"; not escaped yet."""
    if not isinstance(content, dict):
        return None
    return plots.short(
        ", ".join(f"{key} {value_text(value)}" for key, value in content.items() if value is not None), 400
    )
