"""Prune Once for All and its rivals: one sparse checkpoint, many tasks, int8 at the end.

    python benchmarks/prune_once.py --model MINILM --out results/prune-once-minilm.json --work runs/prune-once \
        --corpus ../shared/data/wikitext-103-tok/valid.txt ../shared/data/tinystories/tinystories.jsonl.gz
    python benchmarks/prune_once.py --out results/prune-once-minilm.json --markdown

Every row has the same corpus, teacher, tokens, tokenizer and transfer recipe:

dense            A's output, fine-tuned at a usual dense rate: the task teacher of all others
dense, same ...  A's output, fine-tuned with the teacher by the recipe of the sparse rows: what they are held against
prune once       the method: pruned in pre-training with the teacher, pattern locked; then int8
..., hidden ...  the same, hidden states in its loss
..., fitted      that, from a start that is fitted to the teacher by least squares at the final sparsity
layers alone     from that start the distance of hidden states only, on short blocks (--hidden-...): no head, no stage A
..., pairs too   half of the batches are two segments, and all as long as a task's rows; as many tokens
fitted alone     this start, without the pre-training
1x4              the method in blocks of four
one-shot         (a) A's output pruned at once by magnitude, then fine-tuned with the pattern locked
random           the same with a random pattern of the same sparsity: the floor
no distillation  (b) pruned in pre-training without the teacher
per task         (c) A's output, pruned gradually while it is fine-tuned, for every task anew, on as many tokens more
                 as the student's pre-training took for each of the tasks
small dense      (d) as many layers as take the same int8 bytes, trained on the same tokens against the teacher; without
                 stage A all layers, narrower, refitted and then taught as "layers alone" is

Checkpoints that rows share stay in --work; a second run makes the rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tables import flags, made_on, printed, resumed, spread, write

import sentei
from sentei import checkpoint, data, structure
from sentei.checkpoint import sparse, zeros
from sentei.distill import HiddenStates, same_layers
from sentei.methods.prune_once import lock, pattern
from sentei.methods.prune_once.pretrain import Student
from sentei.methods.prune_once.schedule import linear
from sentei.methods.prune_once.tasks import Task, kind_of
from sentei.recipe import find_model, make_method
from sentei.train import train

KINDS = (
    "dense",
    "dense, same recipe",
    "prune once",
    "prune once, hidden states too",
    "prune once, fitted",
    "layers alone",
    "layers alone, pairs too",
    "fitted alone",
    "1x4",
    "one-shot",
    "random",
    "no distillation",
    "per task",
    "small dense",
)
GIVEN = ("data", "text_field")  # to `compress`, not to the method
SPARSE = tuple(kind for kind in KINDS if not kind.startswith("dense") and kind != "small dense")
QUANTISED = (
    "prune once",
    "prune once, hidden states too",
    "prune once, fitted",
    "layers alone",
    "layers alone, pairs too",
    "1x4",
)


def tasks(root: Path) -> dict[str, dict[str, Any]]:
    """Name -> what `compress` is given: rows, their fields, and the kind where it is not told by the labels."""
    glue = root / "glue"
    return {
        "sst2": {
            "data": {
                "train": str(glue / "sst2_sentences/train.tsv"),
                "validation": str(glue / "sst2_sentences/dev.tsv"),
                "test": str(glue / "sst2_sentences/test.tsv"),
            },
            "text_field": "sentence",
        },
        "mrpc": {
            "data": {"train": str(glue / "mrpc/train.tsv"), "test": str(glue / "mrpc/test.tsv")},
            "text_field": "sentence1",
            "pair_field": "sentence2",
            "metric": "f1",
        },
        "stsb": {
            "data": {part: str(glue / f"stsb/{file}.tsv") for part, file in PARTS.items()},
            "text_field": "sentence1",
            "pair_field": "sentence2",
            "label_field": "score",
            "task": "regression",
        },
        "cola": {
            "data": {
                "train": str(glue / "cola/in_domain_train.tsv"),
                "validation": str(glue / "cola/in_domain_dev.tsv"),
                "test": str(glue / "cola/out_of_domain_dev.tsv"),
            },
            "text_field": "sentence",
            "metric": "matthews",
        },
        "subj": {"data": str(root / "text_cls/subj.jsonl.gz")},
        "squad": {
            "data": str(root / "squad_xquad_en/xquad.en.json"),
            "task": "qa",
            "seq_len": 256,
            "stride": 64,
            "batch_size": 12,
        },
    }


SHOWN = {"mrpc": ("accuracy", "f1"), "stsb": ("pearson", "spearman"), "squad": ("exact_match", "f1")}
"""Scores in the table, where a task has more than the one that stands for it."""
FREE = (
    "out", "work", "markdown", "rows", "tasks", "seeds", "sparsity", "model", "keep", "data", "no_int8", "int8_lr",
)  # fmt: skip
"""Arguments that choose rows of the table, say where things are or stand in the rows; all others must be equal."""
PARTS = {"train": "train", "validation": "dev", "test": "test"}


def main() -> None:
    args = arguments()
    if printed(args, markdown):
        return
    out = Path(args.out)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings["corpus"] = [Path(text).name for text in args.corpus]
    table = resumed(out, {"model": Path(args.model).name, "settings": settings}) | made_on()
    table["versions"]["sentei"] = sentei.__version__
    for seed in args.seeds:
        for task in args.tasks:
            for kind in args.rows:
                for sparsity in args.sparsity if kind in SPARSE or kind == "small dense" else [0.0]:
                    wanted = {"kind": kind, "sparsity": sparsity, "task": task, "seed": seed}
                    if any(wanted.items() <= row.items() for row in table["rows"]):
                        continue
                    started = time.monotonic()
                    row = wanted | make(args, **wanted) | {"seconds": time.monotonic() - started}
                    table["rows"].append(row)
                    write(out, table)
                    print(kind, sparsity, task, seed, row["scores"], flush=True)


def make(args: argparse.Namespace, *, kind: str, sparsity: float, task: str, seed: int) -> dict[str, Any]:
    """One row: the shared checkpoint it starts from, the transfer and, for the method itself, int8."""
    work = Path(args.work)
    teacher = dense_task(args, task, seed)
    if kind == "dense":
        return {"scores": record_of(teacher)["scores"], "metric": record_of(teacher)["metric"]} | sizes(teacher)
    start = teacher_of(args) if kind == "dense, same recipe" else shared(args, kind, sparsity)
    place = work / "tasks" / folder_name(f"{kind}-{sparsity}-{task}-{seed}")
    fields = how(args, task, seed)
    if kind == "per task":
        fields |= {"lock": False, "prune": sparsity}
        fields["epochs"] += pretraining_epochs(args, task, seed)
    if kind in ("small dense", "dense, same recipe"):
        fields |= {"lock": False}
    if kind != "small dense" or not args.teacher_steps:  # else it has not the teacher's layers
        fields["kd_hidden"] = args.task_kd_hidden
    once(place, lambda: sentei.compress(start, method="prune_once_transfer", teacher=teacher, out=place, **fields))
    record = record_of(place)
    row = {name: record[name] for name in ("scores", "metric", "mask_sha256")} | sizes(place)
    row["epochs"] = fields["epochs"]
    if kind in QUANTISED and not args.no_int8:
        quantised = place.with_name(f"{place.name}-int8")
        extra = {"fast_path": "torch_1x4"} if kind == "1x4" else {}
        fields = how(args, task, seed) | {
            "epochs": args.int8_epochs, "lr": args.int8_lr, "scope": "linear+embeddings", "scheme": args.scheme,
            "kd_hidden": args.task_kd_hidden,
        }  # fmt: skip
        once(
            quantised,
            lambda: sentei.compress(
                place, method="prune_once_quantise", teacher=teacher, out=quantised, **fields, **extra
            ),
        )
        made = record_of(quantised)
        row["int8"] = {key: made[key] for key in ("scores", "drop", "bytes", "sparsity_int8")}
        row["int8"] |= {"kd_hidden": args.task_kd_hidden, "lr": args.int8_lr}
        row["same_zeros"] = made["mask_sha256"] == record["mask_sha256"] == record_of(start)["mask_sha256"]
        if not args.keep:
            shutil.rmtree(quantised)
    if not args.keep:
        shutil.rmtree(place)
    return row


def dense_task(args: argparse.Namespace, task: str, seed: int) -> Path:
    place = Path(args.work) / "tasks" / f"dense-{task}-{seed}"
    fields = how(args, task, seed) | {"lr": args.dense_lr}
    start = teacher_of(args)
    once(place, lambda: sentei.compress(start, method="prune_once_transfer", lock=False, out=place, **fields))
    return place


def how(args: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    fields = {"seq_len": args.task_seq_len, "batch_size": 32} | tasks(Path(args.data))[task]
    return fields | {
        "epochs": args.epochs, "lr": args.lr, "seed": seed, "limit": args.limit, "held_limit": args.held_limit,
    }  # fmt: skip


def pretraining_epochs(args: argparse.Namespace, task: str, seed: int) -> float:
    """Epochs of the task that take as many tokens as its share of the student's pre-training, which all tasks share."""
    method = make_method("prune_once_transfer", {k: v for k, v in how(args, task, seed).items() if k not in GIVEN})
    rows = method.read(tasks(Path(args.data))[task]["data"], how(args, task, seed).get("text_field", "text"))
    _, tokenizer = checkpoint.load(teacher_of(args))
    coded = Task(kind_of(rows), rows, tokenizer, method.seq_len, method.stride).encoded("train")
    epoch = sum(len(row["input_ids"]) for row in coded)
    stage_b = pretraining(args) | {"steps": args.steps} if args.teacher_steps else layers_alone(args)
    return stage_b["steps"] * stage_b["batch_size"] * stage_b["seq_len"] / len(tasks(Path())) / epoch


