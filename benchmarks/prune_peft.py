"""Tasks x models x seeds x configurations of PEFT, each trained alike: does the search pay, and against what?

    python benchmarks/prune_peft.py --model MINILM --seeds 5 --out results/prune-peft-minilm.json
    python benchmarks/prune_peft.py --out results/prune-peft-minilm.json --markdown

All configurations see the same rows in the same order for the same number of steps. All searches remove as many units
per round after as many steps, so that they differ in who judges alone; only "as planned" follows the method's own plan,
which keeps to max_search_ratio and may drop the warm-up. Units are the paper's, a layer's LoRA of one rank; those of
the method's default, a ladder of ranks in each layer, are in the rows with "ranks". The budget ("at B") is a share,
half without --budget-share, of the smaller of LoRA everywhere and adapters everywhere, in parameters; heads are counted
apart. Scores are on test rows, which nothing was chosen on;
with --grid each configuration's learning rate is chosen on validation rows with the first seed, without it --full-lr,
--everywhere-lr and --lr are those of full fine-tuning, of modules everywhere at full size, and of all others; each row
says its own. Rows are appended as they are made; a second run makes the missing ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import add, flags, made_on, printed, resumed, spread

from sentei import checkpoint
from sentei.adapters import Unit
from sentei.data import examples
from sentei.methods.prune_peft import CRITERIA, PrunePEFT, planning, tasks
from sentei.methods.prune_peft.training import Bench
from sentei.recipe import find_model

SHARED = "../shared/data"
GLUE = f"{SHARED}/glue"
# Files, field of the text, field of the pair, field of the label, metric.
TASKS: dict[str, tuple[Any, str, str | None, str, str]] = {
    "cola": (
        {"train": f"{GLUE}/cola/in_domain_train.tsv",
         "test": [f"{GLUE}/cola/in_domain_dev.tsv", f"{GLUE}/cola/out_of_domain_dev.tsv"]},
        "sentence", None, "label", "matthews",
    ),
    "sst2": (
        {"train": f"{GLUE}/sst2_sentences/train.tsv", "test": f"{GLUE}/sst2_sentences/dev.tsv"},
        "sentence", None, "label", "accuracy",
    ),
    "mrpc": (
        {"train": f"{GLUE}/mrpc/train.tsv", "test": f"{GLUE}/mrpc/test.tsv"},
        "sentence1", "sentence2", "label", "accuracy",
    ),
    "stsb": (
        {"train": f"{GLUE}/stsb/train.tsv", "test": f"{GLUE}/stsb/test.tsv"},
        "sentence1", "sentence2", "score", "spearman",
    ),
    "subj": (f"{SHARED}/text_cls/subj.jsonl.gz", "text", None, "label", "accuracy"),
    "qnli": (f"{GLUE}/qnli/dev.tsv", "question", "sentence", "label", "accuracy"),
    "boolq": (f"{SHARED}/superglue_val/boolq.jsonl.gz", "question", "passage", "label", "accuracy"),
    "pubmedqa": (f"{SHARED}/pubmedqa/pqa_labeled.jsonl.gz", "question", "long_answer", "final_decision", "accuracy"),
}  # fmt: skip
DEFAULT_TASKS = ("cola", "sst2", "mrpc", "stsb", "subj", "boolq", "pubmedqa")
HALF = PrunePEFT.budget  # of the smaller kind: --budget-share
FULL, LORA, ADAPTERS, BOTH = "full fine-tuning", "LoRA everywhere", "adapters everywhere", "both everywhere"
EVERYWHERE = (LORA, ADAPTERS, BOTH)
REFERENCE, CHANCE = "LoRA everywhere at B", ("random removal at B", "random removal of ranks at B")

Made = tuple[Any, Bench, dict[str, Any]]


def main() -> None:
    args = arguments()
    if printed(args, markdown):
        return
    out = Path(args.out)
    names = ("rows", "test_rows", "epochs", "batch_size", "seq_len", "grid", "precision")  # each row has its rate
    settings = {name: getattr(args, name) for name in names} | {"model": args.name or Path(args.model).name}
    if args.budget_share != HALF:  # files without it are of half
        settings["budget_share"] = args.budget_share
    table = resumed(out, {"settings": settings}, rows=[], lr={}) | made_on()
    made = {(row["task"], row["configuration"], row["seed"]) for row in table["rows"]}
    for seed in range(args.seeds):
        for name in args.tasks:
            wanted = [c for c in args.configurations if (name, c, seed) not in made]
            if not wanted:
                continue
            fields = fields_of(name, args)
            base = PrunePEFT(**fields, seed=seed, precision=args.precision, budget=args.budget_share)
            rows = read(name, args)
            model, tokenizer = checkpoint.load(find_model(args.model), **base.head(rows))
            base = replace(base, lora_r=base.ranks(model)[-1])
            for configuration in wanted:
                key = f"{name}: {configuration}"
                if key not in table["lr"]:
                    table["lr"][key] = choose_lr(configuration, base, model, tokenizer, rows, args)
                row = run(configuration, replace(base, lr=table["lr"][key]), model, tokenizer, rows, "test", args)
                add(out, table, {"task": name, "configuration": configuration, "seed": seed} | row, "living")


def fields_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What all trainings on a task's rows have in common."""
    _, _, pair, label, metric = TASKS[name]
    return {
        "epochs": args.epochs, "batch_size": args.batch_size, "seq_len": args.seq_len, "limit": args.rows,
        "pair_field": pair, "label_field": label, "metric": metric, "save_every": 1_000_000,
    }  # fmt: skip


