"""ATP beside its rivals on domain rows: one row per method, sparsity and seed, same data, LoRA rank and tokens.

    python benchmarks/atp.py --data pubmedqa --out results/atp-pubmedqa.json --sparsity 0.4 --seeds 3
    python benchmarks/atp.py --out results/atp-pubmedqa.json --overhead 3
    python benchmarks/atp.py --out results/atp-pubmedqa.json --markdown
    python benchmarks/atp.py --data pubmedqa --rows .         # the rows as pubmedqa-train.jsonl, pubmedqa-test.jsonl

    dense             the untuned model
    dense-lora        tuned, nothing removed: the 100 % row
    taylor, wanda, policy-gradient    pruned first, then LoRA of the same rank on the same tokens
    fixed-mask        ATP's own LoRA with a Taylor mask, cut from step 0: what is left without learning the mask
    random-mask       the same with random units
    atp-ours          the method as it is by default: from what policy gradient's search keeps the mask is sought that
                      is nearest to the dense model; least squares at the freeze, then LoRA on all rows
    atp-ours-healed   the same, distilled from a dense-LoRA model at the end
    atp-flap          the same from FLAP scores, every layer alike, with half of the steps for the mask
    atp-kl            LoRA learns on the dense model while that mask is sought, from a start by Taylor scores
    atp, atp-healed   in the paper's form, as all that follow; healed: distilled from a dense-LoRA model at the end
    atp-near          its masks start near the budget, by Taylor scores, and not dense
    atp-searched      the next row, its masks starting near what policy-gradient keeps, a quarter of the steps for them
    atp-refit, fixed-mask-refit       least squares at the freeze, on as many tokens as the rivals' calibration
    taylor-refit, wanda-refit         least squares after the cut, as policy gradient does by default
    fixed-mask-healed, policy-gradient-healed  the same teacher and tokens for the Taylor mask, for policy gradient's
    atp-last-sample, atp-threshold    the method with the final mask of the authors' code, or P(keep) >= 0.5
    atp-head-dims     the method inside heads

Rows are appended as they are made; a second run makes the missing ones, and refuses a file of other settings. `--tokens
all` gives the rivals the tokens that ATP's generator read on top, and the generator's rows. Data sets are read from
../shared/data, or any file of rows by `--train` and `--test`. Test rows are never trained on: a prompt on both sides is
refused. `--overhead N` trains dense LoRA and ATP in turns, N times, each in a process of its own, for the ratios of
time and memory; the seconds of the table's rows hold pruning and whatever else the machine did.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
import torch
from domains import READ, rows_of, write_rows
from tables import spread

from sentei import checkpoint, structure
from sentei.data import Text, prompts
from sentei.data.examples import Examples
from sentei.evaluate import domain
from sentei.methods.atp import ATP, PAPER
from sentei.methods.one_shot import OneShot
from sentei.methods.policy_gradient import PolicyGradient
from sentei.recipe import find_model
from sentei.train import resolve_precision

TWO_STAGE = ("taylor", "wanda", "policy-gradient", "taylor-refit", "wanda-refit")
METHODS = ("dense", "dense-lora", *TWO_STAGE[:3], "fixed-mask", "random-mask", "atp", "atp-ours")
MORE = (
    "atp-ours-healed", "atp-flap", "atp-kl", "atp-healed", "atp-near", "atp-searched", "atp-refit", "fixed-mask-refit",
    *TWO_STAGE[3:], "fixed-mask-healed", "policy-gradient-healed", "atp-last-sample", "atp-threshold", "atp-head-dims",
    "atp-uniform",
)  # fmt: skip
WHOLE = ("dense", "dense-lora")
# Arguments that choose rows of the table, or what is done with it; all others must be equal for all rows.
NO_SETTINGS = (
    "out", "markdown", "sparsity", "methods", "seeds", "verbose", "rows", "overhead", "overhead_steps", "overhead_of",
    "model", "data", "train", "test",
)  # fmt: skip


def main() -> None:
    args = arguments()
    if args.rows:
        write_rows(Path(args.rows), args)
    elif args.overhead_of:
        print(json.dumps(train_alone(args.overhead_of, args)))
    elif not tables.printed(args, markdown):
        measure(Path(args.out), args)


def measure(out: Path, args: argparse.Namespace) -> None:
    """Make the rows that the table does not have yet, or its overhead."""
    warnings.filterwarnings("ignore", category=UserWarning, module="__main__")
    model, tokenizer = checkpoint.load(find_model(args.model), dtype=args.dtype)
    train, test = rows_of(args)
    prompts.check_unseen(test, prompts.seen(train))
    table = tables.resumed(out, settings_of(args, model, train, test))
    table |= tables.made_on()
    if args.overhead:
        del model
        table["overhead"] = overhead(args)
        tables.write(out, table)
        print(overhead_in_words(table["overhead"]))
        return
    made = {(row["method"], row["sparsity"], row["seed"]) for row in table["rows"]}
    for seed in range(args.seeds):
        for sparsity in (0.0, *args.sparsity):
            for name in args.methods:
                if (name in WHOLE) != (sparsity == 0.0) or (name == "dense" and seed) or (name, sparsity, seed) in made:
                    continue
                row = {"method": name, "sparsity": sparsity, "seed": seed}
                row |= make(name, sparsity, seed, model, tokenizer, train, test, args)
                tables.add(out, table, row, "history")


def settings_of(
    args: argparse.Namespace, model: Any, train: list[prompts.Row], test: list[prompts.Row]
) -> dict[str, Any]:
    """Everything that must be equal for two rows to stand in one table."""
    digest = hashlib.sha256(json.dumps([train, test], sort_keys=True).encode()).hexdigest()[:16]
    name = Path(args.train).name if args.train else args.data
    return {
        "model": {"name": Path(args.model).name, "parameters": structure.total_parameters(model)},
        "data": {"name": name, "train": len(train), "test": len(test), "answers": answers(test), "sha256": digest},
        "settings": {name: value for name, value in vars(args).items() if name not in NO_SETTINGS},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def answers(rows: list[prompts.Row]) -> list[int] | None:
    """How often each choice is the answer, where all multiple-choice rows have the same choices."""
    asked = [row for row in rows if row["kind"] == "choices"]
    if len({tuple(row["choices"]) for row in asked}) != 1:
        return None
    return [sum(row["answer"] == number for row in asked) for number in range(len(asked[0]["choices"]))]


def method_of(args: argparse.Namespace, sparsity: float, seed: int) -> ATP:
    return ATP(
        sparsity=sparsity, steps=args.steps, batch_size=args.batch_size, seq_len=args.seq_len, template=args.template,
        loss_on=args.loss_on, prompt_loss_weight=args.prompt_loss_weight or 0.0, seed=seed, patience=0, lr=args.lr,
        final_lr=1.0 if args.final_lr is None else args.final_lr, lora_rank=args.rank, eval_rows=args.eval_rows,
        slice_rows=args.slice_rows, control_every=args.control_every, refit_tokens=args.calibration * args.seq_len,
    )  # fmt: skip


def parts_of(train: list[prompts.Row], name: str) -> Examples:
    """Training rows and a twentieth to choose the best step on."""
    held = prompts.hold_out(train, max(8, len(train) // 20), 0)[1]
    rest = [row for i, row in enumerate(train) if i not in set(held)]
    return Examples("response", rest, [train[i] for i in held], [], None, name, "")


def make(
    name: str,
    sparsity: float,
    seed: int,
    model: Any,
    tokenizer: Any,
    train: list[prompts.Row],
    test: list[prompts.Row],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One method from the dense model to its scores."""
    small = copy.deepcopy(model)
    method, examples = method_of(args, sparsity, seed), parts_of(train, args.train or args.data)
    if name not in ("atp", "dense") and args.tokens == "all" and not name.startswith("atp-"):
        decided = math.ceil(round(method.control_fraction * args.steps) / args.control_every)
        method = replace(method, steps=args.steps + decided, slice_rows=0)
    started = time.monotonic()
    found: dict[str, Any] = {}
    searched = Path(args.out).with_suffix(".searched")
    if name in TWO_STAGE:
        found["prune_seconds"] = prune(name, sparsity, seed, small, tokenizer, examples.train, method, args)["seconds"]
    elif name in ("atp-searched", "policy-gradient-healed"):
        pruned = copy.deepcopy(model)
        record = prune("policy-gradient", sparsity, seed, pruned, tokenizer, examples.train, method, args)
        found["prune_seconds"], mask = record["seconds"], record["kept"]
        searched.mkdir(exist_ok=True)
        (searched / "compression.json").write_text(json.dumps({"stages": [{"record": {"kept": mask}}]}))
        del pruned
    paper = PAPER | {"generator_lr": args.generator_lr}
    refitted = paper | {"compensate": "least-squares"}
    variant = {
        "fixed-mask": {"mask": "taylor"},
        "fixed-mask-healed": {"mask": "taylor", "heal_steps": args.heal_steps},
        "fixed-mask-refit": {"mask": "taylor", "compensate": "least-squares"},
        "policy-gradient-healed": {  # a generator that does not move leaves the mask as it was found
            "start": str(searched),
            "control_fraction": 1 / args.steps,
            "generator_lr": 1e-12,
            "heal_steps": args.heal_steps,
        },
        "random-mask": {"mask": "random"},
        "atp": paper,
        "atp-healed": paper | {"heal_steps": args.heal_steps},
        "atp-ours": {},
        "atp-ours-healed": {"heal_steps": args.heal_steps},
        "atp-flap": {"start": "flap", "control_fraction": 0.5},
        "atp-kl": {"start": "taylor", "lora_on": "dense", "control_fraction": 0.25},
        "atp-near": paper | {"start": "taylor"},
        "atp-searched": refitted | {"start": str(searched), "control_fraction": 0.25},
        "atp-refit": refitted | {"start": "taylor"},
        "atp-last-sample": paper | {"final_mask": "last_sample"},
        "atp-threshold": paper | {"final_mask": "threshold"},
        "atp-head-dims": paper | {"units": "head-dims+channels"},
        "atp-uniform": paper | {"shape": "uniform"},
    }.get(name, {"mask": "none"})
    if name != "dense":
        record = replace(method, **variant).compress(small, tokenizer, examples, report=say if args.verbose else None)
        kept = ("steps", "lora_tokens", "slice_tokens", "search_seconds", "generator_seconds", "tuning_seconds",
                "freeze", "zeroing", "cut_against_masked", "cut_against_masked_absolute", "removed_of_prunable",
                "validation_loss", "best_step", "heal", "warnings", "history")  # fmt: skip
        found |= {key: record[key] for key in kept if key in record}
        if name == "policy-gradient-healed" and record["kept"] != mask:
            raise ValueError("the mask is not policy gradient's any more")
    found["seconds"] = time.monotonic() - started
    total, layers = structure.total_parameters(model), structure.layer_parameters(model)
    found |= {
        "parameters": structure.total_parameters(small),
        "removed_of_layers": 1 - structure.layer_parameters(small) / layers,
        "removed_of_model": 1 - structure.total_parameters(small) / total,
        "bytes_bf16": 2 * structure.total_parameters(small),
        "layers": [[size.num_kv_heads, size.intermediate_size] for size in structure.sizes(small)],
    }
    template = prompts.Template(tokenizer, args.template)
    scores = domain.measure(
        small.eval(), test, template, seq_len=args.seq_len, new_tokens=args.new_tokens, generations=args.generations
    )
    for part in scores.values():
        part.pop("predicted", None)
        part.pop("generated", None)
    return found | {"scores": scores}


