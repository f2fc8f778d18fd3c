"""Scores of a batch of task rows as rewards of a search: `function(model, batch) -> float`, higher is better.

`batch.examples` are rows as `sentei.data.prompts.make_row` reads them (question/choices/answer[/context], or
prompt/response), `batch.tokenizer` the model's. Prompts are plain. Classifiers, encoders above all, have rows of text,
label and, where a row is a pair, text_pair. They are examples for one's own, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sentei import structure
from sentei.data import prompts
from sentei.data.prompts import Row, Template
from sentei.evaluate import domain, squad

SEQ_LEN, NEW_TOKENS = 512, 32


def choice_accuracy(model: Any, batch: Any) -> float:
    """Share of questions whose right choice is the likeliest: coarse, so batches must be large."""
    return float(_choices(model, batch)["accuracy"])


def choice_probability(model: Any, batch: Any) -> float:
    """Mean probability of the right choice among its row's choices: smooth where accuracy stands still."""
    return float(_choices(model, batch)["answer_probability"])


def label_accuracy(model: Any, batch: Any) -> float:
    """Share of rows whose label a classifier finds the likeliest."""
    probability_BL, label_B = _labels(model, batch)
    return float((probability_BL.argmax(1) == label_B).double().mean())


def label_probability(model: Any, batch: Any) -> float:
    """Mean probability that a classifier gives the right label: smooth where accuracy stands still."""
    probability_BL, label_B = _labels(model, batch)
    return float(probability_BL[torch.arange(len(label_B)), label_B].mean())


def exact_match(model: Any, batch: Any) -> float:
    """Share of prompts whose greedy answer is the response, by the definition of `squad`.

    Of an answer to a response of one line only the first line counts: models talk on.
    """
    rows, template = _rows(batch, "response"), Template(batch.tokenizer)
    hits = 0.0
    for row in rows:
        said = domain.generate(model, template, row, seq_len=SEQ_LEN, new_tokens=NEW_TOKENS)
        hits += squad.exact(said if "\n" in row["response"] else said.partition("\n")[0], row["response"])
    return hits / len(rows)


def rouge_l(model: Any, batch: Any) -> float:
    """Mean ROUGE-L of greedy answers against the responses (or summaries)."""
    rows = _rows(batch, "response", "summary")
    found = domain.rouge(model, rows, Template(batch.tokenizer), seq_len=SEQ_LEN, new_tokens=NEW_TOKENS)
    return float(found["rougeL"])


def _choices(model: Any, batch: Any) -> dict[str, Any]:
    return domain.choices(model, _rows(batch, "choices"), Template(batch.tokenizer), seq_len=SEQ_LEN)


def _labels(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """[B, L] probability of each label, [B] the right one."""
    rows = batch.examples
    if not rows or any(not {"text", "label"} <= row.keys() for row in rows):
        raise ValueError("this reward scores rows of text, label and, for pairs, text_pair; give reward_data")
    names = {str(name): number for name, number in model.config.label2id.items()}
    names = {str(number): number for number in names.values()} | names  # a name may be a number, and wins
    if unknown := sorted({str(row["label"]) for row in rows} - set(names)):
        raise ValueError(f"label {unknown[0]!r} is not one of the model's: {', '.join(model.config.label2id)}")
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    longest = min(SEQ_LEN, structure.positions(model) or SEQ_LEN)
    inputs = batch.tokenizer(
        [row["text"] for row in rows], pairs, padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    logits_BL = model(**inputs.to(batch.device)).logits
    if logits_BL.ndim != 2 or logits_BL.shape[1] != len(model.config.label2id):
        raise ValueError(f"{type(model).__name__} is no classifier of texts: this reward needs one label for each row")
    return logits_BL.float().softmax(1).cpu(), torch.tensor([names[str(row["label"])] for row in rows])


def _rows(batch: Any, *kinds: str) -> list[Row]:
    rows = [prompts.make_row(row, f"row {number} of reward_data") for number, row in enumerate(batch.examples)]
    if not rows or any(row["kind"] not in kinds for row in rows):
        known = " or ".join(f"{kind}: {', '.join(prompts.FIELDS[kind])}" for kind in kinds)
        raise ValueError(f"this reward scores rows of kind {known}; give reward_data")
    return rows
