"""A task's rows as batches, its loss, its predictions and its score."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sentei.data.examples import Examples, MakeRow, Row, field
from sentei.evaluate import scores
from sentei.train import IGNORE, Batch, Batches, autocast, causal_batch, evaluating, mix, resolve_precision, shuffled

DEFAULT_METRIC = {"classification": "accuracy", "regression": "spearman", "response": "likelihood"}


class Task:
    """What turns a model and rows into losses and scores.

    Classification and regression use the model's head; "response" is a language model that learns the response and not
    the prompt (its metric, "likelihood", is exp(-mean loss) of a response token).

    Args:
        length: tokens of a row at most; longer ones are cut.
    """

    def __init__(self, rows: Examples, tokenizer: Any, model: Any, *, metric: str | None, length: int):
        if rows.kind not in DEFAULT_METRIC:
            raise ValueError(f"rows of kind {rows.kind!r} are not searched; known: {', '.join(DEFAULT_METRIC)}")
        self.kind, self.labels, self.tokenizer, self.length = rows.kind, rows.labels, tokenizer, length
        self.metric = metric or DEFAULT_METRIC[rows.kind]
        of_numbers = self.metric in scores.OF_NUMBERS
        known = self.metric in scores.SCORES and of_numbers == (rows.kind == "regression") and rows.kind != "response"
        if not known and self.metric != DEFAULT_METRIC[rows.kind]:
            raise ValueError(
                f"metric {self.metric!r} is not for {rows.kind}; the default is {DEFAULT_METRIC[rows.kind]}"
            )
        outputs = {"classification": len(rows.labels or ()), "regression": 1}.get(rows.kind)
        if outputs is not None and model.config.num_labels != outputs:
            raise ValueError(
                f"the model's head has {model.config.num_labels} outputs, the rows need {outputs} "
                f"({', '.join(rows.labels or ['a number'])}); load the model with num_labels={outputs}"
            )
        if self.metric == "f1" and outputs != 2:
            raise ValueError(f"metric f1 is of two labels, the rows have {outputs}; use macro_f1")
        accepted = inspect.signature(model.forward).parameters
        self.names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._encoded: dict[int, tuple[Row, dict[str, list[int]]]] = {}

    def encode(self, rows: Sequence[Row]) -> None:
        """Tokenise rows now, so that no training is charged with it."""
        for row in rows:
            self._encode(row)

    def batches(self, rows: Sequence[Row], batch_size: int, *, seed: int) -> Batches:
        """Batch n of an endless, reshuffled pass over the rows; a function of (seed, n)."""
        where = torch.arange(len(rows))
        return shuffled(
            where, batch_size, seed=seed, make=lambda index, n: self.collate([rows[i] for i in index.tolist()])
        )

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Rows padded on the right to the longest."""
        encoded = [self._encode(row) for row in rows]
        width = max(len(row["input_ids"]) for row in encoded)
        fill = {"input_ids": self.tokenizer.pad_token_id}
        batch: Batch = {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in encoded])
            for name in self.names
        }
        if self.kind == "response":
            answer_BT = torch.tensor([row["answer"] + [0] * (width - len(row["answer"])) for row in encoded]).bool()
            return causal_batch(batch["input_ids"], batch["attention_mask"], answer_BT)
        of = torch.float32 if self.kind == "regression" else torch.long
        return batch | {"targets": torch.tensor([row["label"] for row in rows], dtype=of)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**{name: x for name, x in batch.items() if name != "targets"}).logits.float()
        if self.kind == "regression":
            return {"loss": nn.functional.mse_loss(logits[:, 0], batch["targets"])}
        return {
            "loss": nn.functional.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten(), ignore_index=IGNORE)
        }

    @torch.inference_mode()
    def predict(
        self, model: nn.Module, rows: Sequence[Row], *, batch_size: int, precision: str = "auto"
    ) -> list[float]:
        """A label's index, a number, or the mean loss of a response, for each row."""
        device = next(model.parameters()).device
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(self._encode(rows[i])["input_ids"]))
        with evaluating(model):
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                batch = {name: x.to(device) for name, x in self.collate([rows[i] for i in places]).items()}
                targets = batch.pop("targets")
                with autocast(resolve_precision(precision, device), device):
                    logits = model(**batch).logits.float()
                if self.kind == "response":
                    each_BT = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
                    values = each_BT.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)
                else:
                    values = logits[:, 0] if self.kind == "regression" else logits.argmax(-1)
                for place, value in zip(places, values.tolist(), strict=True):
                    found[place] = value
        return found

    def score(self, model: nn.Module, rows: Sequence[Row], *, batch_size: int, precision: str = "auto") -> float:
        """The metric on rows; larger is better."""
        predicted = self.predict(model, rows, batch_size=batch_size, precision=precision)
        if self.kind == "response":
            return math.exp(-sum(predicted) / len(predicted))
        return scores.score(self.metric, predicted, [row["label"] for row in rows])

    def _encode(self, row: Row) -> dict[str, list[int]]:
        if id(row) not in self._encoded:  # the row is kept, so that its id stays its own
            self._encoded[id(row)] = (row, self._tokens(row))
        return self._encoded[id(row)][1]

    def _tokens(self, row: Row) -> dict[str, list[int]]:
        if self.kind != "response":
            found = self.tokenizer(row["text"], row["pair"], truncation=True, max_length=self.length)
            return {name: list(found[name]) for name in self.names if name in found} | {
                name: [0] * len(found["input_ids"]) for name in self.names if name not in found
            }
        prompt = self.tokenizer(row["prompt"])["input_ids"]
        response = self.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        # A long prompt loses its beginning: the response must stay.
        response = [*response, *end][: self.length - 1]
        prompt = prompt[-(self.length - len(response)) :]
        ids = [*prompt, *response]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "token_type_ids": [0] * len(ids),
            "answer": [0] * len(prompt) + [1] * len(response),
        }


def watch_split(rows: Sequence[Row], *, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to search on, rows to watch): a tenth of the training rows, 500 at most, is set aside."""
    count = min(500, len(rows) // 10)
    random = torch.Generator().manual_seed(mix(seed, "watch"))
    watched = set(torch.randperm(len(rows), generator=random)[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in watched], [rows[i] for i in sorted(watched)]


def response_row(prompt_field: str, response_field: str) -> MakeRow:
    """Makes rows {"prompt", "response"}."""

    def make(row: Row, where: str) -> Row:
        prompt, response = field(row, prompt_field, where), field(row, response_field, where)
        return {"prompt": prompt, "response": response, "key": prompt}

    return make
