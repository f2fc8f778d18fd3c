"""Every structural method at equal parameters, before and after equal healing: the table in the README.

    python benchmarks/peers.py --out results/peers-smollm2.json --sparsity 0.3 0.5 --heal-steps 60
    python benchmarks/peers.py --out results/peers-smollm2.json --markdown

All methods calibrate on the same text. A row tries each compensation that fits and keeps the one with the lowest loss
on held-out calibration text, never on the evaluation text. Rows are appended as they are made; a second run makes the
missing ones. With --masks DIR a search is kept there and not made again when its healed row is added later; the healed
row takes the compensation that its unhealed row found best. --cost adds what each search costs, on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tables import add, flags, made_on, name_of, peak, printed, reset_peak, resumed, spread, write

from sentei import checkpoint, data, evaluate, structure
from sentei.methods import settings
from sentei.methods.heal import Heal
from sentei.methods.one_shot import OneShot
from sentei.methods.policy_gradient import PolicyGradient
from sentei.recipe import find_model
from sentei.train import weights_digest

TASKS = ("local_piqa", "local_arc_easy", "local_hellaswag", "local_winogrande")
ROWS: dict[str, tuple[Any, tuple[str, ...], int]] = {  # method, compensations tried, seeds
    "random": (OneShot(criterion="random"), ("none", "mean", "least-squares"), 3),
    "magnitude": (OneShot(criterion="magnitude"), ("none", "mean", "least-squares"), 1),
    "wanda": (OneShot(criterion="wanda"), ("none", "mean", "least-squares"), 3),
    "wanda, channels only": (OneShot(criterion="wanda", granularity="channels"), ("none", "mean", "least-squares"), 1),
    "flap": (OneShot(criterion="flap"), ("none", "mean", "least-squares"), 1),
    "taylor": (OneShot(criterion="taylor"), ("none", "mean", "least-squares"), 1),
    "shortgpt": (OneShot(criterion="block_influence"), ("none",), 1),
    "greedy": (OneShot(criterion="greedy", calibration_samples=8), ("none",), 1),
    "policy gradient": (
        PolicyGradient(granularity="channels", compensate="mean", init="wanda"),
        ("mean", "least-squares"),
        3,
    ),
    "policy gradient, heads too": (PolicyGradient(compensate="mean", init="wanda"), ("mean", "least-squares"), 3),
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
        "calibration": {"name": Path(args.data).name, "sha256": text.sha256, "blocks": args.calibration, "tokens": 128},
        "dtype": str(next(model.parameters()).dtype),
    }
    table = resumed(out, made_with)
    if args.cost:
        table.setdefault("cost", {})
        for name in args.methods or ["inference", *ROWS]:
            if name not in table["cost"]:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    table["cost"][name] = fresh.submit(search_cost, name, args).result() | made_on()
                write(out, table)
                print(name, table["cost"][name], flush=True)
        return
    table |= made_on()

    def put(row: dict[str, Any]) -> None:
        add(out, table, row, "layers")

    made: dict[Any, dict[str, Any]] = {
        (row["method"], row["sparsity"], row["seed"], row["healed"]): row for row in table["rows"]
    }
    parent = remembering(model) if args.heal_steps else model
    if ("dense", 0.0, 0, False) not in made:
        put({"method": "dense", "sparsity": 0.0, "seed": 0, "healed": False} | quality(model, tokenizer, args))
    for sparsity in args.sparsity:
        for name in args.methods or ROWS:
            _, compensations, seeds = ROWS[name]
            for seed in range(min(seeds, args.seeds)):
                wanted = [False, True] if args.heal_steps else [False]
                if all((name, sparsity, seed, healed) in made for healed in wanted):
                    continue
                method = with_fields(name, sparsity, seed, args)
                kept = Path(args.masks) / f"{name}-{sparsity}-{seed}.pt" if args.masks else None
                row = made.get((name, sparsity, seed, False))
                if row is not None:
                    pruned, _ = prune(method, (row["compensation"],), model, tokenizer, text, kept)
                else:
                    pruned, found = prune(method, compensations, model, tokenizer, text, kept)
                    row = {"method": name, "sparsity": sparsity, "seed": seed} | found | {"healed": False}
                    row |= quality(pruned, tokenizer, args)
                    put(row)
                if args.heal_steps:
                    Heal(steps=args.heal_steps, seed=seed).compress(pruned, tokenizer, text, teacher=parent)
                    healed = {"healed": True, "heal_steps": args.heal_steps}
                    put(row | healed | quality(pruned, tokenizer, args))


def with_fields(name: str, sparsity: float, seed: int, args: argparse.Namespace) -> Any:
    """A row's method. The table began without slopes of the divergence, a correction (see ingredients.py), rounding."""
    method = ROWS[name][0]
    fields = {"sparsity": sparsity, "seed": seed, "correction": 0.0, "round_to": 1}
    if name != "greedy":
        fields["calibration_samples"] = args.calibration
    if isinstance(method, PolicyGradient):
        fields |= {
            "reward": "lm_loss",
            "slope_sweeps": 0,
            "coarse_steps": args.search_steps,
            "batch_size": args.search_batch,
        }
    return replace(method, **fields)