def pretraining(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": args.corpus, "batch_size": args.batch_size, "seq_len": args.seq_len, "lr": args.pretrain_lr,
    }  # fmt: skip


def layers_alone(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "objective": "hidden", "start": "fit", "steps": args.hidden_steps, "batch_size": args.hidden_batch_size,
        "seq_len": args.hidden_seq_len, "lr": args.hidden_lr,
    }  # fmt: skip


def teacher_of(args: argparse.Namespace) -> Path:
    """A's output; the model itself where A has no steps."""
    if not args.teacher_steps:
        return Path(find_model(args.model))
    place = Path(args.work) / "teacher"
    fields = pretraining(args) | {"steps": args.teacher_steps, "train": args.teacher_train}
    fields["lr"] = args.teacher_lr or args.pretrain_lr
    return once(place, lambda: sentei.compress(args.model, method="prune_once_teacher", out=place, **fields))


def shared(args: argparse.Namespace, kind: str, sparsity: float) -> Path:
    """The checkpoint that all tasks of a row start from."""
    teacher = teacher_of(args)
    if kind == "per task":
        return teacher
    place = Path(args.work) / folder_name(f"{kind}-{sparsity}")
    if kind in ("one-shot", "random"):
        return once(place, lambda: at_once(teacher, place, sparsity, random=kind == "random"))
    if kind == "small dense":
        dense = small_dense if args.teacher_steps else narrow
        return once(place, lambda: dense(args, teacher, place, sparsity))
    fields = pretraining(args) | {"steps": args.steps, "sparsity": sparsity}
    if kind == "1x4":
        fields["pattern"] = "1x4"
    if kind in ("prune once, hidden states too", "prune once, fitted"):
        fields["kd_hidden"] = args.kd_hidden
    if "fitted" in kind:
        fields["start"] = "fit"
    if kind.startswith("layers alone"):
        fields |= layers_alone(args)
    if kind == "layers alone, pairs too":
        length = max(args.task_seq_len, args.hidden_seq_len)  # not shorter than a task's, as many tokens
        batch = round(args.hidden_batch_size * args.hidden_seq_len / length)
        fields |= {"pairs": 0.5, "seq_len": length, "batch_size": batch}
    if kind == "fitted alone":
        fields |= {"steps": 1, "lr": 1e-12}
        if not args.teacher_steps:  # no head to train
            fields["objective"] = "hidden"
    if kind == "no distillation":
        fields |= {"kd_hard": 1.0, "kd_soft": 0.0}
    return once(place, lambda: sentei.compress(teacher, method="prune_once_student", out=place, **fields))