def read(name: str, args: argparse.Namespace) -> examples.Examples:
    """The task's rows: the split is the same for every seed."""
    spec, text, pair, label, metric = TASKS[name]
    kind = "regression" if metric in ("spearman", "pearson") else "classification"
    return examples.load(
        spec, kind=kind, text_field=text, pair_field=pair, label_field=label, limit=args.rows, held_limit=args.test_rows
    )


def choose_lr(configuration: str, base: PrunePEFT, model: Any, tokenizer: Any, rows: Any, args: Any) -> float:
    full = configuration == FULL
    if not args.grid:
        return args.full_lr if full else args.everywhere_lr if configuration in EVERYWHERE else args.lr
    rates = [rate / 10 for rate in args.grid] if full else args.grid
    first = replace(base, seed=0)
    values = {
        rate: run(configuration, replace(first, lr=rate), model, tokenizer, rows, "validation", args)["value"]
        for rate in rates
    }
    return max(values, key=lambda rate: values[rate])


def run(
    configuration: str, method: PrunePEFT, model: Any, tokenizer: Any, rows: Any, part: str, args: Any
) -> dict[str, Any]:
    """Train one configuration on a copy of the model and score it."""
    begun = time.monotonic()
    torch.manual_seed(method.seed)
    _, bench, row = CONFIGURATIONS[configuration](method, copy.deepcopy(model), tokenizer, rows)
    row |= {"lr": method.lr, "metric": bench.task.metric, "seconds": time.monotonic() - begun}
    row["value"] = bench.score(getattr(rows, part))
    row["head"] = sum(p.numel() for p in bench.head_parameters())
    return row


def steps_of(method: PrunePEFT, rows: Any) -> int:
    return math.ceil(len(rows.train) * method.epochs / method.batch_size)


def bench_of(method: PrunePEFT, model: Any, tokenizer: Any, rows: Any) -> Bench:
    task = tasks.Task(rows, tokenizer, model, metric=method.metric, length=method.seq_len)
    return Bench(model, task, method, method.alpha_per_rank(model))


def everywhere(choose: Callable[[PrunePEFT, Any], list[Unit]]) -> Callable[..., Made]:
    """Train a fixed set of units."""

    def train(method: PrunePEFT, model: Any, tokenizer: Any, rows: Any) -> Made:
        units = choose(method, model)
        bench = bench_of(method, model, tokenizer, rows)
        bench.task.encode(rows.train)
        bench.put(units, "final")
        seconds = bench.fit(rows.train, steps_of(method, rows), seed="final")
        return model, bench, {
            "parameters": sum(unit.parameters for unit in units),
            "train_seconds": seconds,
            "living": [f"{unit.id}:{unit.rank}" for unit in units],
        }  # fmt: skip

    return train


def full(method: PrunePEFT, model: Any, tokenizer: Any, rows: Any) -> Made:
    model.float()  # whatever is trained must be
    bench = bench_of(method, model, tokenizer, rows)
    bench.task.encode(rows.train)
    bench.start_head("final")
    model.requires_grad_(True)
    seconds = bench.fit(rows.train, steps_of(method, rows), seed="final")
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in bench.head_parameters())
    return model, bench, {"parameters": count, "train_seconds": seconds}