def search_cost(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak megabytes of a search, or of inference with its batch. For a process of its own."""
    model, tokenizer = checkpoint.load(find_model(args.model), dtype=args.dtype)
    text = data.load(args.data)
    batches = data.blocks(text.train, tokenizer, 128, seed=0)[: args.calibration].split(args.search_batch)
    with torch.inference_mode():
        model(batches[0])  # what the first forward sets up is no method's cost
        reset_peak()
        started = time.monotonic()
        if name == "inference":
            for ids_BT in batches:
                model(ids_BT)
    if name != "inference":
        method = with_fields(name, args.sparsity[0], 0, args)
        method.choose(method.start(model, tokenizer, text))
    return {"seconds": time.monotonic() - started, "peak_mb": peak(), "sparsity": args.sparsity[0]}


def remembering(model: Any) -> Any:
    """A copy that answers a batch seen before from memory: all rows heal on the same batches against one parent."""
    parent = copy.deepcopy(model)
    body, seen = structure.base_model(parent), {}
    forward = body.forward

    def remembered(input_ids: torch.Tensor, **rest: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in seen:
            seen[key] = forward(input_ids=input_ids, **rest)
        return seen[key]

    body.forward = remembered
    return parent


def prune(
    method: Any, compensations: tuple[str, ...], model: Any, tokenizer: Any, text: Any, kept: Path | None
) -> tuple[Any, dict[str, Any]]:
    """The pruned copy with the compensation that is best on held-out calibration text, and its figures."""
    if kept is not None:
        kept = kept.with_stem(f"{kept.stem}-{searched_by(method, model, text)}")
    if kept is not None and kept.exists():
        keep_U, account = torch.load(kept, weights_only=True), {}
    else:
        keep_U, account = method.choose(method.start(model, tokenizer, text))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(keep_U, kept)
    held = data.blocks(text.validation, tokenizer, 128, seed=1)[:32]
    losses: dict[str, float] = {}
    best: Any = None
    record: dict[str, Any] = {}
    for compensation in compensations:
        attempt = replace(method, compensate=compensation)
        again = attempt.start(copy.deepcopy(model), tokenizer, text)
        record = attempt.cut(again, keep_U)
        losses[compensation] = again.mean_loss(held)
        if losses[compensation] == min(losses.values()):
            best = again.model
    return best, {
        "compensation": min(losses, key=lambda name: losses[name]),
        "held_perplexity": {name: math.exp(min(loss, 50)) for name, loss in losses.items()},
        "start_held_perplexity": account.get("start_perplexity"),
        "removed_of_layers": record["removed_of_layers"],
        "removed_of_model": record["removed_of_model"],
        "init": account.get("init"),
        "forwards": account.get("forwards"),
        "layers": [[size.num_kv_heads, size.intermediate_size] for size in structure.sizes(best)],
    }


def searched_by(method: Any, model: Any, text: Any) -> str:
    """Eight digits of what a kept mask depends on; rows that differ in the cut alone share one."""
    of_the_cut = ("compensate", "correction", "ridge", "calibration_samples")
    fields = {name: value for name, value in settings(method).items() if name not in of_the_cut}
    return hashlib.sha256(repr((fields, weights_digest(model), text.sha256)).encode()).hexdigest()[:8]


def quality(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    model.eval()
    found: dict[str, Any] = {"perplexity": {}}
    text = data.read_text(args.test)
    for context, blocks in ((128, args.blocks_128), (1024, args.blocks_1024)):
        measured = evaluate.perplexity_text(
            model,
            tokenizer,
            text,
            context=context,
            max_blocks=blocks,
            batch_size=max(1, 1024 // context),
            progress=False,
        )
        found["perplexity"][str(context)] = {"value": measured["perplexity"], "blocks": measured["blocks"]}
    return found | zero_shot(model, tokenizer, args)


def zero_shot(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on the first rows of each task; nothing where none are asked for."""
    if not args.limit:
        return {}
    scores = evaluate.tasks(model, tokenizer, TASKS, include_path=args.tasks_path, limit=args.limit, batch_size=16)
    found = {task.removeprefix("local_"): score["acc"] for task, score in scores.items()}
    return {"zero_shot": found, "zero_shot_mean": sum(found.values()) / len(TASKS), "zero_shot_limit": args.limit}


def markdown(table: dict[str, Any]) -> str:
    """The table of the README: one line per method and sparsity, mean and spread over seeds."""
    context = {"128": "WikiText-2, 128", "1024": "WikiText-2, 1024"}
    first = table["rows"][0]
    blocks = ", ".join(f"{first['perplexity'][c]['blocks']} blocks of {c}" for c in context)
    steps = sorted({row["heal_steps"] for row in table["rows"] if row["healed"]})
    healing = f"Healed: {'/'.join(map(str, steps))} steps of LoRA on the same text, KL to the parent. " if steps else ""
    lines = [
        f"{table['model']}, {table['dtype'].removeprefix('torch.')}, {table['machine']}. Perplexity on WikiText-2 raw "
        f"test ({blocks} tokens); zero-shot: mean accuracy of PIQA, ARC-easy, HellaSwag and WinoGrande, first "
        f"{first.get('zero_shot_limit', 0)} rows of each. All calibrated on {table['calibration']['blocks']} blocks of "
        f"{table['calibration']['tokens']} tokens of {table['calibration']['name']} (WikiText-103). {healing}",
        "",
        f"| removed of layers | method | compensation | {' | '.join(context.values())} | zero-shot "
        "| healed: 128 | healed: 1024 | healed: zero-shot |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[Any, dict[bool, list[dict[str, Any]]]] = {}
    for row in table["rows"]:
        groups.setdefault((row["sparsity"], row["method"]), {False: [], True: []})[row["healed"]].append(row)

    def scores(rows: list[dict[str, Any]]) -> list[str]:
        cells = [spread([row["perplexity"][c]["value"] for row in rows]) for c in context]
        return [*cells, spread([row["zero_shot_mean"] for row in rows if "zero_shot_mean" in row], 3)]

    def order(key: Any) -> Any:
        return key[0], statistics.mean(row["perplexity"]["128"]["value"] for row in groups[key][False])

    for sparsity, method in sorted(groups, key=order):
        plain, healed = groups[sparsity, method][False], groups[sparsity, method][True]
        cells = scores(plain) + scores(healed)
        used = "/".join(sorted({row.get("compensation", "") for row in plain}))
        lines.append(f"| {plain[0].get('removed_of_layers', 0):.1%} | {method} | {used} | {' | '.join(cells)} |")
    costs = table.get("cost", {})
    if costs:
        first = next(iter(costs.values()))
        lines += [
            "",
            f"The search of each, at {first['sparsity']:.0%}, in a process of its own ({first['machine']}); inference "
            "is one pass over the calibration text.",
            "",
            "| search | s | peak MB |",
            "|---|---|---|",
        ]
        lines += [f"| {name} | {row['seconds']:,.1f} | {row['peak_mb']:,.0f} |" for name, row in costs.items()]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, "results/peers-smollm2.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--data", default="../shared/data/wikitext-103-tok/valid.txt", help="calibration and healing text"
    )
    parser.add_argument("--test", default="../shared/data/wikitext-2-raw/wiki.test.raw")
    parser.add_argument("--tasks-path", default="../shared/data/lm_eval_tasks")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="at most, where a method is random")
    parser.add_argument("--calibration", type=int, default=64, help="blocks of 128 tokens")
    parser.add_argument("--search-steps", type=int, default=50)
    parser.add_argument("--search-batch", type=int, default=8)
    parser.add_argument("--blocks-128", type=int, default=100)
    parser.add_argument("--blocks-1024", type=int, default=10)
    parser.add_argument("--limit", type=int, default=50, help="rows of each zero-shot task; 0 leaves them out")
    parser.add_argument("--heal-steps", type=int, default=0)
    parser.add_argument("--masks", help="folder to keep the searches in")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--cost", action="store_true", help="only what each search costs, at the first sparsity, in a fresh process"
    )
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    main()
