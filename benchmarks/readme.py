"""Writes the "Measured" section of README.md from results/*.json: `python benchmarks/readme.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import estimators
import fold
import ingredients
from peers import markdown

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"<!-- results -->.*<!-- /results -->", re.DOTALL)


def main() -> None:
    parts = []
    for name, write in (
        ("demo", demo),
        ("peers-smollm2", peers),
        ("peers-smollm2-mha", peers),
        ("ingredients-smollm2", parts_of_the_search),
        ("estimators-smollm2", ways),
        ("search-cost", search),
        ("fold-smollm2", depth),
    ):
        file = ROOT / "results" / f"{name}.json"
        if file.exists():
            parts.append(write(json.loads(file.read_text())))
    readme = ROOT / "README.md"
    section = "<!-- results -->\n" + "\n".join(parts) + "<!-- /results -->"
    readme.write_text(SECTION.sub(lambda _: section, readme.read_text()))


def demo(result: dict[str, Any]) -> str:
    """The demo: what `sentei run recipes/demo.yaml` wrote as result.json."""
    values, bench = result["values"], result["benchmark"]
    machine = bench["machine"]
    rows = {name: found[0]["value"] for name, found in result["measurements"].items()}
    shown = " → ".join(f"{value:.2f} ({name})" for name, value in rows.items())
    speed = bench["speedups"]["prefill"]
    return (
        "**The demo** (SmolLM2-135M-Instruct, a quarter of the decoder parameters removed, healed for two and a half "
        f"minutes on the Python reference; {machine['cores']} cores of {machine['cpu']}, "
        f"{bench['parent']['dtype']}, one seed; healing sees the domain of the test text, the parent did not):\n\n"
        "| | small / parent |\n|---|---|\n"
        f"| perplexity on held-out Python reference, context 128 | {shown} |\n"
        f"| decoder parameters · all parameters | {values['layer_parameters_ratio']:.3f} · "
        f"{values['parameters_ratio']:.3f} |\n"
        f"| bytes on disk · peak memory | {values['bytes_ratio']:.3f} · {values['memory_ratio']:.3f} |\n"
        f"| prefill speed-up, median of {len(speed['rounds'])} rounds in turns | {speed['median']:.2f}x "
        f"({speed['min']:.2f} to {speed['max']:.2f}), {values['speedup_of_ideal']:.2f} of the ideal |\n"
        f"| decode speed-up · time to first token | {values['speedup_decode']:.2f}x · "
        f"{values['speedup_first_token']:.2f}x |\n"
    )


def peers(table: dict[str, Any]) -> str:
    return "**All methods at equal parameters.** " + markdown(table)


def parts_of_the_search(table: dict[str, Any]) -> str:
    return "**What each ingredient of policy gradient gives.** " + ingredients.markdown(table)


def ways(table: dict[str, Any]) -> str:
    return "**Ways to spend the same forward passes.** " + estimators.markdown(table)


def depth(table: dict[str, Any]) -> str:
    return "**Blocks removed, shared, or both, at equal stored parameters.** " + fold.markdown(table)


def search(result: dict[str, Any]) -> str:
    """What a step of the search costs."""
    lines = [
        f"**What a step of the search costs**, as a ratio to the dense forward of the same round "
        f"({result['machine']}). Peak memory of the search is {result['memory']['ratio']:.2f}x that of inference with "
        "the same batch.",
        "",
        "| tokens | removed | masked | sliced | ideal | sliced / ideal |",
        "|---|---|---|---|---|---|",
    ]
    by_way = {(row["tokens"], row["sparsity"], row["way"]): row for row in result["time"]}
    for tokens, sparsity, way in by_way:
        if way == "sliced":
            masked, sliced = by_way[tokens, sparsity, "masked"], by_way[tokens, sparsity, "sliced"]
            spread = f"({sliced['least']:.2f} to {sliced['most']:.2f})"
            lines.append(
                f"| {tokens} | {sparsity:.0%} | {masked['ratio']:.2f} | {sliced['ratio']:.2f} {spread} "
                f"| {sliced['ideal']:.2f} | {sliced['over_ideal']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
