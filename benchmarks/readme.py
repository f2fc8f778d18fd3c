"""Writes results/README.md, all tables of results/*.json, and the short "Measured" section of the project's README.md.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atp
import estimators
import fold
import ingredients
import placements
import prune_once
import prune_peft
import sparse as speed
from peers import markdown
from tables import shown, spread

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"<!-- results -->.*<!-- /results -->", re.DOTALL)
HEAD = """# Results

Written by `python benchmarks/readme.py` from the JSON files beside this page. What the figures say, and what they do
not, is in the project's [README](../README.md); how they came about, in [LOG.md](../LOG.md).

"""
Write = Callable[[dict[str, Any]], str]


def main() -> None:
    short = tables(
        {
            "demo": demo,
            "peers-smollm2": best,
            "peers-smollm2-mha": best,
            "ingredients-smollm2-bf16": against_peers,
            "ingredients-gemma-3-270m": against_peers,
            "fold-smollm2": best_depth,
            "fold-gemma-3-270m": best_depth,
            "prune-once-minilm-all-rows": best_sparse,
            "prune-once-minilm-long": best_sparse,
            "prune-once-minilm-layers": best_sparse,
            "prune-once-smollm2": best_sparse,
            "atp-legalbench-refitted": best_domain,
            "atp-legalbench-response": best_domain,
            "atp-legalbench-weighted": best_domain,
            "atp-legalbench-twice": best_domain,
            "atp-legalbench-distilled": best_domain,
            "atp-pubmedqa": best_domain,
            "atp-medqa": best_domain,
            "atp-chatdoctor": best_domain,
            "atp-gemma-3-270m": best_domain,
            "atp-legalbench": best_domain,
            "prune-peft-minilm": best_units,
            "placements-minilm": placements.markdown,
        }
    )
    whole = tables(
        {
            "demo": demo,
            "peers-smollm2": peers,
            "peers-smollm2-mha": peers,
            "ingredients-smollm2-bf16": parts_of_the_search,
            "ingredients-smollm2": parts_of_the_search,
            "ingredients-smollm2-zero-shot": parts_of_the_search,
            "ingredients-gemma-3-270m": parts_of_the_search,
            "estimators-smollm2": ways,
            "search-cost": search,
            "policy-gradient-task": for_a_task,
            "search-processes": several,
            "search-scaling": scaling,
            "fold-smollm2": depth,
            "fold-gemma-3-270m": depth,
            "prune-once-minilm-all-rows": sparse,
            "prune-once-minilm-long": sparse,
            "prune-once-minilm-longer": sparse,
            "prune-once-minilm-epochs": sparse,
            "prune-once-minilm-layers": sparse,
            "prune-once-minilm": sparse,
            "prune-once-minilm-head": sparse,
            "prune-once-minilm-head-rows": sparse,
            "prune-once-smollm2": sparse,
            "prune-once-speed": speed.markdown,
            "atp-legalbench-refitted": domain,
            "atp-legalbench-response": domain,
            "atp-legalbench-weighted": domain,
            "atp-legalbench-twice": domain,
            "atp-legalbench-distilled": domain,
            "atp-legalbench-cosine": domain,
            "atp-pubmedqa": domain,
            "atp-medqa": domain,
            "atp-chatdoctor": domain,
            "atp-gemma-3-270m": domain,
            "atp-legalbench": domain,
            "prune-peft-minilm": units,
            "prune-peft-minilm-ranks": units,
            "prune-peft-minilm-slices": units,
            "prune-peft-minilm-boolq": units,
            "prune-peft-smollm2": units,
            "placements-minilm": placements.markdown,
        }
    )
    readme = ROOT / "README.md"
    more = "All rows, seeds and settings: [results/README.md](results/README.md).\n"
    section = f"<!-- results -->\n{short}\n{more}<!-- /results -->"
    readme.write_text(SECTION.sub(lambda _: section, readme.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "results" / "README.md").write_text(HEAD + whole, encoding="utf-8")


def tables(parts: dict[str, Write]) -> str:
    """Those that have been measured."""
    files = {name: ROOT / "results" / f"{name}.json" for name in parts}
    return "\n".join(
        parts[name](json.loads(file.read_text(encoding="utf-8"))) for name, file in files.items() if file.exists()
    )


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


def best(table: dict[str, Any]) -> str:
    """Policy gradient and the best of all others at each budget, before and after healing."""
    title = (
        f"**Policy gradient and the best of eight other rows at equal parameters**, {table['model']}; perplexity on "
        "WikiText-2 test at 128, before and after the same sixteen steps of healing:"
    )
    columns = ["removed of layers", "policy gradient", "best other", "healed: policy gradient", "healed: best other"]
    lines = []
    for sparsity in sorted({row["sparsity"] for row in table["rows"] if row["sparsity"]}):
        cells = []
        for healed in (False, True):
            found: dict[str, list[float]] = {}
            for row in table["rows"]:
                if (row["sparsity"], row["healed"]) == (sparsity, healed):
                    found.setdefault(row["method"], []).append(row["perplexity"]["128"]["value"])
            for ours in (True, False):
                means = {m: statistics.mean(v) for m, v in found.items() if m.startswith("policy gradient") == ours}
                method = min(means, key=lambda name: means[name])
                named = "" if method == "policy gradient" else f" ({method.removeprefix('policy gradient, ')})"
                cells.append(f"{spread(found[method])}{named}")
        lines.append([f"{sparsity:.0%}", *cells])
    return shown(title, columns, lines)


def against_peers(table: dict[str, Any]) -> str:
    """Policy gradient with all its ingredients and the best peer as published, text by text."""
    texts = ["WikiText-2", *table["texts"]]
    title = (
        f"**Policy gradient, refit included, and the best peer as it was published** (no refit), {table['model']}; "
        "perplexity at 128, and the part of the peer's:"
    )
    lines = []
    for sparsity in sorted({row["sparsity"] for row in table["rows"]}):
        for healed in (False, True):
            found = ingredients.against_peers(table, sparsity, healed)
            cells = [
                f"{spread(ours)}, {peer:.1f} ({name}): **{statistics.mean(ours) / peer:.2f}**"
                for ours, peer, name in (found[text] for text in texts if text in found)
            ]
            if cells:
                lines.append([f"{sparsity:.0%}{', healed alike' if healed else ''}", *cells])
    return shown(title, ["removed of layers", *texts], lines)


def best_depth(table: dict[str, Any]) -> str:
    """Healed perplexity of whole blocks removed, shared and both."""
    kinds = {
        "removed by Block Influence": ["remove: block influence"],
        "greedily": ["remove: greedy"],
        "by gates": ["remove: gates"],
        "by exchange": ["remove: gates, exchanged", "remove: block influence, exchanged"],
        "half removed, half shared": ["block influence + fold, half and half"],
        "shared": ["fold"],
        "half and half, not fitted": ["block influence + fold, half and half, not fitted"],
        "shared, not fitted": ["fold, not fitted"],
    }
    made = {row["row"] for row in table["rows"]}
    kinds = {column: names for column, names in kinds.items() if made & set(names)}
    title = (
        f"**Blocks removed or shared at equal stored parameters**, {table['model']}; perplexity on WikiText-2 test at "
        "128 after 32 steps of healing (in brackets before it):"
    )
    lines = []
    for stored in sorted({row["stored"] for row in table["rows"] if row["stored"] < 1}, reverse=True):
        cells = []
        for names in kinds.values():
            rows = [row for row in table["rows"] if row["stored"] == stored and row["row"] in names]
            sides = [[r["perplexity"]["128"]["value"] for r in rows if r["healed"] == after] for after in (True, False)]
            cells.append(
                " ".join(text.format(min(v)) for text, v in zip(("{:.1f}", "({:.1f})"), sides, strict=True) if v)
            )
        lines.append([f"{stored:.1%}", *cells])
    return shown(title, ["stored of blocks", *kinds], lines)


def best_sparse(table: dict[str, Any]) -> str:
    return (
        "**One sparse pre-trained model for all tasks, and its rivals.** "
        + prune_once.markdown(table).partition("\n\nBytes on disk")[0]
        + "\n"
    )


def best_domain(table: dict[str, Any]) -> str:
    """Scores of each method at each sparsity, and the perplexity of the domain's text."""
    rows, names, how = table["rows"], list(atp.headline(table["rows"][0])), table["settings"]
    title = (
        f"**Tuned and cut for a domain**, {table['model']['name']}, {table['data']['name']}: {table['data']['test']} "
        f"test rows; {how['steps']} LoRA steps each, of the same rank on the same rows, searched for and refitted on "
        f"{how['calibration'] * how['seq_len']:,} tokens, {atp.learned(table)}:"
    )
    lines = []
    made = dict.fromkeys((row["sparsity"], row["method"]) for row in rows)
    for sparsity, method in sorted(made, key=lambda pair: pair[0]):
        found = [row for row in rows if (row["sparsity"], row["method"]) == (sparsity, method)]
        cells = [spread([atp.headline(row)[name] for row in found], 3) for name in names]
        cells.append(spread([row["scores"]["perplexity_full"]["perplexity"] for row in found], 2))
        lines.append([f"{sparsity:.0%}", method, *cells])
    return shown(title, ["removed of prunable", "method", *names, "domain perplexity"], lines)


