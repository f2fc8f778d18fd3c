"""Removing blocks, sharing their weights, or both, at equal stored parameters: before and after the same healing.

    python benchmarks/fold.py --out results/fold-smollm2.json --stored 0.8 0.7 0.6 0.5
    python benchmarks/fold.py --out results/fold-smollm2.json --small            # minutes: does it work?
    python benchmarks/fold.py --out results/fold-smollm2.json --weigh            # bytes, resident memory, tokens/s
    python benchmarks/fold.py --out results/fold-smollm2.json --latency 25       # folded and unfolded, one process
    python benchmarks/fold.py --out results/fold-smollm2.json --markdown

A row stores at most the asked fraction of the blocks' parameters, corrections included. All rows of a seed calibrate,
heal and are judged on the same blocks of text; healing trains the same kind of parameters in each (adapters of one rank
on all stored linears, and in folded models what is a layer's own). "Not fitted" rows leave out the least-squares fit
of what is a layer's own, which has no part in removal. Rows are written as they are made; a second run with
the same settings goes on inside the row where the first was stopped (its seconds are then those of the last sitting).
`--weigh` saves every unhealed row and times it against the dense model, and a folded one against itself unfolded.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
import torch
from tables import write

from sentei import benchmark, checkpoint, data, evaluate, folding, masks, recipe, structure
from sentei.atomic import replacing
from sentei.greedy import greedy
from sentei.methods.fold_gpt import FoldGPT, healing, ranking

SPEEDS = ("prefill", "decode")
NOT_FITTED = ", not fitted"
# name -> (score that removes, is what it drops exchanged, part of what goes that is removed; the rest is folded)
ROWS: dict[str, tuple[str, bool, float]] = {
    "remove: block influence": ("block_influence", False, 1.0),
    "remove: block influence, exchanged": ("block_influence", True, 1.0),
    "remove: greedy": ("greedy", False, 1.0),
    "remove: gates": ("gates", False, 1.0),
    "remove: gates, exchanged": ("gates", True, 1.0),
    "remove: Taylor": ("taylor", False, 1.0),
    "remove: random": ("random", False, 1.0),
    "fold": ("gates", False, 0.0),
    "gates + fold, half and half": ("gates", True, 0.5),
    "gates + fold, three to one": ("gates", True, 0.75),
    "block influence + fold, half and half": ("block_influence", True, 0.5),
    "greedy + fold, half and half": ("greedy", False, 0.5),
}
# Rows that fold, with the corrections as the plan leaves them.
ROWS |= {f"{name}{NOT_FITTED}": row for name, row in ROWS.items() if row[2] < 1}
# What may differ between two runs that add rows to one table.
FREE = (
    "model", "data", "test", "out", "work", "markdown", "small", "weigh", "latency", "rows", "stored", "seeds", "heal",
)  # fmt: skip


def main() -> None:
    args = arguments()
    if tables.printed(args, markdown):
        return
    out = Path(args.out)
    work = Path(args.work or Path("runs") / out.stem)
    named, args.model = args.model, parent_folder(args.model, work)
    model, tokenizer = checkpoint.load(args.model, dtype=args.dtype)
    text = data.load(args.data)
    made_with = {
        "model": tables.name_of(named),
        "calibration": {"name": Path(args.data).name, "sha256": text.sha256},
        "test": {"name": Path(args.test).name},
        "settings": {key: value for key, value in vars(args).items() if key not in FREE},
        "dtype": str(next(model.parameters()).dtype),
    }
    table = tables.resumed(out, made_with, rows=[], greedy={}, weights=[]) | tables.made_on()
    if args.latency:
        table.setdefault("latency", []).append(latency(model, table, args))
        write(out, table)
        return
    texts: dict[int, dict[str, torch.Tensor]] = {}

    def put(row: dict[str, Any]) -> None:
        tables.add(out, table, row, "groups")

    made = {(row["row"], row["stored"], row["seed"], row["healed"]) for row in table["rows"]}
    weighed = {(row["row"], row["stored"]) for row in table["weights"]}
    if ("dense", 1.0, 0, False) not in made:
        put({"row": "dense", "stored": 1.0, "seed": 0, "healed": False} | quality(model, tokenizer, args))
    for stored in args.stored:
        for name in args.rows or ROWS:
            for seed in range(args.seeds):
                wanted = [False, True] if args.heal_steps and args.heal else [False]
                missing = [healed for healed in wanted if (name, stored, seed, healed) not in made]
                if not missing and (not args.weigh or seed or (name, stored) in weighed):
                    continue
                method = row_method(name, stored, seed, args)
                small = copy.deepcopy(model)
                place = work / f"{re.sub('[^a-z]+', '-', name.lower())}-{stored}-{seed}"
                run = method.start(small, tokenizer, text, workdir=place)
                run.texts = texts[seed] = texts.get(seed) or shared_text(run)
                resumed = place.exists()
                kept = shared_states(work, method)
                for state, file in kept.items():
                    if file.exists() and not resumed:
                        place.mkdir(parents=True, exist_ok=True)
                        shutil.copy(file, place / state)
                dense, row = prune(run, table, out)
                for state, file in kept.items():
                    if (place / state).exists():
                        with replacing(file) as part:
                            shutil.copy(place / state, part)
                row = {"row": name, "stored": stored, "seed": seed, "resumed": resumed} | row
                if False in missing:
                    put(row | {"healed": False} | quality(small, tokenizer, args))
                if args.weigh and not seed and (name, stored) not in weighed:
                    table["weights"].append({"row": name, "stored": stored} | weigh(small, tokenizer, args))
                    write(out, table)
                if True in missing:
                    started = time.monotonic()
                    record = method.heal(run, dense, row["origin"], folding.is_folded(small))
                    spent = {"heal_seconds": time.monotonic() - started, "heal_tokens": record["tokens"]}
                    spent |= {"heal_trained": record["trained_parameters"], "heal_held_loss": record["loss_after"]}
                    put(row | {"healed": True} | spent | quality(small, tokenizer, args))
                shutil.rmtree(place, ignore_errors=True)


def parent_folder(model: str, work: Path) -> str:
    """What every row loads and is weighed against: a .gguf file is unpacked once."""
    found = recipe.find_model(model)
    if not found.endswith(".gguf"):
        return found
    folder = work / "parent"
    return str(folder if folder.exists() else checkpoint.unpack(found, folder))


def shared_text(run: Any) -> dict[str, torch.Tensor]:
    """Text for every purpose, also those that a row has no need of: so all rows of a seed have the same blocks."""
    return replace(run.method, sparsity=0.1, score=("gates",), target_blocks=0.5).split(run)


def shared_states(work: Path, method: FoldGPT) -> dict[str, Path]:
    """Where trained gates and measured windows wait for the next row that would make the same ones."""
    removed = f"{method.score[0]}-{method.sparsity:g}-{method.seed}"
    windows = f"{removed}-{method.exchange}" if method.sparsity else f"none-{method.seed}"
    return {
        "gates.pt": work / f"gates-{removed}.pt",
        "plan.json": work / f"plan-{windows}-{method.group_size}.json",
    }


def row_method(name: str, stored: float, seed: int, args: argparse.Namespace) -> FoldGPT:
    score, exchanged, part = ROWS[name]
    remove = (1 - stored) * part
    # a group of two saves half of what is in groups, less the corrections: fewer parameters need larger groups
    left = 1 - remove
    group_size = 2 if (left - stored) / left < 0.42 else 3 if (left - stored) / left < 0.57 else 4
    return FoldGPT(
        sparsity=remove,
        target_blocks=stored if part < 1 else None,
        score=(score,),
        exchange=args.exchange if exchanged else 0,
        group_size=args.group_size or group_size,
        parent=args.parent,
        plan=args.plan,
        lora_rank=args.lora_rank,
        scale=args.scale,
        gate_steps=args.gate_steps,
        gate_batch=args.gate_batch,
        calibration_samples=args.calibration,
        calibration_seq_len=args.tokens,
        fold_samples=args.fold_samples,
        fit_samples=0 if name.endswith(NOT_FITTED) else args.fit_samples,
        heal_steps=max(1, args.heal_steps),
        heal_lora_rank=args.heal_rank,
        heal_lr=args.heal_lr,
        heal_vector_lr=args.heal_vector_lr,
        batch_size=args.batch_size,
        hidden_weight=args.hidden_weight,
        tail_layers=args.tail_layers,
        seed=seed,
    )


def prune(run: Any, table: dict[str, Any], out: Path) -> tuple[Any, dict[str, Any]]:
    """Remove and fold the run's model in place: what the method's own `compress` does before it heals."""
    method, model = run.method, run.model
    dense = healing.aliased(model)
    began = time.monotonic()
    row: dict[str, Any] = {}
    if method.sparsity and method.score == ("greedy",):
        keep_U = greedy_prefix(method, run, table, out)
    else:
        keep_U, account = method.choose(run)
        if account["scores"]:
            row = {key: account["scores"][0][key] for key in ("held_loss", "held_loss_dense", "tokens", "seconds")}
            row["polarised"] = account.get("gates_polarised")
    row["score_seconds"] = time.monotonic() - began
    method.cut(run, keep_U)
    origin = method.origin(run.units, keep_U)
    row |= {"origin": origin, "removed": [i for i in range(run.units.num_layers) if i not in origin]}
    if method.folds:
        folded = method.fold(run, dense, origin)
        if folded is not None:
            row |= {key: folded[key] for key in ("groups", "fit", "fold_seconds", "measurements", "saved_parameters")}
    row["parameters"] = structure.total_parameters(model)
    row["stored_of_layers"] = structure.layer_parameters(model) / structure.layer_parameters(dense)
    row["stored_of_model"] = row["parameters"] / structure.total_parameters(dense)
    return dense, row


def greedy_prefix(method: FoldGPT, run: Any, table: dict[str, Any], out: Path) -> torch.Tensor:
    """Greedy's order does not depend on how much is to go: made once, for the largest rate asked so far."""
    units, target = run.units, masks.removal_target(run.units, method.sparsity)
    order: list[int] = table["greedy"].get(str(method.seed), [])
    keep_U = torch.ones(len(units), dtype=torch.bool)
    keep_U[order] = False
    if units.removed_parameters(keep_U) < target:
        _, found = greedy(
            run.model, units, run.calibration, run.loss, target, protected_U=ranking.protected(method, units),
            batch_size=method.batch_size,
        )  # fmt: skip
        order = [int(entry["unit"]) for entry in found]
        table["greedy"][str(method.seed)] = order
        write(out, table)
    keep_U = torch.ones(len(units), dtype=torch.bool)
    for unit in order:
        if units.removed_parameters(keep_U) < target:
            keep_U[unit] = False
    return keep_U


