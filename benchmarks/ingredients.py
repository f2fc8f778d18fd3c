"""What each ingredient of policy-gradient pruning gives, and the peers without a refit, on several texts.

    python benchmarks/ingredients.py --out results/ingredients-smollm2.json --sparsity 0.2 0.3 0.5
    python benchmarks/ingredients.py --out results/ingredients-smollm2.json --markdown

A row adds one ingredient to the row above it, from equal widths in FLAP's order to all of them; a first row has all but
the search. The peers are those of `peers.py`, at the same budget and as they were published: without compensation or
with the means of what goes, whichever is better on held-out calibration text. All calibrate on the same articles and
are judged on WikiText-2 raw test and on texts of other kinds. Rows are appended as they are made. With --heal-steps
rows are also healed, all alike, and with --limit the zero-shot tasks of `peers.py` are asked too.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import ROWS, prune, remembering, zero_shot
from tables import add, flags, made_on, name_of, printed, resumed, shown, spread

from sentei import checkpoint, data, evaluate
from sentei.methods.heal import Heal
from sentei.methods.one_shot import OneShot
from sentei.methods.policy_gradient import PolicyGradient
from sentei.recipe import find_model

EQUAL = OneShot(criterion="flap", granularity="channels", scope="layer", correction=0.0, calibration_samples=64)
SEARCH = PolicyGradient(  # what a row adds is told by its fields
    granularity="channels", compensate="mean", reward="lm_loss", init="flap", correction=0.0, calibration_samples=64
)
MORE_TEXT = replace(SEARCH, calibration_samples=256)
CORRECTED = replace(MORE_TEXT, correction=0.3)
BY_MEASURING = replace(CORRECTED, init="auto")
BY_DIVERGENCE = replace(BY_MEASURING, reward="kl")
# Beside the row above, not set against peers: they calibrate on 8,192 tokens, and the table's search is of channels.
LONGER, LONGER_PEER = "+ refit on 131,072 tokens", "wanda, channels only, on 131,072 tokens"
WHOLE = "+ whole sub-layers and heads too (32,768 tokens)"
INGREDIENTS: dict[str, tuple[Any, str]] = {  # method, compensation
    "FLAP's order, all but the search": (replace(EQUAL, correction=0.3, calibration_samples=256), "least-squares"),
    "equal widths, FLAP's order": (EQUAL, "none"),
    "+ means of what goes": (EQUAL, "mean"),
    "+ search over widths": (SEARCH, "mean"),
    "+ refit on 8,192 tokens": (SEARCH, "least-squares"),
    "+ refit on 32,768 tokens": (MORE_TEXT, "least-squares"),
    "+ 0.3 of the layers' errors made good": (CORRECTED, "least-squares"),  # not in every model
    "+ FLAP's or Wanda's order, by measuring": (BY_MEASURING, "least-squares"),
    "+ searched by the divergence, not the loss": (BY_DIVERGENCE, "least-squares"),
    LONGER: (replace(BY_DIVERGENCE, calibration_samples=1024), "least-squares"),
    WHOLE: (replace(BY_DIVERGENCE, granularity="sublayers+heads+channels"), "least-squares"),
}
PEERS = {  # as they were published: without a refit
    name: (
        method if name == "greedy" else replace(method, calibration_samples=64),
        tuple(each for each in compensations if each != "least-squares"),
    )
    for name, (method, compensations, _) in ROWS.items()
    if isinstance(method, OneShot)
}
ALL_ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {  # method, compensations tried
    **{name: (method, (compensation,)) for name, (method, compensation) in INGREDIENTS.items()},
    **PEERS,
    LONGER_PEER: (replace(PEERS["wanda, channels only"][0], calibration_samples=1024), ("none", "mean")),
}


def main() -> None:
    args = arguments()
    if printed(args, markdown):
        return
    out = Path(args.out)
    model, tokenizer = checkpoint.load(find_model(args.model), dtype=args.dtype)
    text = data.load(args.data)
    made_with = {
        "model": name_of(args.model),
        "calibration": {"name": Path(args.data).name, "sha256": text.sha256},
        "texts": {name.partition("=")[0]: args.text_blocks for name in args.texts},
        "dtype": str(next(model.parameters()).dtype),
    }
    table = resumed(out, made_with) | made_on()
    others = {
        name: data.blocks(data.read_documents(path), tokenizer, 128, num=args.text_blocks, seed=0)
        for name, _, path in (each.partition("=") for each in args.texts)
    }
    test = data.read_text(args.test)

    def judged(pruned: Any) -> dict[str, Any]:
        pruned.eval()
        on_test = evaluate.perplexity_text(pruned, tokenizer, test, context=128, max_blocks=100, progress=False)
        found = {name: evaluate.perplexity(pruned, ids_NT, progress=False) for name, ids_NT in others.items()}
        perplexity = {name: each["perplexity"] for name, each in ({"WikiText-2": on_test} | found).items()}
        return {"perplexity": perplexity} | zero_shot(pruned, tokenizer, args)

    made = {(row["row"], row["sparsity"], row["seed"], row.get("heal_steps", 0)) for row in table["rows"]}
    parent = remembering(model) if args.heal_steps else model
    if ("dense", 0.0, 0, 0) not in made:
        add(out, table, {"row": "dense", "sparsity": 0.0, "seed": 0} | judged(model))
    for sparsity in args.sparsity:
        for name in args.rows or [*INGREDIENTS, *PEERS]:
            for seed in args.seeds:
                wanted = {(name, sparsity, seed, steps) for steps in (0, args.heal_steps)}
                if wanted <= made or (seed and name in PEERS and ROWS[name][2] == 1):
                    continue
                method, compensations = ALL_ROWS[name]
                method = replace(method, sparsity=sparsity, seed=seed)
                kept = Path(args.masks) / f"{type(method).__name__}-{sparsity}-{seed}.pt"  # and what it depends on
                pruned, found = prune(method, compensations, model, tokenizer, text, kept)
                row = {"row": name, "sparsity": sparsity, "seed": seed} | found
                if (name, sparsity, seed, 0) not in made:
                    add(out, table, row | judged(pruned), "layers")
                if args.heal_steps:
                    Heal(steps=args.heal_steps, seed=seed).compress(pruned, tokenizer, text, teacher=parent)
                    add(out, table, row | {"heal_steps": args.heal_steps} | judged(pruned), "layers")


def markdown(table: dict[str, Any]) -> str:
    """The table of the README: one line per row and sparsity, and how the last one stands against the best peer."""
    texts = ["WikiText-2", *table["texts"]]
    blocks = ", ".join(f"{name} {count}" for name, count in table["texts"].items())
    steps = sorted({row["heal_steps"] for row in table["rows"] if "heal_steps" in row})
    limits = sorted({row["zero_shot_limit"] for row in table["rows"] if "zero_shot" in row})
    told = (
        f"{table['model']}, {table['dtype'].removeprefix('torch.')}; perplexity at 128 (WikiText-2 raw test: 100 "
        f"blocks; {blocks}), mean ± s.d. over seeds. A row that begins with + adds to the one above it; peers have no "
        "refit."
    )
    if steps:
        told += f" Healed: {'/'.join(map(str, steps))} steps of LoRA on the calibration text, KL to the parent."
    if limits:
        told += " Zero-shot: mean accuracy of PIQA, ARC-easy, HellaSwag and WinoGrande, first "
        told += f"{'/'.join(map(str, limits))} rows of each."
    sides = [(False, ""), *([(True, "healed: ")] if steps else [])]
    columns = [f"{side}{text}" for _, side in sides for text in texts]
    columns += [f"{side}zero-shot" for _, side in sides if limits]
    lines = []
    groups = {healed: grouped(table, healed) for healed, _ in sides}
    scores = {healed: grouped(table, healed, "zero_shot_mean") for healed, _ in sides}
    names = ["dense", *ALL_ROWS]
    for sparsity in sorted({sparsity for sparsity, _ in groups[False]}):
        for name in names:
            if (sparsity, name) in groups[False]:
                at = [groups[healed].get((sparsity, name), []) for healed, _ in sides]
                cells = [spread([row[text] for row in its], count=False) for its in at for text in texts]
                if limits:
                    at = [scores[healed].get((sparsity, name), []) for healed, _ in sides]
                    cells += [spread(its, 3, count=False) for its in at]
                lines.append([f"{sparsity:.0%}", name, *cells])
        found = [against_peers(table, sparsity, healed).get(text) for healed, _ in sides for text in texts]
        if any(found):
            cells = [f"{statistics.mean(each[0]) / each[1]:.2f}" if each else "" for each in found]
            cells += [""] * (len(columns) - len(found))
            lines.append([f"{sparsity:.0%}", "all ingredients / best peer", *cells])
    return shown(told, ["removed of layers", "row", *columns], lines)


def grouped(table: dict[str, Any], healed: bool = False, of: str = "perplexity") -> dict[tuple[float, str], list[Any]]:
    """(sparsity, row) -> perplexities of its seeds, text by text (or what else is asked of its rows)."""
    groups: dict[tuple[float, str], list[Any]] = {}
    for row in table["rows"]:
        if ("heal_steps" in row) == healed and of in row:
            groups.setdefault((row["sparsity"], row["row"]), []).append(row[of])
    return groups


def against_peers(
    table: dict[str, Any], sparsity: float, healed: bool = False
) -> dict[str, tuple[list[float], float, str]]:
    """Text -> (seeds of the row with most ingredients, mean of the best peer, its name), or nothing."""
    groups = grouped(table, healed)
    names = [name for name in INGREDIENTS if (sparsity, name) in groups and name not in (LONGER, WHOLE)]
    ours = [(sparsity, name) for name in names][-1:]
    peers = [(sparsity, name) for name in PEERS if (sparsity, name) in groups]
    if not ours or not peers:
        return {}
    found = {}
    for text in ("WikiText-2", *table["texts"]):
        means = {each: statistics.mean(row[text] for row in groups[each]) for each in peers}
        best = min(peers, key=lambda each: means[each])
        found[text] = [row[text] for row in groups[ours[0]]], means[best], best[1]
    return found


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, "results/ingredients-smollm2.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="../shared/data/wikitext-103-tok/valid.txt", help="calibration text")
    parser.add_argument("--test", default="../shared/data/wikitext-2-raw/wiki.test.raw")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[
            "news=../shared/data/nltk_text/abc.jsonl.gz",
            "stories=../shared/data/tinystories/tinystories.jsonl.gz",
        ],
        help="name=path of texts of other kinds",
    )
    parser.add_argument("--text-blocks", type=int, default=32, help="of each, drawn at random")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--rows", nargs="+", choices=list(ALL_ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--masks", default="masks", help="folder to keep the searches in")
    parser.add_argument("--heal-steps", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0, help="rows of each zero-shot task")
    parser.add_argument("--tasks-path", default="../shared/data/lm_eval_tasks")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    main()