def best_units(table: dict[str, Any]) -> str:
    return (
        "**PEFT configurations, searched and fixed** (at B: within half of the parameters of adapters everywhere). "
        + prune_peft.markdown(table).partition("\n\nDifferences")[0]
        + "\n"
    )


def peers(table: dict[str, Any]) -> str:
    return "**All methods at equal parameters.** " + markdown(table)


def parts_of_the_search(table: dict[str, Any]) -> str:
    return "**What each ingredient of policy gradient gives.** " + ingredients.markdown(table)


def ways(table: dict[str, Any]) -> str:
    return "**Ways to spend the same forward passes.** " + estimators.markdown(table)


def depth(table: dict[str, Any]) -> str:
    return "**Blocks removed, shared, or both, at equal stored parameters.** " + fold.markdown(table)


def sparse(table: dict[str, Any]) -> str:
    return "**One sparse pre-trained model for all tasks, and its rivals.** " + prune_once.markdown(table) + "\n"


def domain(table: dict[str, Any]) -> str:
    return "**Tuned and cut for a domain.** " + atp.markdown(table)


def units(table: dict[str, Any]) -> str:
    return "**PEFT configurations, searched and fixed.** " + prune_peft.markdown(table) + "\n"


def for_a_task(result: dict[str, Any]) -> str:
    """What `sentei run recipes/policy-gradient-task.yaml` wrote as result.json."""
    rows = next(iter(result["measurements"].values()))[0]["samples"]
    sparsity = next(stage["sparsity"] for stage in result["recipe"]["stages"] if "sparsity" in stage)
    title = (
        "**Pruned for a task, for the loss of the same rows, and for any text**: SmolLM2-135M-Instruct tuned to tell "
        f"whether a film review is positive, then without {sparsity:.0%} of the decoder parameters; {rows} reviews of "
        "SST-2's development part, which none has seen. Means: without a refit."
    )
    lines = []
    for name, found in result["measurements"].items():
        value = {each["metric"]: each["value"] for each in found}
        error = (value["accuracy"] * (1 - value["accuracy"]) / rows) ** 0.5
        lines.append([name, f"{value['accuracy']:.1%} ± {error:.1%}", f"{value['perplexity']:.2f}"])
    return shown(title, ["model", "right", "perplexity of the answer"], lines)