def at_once(teacher: Path, place: Path, sparsity: float, *, random: bool) -> Path:
    """Prune the teacher without any training: by magnitude, or at random."""
    model, tokenizer = checkpoint.load(teacher, dtype="float32")
    matrices = lock.prunable(model)
    weights = {name: p.detach() for name, p in matrices.items()}
    if random:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.rand(p.shape, generator=generator) for name, p in weights.items()}
    with lock.Lock(matrices, pattern.masks(weights, sparsity)) as held:
        record = {"method": "at once", "fields": {"random": random}, "seed": 0, "data": {}}
        record["record"] = {"mask_sha256": held.checksum(), "sparsity": held.sparsity}
        return checkpoint.save(model, tokenizer, place, parent=teacher, record=record, shape="sparse", masks=held.masks)


def small_dense(args: argparse.Namespace, teacher: Path, place: Path, sparsity: float) -> Path:
    """Fewer layers, as many as int8 fits into the bytes of the sparse int8 matrices; healed on the same tokens."""
    model, _ = checkpoint.load(teacher, dtype="float32")
    blocks, total = len(structure.layers(model)), sum(p.numel() for p in lock.prunable(model).values())
    layers = max(1, round((total / 8 + (1 - sparsity) * total) / (total / blocks)))
    cut = place.with_name(f"{place.name}-cut")
    gone = (blocks - layers) / blocks
    calibration = {"calibration_samples": 32, "calibration_seq_len": args.seq_len, "data": args.corpus}
    once(
        cut,
        lambda: sentei.compress(
            teacher, method="one_shot", criterion="block_influence", granularity="layers", sparsity=gone - 1e-6,
            out=cut, **calibration,
        ),
    )  # fmt: skip
    fields = pretraining(args) | {"mode": "full", "steps": args.steps, "teacher": teacher}
    return sentei.compress(cut, method="heal", kl_weight=0.5, ce_weight=0.5, temperature=2.0, out=place, **fields)


