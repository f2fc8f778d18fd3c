"""ATP beside its rivals on domain rows: one row per method, sparsity and seed, same data, LoRA rank and tokens.

    python benchmarks/atp.py --data pubmedqa --out results/atp-pubmedqa.json --sparsity 0.4 --seeds 3
    python benchmarks/atp.py --out results/atp-pubmedqa.json --markdown

    dense             the untuned model
    dense-lora        tuned, nothing removed: the 100 % row
    taylor, wanda, policy-gradient    pruned first, then LoRA of the same rank on the same tokens
    fixed-mask        ATP's own LoRA with a Taylor mask, cut from step 0: what is left without learning the mask
    random-mask       the same with random units
    atp, atp-healed   the method; healed: distilled from a dense-LoRA model at the end
    atp-last-sample, atp-threshold    the method with the final mask of the authors' code, or P(keep) >= 0.5
    atp-head-dims     the method inside heads

Rows are appended as they are made; a second run makes the missing ones. `--tokens all` gives the rivals the tokens that
ATP's generator read on top, and the generator's rows. Data sets are read from ../shared/data, or any file of rows by
`--train` and `--test`. Test rows are never trained on: a prompt on both sides is refused.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import platform
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
import torch
from tables import spread

from sentei import checkpoint, structure
from sentei.data import Text, prompts
from sentei.data.examples import Examples
from sentei.evaluate import domain
from sentei.methods.atp import ATP
from sentei.methods.one_shot import OneShot
from sentei.methods.policy_gradient import PolicyGradient

SHARED = Path("../shared/data")
TWO_STAGE = ("taylor", "wanda", "policy-gradient")
METHODS = ("dense", "dense-lora", *TWO_STAGE, "fixed-mask", "random-mask", "atp", "atp-healed")
MORE = ("atp-last-sample", "atp-threshold", "atp-head-dims", "atp-uniform")
WHOLE = ("dense", "dense-lora")


def main() -> None:
    args = arguments()
    out = Path(args.out)
    if args.markdown:
        print(markdown(json.loads(out.read_text())))
        return
    warnings.filterwarnings("ignore", category=UserWarning, module="__main__")
    table = json.loads(out.read_text()) if out.exists() else {"rows": []}
    model, tokenizer = checkpoint.load(args.model, dtype=args.dtype)
    train, test = rows_of(args)
    prompts.check_unseen(test, prompts.seen(train))
    settings = {
        name: getattr(args, name)
        for name in ("steps", "batch_size", "seq_len", "template", "loss_on", "tokens", "heal_steps", "search_steps")
    }
    table |= {
        "model": Path(args.model).name,
        "data": {"name": args.data or Path(args.train).name, "train": len(train), "test": len(test)},
        "settings": settings,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__},
    }
    made = {(row["method"], row["sparsity"], row["seed"]) for row in table["rows"]}
    for seed in range(args.seeds):
        for sparsity in (0.0, *args.sparsity):
            for name in args.methods:
                if (name in WHOLE) != (sparsity == 0.0) or (name == "dense" and seed) or (name, sparsity, seed) in made:
                    continue
                row = {"method": name, "sparsity": sparsity, "seed": seed}
                row |= make(name, sparsity, seed, model, tokenizer, train, test, args)
                table["rows"].append(row)
                tables.write(out, table)
                print(json.dumps({key: row[key] for key in row if key != "history"}), flush=True)


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
    method = ATP(
        sparsity=sparsity, steps=args.steps, batch_size=args.batch_size, seq_len=args.seq_len, template=args.template,
        loss_on=args.loss_on, seed=seed, patience=0, lr=args.lr, generator_lr=args.generator_lr,
        lora_rank=args.rank, eval_rows=args.eval_rows, slice_rows=args.slice_rows, control_every=args.control_every,
    )  # fmt: skip
    held = prompts.hold_out(train, max(8, len(train) // 20), 0)[1]
    validation = [train[i] for i in held]
    rest = [row for i, row in enumerate(train) if i not in set(held)]
    examples = Examples("response", rest, validation, [], None, args.data or args.train, "")
    if name not in ("atp", "dense") and args.tokens == "all" and not name.startswith("atp-"):
        method = replace(method, steps=2 * args.steps - args.steps // 2, slice_rows=0)
    tables.reset_peak()
    started = time.monotonic()
    found: dict[str, Any] = {}
    if name in TWO_STAGE:
        found["prune_seconds"] = prune(name, sparsity, seed, small, tokenizer, rest, method, args)
    variant = {
        "fixed-mask": {"mask": "taylor"},
        "random-mask": {"mask": "random"},
        "atp": {},
        "atp-healed": {"heal_steps": args.heal_steps},
        "atp-last-sample": {"final_mask": "last_sample"},
        "atp-threshold": {"final_mask": "threshold"},
        "atp-head-dims": {"units": "head-dims+channels"},
        "atp-uniform": {"shape": "uniform"},
    }.get(name, {"mask": "none"})
    if name != "dense":
        record = replace(method, **variant).compress(small, tokenizer, examples, report=say if args.verbose else None)
        kept = ("steps", "lora_tokens", "slice_tokens", "generator_seconds", "freeze", "zeroing", "cut_against_masked",
                "removed_of_prunable", "validation_loss", "best_step", "heal", "warnings", "history")  # fmt: skip
        found |= {key: record[key] for key in kept if key in record}
    found["seconds"], found["peak_mb"] = time.monotonic() - started, peak()
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
) -> float:
    """Prune in place, calibrated on the training rows as text, to the same number of parameters as ATP."""
    started = time.monotonic()
    texts = prompts.rows_as_text(rows, prompts.Template(tokenizer, args.template))
    cut = max(1, len(texts) // 10)
    text = Text(texts[cut:], texts[:cut], [], "rows", "")
    units = tuned.units_of(model)
    fields = {
        "sparsity": sparsity * units.total / units.layer_parameters, "seed": seed,
        "calibration_samples": args.calibration, "calibration_seq_len": args.seq_len,
    }  # fmt: skip
    if name == "policy-gradient":
        method: Any = PolicyGradient(
            coarse_steps=args.search_steps, batch_size=args.batch_size, seq_len=args.seq_len, eval_samples=8, **fields
        )
    else:
        method = OneShot(criterion=name, scope="family" if name == "taylor" else "layer", **fields)
    method.compress(model, tokenizer, text)
    return time.monotonic() - started


def rows_of(args: argparse.Namespace) -> tuple[list[prompts.Row], list[prompts.Row]]:
    """Training and test rows of a known data set, or of two files."""
    if args.train:
        train, test = domain.read(args.train), domain.read(args.test)
    else:
        train, test = (
            [prompts.make_row(row, f"{args.data} row {n}") for n, row in enumerate(part)] for part in READ[args.data]()
        )
    taken = {prompts.prompt_hash(row) for row in test}
    train = [row for row in train if prompts.prompt_hash(row) not in taken]
    return train[: args.train_rows], test[: args.test_rows]


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pubmedqa() -> tuple[list[Any], list[Any]]:
    """The official split: 500 abstracts to learn from, 500 to test on."""
    answers = ["yes", "no", "maybe"]
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for row in lines(SHARED / "pubmedqa/pqa_labeled.jsonl.gz"):
        made = {"question": row["question"], "choices": answers, "answer": answers.index(row["final_decision"])}
        parts[row["split"] == "test"].append(made | {"context": "\n".join(row["contexts"])})
    return parts[False], parts[True]


def medqa() -> tuple[list[Any], list[Any]]:
    """MedQA's test set only is at hand: four fifths to learn from, by their place in the file."""
    rows = []
    for row in lines(SHARED / "medical_mc/medqa_test.jsonl.gz"):
        options = row["options"]
        letters = sorted(options)
        answer = letters.index(row.get("answer_idx", ""))
        rows.append({"question": row["question"], "choices": [options[k] for k in letters], "answer": answer})
    return [row for n, row in enumerate(rows) if n % 5], rows[::5]