def search(result: dict[str, Any]) -> str:
    """What a step of the search costs."""
    memory = result["memory"]
    title = (
        f"**What the search costs**, {result['model']}, as ratios to the dense forward of the same round "
        f"({result['machine']}). Steps along random directions, led by the loss or by the divergence (kl), and sweeps "
        "of slopes of the divergence, the default, are counted per mask that they try. Peak memory of the search is "
        f"{memory['ratio']:.2f}x that of inference with the same batch "
        f"({memory['least']:.2f} to {memory['most']:.2f} in {len(memory['peak_mb']['search'])} pairs of processes)."
    )
    ways = ("masked", "sliced", "step", "step, kl", "sweep")
    columns = ["tokens", "removed", "ideal", *(f"{way} (of ideal)" for way in ways)]
    lines: dict[tuple[int, float], list[str]] = {}
    for row in result["time"]:
        line = [f"{row['tokens']}", f"{row['sparsity']:.0%}", f"{row['ideal']:.2f}"]
        line = lines.setdefault((row["tokens"], row["sparsity"]), line)
        line.append(f"{row['ratio']:.2f}, {row['least']:.2f} to {row['most']:.2f} ({row['over_ideal']:.2f})")
    return shown(title, columns, [*lines.values()])


def several(result: dict[str, Any]) -> str:
    """The search by several processes."""
    found = result["processes"]
    return (
        f"**{found['count']} processes of one thread** (gloo) sample as many masks as one ({found['masks']} of "
        f"{result['model']}) {found['speed_up']:.2f} times as fast ({found['least']:.2f} to "
        f"{found['most']:.2f} in {len(found['seconds']['1'])} rounds; {result['machine']}).\n"
    )


def scaling(result: dict[str, Any]) -> str:
    """How the time of a step grows."""
    title = (
        f"**What a step costs as models and batches grow**: {result['model']}, {result['machine']}; seconds for each "
        "mask, and against the first line's seconds for each parameter and token."
    )
    lines = [
        [
            f"{row['hidden']}",
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['tokens']}",
            f"{row['seconds']:.2f}",
            f"{row['of_linear']:.2f}",
        ]
        for row in result["scaling"]
    ]
    return shown(title, ["hidden width", "parameters", "tokens", "s", "of linear"], lines)


if __name__ == "__main__":
    main()