def narrow(args: argparse.Namespace, teacher: Path, place: Path, sparsity: float) -> Path:
    """Heads and channels fewer, to the bytes of the sparse int8 matrices; then the same tokens and loss."""
    cut = place.with_name(f"{place.name}-cut")
    once(
        cut,
        lambda: sentei.compress(
            teacher, method="one_shot", criterion="wanda", granularity="heads+channels", compensate="least-squares",
            sparsity=sparsity - 1 / 8, calibration_samples=16384 // args.hidden_seq_len,
            calibration_seq_len=args.hidden_seq_len, data=args.corpus, out=cut,
        ),
    )  # fmt: skip
    model, tokenizer = checkpoint.load(cut, dtype="float32")
    dense, _ = checkpoint.load(teacher, dtype="float32")
    method = Student(**layers_alone(args))
    batches, _ = method._data(model, tokenizer, data.load(args.corpus), "hidden")
    warmup = int(method.warmup * args.hidden_steps)
    loss = HiddenStates(dense.eval().requires_grad_(False), same_layers(model))
    for _ in train(model, batches, loss, method._settings(), rate=lambda t: linear(args.hidden_steps, warmup, t)):
        pass
    record = {"method": "narrow", "fields": {"sparsity": sparsity}, "seed": 0, "data": {}, "record": {}}
    return checkpoint.save(model, tokenizer, place, parent=teacher, record=record)


def folder_name(words: str) -> str:
    return words.replace(" ", "-").replace(",", "")


def once(place: Path, do: Any) -> Path:
    if not place.exists():
        do()
    return place


def record_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "compression.json").read_text())["stages"][-1]["record"]


def sizes(place: Path) -> dict[str, int]:
    file = next(file for file in place.glob("model*.safetensors"))
    model, _ = checkpoint.load(place, dtype="float32")
    matrices = lock.prunable(model)
    whole = {"bytes": file.stat().st_size, "zeros": int(sum((p == 0).sum() for p in matrices.values()))}
    state = {name: tensor for name, tensor in zeros.unique(model).items() if name in matrices}
    return whole | {"matrices": sparse.size(state) if file.name == sparse.FILE else 0}


