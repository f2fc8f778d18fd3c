"""Prune Once for All, stage C: put the sparse checkpoint to a task; the pattern is locked (arXiv 2111.05754).

1. The zeros of the student become the lock: they get no gradient and stay zero                   `Lock.on_zeros`
2. Survivors and a new dense head are trained on the task's rows, with linear warm-up and decay   `train.train`
   minimising hard * loss(labels) + soft * t^2 KL(task teacher || student)                        `tasks.TaskLoss`
3. The last weights count; scores are of the held-out parts                                       `Task.scores`

The teacher is a dense model fine-tuned on the same task: this stage with `lock` off makes one, and dense baselines too.
Rates and epochs are two to six times the usual ones for dense models: few weights are left, and they must move far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sentei import data, structure
from sentei.data import examples, squad
from sentei.methods import Progress, option
from sentei.methods.prune_once import lock as locks
from sentei.methods.prune_once import pattern as patterns
from sentei.methods.prune_once.pretrain import to_fp32
from sentei.methods.prune_once.schedule import Schedule, linear
from sentei.methods.prune_once.tasks import KINDS, METRICS, Task, TaskLoss, head, in_torch, kind_of
from sentei.train import Settings, train

PRESETS: dict[str, dict[str, float]] = {
    "paper": {"epochs": 9, "batch_size": 32, "seq_len": 128, "lr": 1e-4},
    "paper_squad": {"epochs": 8, "batch_size": 12, "seq_len": 384, "lr": 1.5e-4},
    "small_gpu": {"epochs": 5, "batch_size": 32, "seq_len": 128, "lr": 1e-4},
    "cpu_mini": {"epochs": 3, "batch_size": 32, "seq_len": 128, "lr": 1e-4},
}


@dataclass(frozen=True)
class OnTask:
    """What stages C and D share: the rows of a task and how they are learnt; `preset` fills in what is not given."""

    paper: ClassVar[str] = "arXiv 2111.05754"
    preset: str = option("cpu_mini", "paper, paper_squad, small_gpu or cpu_mini: epochs, batch_size, seq_len and lr")
    task: str = option("auto", "classification, regression, qa (SQuAD v1.1), clm (text); auto: by the labels")
    metric: str = option("auto", "score that stands for the task: accuracy, f1, matthews, pearson and so on, by kind")
    label_field: str = option("label", "field of the rows that holds the label")
    pair_field: str | None = option(None, "field of a second text")
    limit: int | None = option(None, "at most so many training rows; clm: documents", "ours")
    validation_fraction: float = option(0.1, "of the training rows, held out where no validation file is given")
    held_limit: int | None = option(None, "at most so many rows of validation and of test", "ours")
    epochs: float | None = option(None, "times that every row is seen; paper 9, SQuAD 8", "public recipes")
    batch_size: int | None = option(None, "rows per micro-batch; paper 32, SQuAD 12", "public recipes")
    seq_len: int | None = option(None, "tokens of a row; paper 128, SQuAD 384", "public recipes")
    lr: float | None = option(None, "peak learning rate; paper 1e-4, SQuAD 1.5e-4", "public recipes")
    stride: int = option(128, "tokens that two windows of a long context share (qa)", "public recipes")
    accumulate: int = option(1, "micro-batches per optimiser step", "ours")
    warmup: float = option(0.01, "fraction of the run in which the learning rate rises", "authors' code")
    clip: float = option(1.0, "largest gradient norm", "authors' library")
    kd_hard: float = option(0.0, "with a teacher: weight of the labels (without one: labels alone)", "public recipes")
    kd_soft: float = option(1.0, "with a teacher: weight of the distillation", "public recipes")
    kd_hidden: float = option(
        0.0,
        "with a teacher of as many layers: weight of |h - h_teacher|^2 / |h_teacher|^2, mean over layers and tokens; "
        "there is no dropout then",
        "ours",
    )
    temperature: float = option(2.0, "softens both distributions", "authors' script")
    precision: str = option("auto", "fp32, bf16 (autocast over fp32 weights) or auto", "ours")
    save_every: int = option(100, "steps between states on disk", "ours")
    seed: int = option(0, "order of the rows, dropout")
    shape: str = option("sparse", "sparse: container of bits and values; dense: plain, zeros in full")
    zstd: bool = option(True, "compress the parts of the container that become smaller by it")

    structural: ClassVar[bool] = False
    reads: ClassVar[str] = "examples"
    saves: ClassVar[str] = "checkpoint"
    needs_teacher: ClassVar[str] = "optional"
    presets: ClassVar[dict[str, dict[str, float]]] = PRESETS

    def __post_init__(self) -> None:
        if self.preset not in self.presets:
            raise ValueError(f"preset is one of {', '.join(self.presets)}; got {self.preset!r}")
        if self.task not in ("auto", *KINDS):
            raise ValueError(f"task is auto or one of {', '.join(KINDS)}; got {self.task!r}")
        if self.metric not in (known := ["auto", *sorted({name for names in METRICS.values() for name in names})]):
            raise ValueError(f"metric is one of {', '.join(known)}; got {self.metric!r}")
        for name, value in self.presets[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("epochs", "batch_size", "lr", "temperature", "stride"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if (self.seq_len or 0) < 8:
            raise ValueError(f"seq_len must be at least 8, got {self.seq_len}")
        if min(self.kd_hard, self.kd_soft) < 0 or self.kd_hard + self.kd_soft == 0:
            raise ValueError(f"kd_hard {self.kd_hard} and kd_soft {self.kd_soft}: none below 0, one above 0")
        if self.kd_hidden < 0 or (self.kd_hidden and not self.kd_soft):
            raise ValueError(f"kd_hidden is at least 0, and comes on top of kd_soft; got {self.kd_hidden}")
        self._settings(1)

    def read(self, spec: Any, text_field: str) -> Any:
        """Rows of the task, or text for clm."""
        limits = {
            "limit": self.limit, "held_limit": self.held_limit, "validation_fraction": self.validation_fraction,
        }  # fmt: skip
        if self.task == "clm":
            text = data.load(spec, text_field=text_field)
            held = {part: getattr(text, part)[: self.held_limit] for part in ("validation", "test")}
            return replace(text, train=text.train[: self.limit], **held)
        if self.task == "qa":
            return squad.load(spec, **limits)
        kind = None if self.task == "auto" else self.task
        return examples.load(
            spec, kind=kind, text_field=text_field, pair_field=self.pair_field, label_field=self.label_field, **limits
        )

    def forwards(self, rows: Any, tokenizer: Any, *, teacher: bool) -> float:
        """Forward passes of training, a backward counted as two."""
        return (4 if teacher else 3) * self._steps(self._task(rows, tokenizer)) * self.accumulate

    def head(self, rows: Any) -> dict[str, Any]:
        return head(rows, kind_of(rows))

    def _task(self, rows: Any, tokenizer: Any) -> Task:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return Task(kind_of(rows), rows, tokenizer, self.seq_len or 8, self.stride, self.metric)

    def _settings(self, steps: int) -> Settings:
        return Settings(
            lr=self.lr or 0.0,
            steps=steps,
            warmup=self.warmup,
            weight_decay=self._weight_decay(),
            betas=(0.9, 0.999),
            clip=self.clip,
            accumulate=self.accumulate,
            precision=self.precision,
            dropout=not self.kd_hidden,
            save_every=self.save_every,
            seed=self.seed,
        )

    def _weight_decay(self) -> float:
        return 0.0

    def _loss(self, kind: str, teacher: Any | None) -> TaskLoss:
        return TaskLoss(kind, teacher, self.kd_hard, self.kd_soft, self.temperature, hidden=self.kd_hidden)

    def _check_teacher(self, model: Any, teacher: Any | None) -> None:
        """It fits the model and this method; it will not learn."""
        if teacher is None:
            if self.kd_hidden:
                raise ValueError("kd_hidden compares with a teacher; give one (--teacher)")
            return
        check_teacher(model, teacher)
        if self.kd_hidden and len(structure.layers(model)) != len(structure.layers(teacher)):
            raise ValueError(
                f"kd_hidden compares layer with layer; the teacher has {len(structure.layers(teacher))}, the "
                f"student {len(structure.layers(model))}"
            )
        teacher.eval().requires_grad_(False)

    def _learn(
        self,
        model: Any,
        task: Task,
        teacher: Any | None,
        *,
        between: Callable[[int, dict[str, Any]], None],
        workdir: Path | None,
        report: Progress | None,
    ) -> dict[str, Any]:
        """Train on the task's rows, `between(step, state)` after every step, and with 0 after a state was read.

        Returns:
            "history", "steps".
        """
        batches, _ = task.batches(self.batch_size or 1, self.seed)
        steps = self._steps(task)
        warmup = int(self.warmup * steps)
        state: dict[str, Any] = {"history": []}
        run = train(
            model, batches, self._loss(task.kind, teacher), self._settings(steps), folder=workdir, state=state,
            rate=lambda t: linear(steps, warmup, t), restored=lambda: between(0, state),
            fingerprint=repr((asdict(self), task.rows.sha256, teacher is None)),
        )  # fmt: skip
        with closing(run):
            for step in run:
                between(step.step, state)
                if step.step % max(1, steps // 20) == 0 or step.step == steps:
                    state["history"].append({"step": step.step, "lr": step.lr, **step.losses})
                if report is not None:
                    message = ", ".join(f"{name} {value:.3g}" for name, value in step.losses.items())
                    report({"step": step.step, "of": steps, "message": message, **step.losses})
        return {"history": state["history"], "steps": steps}

    def _steps(self, task: Task) -> int:
        _, epoch = task.batches(self.batch_size or 1, self.seed)
        return max(1, round((self.epochs or 1) * epoch / self.accumulate))


@dataclass(frozen=True)
class Transfer(OnTask):
    """Stage C: fine-tune the sparse checkpoint on a task with its pattern locked."""

    lock: bool = option(True, "keep the zeros; off: fine-tune a dense model, as a teacher or a baseline", "ours")
    prune: float = option(0.0, "above 0: prune the dense model gradually while it learns, the rival of 'once'", "ours")
    weight_decay: float = option(0.01, "on matrices only", "public recipes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prune < 1 or (self.prune and self.lock):
            raise ValueError(f"prune is a sparsity, at least 0 and below 1, and only with lock off; got {self.prune}")
        if not self.lock and not self.prune:
            object.__setattr__(self, "shape", "dense")

    def _weight_decay(self) -> float:
        return self.weight_decay

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        text: Any,
        *,
        teacher: Any | None = None,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Fine-tune in place; the zeros of every locked matrix stay exactly where they are.

        Args:
            text: what `read` returned.
            teacher: a model with the same head; None learns from the labels alone.
        Returns:
            "scores" (part -> score -> value), "metric", "mask_sha256" (equal to the student's), "sparsity",
            "history", "seconds".
        Raises:
            ValueError: a dense model, a teacher of another vocabulary or other labels, a loss that is not finite.
        """
        started = time.monotonic()
        task = self._task(text, tokenizer)
        self._check_teacher(model, teacher)
        schedule = None
        if self.lock:
            held = locks.Lock.on_zeros(locks.lockable(model), model.name_or_path)
        else:
            held = locks.Lock(locks.prunable(model) if self.prune else {})
        if self.prune:
            schedule = Schedule.of(self._steps(task), warmup=0.01, start=0.0, end=0.5, freeze=0.8, every=0.01)
        to_fp32(model)

        def between(step: int, state: dict[str, Any]) -> None:
            if step == 0 and "lock" in state:
                held.restore(state["lock"])
            if schedule is not None and step and schedule.due(step):
                held.move(patterns.masks(held.whole(), schedule.sparsity(step, self.prune)))
                state["lock"] = held.state()
            held.apply()

        with held:
            learnt = self._learn(model, task, teacher, between=between, workdir=workdir, report=report)
        model.eval()
        forward = in_torch(model)
        return {
            "stage": "transfer" if self.lock else "pruned on the task" if self.prune else "dense transfer",
            "task": task.kind,
            "metric": task.metric,
            "scores": {part: task.scores(forward, part) for part in ("validation", "test")},
            "rows": {part: len(getattr(text, part)) for part in ("train", "validation", "test")},
            "mask_sha256": held.checksum() if held.masks else None,
            "sparsity": held.sparsity if held.masks else 0.0,
            **learnt,
            "seconds": time.monotonic() - started,
            "saving": {"masks": held.masks, "zstd": self.zstd} if self.shape == "sparse" else {},
        }


def check_teacher(model: Any, teacher: Any) -> None:
    """A teacher must read the same tokens and name the same labels.

    Raises:
        ValueError: it does not; says where they first differ.
    """
    words = [m.get_input_embeddings().weight.shape[0] for m in (model, teacher)]
    if words[0] != words[1]:
        raise ValueError(f"the teacher's vocabulary differs from the student's: {words[1]} tokens against {words[0]}")
    kinds = [type(m).__name__.partition("For")[2] for m in (model, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the teacher is a model for {kinds[1]}, the student for {kinds[0]}; fine-tune it on the task")
    mine, theirs = ({int(k): v for k, v in m.config.id2label.items()} for m in (model, teacher))
    if kinds[0] == "SequenceClassification" and mine != theirs:
        first = next(i for i in sorted({*mine, *theirs}) if mine.get(i) != theirs.get(i))
        raise ValueError(
            f"the teacher's label map differs from the student's; first difference: label {first} is "
            f"{theirs.get(first)!r} there, {mine.get(first)!r} here"
        )