def prune(
    name: str,
    sparsity: float,
    seed: int,
    model: Any,
    tokenizer: Any,
    rows: list[prompts.Row],
    tuned: ATP,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Prune in place, calibrated on the training rows as text, to the same number of parameters as ATP; the record."""
    texts = prompts.rows_as_text(rows, prompts.Template(tokenizer, args.template))
    cut = max(1, len(texts) // 10)
    text = Text(texts[cut:], texts[:cut], [], "rows", "")
    units = tuned.units_of(model)
    fields = {
        "sparsity": sparsity * units.total / units.layer_parameters, "seed": seed,
        "calibration_samples": args.calibration, "calibration_seq_len": args.seq_len,
    }  # fmt: skip
    if name == "policy-gradient":
        if args.search_steps:  # some tables began before slopes and divergence
            fields |= {"reward": "lm_loss", "slope_sweeps": 0, "coarse_steps": args.search_steps}
        method: Any = PolicyGradient(batch_size=args.batch_size, seq_len=args.seq_len, eval_samples=8, **fields)
    else:
        criterion, _, refits = name.partition("-")
        scope, compensate = "family" if criterion == "taylor" else "layer", "least-squares" if refits else "none"
        method = OneShot(criterion=criterion, scope=scope, compensate=compensate, **fields)
    return method.compress(model, tokenizer, text)


# --- time and memory ------------------------------------------------------------------------------------------------


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Dense LoRA and ATP in turns, the same steps, each in a fresh process."""
    rounds = []
    for number in range(args.overhead):
        rounds.append({})
        for name in ("dense-lora", "atp"):
            command = [sys.executable, __file__, *sys.argv[1:], "--overhead-of", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds[-1][name] = json.loads(done.stdout.splitlines()[-1])
            print(f"round {number + 1}, {name}: {rounds[-1][name]}", flush=True)
    return {"steps": args.overhead_steps, "sparsity": args.sparsity[0], "rounds": rounds}


def train_alone(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the training loop, megabytes of the loaded model's process, and their peak up to the last step."""
    model, tokenizer = checkpoint.load(find_model(args.model), dtype=args.dtype)
    device = next(model.parameters()).device
    if resolve_precision("auto", device) == "fp32":  # as the run would have it
        model.float()
    method = replace(
        method_of(args, args.sparsity[0], 0),
        steps=args.overhead_steps,
        mask="none" if name == "dense-lora" else "learned",
        eval_every=args.overhead_steps,
        eval_rows=args.batch_size,
    )
    examples = parts_of(rows_of(args)[0], args.train or args.data)
    reset_peak()
    found = {"loaded_mb": peak()}

    def watch(event: dict[str, Any]) -> None:
        if "step" in event:
            found["peak_mb"] = peak()  # the merge and the comparison after the last step are not training

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = method.compress(model, tokenizer, examples, report=watch)
    return found | {"seconds": record["tuning_seconds"], "lora_tokens": record["lora_tokens"]}


def overhead_in_words(measured: dict[str, Any]) -> str:
    pairs = [(of["atp"], of["dense-lora"]) for of in measured["rounds"]]
    time = [atp["seconds"] / dense["seconds"] for atp, dense in pairs]
    gross = [atp["peak_mb"] / dense["peak_mb"] for atp, dense in pairs]
    net = [
        (atp["peak_mb"] - atp["loaded_mb"]) / max(dense["peak_mb"] - dense["loaded_mb"], 1e-9) for atp, dense in pairs
    ]
    return (
        f"ATP against dense LoRA, {measured['steps']} LoRA steps each, in turns, each in a fresh process: training "
        f"time x {spread(time, 2)}, peak memory x {spread(gross, 2)}, without the loaded model x {spread(net, 2)}."
    )


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        tables.reset_peak()


def peak() -> float:
    """Most resident megabytes since `reset_peak`; of the device where there is one."""
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else tables.peak()


# --- the table ------------------------------------------------------------------------------------------------------


def headline(row: dict[str, Any]) -> dict[str, float]:
    """Scores where higher is better, with the chance level of each."""
    found, scores = {}, row["scores"]
    if "choices" in scores:
        found |= {name: scores["choices"][name] for name in ("accuracy", "macro_f1") if name in scores["choices"]}
    if "rouge" in scores:
        found |= {name: scores["rouge"][name] for name in ("rouge1", "rougeL")}
    return found


Guess = Callable[[str, "dict[str, Any]", "list[int] | None"], "float | None"]
"""(score, row of the table, answers of the test rows) -> what it is worth without knowing anything; None: unknown."""


def nothing(name: str, row: dict[str, Any], counts: list[int] | None) -> float | None:
    return 0.0


def chance(name: str, row: dict[str, Any], counts: list[int] | None) -> float | None:
    """Score of a uniform guess among K choices; 0 for ROUGE.

    Of a class with the share p of the answers it finds 1 / K, and p of what it calls so is right: F1 is the harmonic
    mean of these, 2p / (1 + Kp), and macro-F1 the mean over classes (1 / K only where they are of equal size).
    """
    if name == "accuracy":
        return row["scores"]["choices"]["chance"]
    if name == "macro_f1":
        if not counts:
            return None
        shares = [count / sum(counts) for count in counts]
        return statistics.mean(2 * p / (1 + len(shares) * p) for p in shares)
    return 0.0


def majority(name: str, row: dict[str, Any], counts: list[int] | None) -> float | None:
    """Score of always the commonest answer, of share p: accuracy p; F1 2p / (1 + p) for its class, 0 for the others."""
    if name not in ("accuracy", "macro_f1") or not counts:
        return None
    p = max(counts) / sum(counts)
    return p if name == "accuracy" else 2 * p / (1 + p) / sum(count > 0 for count in counts)


def recovered(row: dict[str, Any], dense: dict[str, Any], counts: list[int] | None, guess: Guess) -> float | None:
    """Mean over scores of the part of dense LoRA's score above a guess, in percent.

    A score at which dense LoRA is no better than the guess has nothing to recover, and is left out; None: all are.
    """
    shares = []
    for name, value in headline(row).items():
        base, best = guess(name, row, counts), headline(dense)[name]
        if base is not None and best > base:
            shares.append((value - base) / (best - base))
    return 100 * statistics.mean(shares) if shares else None


def left_out(table: dict[str, Any], guess: Guess) -> list[str]:
    """Scores at which some seed's dense LoRA is no better than the guess."""
    counts, found = table["data"]["answers"], []
    for row in table["rows"]:
        if row["method"] == "dense-lora":
            for name, value in headline(row).items():
                base = guess(name, row, counts)
                if base is not None and value <= base:
                    found.append(f"{name} of seed {row['seed']} ({value:.3f}, {guess.__name__} {base:.3f})")
    return found


def learned(table: dict[str, Any]) -> str:
    """What LoRA's loss was on, how its rate went, and what some rows had on top."""
    settings = table["settings"]
    words = {"full": "loss on all tokens", "response": "loss on the response"}[settings["loss_on"]]
    if weight := settings.get("prompt_loss_weight"):
        words += f", a token of the prompt counting {weight:g}"
    if (rest := settings.get("final_lr")) is not None:
        words += f", a rate that falls to {rest:g} of itself"
    for steps in sorted({row["heal"]["steps"] for row in table["rows"] if "heal" in row}):
        words += f"; healed: {steps} steps more, taught by dense LoRA"
    return words


def markdown(table: dict[str, Any]) -> str:
    """One line per sparsity and method, mean and spread over seeds, and what the machine was asked."""
    names = list(headline(table["rows"][0]))
    settings, data, first = table["settings"], table["data"], table["rows"][0]
    told = [f"{name} {base:.3f}" for name in names if (base := chance(name, first, data["answers"]))]
    most = [f"{name} {base:.3f}" for name in names if (base := majority(name, first, data["answers"]))]
    words = [f"chance {', '.join(told)}"] if told else ["ROUGE of greedy answers"]
    words += [f"commonest answer {', '.join(most)}"] if most else []
    head = [
        f"{table['model']['name']}, {table['dtype']}, {table['machine']}. {data['name']}: {data['train']} training "
        f"rows, {data['test']} test rows, {'; '.join(words)}; {settings['steps']} LoRA steps of "
        f"{settings['batch_size']} rows of at most {settings['seq_len']} tokens, {learned(table)}. "
        "Recovered: percent of dense LoRA's scores, of their part above chance, and above the commonest answer. "
        "Perplexity: of responses; domain perplexity: of prompts and responses.",
        "",
        "| removed of prunable / model | method | params M | "
        + " | ".join(names)
        + " | perplexity | domain perplexity | recovered % | above chance % | above commonest % | LoRA tokens "
        "| all tokens |",
        "|---" * (10 + len(names)) + "|",
    ]
    by_seed = {row["seed"]: row for row in table["rows"] if row["method"] == "dense-lora"}
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in table["rows"]:
        groups.setdefault((row["sparsity"], row["method"]), []).append(row)
    order = (*METHODS, *MORE)
    for sparsity, method in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
        rows = groups[sparsity, method]
        pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
        shares = [
            [recovered(row, dense, data["answers"], guess) for row, dense in pairs]
            for guess in (nothing, chance, majority)
        ]
        cells = [
            f"{rows[0]['sparsity']:.0%} / {statistics.mean(row['removed_of_model'] for row in rows):.1%}",
            method,
            f"{statistics.mean(row['parameters'] for row in rows) / 1e6:.1f}",
            *(spread([headline(row)[name] for row in rows], 3) for name in names),
            *(spread([row["scores"][of]["perplexity"] for row in rows], 2) for of in ("perplexity", "perplexity_full")),
            *(spread([share for share in of if share is not None], 1) for of in shares),
            spread([row.get("lora_tokens", 0) for row in rows], 0),
            spread([all_tokens(row) for row in rows], 0),
        ]
        head.append("| " + " | ".join(cells) + " |")
    if missing := [*left_out(table, chance), *left_out(table, majority)]:
        head += ["", f"Left out, dense LoRA being no better: {', '.join(missing)}."]
    if "overhead" in table:
        head += ["", overhead_in_words(table["overhead"])]
    return "\n".join(head) + "\n"


def all_tokens(row: dict[str, Any]) -> int:
    """Tokens that anything has learned from: LoRA, the generator, healing, and the teacher that it heals from."""
    heal = row.get("heal") or {}
    of_heal = heal.get("tokens", 0) + heal.get("teacher_tokens", 0)
    return row.get("lora_tokens", 0) + row.get("slice_tokens", 0) + of_heal


def say(event: dict[str, Any]) -> None:
    print(f"  {event.get('step', '')}/{event.get('of', '')} {event['message']}", flush=True)


def arguments() -> argparse.Namespace:
    parser = tables.flags(__doc__, "results/atp-pubmedqa.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", choices=list(READ), default="pubmedqa")
    parser.add_argument("--train", help="a file of rows, in place of --data")
    parser.add_argument("--test", help="its test rows")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.4, 0.5])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *MORE], default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="LoRA steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--template", default="plain")
    parser.add_argument("--loss-on", default="full")
    parser.add_argument("--prompt-loss-weight", type=float, help="of a token, with --loss-on response")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--final-lr", type=float, help="part of --lr that a cosine leaves at the end; default 1")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--generator-lr", type=float, default=1e-3, help="of the paper's form")
    parser.add_argument("--control-every", type=int, default=1)
    parser.add_argument("--slice-rows", type=int, help="for the generator (a tenth, at least 64)")
    parser.add_argument("--tokens", choices=["lora", "all"], default="lora", help="which tokens are equal")
    parser.add_argument("--heal-steps", type=int, default=100)
    parser.add_argument(
        "--search-steps", type=int, default=0, help="of the policy gradient, on the loss; 0: its default"
    )
    parser.add_argument("--calibration", type=int, default=64, help="blocks for taylor, wanda and policy gradient")
    parser.add_argument("--train-rows", type=int, help="at most")
    parser.add_argument("--test-rows", type=int, help="at most, all if not given")
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--generations", type=int, help="rows answered for ROUGE, all if not given")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--rows", metavar="DIR", help="write the training and test rows as JSON lines and stop")
    parser.add_argument("--overhead", type=int, metavar="N", help="measure time and memory in N rounds and stop")
    parser.add_argument("--overhead-steps", type=int, default=40, help="LoRA steps of one measurement")
    parser.add_argument("--overhead-of", choices=["dense-lora", "atp"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