def chatdoctor() -> tuple[list[Any], list[Any]]:
    """Generated dialogues, a tenth of them to test on."""
    rows = []
    for row in lines(SHARED / "chatdoctor/chatdoctor5k.jsonl.gz"):
        asked = row.get("input") or row.get("instruction") or ""
        if asked.strip() and (row.get("output") or "").strip():
            rows.append({"prompt": asked, "response": row["output"]})
    return [row for n, row in enumerate(rows) if n % 10], rows[::10]


def legalbench() -> tuple[list[Any], list[Any]]:
    """Clauses to be answered with yes or no, a fifth of each task to test on."""
    train, test = [], []
    count: dict[str, int] = {}
    for row in lines(SHARED / "legalbench/legalbench_old_test.jsonl.gz"):
        answer, text = str(row.get("label", "")).strip().lower(), row.get("text")
        if answer not in ("yes", "no") or not isinstance(text, str) or not text.strip():
            continue
        task = str(row.get("task", ""))
        number = count[task] = count.get(task, -1) + 1
        question = f"Does the text fit: {task.replace('_', ' ')}?"
        made = {"question": question, "context": text, "choices": ["yes", "no"], "answer": answer}
        (train if number % 5 else test).append(made)
    return train, test


READ = {"pubmedqa": pubmedqa, "medqa": medqa, "chatdoctor": chatdoctor, "legalbench": legalbench}


def headline(row: dict[str, Any]) -> dict[str, float]:
    """Scores where higher is better, with the chance level of each."""
    found, scores = {}, row["scores"]
    if "choices" in scores:
        found |= {name: scores["choices"][name] for name in ("accuracy", "macro_f1") if name in scores["choices"]}
    if "rouge" in scores:
        found |= {name: scores["rouge"][name] for name in ("rouge1", "rougeL")}
    return found


