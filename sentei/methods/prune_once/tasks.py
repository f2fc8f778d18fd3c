"""Tasks that a sparse checkpoint is put to: batches, losses against a teacher, predictions and scores.

A task does not know where its logits come from: `scores` takes any function from model inputs to logits, so that the
model in torch and its int8 form in another runtime are judged by the same lines.

Shape legend: B rows of a batch, T tokens, V labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sentei import data
from sentei.data import squad
from sentei.data.examples import Examples
from sentei.distill import Distillation, comparing, kl, same_layers
from sentei.evaluate import scores as scoring
from sentei.evaluate import squad as squad_scoring
from sentei.train import IGNORE, Batch, Batches, causal_batch, evaluating, shuffled

METRICS: dict[str, tuple[str, ...]] = {  # by kind of the task; the first stands for it unless another is named
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "qa": ("f1", "exact_match"),
    "clm": ("perplexity", "loss"),
}
KINDS = tuple(METRICS)
SMALLER_IS_BETTER = ("perplexity", "loss")
Forward = Callable[[Batch], Sequence[Tensor]]
"""Model inputs -> logits: one tensor, or start and end for question answering."""


@dataclass(frozen=True)
class Task:
    """Rows of one kind, tokenised for one model.

    Attributes:
        rows: `Examples`, or a `data.Text` for "clm".
        seq_len: tokens; longer inputs are cut, or cut to windows for "qa".
        asked: the score that stands for the task, one of METRICS for its kind, or "auto".
    Raises:
        ValueError: a score that this kind of task, or a task of this many labels, does not have.
    """

    kind: str
    rows: Any
    tokenizer: Any
    seq_len: int
    stride: int = 128
    asked: str = "auto"
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.asked not in ("auto", *METRICS[self.kind]):
            known = ", ".join(METRICS[self.kind])
            raise ValueError(f"metric is {self.asked!r}; a task of kind {self.kind} has auto, {known}")
        if self.kind == "classification" and self.asked == "f1" and len(self.rows.labels) != 2:
            raise ValueError(f"metric f1 is of two labels, the task has {len(self.rows.labels)}; use accuracy")

    def encoded(self, part: str) -> Any:
        """Token rows of a part (windows for "qa", blocks [N, T] for "clm"), made once."""
        if part not in self._made:
            rows = getattr(self.rows, part)
            if self.kind == "clm":
                self._made[part] = data.blocks(rows, self.tokenizer, self.seq_len)
            elif self.kind == "qa":
                self._made[part] = squad.windows(rows, self.tokenizer, self.seq_len, self.stride)
            else:
                pairs = None if not rows or rows[0]["pair"] is None else [row["pair"] for row in rows]
                texts = [row["text"] for row in rows]
                coded = self.tokenizer(texts, pairs, truncation=True, max_length=self.seq_len) if rows else {}
                targets = [row["label"] for row in rows]
                names = [name for name in self.tokenizer.model_input_names if name in coded]
                self._made[part] = [
                    {name: coded[name][i] for name in names} | {"targets": targets[i]} for i in range(len(rows))
                ]
        return self._made[part]

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Rows padded to the longest of them."""
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        batch = dict(self.tokenizer.pad([{name: row[name] for name in names} for row in rows], return_tensors="pt"))
        number = torch.float32 if self.kind == "regression" else torch.long
        return batch | {"targets": torch.tensor([row["targets"] for row in rows], dtype=number)}

    def batches(self, size: int, seed: int) -> tuple[Batches, int]:
        """Training batches without end, and how many make an epoch."""
        rows = self.encoded("train")
        if not len(rows):
            raise ValueError("there is no training row")
        count = -(-len(rows) // size)
        if self.kind == "clm":
            return shuffled(rows, size, seed=seed), count
        places = torch.arange(len(rows))[:, None]
        make = lambda chosen, n: self.collate([rows[i] for i in chosen.flatten().tolist()])  # noqa: E731
        return shuffled(places, size, seed=seed, make=make), count

    def scores(self, forward: Forward, part: str, size: int = 32) -> dict[str, Any]:
        """Scores of a part, by the kind of the task; correlations and shares are fractions of 1.

        Returns:
            "accuracy", "matthews" and of two labels "f1" (of the second label); "pearson" and "spearman", None where
            one side is constant, with the reason in "undefined"; "exact_match" and "f1"; or "loss" (nats per token) and
            "perplexity".
        """
        rows = self.encoded(part)
        if not len(rows):
            return {}
        if self.kind == "clm":
            total = count = 0.0
            for ids in rows.split(size):
                batch = causal_batch(ids, torch.ones_like(ids))
                (logits_BTV,) = forward(_inputs(batch))
                wanted = batch["targets"] != IGNORE
                each = F.cross_entropy(logits_BTV[wanted].float(), batch["targets"][wanted], reduction="sum")
                total, count = total + float(each), count + int(wanted.sum())
            loss = total / count
            return {"loss": loss, "perplexity": float(torch.tensor(loss).exp())}
        # Rows of a length together: less padding, and the same scores.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        found: dict[int, list[Tensor]] = {}
        for start in range(0, len(order), size):
            places = order[start : start + size]
            made = forward(_inputs(self.collate([rows[i] for i in places])))
            for place, *logits in zip(places, *made, strict=True):
                found[place] = logits
        if self.kind == "qa":
            asked = getattr(self.rows, part)
            starts, ends = ([found[i][side] for i in range(len(rows))] for side in (0, 1))
            given = squad.answers(asked, rows, starts, ends)
            return squad_scoring.score(given, [[answer["text"] for answer in row["answers"]] for row in asked])
        labels = [row["targets"] for row in rows]
        if self.kind == "regression":
            predicted = [float(found[i][0]) for i in range(len(rows))]
            for what, numbers in (("prediction", predicted), ("label", labels)):
                if len(set(numbers)) < 2:
                    return dict.fromkeys(METRICS[self.kind]) | {"undefined": f"every {what} is {numbers[0]:g}"}
            return {name: scoring.score(name, predicted, labels) for name in METRICS[self.kind]}
        chosen = [int(found[i][0].argmax()) for i in range(len(rows))]
        names = ["accuracy", "matthews"] + (["f1"] if len(self.rows.labels) == 2 else [])
        return {name: scoring.score(name, chosen, labels) for name in names}

    @property
    def metric(self) -> str:
        """The score that stands for the task."""
        return METRICS[self.kind][0] if self.asked == "auto" else self.asked

    def drop(self, before: dict[str, Any], after: dict[str, Any]) -> float | None:
        """By how much the metric is worse in `after`, two results of `scores`; None where one of them has none."""
        first, last = before.get(self.metric), after.get(self.metric)
        if first is None or last is None:
            return None
        return last - first if self.metric in SMALLER_IS_BETTER else first - last


def head(rows: Any, kind: str) -> dict[str, Any]:
    """What the model of a task is loaded with: arguments of `checkpoint.load`."""
    if kind == "clm":
        return {}
    if kind == "qa":
        return {"task": "QuestionAnswering"}
    return {"task": "SequenceClassification", "labels": rows.labels or ["score"]}


def kind_of(rows: Any) -> str:
    return rows.kind if isinstance(rows, Examples) else "clm"


def in_torch(model: nn.Module) -> Forward:
    """The logits of a torch model in eval mode."""
    device = next(model.parameters()).device

    def call(batch: Batch) -> Sequence[Tensor]:
        with evaluating(model), torch.inference_mode():
            output = model(**{name: x.to(device) for name, x in batch.items()})
        return [logits.cpu() for logits in _logits(output)]

    return call


@dataclass(frozen=True)
class TaskLoss:
    """hard * loss on the labels + soft * distance to the teacher's logits, means over rows; without a teacher, labels.

    The distance is t^2 KL for classes; for question answering the mean of those of start and end, padding left out; the
    squared difference for regression. With `hidden`, that times the mean distance of the layers' outputs is added.
    """

    kind: str
    teacher: nn.Module | None = None
    hard: float = 0.0
    soft: float = 1.0
    temperature: float = 2.0
    hidden: float = 0.0

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if self.teacher is None or not self.hidden:
            return self._on_logits(student, batch)
        with comparing(student, self.teacher, same_layers(student)) as distances:
            losses = self._on_logits(student, batch)
        hidden = torch.stack(distances(batch)).mean()
        return losses | {"loss": losses["loss"] + self.hidden * hidden, "hidden": hidden.detach()}

    def _on_logits(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        hard = self.hard if self.teacher is not None else 1.0
        if self.kind == "clm":
            return Distillation(self.teacher, self.temperature, hard, self.soft)(student, batch)
        inputs, targets = _inputs(batch), batch["targets"]
        mine = self._shown(_logits(student(**inputs)), inputs)
        labels = self._labels(mine, targets)
        losses = {"loss": hard * labels, "labels": labels.detach()}
        if self.teacher is not None and self.soft:
            with torch.inference_mode():
                theirs = self._shown(_logits(self.teacher(**inputs)), inputs)
            theirs = [logits.clone() for logits in theirs]  # a tensor of inference mode may not be kept for backward
            distance = self._distance(mine, theirs)
            losses |= {"loss": losses["loss"] + self.soft * distance, "kd": distance.detach()}
        return losses

    def _labels(self, mine: Sequence[Tensor], targets: Tensor) -> Tensor:
        if self.kind == "regression":
            return F.mse_loss(mine[0].float().flatten(), targets)
        if self.kind == "qa":
            each = [F.cross_entropy(logits.float(), targets[:, side]) for side, logits in enumerate(mine)]
            return (each[0] + each[1]) / 2
        return F.cross_entropy(mine[0].float(), targets)

    def _shown(self, logits: Sequence[Tensor], inputs: Batch) -> Sequence[Tensor]:
        """No answer starts or ends in the padding."""
        if self.kind != "qa":
            return logits
        # A finite number: infinity less infinity is not a number, and exp(-10000) is 0 all the same.
        away = ~inputs["attention_mask"].bool()
        return [x.float().masked_fill(away, -1e4) for x in logits]

    def _distance(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        if self.kind == "regression":
            return F.mse_loss(mine[0].float(), theirs[0].float())
        each = [kl(m, t, self.temperature) for m, t in zip(mine, theirs, strict=True)]
        return torch.stack(each).mean()


def _inputs(batch: Batch) -> Batch:
    return {name: x for name, x in batch.items() if name != "targets"}


def _logits(output: Any) -> list[Tensor]:
    return [output.start_logits, output.end_logits] if "start_logits" in output else [output.logits]
