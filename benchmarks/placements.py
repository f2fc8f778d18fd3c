"""Which layers should have LoRA? Every placement trained, and where those stand that each way to search chooses.

    python benchmarks/placements.py --model MINILM --out results/placements-minilm.json --seeds 2
    python benchmarks/placements.py --out results/placements-minilm.json --markdown

Units are the paper's, LoRA on query and value of a layer, with `--keep` of them left. All sets of so many layers are
trained alike on the rows, steps and rate of `prune_peft.py` (first seed); their mean is what removal at random gives on
average, their best what a search could win. Searches then choose, without a training afterwards: the score of a choice
is that of its set. Scores are on test rows; those of validation rows, by which a default may be chosen, stand beside
them. Rows are appended as they are made; a second run makes the missing ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prune_peft import TASKS, everywhere, fields_of, read, same_rounds, training_flags
from tables import add, flags, made_on, printed, resumed, shown, spread, write

from sentei import checkpoint
from sentei.methods.prune_peft import CRITERIA, PrunePEFT
from sentei.recipe import find_model

WAYS = (*CRITERIA, "equal", "paper", "warmup")
CHECKED_ON = ("test", "validation")


@dataclass(frozen=True)
class SearchOnly(PrunePEFT):
    """The choice without the training that follows it."""

    def _train(self, search: Any, units: Any, text: Any, folder: str, what: str) -> float:
        search.bench.put(units, "final")
        search.bench.settle_head()
        return 1.0


def main() -> None:
    args = arguments()
    if printed(args, markdown):
        return
    out = Path(args.out)
    names = ("rows", "test_rows", "epochs", "batch_size", "seq_len", "lr", "keep")
    settings = {name: getattr(args, name) for name in names} | {"model": args.name or Path(args.model).name}
    table = resumed(out, {"settings": settings}, rows=[], choices=[]) | made_on()
    for name in args.tasks:
        rows = read(name, args)
        base = SearchOnly(**fields_of(name, args), lr=args.lr)
        model, tokenizer = checkpoint.load(find_model(args.model), **base.head(rows))
        base = replace(base, lora_r=base.ranks(model)[-1], kinds=("lora",))
        made = {tuple(row["layers"]) for row in table["rows"] if row["task"] == name}
        for chosen in itertools.combinations(range(model.config.num_hidden_layers), args.keep):
            if chosen not in made:
                scores = trained(chosen, base, model, tokenizer, rows)
                add(out, table, {"task": name, "layers": list(chosen)} | scores)
        known = {(row["way"], row["seed"]) for row in table["choices"] if row["task"] == name}
        for seed, way in itertools.product(range(args.seeds), args.ways):
            if (way, seed) not in known:
                method = replace(base, seed=seed, assignment=way, **same_rounds(base, model))
                layers = choice(method, args.keep, model, tokenizer, rows)
                found = {"task": name, "way": way, "seed": seed, "layers": layers}
                table["choices"].append(found)
                write(out, table)
                print(found, flush=True)


def trained(chosen: tuple[int, ...], base: PrunePEFT, model: Any, tokenizer: Any, rows: Any) -> dict[str, float]:
    """Scores and seconds of LoRA in these layers."""
    torch.manual_seed(base.seed)
    train = everywhere(lambda method, model: [unit for unit in method.space(model) if unit.layer in chosen])
    _, bench, row = train(base, copy.deepcopy(model), tokenizer, rows)
    return {part: bench.score(getattr(rows, part)) for part in CHECKED_ON} | {"seconds": row["train_seconds"]}


def choice(method: PrunePEFT, keep: int, model: Any, tokenizer: Any, rows: Any) -> list[int]:
    """The layers whose units a search leaves."""
    units = {unit.id: unit for unit in method.space(model)}
    method = replace(method, budget=keep * max(unit.parameters for unit in units.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a search that costs more than is usual
        living = method.compress(copy.deepcopy(model), tokenizer, rows)["living"]
    return sorted(units[name].layer for name in living)


def markdown(table: dict[str, Any]) -> str:
    """Per part and task, and on average: all placements, then the ones that each way to search chose."""
    names, s = list(dict.fromkeys(row["task"] for row in table["rows"])), table["settings"]
    value = {(row["task"], *row["layers"]): row for row in table["rows"]}

    def cells(found: dict[str, list[dict[str, float]]], of: Any) -> list[str]:
        """found: task -> rows."""
        made = []
        for part in CHECKED_ON:
            scores = {name: [100 * row[part] for row in found[name]] for name in names}
            made += [of(scores[name]) for name in names]
            if len(names) > 1:
                made.append(of([statistics.mean(its) for its in zip(*scores.values(), strict=True)]))
        return made

    every = {name: [row for row in table["rows"] if row["task"] == name] for name in names}
    lines = [
        [what, *cells(every, lambda scores, of=of: f"{of(scores):.1f}")]
        for what, of in (("chance (all on average)", statistics.mean), ("worst", min), ("best", max))
    ]
    for way in WAYS:
        chosen = {name: [] for name in names}
        for row in table["choices"]:
            if row["way"] == way:
                chosen[row["task"]].append(value[(row["task"], *row["layers"])])
        if all(chosen.values()):
            lines.append([way, *cells(chosen, lambda scores: spread(scores, count=False))])
    seeds = 1 + max((row["seed"] for row in table["choices"]), default=0)
    title = (
        f"**Which {s['keep']} layers should have LoRA**, {s['model']}, {table['machine']}; {s['rows']} training rows, "
        f"{s['epochs']:g} epochs, batch {s['batch_size']}; every placement trained once, and those that {seeds} seeds "
        "of each search chose (mean ± s.d.). A default may be chosen by validation rows, not by test rows."
    )
    shown_of = [*names, "mean"] if len(names) > 1 else names
    columns = [f"{part}: {of}" for part in CHECKED_ON for of in shown_of]
    return shown(title, ["layers chosen by", *columns], lines)


def arguments() -> argparse.Namespace:
    parser = flags(__doc__)
    parser.add_argument("--model", default="minilm", help="folder, .gguf file or hub id")
    parser.add_argument("--name", help="of the model, in the table")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["stsb", "sst2", "subj", "pubmedqa"])
    parser.add_argument("--keep", type=int, default=2, help="layers that have LoRA")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3, help="of the searches")
    training_flags(parser)
    parser.set_defaults(rows=1000, seq_len=64, lr=3e-3)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