def searched(planned: bool = False, **fields: Any) -> Callable[..., Made]:
    """The method itself, at the budget; `planned` leaves the rounds to it."""

    def search(method: PrunePEFT, model: Any, tokenizer: Any, rows: Any) -> Made:
        ranks = replace(method, lora_r=fields.get("lora_r", method.lora_r))
        same = {} if planned else same_rounds(ranks, model)
        method = replace(method, budget=budget(method, model), **same, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plan's notes are in the row
            record = method.compress(model, tokenizer, rows)
        phases = record["phases"]
        return model, bench_of(method, model, tokenizer, rows), {
            "parameters": record["parameters"]["living"],
            "living": record["living"],
            "train_seconds": phases["retrain"],
            "search_seconds": phases.get("warmup", 0.0) + phases.get("rounds", 0.0),
            "search_ratio": record["search_ratio"]["rows"],
            "assigned_by": record["assigned_by"],
            "notes": record["notes"],
        }  # fmt: skip

    return search


def same_rounds(method: PrunePEFT, model: Any) -> dict[str, int]:
    """Rounds of the fewest steps that tell units apart, each for a sixth of all units."""
    return {"steps_per_round": planning.LEAST_STEPS, "units_per_round": max(1, round(len(supernet(method, model)) / 6))}


def supernet(method: PrunePEFT, model: Any) -> list[Unit]:
    return replace(method, kinds=("lora", "adapter")).space(model)


def budget(method: PrunePEFT, model: Any) -> int:
    """B; until then `method.budget` is the share."""
    space = supernet(method, model)
    return int(method.budget * min(sum(u.parameters for u in space if u.is_lora == lora) for lora in (True, False)))


def of_kind(lora: bool) -> Callable[[PrunePEFT, Any], list[Unit]]:
    return lambda method, model: [unit for unit in method.space(model) if unit.is_lora == lora]


def thinner(lora: bool) -> Callable[[PrunePEFT, Any], list[Unit]]:
    """A unit in every layer, of lower rank or width: as many as the budget holds, the rest to the first layers."""

    def choose(method: PrunePEFT, model: Any) -> list[Unit]:
        units = [replace(unit, rank=1) for unit in of_kind(lora)(method, model)]
        left = budget(method, model) - sum(unit.parameters for unit in units)
        grown = True
        while grown:
            grown = False
            for place, unit in enumerate(units):
                larger = replace(unit, rank=unit.rank + 1)
                if larger.parameters - unit.parameters <= left:
                    left -= larger.parameters - unit.parameters
                    units[place], grown = larger, True
        return units

    return choose


CONFIGURATIONS: dict[str, Callable[..., Made]] = {
    FULL: full,
    LORA: everywhere(of_kind(True)),
    ADAPTERS: everywhere(of_kind(False)),
    BOTH: everywhere(lambda method, model: method.space(model)),
    REFERENCE: everywhere(thinner(True)),
    "adapters everywhere at B": everywhere(thinner(False)),
    CHANCE[0]: searched(assignment="random"),
    **{f"{criterion} alone at B": searched(assignment=criterion) for criterion in CRITERIA},
    "equal at B": searched(assignment="equal"),
    "paper's table at B": searched(assignment="paper"),
    "warm-up at B": searched(assignment="warmup"),
    "warm-up at B, on 5 % of the rows": searched(assignment="warmup", search_fraction=0.05),
    "warm-up at B, on all rows": searched(assignment="warmup", search_fraction=1.0),
    "prune_peft at B, as planned": searched(planned=True),
    "ladder of ranks at B, as planned": searched(planned=True, lora_r=None),
    CHANCE[1]: searched(planned=True, lora_r=None, assignment="random"),
    "LoRA ranks alone at B, as planned": searched(planned=True, lora_r=None, kinds=("lora",)),
    "random removal of LoRA ranks at B": searched(planned=True, lora_r=None, kinds=("lora",), assignment="random"),
    **{f"{criterion} alone, ranks at B": searched(lora_r=None, assignment=criterion) for criterion in CRITERIA},
    "equal, ranks at B": searched(lora_r=None, assignment="equal"),
    "paper's table, ranks at B": searched(lora_r=None, assignment="paper"),
    "warm-up, ranks at B": searched(lora_r=None, assignment="warmup"),
    "whole LoRA units alone at B": searched(kinds=("lora",)),
    "random removal of whole LoRA units at B": searched(kinds=("lora",), assignment="random"),
    **{
        f"{criterion} alone, whole LoRA units at B": searched(kinds=("lora",), assignment=criterion)
        for criterion in CRITERIA
    },
    "whole adapters alone at B": searched(kinds=("adapter",)),
}


def markdown(table: dict[str, Any]) -> str:
    """Two tables with a line for each configuration: scores in per cent; paired differences, costs and masks."""
    names = list(dict.fromkeys(row["task"] for row in table["rows"]))
    value = {(row["configuration"], row["task"], row["seed"]): 100 * row["value"] for row in table["rows"]}
    metric = {row["task"]: row["metric"] for row in table["rows"]}
    s = table["settings"]
    share = f"; B is {s['budget_share']:g} of the smaller kind" if "budget_share" in s else ""
    scores = [
        f"{s['model']}, {table['machine']}; {s['rows']} training rows, {s['epochs']:g} epochs, batch "
        f"{s['batch_size']}, up to {s['test_rows']} test rows{share}. Mean ± s.d. over seeds.",
        "",
        f"| configuration | parameters | {' | '.join(f'{n} ({metric[n]})' for n in names)} | mean |",
        "|" + "---|" * (len(names) + 3),
    ]
    there = {row["configuration"] for row in table["rows"]}
    against = [other for other in (FULL, LORA, ADAPTERS, REFERENCE, *CHANCE) if other in there]
    costs = [
        "Differences are paired by task and seed, with 95 % intervals: only those without 0 are shown to be any. "
        "Seconds are of the training, and of the search before it, over those of LoRA everywhere with the same task "
        "and seed; masks agree as far as the Jaccard index says, the mean over pairs of seeds (random removal shows "
        "what chance gives).",
        "",
        f"| configuration | {' | '.join(f'vs {other}' for other in against)} | search / training (rows) "
        f"| seconds / {LORA} | masks agree | s |",
        "|" + "---|" * (len(against) + 5),
    ]
    for configuration in dict.fromkeys(row["configuration"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["configuration"] == configuration]
        of = {name: [value[k] for k in value if k[:2] == (configuration, name)] for name in names}
        mean = f"{statistics.mean(map(statistics.mean, of.values())):.1f}" if all(of.values()) else ""
        cells = " | ".join(spread(values, count=False) for values in of.values())
        scores.append(
            f"| {configuration} | {statistics.mean(row['parameters'] for row in rows):,.0f} | {cells} | {mean} |"
        )
        differences = " | ".join(difference(value, configuration, other) for other in against)
        ratios = mean_of([row["search_ratio"] for row in rows if "search_ratio" in row])
        costs.append(
            f"| {configuration} | {differences} | {ratios} | {mean_of(times(table['rows'], rows))} | "
            f"{mean_of(agreement(rows))} | {statistics.mean(row['seconds'] for row in rows):,.0f} |"
        )
    return "\n".join([*scores, "", *costs])


def mean_of(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" if values else ""


def times(all_rows: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of search and training over those of training LoRA everywhere, where both were taken on one machine."""
    timed = [row for row in all_rows if "train_seconds" in row]
    plain = {(row["task"], row["seed"]): row["train_seconds"] for row in timed if row["configuration"] == LORA}
    return [
        (row["train_seconds"] + row.get("search_seconds", 0.0)) / plain[row["task"], row["seed"]]
        for row in rows
        if row in timed and (row["task"], row["seed"]) in plain
    ]


def agreement(rows: list[dict[str, Any]]) -> list[float]:
    """Jaccard index of the units that two seeds keep, for each task and pair of seeds of a search."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        masks = [set(row["living"]) for row in rows if row["task"] == task and "search_ratio" in row]
        found += [len(one & two) / len(one | two) for one, two in itertools.combinations(masks, 2)]
    return found


def difference(value: dict[Any, float], one: str, other: str) -> str:
    pairs = [value[k] - value[other, k[1], k[2]] for k in value if k[0] == one and (other, k[1], k[2]) in value]
    if one == other or not pairs:
        return ""
    if len(pairs) < 3:
        return f"{statistics.mean(pairs):+.1f} (n={len(pairs)})"
    import scipy.stats

    half = scipy.stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.mean(pairs):+.1f} ± {half:.1f} (n={len(pairs)})"


def training_flags(parser: argparse.ArgumentParser) -> None:
    """The rows, and how they are learned from."""
    parser.add_argument("--rows", type=int, default=2000, help="training rows at most")
    parser.add_argument("--test-rows", type=int, default=1000, help="test and validation rows at most")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, "results/prune-peft-minilm.json")
    parser.add_argument("--model", help="folder, .gguf file or hub id")
    parser.add_argument("--name", help="of the model, in the table")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(DEFAULT_TASKS))
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--seeds", type=int, default=5)
    training_flags(parser)
    parser.add_argument("--full-lr", type=float, default=1e-4)
    parser.add_argument("--everywhere-lr", type=float, default=1e-3)
    parser.add_argument("--grid", type=float, nargs="+", help="rates to choose from for PEFT; a tenth of them for full")
    parser.add_argument("--precision", default="auto")
    parser.add_argument(
        "--budget-share", type=float, default=HALF, help="B, of the smaller of LoRA and adapters everywhere"
    )
    parsed = parser.parse_args()
    if not parsed.markdown and not parsed.model:
        parser.error("--model is needed")
    if not 0 < parsed.budget_share <= 1:
        parser.error("--budget-share is above 0 and at most 1")
    return parsed


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    main()
