"""What a search has to say for itself: the model card's second part, a report, and a heat map of units."""

from __future__ import annotations

from html import escape
from typing import Any

_CELL = 26


def all_pages(record: dict[str, Any]) -> dict[str, str]:
    """File name -> text."""
    report = markdown(record)
    return {"README.md": report, "report.md": f"# Search report\n\n{report}", "heat_map.svg": heat_map(record)}


def markdown(record: dict[str, Any]) -> str:
    """Result, budget, cost, assignment and one row for each unit."""
    parameters, ratio, metric = record["parameters"], record["search_ratio"], record["metric"]
    kept, base = parameters["living"], parameters["base"]
    share = f"{kept / parameters['supernet']:.1%}"
    measured = (
        "not measured" if metric["value"] is None else f"{metric['value']:.4f} on {metric['rows']} validation rows"
    )
    lines = [
        f"Found by sentei's `prune_peft` (arXiv 2506.07587): {record['status']}"
        + (f" ({'; '.join(record['rejected'])})" if record["rejected"] else ""),
        "",
        "| | |",
        "|---|---|",
        f"| {metric['name']} | {measured} |",
        f"| units | {len(record['living'])} of {len(record['units'])} |",
        f"| their parameters | {kept:,} of {parameters['supernet']:,} in the search space ({share}), "
        f"budget {parameters['budget']:,} |",
        f"| share of the base model | {kept / base:.2%}; with the head {(kept + parameters['head']) / base:.2%} |",
        f"| search / one training, in rows seen | {ratio['rows']:.2f} |",
        f"| search / one LoRA training, in seconds | {_seconds(ratio)} |",
        *(
            [f"| (search + final training) / one LoRA training, in seconds | {ratio['with_training']:.2f} |"]
            if ratio["with_training"] is not None
            else []
        ),
        *(f"| seconds: {name} | {seconds:.1f} |" for name, seconds in record["phases"].items()),
    ]
    if record["plain_lora"]:
        plain = record["plain_lora"]
        lines.append(
            f"| LoRA everywhere | {metric['name']} {plain['metric']:.4f}, {plain['parameters']:,} parameters |"
        )
    lines += ["", *(f"- {note}" for note in record["notes"])]
    check = record["adapter"]["pattern_check"]
    lines += [
        "",
        "## The configuration",
        "",
        f"```text\n{record['adapter']['pattern']}\n```",
        "",
        f"As `target_modules` this expression matched {check['matched']} of {check['expected']} expected modules, "
        f"{check['others']} others.",
        "",
        "## Units",
        "",
        "![kind by layer](heat_map.svg)",
        "",
        "Scores of different kinds are not comparable, so each gives up the same share of its parameters. n is what a "
        "score is the mean of: few weights make it noisier.",
        "",
        "| unit | n | removed in round | mean P |",
        "|---|---|---|---|",
    ]
    for unit in record["units"]:
        gone, mean = fate(record, unit["id"])
        shown = "" if mean is None else f"{mean:.2f}"
        lines.append(f"| {unit['id']} | {unit['parameters']:,} | {gone or 'stays'} | {shown} |")
    if record["assignment"]:
        lines += [
            "",
            f"## Who judged where ({record['assigned_by']})",
            "",
            "| kind | 0-20 % | 20-50 % | 50-80 % | 80-100 % |",
        ]
        lines += ["|---|---|---|---|---|"]
        for kind, blocks in record["assignment"].items():
            lines.append(f"| {kind} | " + " | ".join(", ".join(block) or "-" for block in blocks) + " |")
        if record["chance"] is not None:
            lines += ["", f"Probability of votes as uneven by chance: {record['chance']:.3f}."]
    return "\n".join(lines) + "\n"


def _seconds(ratio: dict[str, Any]) -> str:
    if ratio["seconds"] is not None:
        return f"{ratio['seconds']:.2f}"
    return f"{ratio['seconds_estimated']:.2f}, against the final training (LoRA everywhere was not trained)"


def fate(record: dict[str, Any], unit: str) -> tuple[int | None, float | None]:
    """(round in which a unit was removed for good, or None; mean P over the rounds that judged it)."""
    gone, seen = None, []
    for number, found in enumerate(record["rounds"], 1):
        if unit in found.get("probability", {}):
            seen.append(found["probability"][unit])
        if unit in found.get("removed", []):
            gone = number
    if unit in record["living"]:
        gone = None
    return gone, sum(seen) / len(seen) if seen else None


def heat_map(record: dict[str, Any]) -> str:
    """Kind, or slice, by layer: white stays, the darker the earlier it went; the number is the mean P in per cent."""
    row_of = {unit["id"]: unit["id"].replace(f".L{unit['layer']}", "") for unit in record["units"]}
    rows = sorted(set(row_of.values()), key=lambda name: (name.partition(".")[0], len(name), name))
    layers = 1 + max(unit["layer"] for unit in record["units"])
    rounds = max(1, len(record["rounds"]))
    left, top = 90, 40
    width, height = left + layers * _CELL + 10, top + len(rows) * _CELL + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="4" y="14">darker: removed earlier; outlined: stays; number: mean P in per cent</text>',
    ]
    for layer in range(layers):
        parts.append(f'<text x="{left + (layer + 0.5) * _CELL}" y="{top - 6}" text-anchor="middle">{layer}</text>')
    for number, name in enumerate(rows):
        y = top + number * _CELL
        parts.append(f'<text x="4" y="{y + 0.65 * _CELL}">{escape(name)}</text>')
        for unit in (unit for unit in record["units"] if row_of[unit["id"]] == name):
            gone, mean = fate(record, unit["id"])
            dark = 0.0 if gone is None else 0.25 + 0.75 * (rounds - gone + 1) / rounds
            shade = round(255 - 190 * dark)
            x = left + unit["layer"] * _CELL
            stroke = ' stroke="black" stroke-width="1.5"' if gone is None else ' stroke="#bbb"'
            title = f"{unit['id']}: {'stays' if gone is None else f'removed in round {gone}'}"
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_CELL - 2}" '
                f'fill="rgb({shade},{shade},{255 if gone is None else shade + 20})"{stroke}>'
                f"<title>{escape(title)}</title></rect>"
            )
            if mean is not None:
                color = "white" if dark > 0.6 else "black"
                parts.append(
                    f'<text x="{x + _CELL / 2}" y="{y + 0.65 * _CELL}" text-anchor="middle" '
                    f'fill="{color}">{100 * mean:.0f}</text>'
                )
    return "\n".join([*parts, "</svg>"]) + "\n"
