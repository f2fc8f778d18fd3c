"""Scores of a batch of task rows as rewards of a search: `function(model, batch) -> float`, higher is better.

`batch.examples` are rows as `sentei.data.prompts.make_row` reads them (question/choices/answer[/context], or
prompt/response), `batch.tokenizer` the model's. Prompts are plain. They are examples for one's own, too.
"""

from __future__ import annotations

from typing import Any

from sentei.data import prompts
from sentei.data.prompts import Row, Template
from sentei.evaluate import domain

SEQ_LEN, NEW_TOKENS = 512, 32


def choice_accuracy(model: Any, batch: Any) -> float:
    """Share of questions whose right choice is the likeliest: coarse, so batches must be large."""
    return float(_choices(model, batch)["accuracy"])


def choice_probability(model: Any, batch: Any) -> float:
    """Mean probability of the right choice among its row's choices: smooth where accuracy stands still."""
    return float(_choices(model, batch)["answer_probability"])


def exact_match(model: Any, batch: Any) -> float:
    """Share of prompts whose greedy answer begins with the response, spaces and case aside."""
    rows, template = _rows(batch, "response"), Template(batch.tokenizer)
    hits = 0
    for row in rows:
        said = domain.generate(model, template, row, seq_len=SEQ_LEN, new_tokens=NEW_TOKENS)
        hits += " ".join(said.casefold().split()).startswith(" ".join(row["response"].casefold().split()))
    return hits / len(rows)


def _choices(model: Any, batch: Any) -> dict[str, Any]:
    return domain.choices(model, _rows(batch, "choices"), Template(batch.tokenizer), seq_len=SEQ_LEN)


def _rows(batch: Any, kind: str) -> list[Row]:
    rows = [prompts.make_row(row, f"row {number} of reward_data") for number, row in enumerate(batch.examples)]
    if not rows or any(row["kind"] != kind for row in rows):
        raise ValueError(f"this reward scores rows of kind {kind}: {', '.join(prompts.FIELDS[kind])}; give reward_data")
    return rows
