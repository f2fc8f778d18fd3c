"""Extractive question answering in SQuAD's format (version 1.1): rows, windows of tokens, and answers out of logits.

A context longer than a window is cut to windows that overlap. A window that does not hold the whole answer is taught to
point at its first token. The best answer is the pair (start, end) with the largest sum of logits over all windows of a
question, among the 20 best of each, no longer than 30 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentei.data.examples import SUFFIXES, Examples, Row, _fingerprint, _limited, _name, _split, parts_of, read_rows
from sentei.data.read import read_characters, suffix

BEST, LONGEST = 20, 30


def load(
    spec: str | Path | Mapping[str, Any],
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    limit: int | None = None,
    held_limit: int | None = None,
) -> Examples:
    """Read SQuAD v1.1 rows: "id", "context", "question", "answers" (a list of {"text", "start"}).

    Questions of one paragraph stay in one part.

    Args:
        spec: a .json of SQuAD's own form (gzip too), rows {"id", "context", "question", "answers": {"text",
            "answer_start"}} in a .jsonl, or a Hugging Face dataset; parts of these as in `examples.load`.
    Raises:
        ValueError: what cannot be read, a question without an answer (SQuAD v2), an answer that is not at its place.
    """
    given = parts_of(spec)
    read = {part: [row for source in files for row in _read(source, part)] for part, files in given.items()}
    fractions = {"validation": validation_fraction, "test": test_fraction}
    parts, dropped = _split(read, {part: of for part, of in fractions.items() if part not in read}, seed)
    empty = [part for part, rows in parts.items() if not rows and (part == "train" or fractions[part])]
    if empty:
        raise ValueError(f"{_name(given)} has too few paragraphs: {', '.join(empty)} would be empty; give more")
    parts = {part: _limited(rows, limit if part == "train" else held_limit, seed) for part, rows in parts.items()}
    return Examples("qa", *parts.values(), None, _name(given), _fingerprint(parts), dropped)


def _read(source: str, part: str) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_file() and suffix(path) == ".json":
        return _official(path)
    return [_row(row, row.get("context"), where) for row, where in read_rows(source, part)]


def _official(path: Path) -> list[Row]:
    """SQuAD's own nesting: data, paragraphs, qas."""
    try:
        content = json.loads(read_characters(path, SUFFIXES))
        nested = [
            (question, paragraph["context"])
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not in SQuAD's format (data, paragraphs, qas): {error!r}") from None
    return [_row(row, context, f"{path} question {row.get('id')!r}") for row, context in nested]


def _row(row: Row, context: Any, where: str) -> Row:
    question, answers = row.get("question"), row.get("answers")
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):  # as Hugging Face has it, by columns
        texts, starts = answers["text"], answers.get("answer_start") or []
        answers = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=False)]
    for name, value in (("context", context), ("question", question)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: the field {name!r} is {value!r}; expected text")
    if row.get("is_impossible") or not answers:
        raise ValueError(f"{where} has no answer: SQuAD v2 is not supported, leave such questions out")
    found = []
    for answer in answers:
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not isinstance(start, int) or context[start : start + len(text)] != text:
            raise ValueError(f"{where}: the answer {text!r} does not stand at character {start} of its context")
        found.append({"text": text, "start": start})
    return {
        "id": str(row.get("id", "")), "context": context, "question": question, "answers": found, "key": context,
    }  # fmt: skip


def windows(rows: Sequence[Row], tokenizer: Any, length: int = 384, stride: int = 128) -> list[Row]:
    """Windows of tokens: model inputs, "row" (index), "spans" (characters of each token, None outside the context) and
    "targets" (start and end token of the first answer; 0, 0 where the window does not hold it).

    Raises:
        ValueError: a slow tokenizer, which cannot say where its tokens stand, or a question that fills the window.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where tokens stand; use its fast version")
    made = []
    for number, row in enumerate(rows):
        question = row["question"].strip()
        room = length - tokenizer.num_special_tokens_to_add(pair=True)
        asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        if asked + min(stride, 16) >= room:
            raise ValueError(f"question {row['id']!r} has {asked} tokens, a window {length}; raise seq_len")
        coded = tokenizer(
            question, row["context"], truncation="only_second", max_length=length,
            stride=min(stride, room - asked - 1), return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        answer = row["answers"][0]
        first, last = answer["start"], answer["start"] + len(answer["text"])
        for window in range(len(coded["input_ids"])):
            sides = coded.sequence_ids(window)
            places = zip(coded["offset_mapping"][window], sides, strict=True)
            spans: list[Any] = [span if side == 1 else None for span, side in places]
            inside = [i for i, span in enumerate(spans) if span is not None]
            start = end = 0
            if inside and spans[inside[0]][0] <= first and spans[inside[-1]][1] >= last:
                start = max((i for i in inside if spans[i][0] <= first), default=0)
                end = min((i for i in inside if spans[i][1] >= last), default=0)
            inputs = {name: coded[name][window] for name in tokenizer.model_input_names if name in coded}
            made.append(inputs | {"row": number, "spans": spans, "targets": [start, end]})
    return made


def answers(rows: Sequence[Row], of: Sequence[Row], starts: Sequence[Tensor], ends: Sequence[Tensor]) -> list[str]:
    """The best answer to every question.

    Args:
        rows: the questions.
        of: their windows.
        starts, ends: per window, logits of at least as many tokens as it has.
    """
    best: list[tuple[float, str]] = [(float("-inf"), "")] * len(rows)
    for window, start_T, end_T in zip(of, starts, ends, strict=True):
        spans = window["spans"]
        outside = torch.tensor([span is None for span in spans])
        start_T = start_T[: len(spans)].float().masked_fill(outside, float("-inf"))
        end_T = end_T[: len(spans)].float().masked_fill(outside, float("-inf"))
        first, last = (x.topk(min(BEST, len(spans))).indices for x in (start_T, end_T))
        score = start_T[first][:, None] + end_T[last][None]
        size = last[None] - first[:, None] + 1
        score = score.masked_fill((size < 1) | (size > LONGEST), float("-inf"))
        place = int(score.argmax())
        i, j = int(first[place // len(last)]), int(last[place % len(last)])
        value = float(score.flatten()[place])
        if value > best[window["row"]][0]:
            context = rows[window["row"]]["context"]
            best[window["row"]] = value, context[spans[i][0] : spans[j][1]]
    return [text for _, text in best]