def quality(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    model.eval()
    text = data.read_text(args.test)
    found: dict[str, Any] = {"perplexity": {}}
    for context, blocks in ((128, args.blocks_128), (1024, args.blocks_1024)):
        if blocks:
            measured = evaluate.perplexity_text(
                model, tokenizer, text, context=context, max_blocks=blocks, batch_size=max(1, 1024 // context),
                progress=False,
            )  # fmt: skip
            found["perplexity"][str(context)] = {"value": measured["perplexity"], "blocks": measured["blocks"]}
    return found


def weigh(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes on disk, and in turns with the dense model (and with itself unfolded): memory and tokens per second."""
    settings = {"prompt_tokens": args.prompt_tokens, "new_tokens": 16, "rounds": args.rounds, "progress": False}
    stage = {"method": "fold_gpt", "fields": {}, "seed": 0, "data": {"name": "", "sha256": ""}, "record": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain = Path(scratch) / "small", Path(scratch) / "unfolded"
        checkpoint.save(model, tokenizer, folder, parent=args.model, record=stage)
        found = {
            "parameters": structure.total_parameters(model),
            "bytes": checkpoint.inspect(folder).bytes,
            "parent_bytes": checkpoint.inspect(args.model).bytes,
            "against_dense": ratios(benchmark.run(folder, args.model, **settings)),
        }
        if folding.is_folded(model):
            checkpoint.unfold(folder, plain)
            found["unfolded_bytes"] = checkpoint.inspect(plain).bytes
            found["against_unfolded"] = ratios(benchmark.run(folder, plain, **settings))
    print(json.dumps(found), flush=True)
    return found


@torch.inference_mode()
def latency(model: Any, table: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Speed of a model folded like the table's row at the first rate, as part of its own unfolded, in turns.

    Both live in one process: between processes the decode speed of one model differs by a tenth. Corrections are drawn
    at random; they take as long as any others.
    """
    stored = args.stored[0]
    groups = next(row["groups"] for row in table["rows"] if row["row"].startswith("fold") and row["stored"] == stored)
    small = copy.deepcopy(model)
    for group in groups:
        folding.fold(small, group["members"], group["owner"], rank=args.lora_rank, scale=args.scale)
    for module in small.modules():
        if isinstance(module, folding.ChildLinear) and module.A is not None and module.B is not None:
            torch.nn.init.normal_(module.A, std=0.01)
            torch.nn.init.normal_(module.B, std=0.01)
    plain = copy.deepcopy(small)
    folding.unfold(plain)
    prompt = torch.randint(100, 1000, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    speed: dict[str, list[float]] = {name: [] for name in SPEEDS}
    for number in range(args.latency + 1):
        seconds = []
        for of in (small, plain) if number % 2 else (plain, small):
            began = time.perf_counter()
            past = of(prompt, use_cache=True).past_key_values
            middle = time.perf_counter()
            for _ in range(8):
                past = of(prompt[:, -1:], past_key_values=past, use_cache=True).past_key_values
            seconds.append((middle - began, time.perf_counter() - middle))
        if number:  # the first round warms up
            folded, unfolded = seconds if number % 2 else reversed(seconds)
            for name, a, b in zip(speed, unfolded, folded, strict=True):
                speed[name].append(a / b)
    found: dict[str, Any] = {"stored": stored, "folded_layers": len(groups), "threads": torch.get_num_threads()}
    for name, values in speed.items():
        low, middle, high = (float(torch.tensor(values).quantile(q)) for q in (0.1, 0.5, 0.9))
        found[name] = {"median": middle, "p10": low, "p90": high, "rounds": len(values)}
    print(json.dumps(found), flush=True)
    return found


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    names = ("speedup_prefill", "speedup_first_token", "speedup_decode")
    sides = {side: result[side]["memory"] for side in ("parent", "child")}
    return {name: result.get(name) for name in names} | {"memory": result["ratios"], "bytes": sides}


def markdown(table: dict[str, Any]) -> str:
    """One line per row and rate, perplexity before and after healing; then bytes, memory and speed."""
    dense = next(row for row in table["rows"] if row["row"] == "dense")
    contexts = list(dense["perplexity"])
    shown = ", ".join(f"{dense['perplexity'][c]['value']:.2f} at {c}" for c in contexts)
    healed = next((row for row in table["rows"] if row["healed"]), None)
    tokens = f"{healed['heal_tokens']:,} tokens" if healed else "none"
    lines = [
        f"{table['model']}, {table['dtype'].removeprefix('torch.')}, {table['machine']}. Perplexity on WikiText-2 raw "
        f"test; dense: {shown}. Calibrated and healed ({tokens}) on {table['calibration']['name']}.",
        "",
        "| stored of blocks | row | removed | groups | " + " | ".join(f"{c}, healed" for c in contexts)
        + " | " + " | ".join(f"{c}, not healed" for c in contexts) + " | parameters |",
        "|---|---|---|---|" + "---|" * (2 * len(contexts) + 1),
    ]  # fmt: skip
    keys = dict.fromkeys((row["stored"], row["row"]) for row in table["rows"] if row["row"] != "dense")

    def value(stored: float, name: str, after: bool, context: str) -> str:
        found = [
            row["perplexity"][context]["value"]
            for row in table["rows"]
            if (row["stored"], row["row"], row["healed"]) == (stored, name, after) and context in row["perplexity"]
        ]
        return tables.spread(found)

    for stored, name in sorted(keys, key=lambda key: -key[0]):
        row = next(row for row in table["rows"] if (row["stored"], row["row"]) == (stored, name))
        cells = [value(stored, name, after, c) for after in (True, False) for c in contexts]
        lines.append(
            f"| {row['stored_of_layers']:.1%} | {name} | {len(row['removed'])} | {len(row.get('groups', []))} | "
            f"{' | '.join(cells)} | {row['parameters']:,} |"
        )
    if table["weights"]:
        lines += [
            "",
            "| stored | row | file | of the dense | loaded memory of dense | prefill, decode against dense | "
            "prefill, decode against unfolded |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in table["weights"]:
        speed = [
            f"{found['speedup_prefill']:.2f}, {found['speedup_decode']:.2f}" if found else ""
            for found in (row["against_dense"], row.get("against_unfolded"))
        ]
        memory = row["against_dense"]["memory"]["loaded_memory"]
        lines.append(
            f"| {row['stored']} | {row['row']} | {row['bytes'] / 1e6:.1f} MB | "
            f"{row['bytes'] / row['parent_bytes']:.3f} | {memory:.3f} | {speed[0]} | {speed[1]} |"
        )
    for of in table.get("latency", []):
        shown = ", ".join(f"{n} {of[n]['median']:.3f} ({of[n]['p10']:.3f} to {of[n]['p90']:.3f})" for n in SPEEDS)
        lines += [
            "",
            f"{of['folded_layers']} groups at {of['stored']:.1%}, {of['threads']} threads, folded against unfolded in "
            f"one process, {of['prefill']['rounds']} rounds in turns, median (p10 to p90): {shown}",
        ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = tables.flags(__doc__, "results/fold-smollm2.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--work", help="folder for the state of the row under way (runs/NAME, by the name of --out)")
    parser.add_argument("--small", action="store_true", help="few steps and tokens, unless a flag says otherwise")
    parser.add_argument("--weigh", action="store_true", help="save unhealed rows; measure bytes, memory and speed")
    parser.add_argument("--latency", type=int, default=0, metavar="ROUNDS", help="speed of folded against unfolded")
    parser.add_argument("--data", default="../shared/data/wikitext-103-tok/valid.txt", help="calibration and healing")
    parser.add_argument("--test", default="../shared/data/wikitext-2-raw/wiki.test.raw")
    parser.add_argument("--stored", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5], help="of block parameters")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--heal", action=argparse.BooleanOptionalAction, default=True, help="the healed rows too")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=16, help="blocks of text for scores other than gates")
    parser.add_argument("--tokens", type=int, default=256, help="per block of all calibration and healing text")
    parser.add_argument("--gate-steps", type=int, default=200)
    parser.add_argument("--gate-batch", type=int, default=8)
    parser.add_argument("--exchange", type=int, default=8, help="trials of rows that exchange what they drop")
    parser.add_argument("--fold-samples", type=int, default=16)
    parser.add_argument(
        "--fit-samples", type=int, default=64, help="blocks that folded layers' corrections are fitted on"
    )
    parser.add_argument("--group-size", type=int, default=None, help="default: the smallest that reaches the rate")
    parser.add_argument("--parent", default="best")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--lora-rank", type=int, default=8, help="of what a folded layer keeps for itself")
    parser.add_argument("--scale", action=argparse.BooleanOptionalAction, default=True, help="output scales too")
    parser.add_argument("--heal-steps", type=int, default=200)
    parser.add_argument("--heal-lr", type=float, default=3e-3, help="of low-rank terms and adapters")
    parser.add_argument("--heal-vector-lr", type=float, default=1e-3, help="of norms and scales")
    parser.add_argument("--heal-rank", type=int, default=8, help="of temporary adapters, in every row")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hidden-weight", type=float, default=1.0)
    parser.add_argument("--tail-layers", type=int, default=2)
    parser.add_argument("--blocks-128", type=int, default=100)
    parser.add_argument("--blocks-1024", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    small = {
        "gate_steps": 20, "gate_batch": 2, "calibration": 2, "tokens": 64, "fold_samples": 2, "heal_steps": 2,
        "batch_size": 2, "blocks_128": 4, "blocks_1024": 0, "plan": "dp", "parent": "first", "rounds": 1,
        "prompt_tokens": 32,
    }  # fmt: skip
    if parser.parse_known_args()[0].small:
        parser.set_defaults(**small)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    main()