def chance(row: dict[str, Any], name: str) -> float:
    """What a uniform guess scores: for macro-F1 of balanced classes about its accuracy; 0 for ROUGE."""
    return row["scores"]["choices"]["chance"] if name in ("accuracy", "macro_f1") else 0.0


def recovered(row: dict[str, Any], dense: dict[str, Any], corrected: bool) -> float | None:
    """Mean over scores of score / dense-LoRA's score, in percent; corrected: both less the chance level."""
    shares = []
    for name, value in headline(row).items():
        base = chance(row, name) if corrected else 0.0
        best = headline(dense)[name] - base
        if best <= 0:
            return None  # dense LoRA is at chance itself: there is nothing to recover
        shares.append((value - base) / best)
    return 100 * statistics.mean(shares) if shares else None


def markdown(table: dict[str, Any]) -> str:
    """One line per sparsity and method, mean and spread over seeds; ratios are to dense LoRA of the same seed."""
    names = list(headline(table["rows"][0]))
    settings, data = table["settings"], table["data"]
    first = table["rows"][0]["scores"]
    told = f"chance accuracy {first['choices']['chance']:.3f}" if "choices" in first else "ROUGE of greedy answers"
    if "choices" in first and "majority" in first["choices"]:
        told += f", commonest answer {first['choices']['majority']:.3f}"
    head = [
        f"{table['model']}, {table['dtype']}, {table['machine']}. {data['name']}: {data['train']} training rows, "
        f"{data['test']} test rows, {told}; {settings['steps']} LoRA steps of {settings['batch_size']} rows of at most "
        f"{settings['seq_len']} tokens. Recovered: percent of dense LoRA's scores, and of their part above chance.",
        "",
        "| removed of prunable / model | method | params M | "
        + " | ".join(names)
        + " | perplexity | recovered % | above chance % | LoRA tokens | all tokens | time x | memory x |",
        "|---" * (9 + len(names)) + "|",
    ]
    by_seed = {row["seed"]: row for row in table["rows"] if row["method"] == "dense-lora"}
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in table["rows"]:
        groups.setdefault((row["sparsity"], row["method"]), []).append(row)
    order = (*METHODS, *MORE)
    for sparsity, method in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
        rows = groups[sparsity, method]
        pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
        shares = [[recovered(row, dense, corrected) for row, dense in pairs] for corrected in (False, True)]
        cells = [
            f"{rows[0]['sparsity']:.0%} / {statistics.mean(row['removed_of_model'] for row in rows):.1%}",
            method,
            f"{statistics.mean(row['parameters'] for row in rows) / 1e6:.1f}",
            *(spread([headline(row)[name] for row in rows], 3) for name in names),
            spread([row["scores"]["perplexity"]["perplexity"] for row in rows], 2),
            *(spread([share for share in of if share is not None], 1) for of in shares),
            spread([row.get("lora_tokens", 0) for row in rows], 0),
            spread([all_tokens(row) for row in rows], 0),
            spread([row["seconds"] / dense["seconds"] for row, dense in pairs if dense["seconds"]], 2),
            spread([row["peak_mb"] / dense["peak_mb"] for row, dense in pairs], 2),
        ]
        head.append("| " + " | ".join(cells) + " |")
    return "\n".join(head) + "\n"


def all_tokens(row: dict[str, Any]) -> int:
    return row.get("lora_tokens", 0) + row.get("slice_tokens", 0) + (row.get("heal") or {}).get("tokens", 0)


def say(event: dict[str, Any]) -> None:
    print(f"  {event.get('step', '')}/{event.get('of', '')} {event['message']}", flush=True)


def peak() -> float:
    """Peak resident megabytes since `reset_peak`; of the device where there is one."""
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return most
    return tables.peak()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", choices=list(READ), default="pubmedqa")
    parser.add_argument("--train", help="a file of rows, in place of --data")
    parser.add_argument("--test", help="its test rows")
    parser.add_argument("--out", default="results/atp-pubmedqa.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of an existing file and stop")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.4, 0.5])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *MORE], default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="LoRA steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--template", default="plain")
    parser.add_argument("--loss-on", default="full")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--generator-lr", type=float, default=1e-3)
    parser.add_argument("--control-every", type=int, default=1)
    parser.add_argument("--slice-rows", type=int, help="for the generator (a tenth, at least 64)")
    parser.add_argument("--tokens", choices=["lora", "all"], default="lora", help="which tokens are equal")
    parser.add_argument("--heal-steps", type=int, default=100)
    parser.add_argument("--search-steps", type=int, default=50, help="of the policy gradient")
    parser.add_argument("--calibration", type=int, default=64, help="blocks for taylor, wanda and policy gradient")
    parser.add_argument("--train-rows", type=int, help="at most")
    parser.add_argument("--test-rows", type=int, help="at most, all if not given")
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--generations", type=int, help="rows answered for ROUGE, all if not given")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