def markdown(table: dict[str, Any]) -> str:
    """Mean and spread over seeds of each task's score (per cent), test rows; then int8 and bytes."""
    rows = table["rows"]
    first = {row["task"]: row["metric"] for row in rows}
    names = [(task, metric) for task in first for metric in SHOWN.get(task, (first[task],))]
    how = table["settings"]
    trained = {"all": "all weights", "head": "the head alone"}[how.get("teacher_train", "all")]
    steps = f"stage A trains {trained}, {how['teacher_steps']} steps, stage B has {how['steps']}"
    if not how["teacher_steps"]:
        batch = f"{how['hidden_batch_size']} x {how['hidden_seq_len']}"
        steps = f"no stage A, stage B has {how['hidden_steps']} steps of {batch} tokens on the layers alone"
    lines = [
        f"{table['model']}; {table['machine']}; {steps}; up to {how['limit']} training rows; test rows, mean ± "
        "standard deviation over seeds",
        "",
    ]
    lines += ["| | sparse | " + " | ".join(" ".join(of) for of in names) + " |", "|---|---|" + "---|" * len(names)]
    rates = sorted({row["int8"]["lr"] for row in rows if "int8" in row})
    for rate in (None, *rates):
        label = "" if rate is None else f", int8 in OpenVINO (rate {rate:g})"
        for kind in KINDS:
            for sparsity in sorted({row["sparsity"] for row in rows if row["kind"] == kind}):
                chosen = [row for row in rows if row["kind"] == kind and row["sparsity"] == sparsity]
                scores = [(row["task"], scores_of(row, rate)) for row in chosen]
                cells = [
                    cell([of["test"].get(metric) for name, of in scores if of and name == task])
                    for task, metric in names
                ]
                if any(c != "-" for c in cells):
                    lines.append(f"| {kind}{label} | {sparsity:.0%} | " + " | ".join(cells) + " |")
    if any("int8" in row for row in rows):
        lines += ["", "Bytes on disk, in brackets how many times smaller than fp32: prunable matrices, whole model", ""]
    for kind in QUANTISED:
        for sparsity in sorted({row["sparsity"] for row in rows if row["kind"] == kind}):
            made = [
                row["int8"] for row in rows if row["kind"] == kind and row["sparsity"] == sparsity and "int8" in row
            ]
            if made:
                drops = [100 * one["drop"] for one in made if one["drop"] is not None]
                drop = f"{statistics.mean(drops):.2f} points" if drops else "not known"
                lines += [f"{kind}, {sparsity:.0%}; drop by int8: {drop}", ""]
                lines += [*byte_lines(made[0]["bytes"]), ""]
    return "\n".join(lines)


def byte_lines(forms: dict[str, Any]) -> list[str]:
    """A line per form: fp32, fp16, int8, int8 + zstd, ours; of the runtime's IR, the whole model."""
    lines = ["| | matrices MB | whole model MB |", "|---|---|---|"]
    for form, of in forms.items():
        sizes = of if isinstance(of, dict) else {"whole": of}
        cells = [
            f"{sizes[what] / 1e6:.3f} ({forms['fp32'][what] / sizes[what]:.1f}x)" if what in sizes else "-"
            for what in ("matrices", "whole")
        ]
        lines.append(f"| {form} | {cells[0]} | {cells[1]} |")
    return lines


def scores_of(row: dict[str, Any], rate: float | None) -> dict[str, Any] | None:
    """Those of the checkpoint in fp32; of its int8 form, in the runtime, where that was trained at this rate."""
    if rate is None:
        return row["scores"]
    if row.get("int8", {}).get("lr") != rate:
        return None
    return row["int8"]["scores"].get("openvino", row["int8"]["scores"]["torch"])


def cell(values: list[Any]) -> str:
    return spread([100 * value for value in values if value is not None], count=False) or "-"


def arguments() -> argparse.Namespace:
    parser = flags(__doc__)
    parser.add_argument("--model", default="", help="folder of an encoder, with or without a language-model head")
    parser.add_argument("--corpus", nargs="+", default=["python-docs"], help="texts of stages A and B")
    parser.add_argument("--data", default="../shared/data", help="folder of the tasks")
    parser.add_argument("--work", default="runs/prune-once")
    parser.add_argument("--rows", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--tasks", nargs="+", default=list(tasks(Path())))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8, 0.85, 0.9])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--teacher-steps", type=int, default=300, help="of stage A; 0: the model is the teacher")
    parser.add_argument("--teacher-train", default="all", help="all, or head")
    parser.add_argument("--teacher-lr", type=float, help="default: --pretrain-lr")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kd-hidden", type=float, default=10.0, help="of the row with hidden states")
    parser.add_argument("--hidden-steps", type=int, default=400, help="of the row of the layers alone")
    parser.add_argument("--hidden-batch-size", type=int, default=32)
    parser.add_argument("--hidden-seq-len", type=int, default=32)
    parser.add_argument("--hidden-lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--pretrain-lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dense-lr", type=float, default=5e-5)
    parser.add_argument("--int8-epochs", type=float, default=1)
    parser.add_argument("--int8-lr", type=float, default=1e-5)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--task-seq-len", type=int, default=64)
    parser.add_argument("--task-kd-hidden", type=float, default=0.0, help="of the layers of the task's teacher")
    parser.add_argument("--limit", type=int, help="training rows of a task")
    parser.add_argument("--held-limit", type=int, help="validation and test rows of a task")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of tasks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
