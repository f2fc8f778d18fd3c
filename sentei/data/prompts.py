"""Rows with a prompt and a response: multiple choice, instructions, summaries; as text, as tokens, as batches.

=========  =====================================================  ==================================
kind       fields                                                 what is cut where a row is too long
=========  =====================================================  ==================================
choices    question, choices, answer, and optionally context      context, or else question
response   prompt, response                                       prompt
summary    document, summary                                      document
=========  =====================================================  ==================================

`answer` is an index into `choices`, or one of them. A file may mix kinds; a field `kind` settles what the fields leave
open. One `Template` makes the text for training and for evaluation, so that both see the same prompt.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sentei.data import special_frame
from sentei.train import Batch, causal_batch

Row = dict[str, Any]

FIELDS = {"choices": ("question", "choices", "answer"), "response": ("prompt", "response"),
          "summary": ("document", "summary")}  # fmt: skip
TEMPLATES = ("plain", "chat")
LOSSES = ("full", "response")
MOST_DROPPED = 0.2
_BODY = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the part that may be cut while a chat template is applied


def make_row(row: Row, where: str) -> Row:
    """A row as it was read -> a checked row of one kind, with "key", its prompt (for `examples.load(make=...)`).

    Args:
        where: file and line, for errors.
    Raises:
        ValueError: fields of no kind, a field that is missing or of another type, no choices, an answer that is none
            of them.
    """
    kind = row.get("kind")
    if kind is None:
        kind = next((kind for kind, (first, *_) in FIELDS.items() if first in row), None)
    if kind not in FIELDS:
        known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in FIELDS.items())
        raise ValueError(f"{where} has the fields {', '.join(map(str, row))}; expected those of one kind ({known})")
    made: Row = {"kind": kind}
    for name in FIELDS[kind]:
        if name not in row:
            raise ValueError(f"{where} has no field {name!r}, which a row of kind {kind} needs")
        if name not in ("choices", "answer"):
            made[name] = _text(row[name], name, where)
    if kind != "choices":
        return made | {"key": made[FIELDS[kind][0]]}
    choices = row["choices"]
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise ValueError(f"{where}: the field 'choices' is {choices!r}; expected a list of two texts or more")
    made["choices"] = [_text(choice, "choices", where) for choice in choices]
    made["answer"] = _answer(row["answer"], made["choices"], where)
    made["context"] = _text(row["context"], "context", where) if row.get("context") else None
    return made | {"key": made["question"] if made["context"] is None else f"{made['question']}\n{made['context']}"}


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: the field {name!r} is {value!r}; expected text")
    return value.strip()


def _answer(answer: Any, choices: list[str], where: str) -> int:
    if isinstance(answer, str) and answer.strip() in choices:
        return choices.index(answer.strip())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: the field 'answer' is {answer!r}; expected an index from 0 to {len(choices) - 1}, or one of the "
            "choices"
        )
    return answer


def key(row: Row) -> str:
    """What decides whether two rows have the same prompt."""
    if row["kind"] == "choices":
        return row["question"] if row["context"] is None else f"{row['question']}\n{row['context']}"
    return row[FIELDS[row["kind"]][0]]


def prompt_hash(row: Row) -> str:
    """Ten hexadecimal digits of the prompt; spaces and case do not count."""
    return hashlib.sha256(" ".join(key(row).casefold().split()).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Parts:
    """A row as text: `body` is what may be cut, `response` what is learned, `end` closes it."""

    head: str
    body: str
    tail: str
    response: str
    end: str


@dataclass(frozen=True)
class Template:
    """How a row becomes text: "plain", or "chat" by the tokenizer's own chat template.

    Raises:
        ValueError: no such template, or a tokenizer without one for chat.
    """

    tokenizer: Any
    name: str = "plain"

    def __post_init__(self) -> None:
        if self.name not in TEMPLATES:
            raise ValueError(f"template is one of {', '.join(TEMPLATES)}; got {self.name!r}")
        if self.name == "chat" and not self.tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template; use template=plain")

    def parts(self, row: Row, response: str | None = None) -> Parts:
        """The text of a row.

        Args:
            response: in place of the row's own (another choice).
        """
        head, body, tail, own = _plain(row)
        response = own if response is None else response
        if self.name == "plain":
            return Parts(head, body, tail, " " + response, self.tokenizer.eos_token or "")
        turns = [{"role": "user", "content": head + _BODY + tail}]
        asked = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        answered = self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": _BODY}], tokenize=False)
        before, found, after = asked.partition(_BODY)
        end = answered[len(asked) :].partition(_BODY)[2] if answered.startswith(asked) else ""
        if not found:
            raise ValueError("the tokenizer's chat template changes the user's text; use template=plain")
        return Parts(before, body, after, response, end.rstrip() or self.tokenizer.eos_token or "")

    def prompt_ids(self, parts: Parts, room: int | None = None) -> list[int] | None:
        """Tokens of the prompt, the body cut so that no more than `room` are used; None if that is not possible."""
        # A chat template writes its own first token, a tokenizer would write it again.
        prefix = [] if self.name == "chat" else special_frame(self.tokenizer)[0]
        ids = prefix + self._ids(parts.head + parts.body + parts.tail)
        if room is None or len(ids) <= room:
            return ids
        fixed = len(prefix) + len(self._ids(parts.head + parts.tail))
        body = self._ids(parts.body)
        keep = room - fixed
        while keep > 0:
            cut = self.tokenizer.decode(body[:keep], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            ids = prefix + self._ids(parts.head + cut + parts.tail)
            if len(ids) <= room:
                return ids
            keep -= max(1, len(ids) - room)
        return None

    def response_ids(self, parts: Parts, *, end: bool = True) -> list[int]:
        return self._ids(parts.response + (parts.end if end else ""))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(row: Row) -> tuple[str, str, str, str]:
    """Head, body, tail and response of a row, without any chat frame."""
    if row["kind"] == "response":
        return "", row["prompt"], "\n\nAnswer:", row["response"]
    if row["kind"] == "summary":
        return "Document: ", row["document"], "\n\nSummary:", row["summary"]
    options = "\nOptions:\n" + "\n".join(f"- {choice}" for choice in row["choices"]) + "\nAnswer:"
    response = row["choices"][row["answer"]]
    if row["context"] is None:
        return "Question: ", row["question"], options, response
    return "Context: ", row["context"], f"\n\nQuestion: {row['question']}{options}", response


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens: `ids[i][:start[i]]` is the prompt, the rest the response with its end; `kept`: their indices."""

    ids: list[list[int]]
    start: list[int]
    kept: list[int]
    dropped: int
    cut: int

    def __len__(self) -> int:
        return len(self.ids)


def encode(rows: Sequence[Row], template: Template, seq_len: int) -> Encoded:
    """Tokens of rows, at most `seq_len` each. The prompt's body is cut, never the response.

    Raises:
        ValueError: more than a fifth of the rows do not fit even so.
    """
    made = Encoded([], [], [], 0, 0)
    dropped = cut = 0
    for number, row in enumerate(rows):
        parts = template.parts(row)
        response = template.response_ids(parts)
        prompt = template.prompt_ids(parts, seq_len - len(response)) if len(response) < seq_len else None
        if prompt is None:
            dropped += 1
            continue
        cut += len(prompt) < len(template.prompt_ids(parts) or [])
        made.ids.append(prompt + response)
        made.start.append(len(prompt))
        made.kept.append(number)
    if rows and dropped > MOST_DROPPED * len(rows):
        raise ValueError(
            f"{dropped} of {len(rows)} rows have a response too long for seq_len {seq_len}; raise seq_len, or shorten "
            "the responses"
        )
    return Encoded(made.ids, made.start, made.kept, dropped, cut)


def collate(
    encoded: Encoded, chosen: Sequence[int], *, pad: int, loss_on: str = "full", prompt_loss_weight: float = 0.0
) -> Batch:
    """A batch of rows, padded on the right.

    Labels are left out by the attention mask, never by the pad token's id: where pad and end of text are the same
    token, the end must still be learned.

    Args:
        loss_on: "full", prompt and response; "response", its end included.
        prompt_loss_weight: of a token of the prompt, where one of the response has 1 and the loss is on the response.
    """
    width = max(len(encoded.ids[i]) for i in chosen)
    ids_BT = torch.full((len(chosen), width), pad)
    mask_BT = torch.zeros((len(chosen), width), dtype=torch.long)
    answer_BT = torch.zeros((len(chosen), width), dtype=torch.bool)
    for place, i in enumerate(chosen):
        length = len(encoded.ids[i])
        ids_BT[place, :length] = torch.tensor(encoded.ids[i])
        mask_BT[place, :length] = 1
        answer_BT[place, encoded.start[i] : length] = True
    if loss_on == "full" or not prompt_loss_weight:
        return causal_batch(ids_BT, mask_BT, answer_BT if loss_on == "response" else None)
    weights_BT = torch.full(ids_BT.shape, prompt_loss_weight)
    weights_BT[:, :-1][answer_BT[:, 1:]] = 1.0  # targets are a token ahead
    return causal_batch(ids_BT, mask_BT) | {"weights": weights_BT}


def pad_id(tokenizer: Any) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def hold_out(rows: Sequence[Row], count: int, seed: int) -> tuple[list[int], list[int]]:
    """(rest, held): indices of rows, every kind in its proportion, chosen by a hash of the prompt.

    Rows with the same prompt are on the same side, so `held` may differ from `count` by a few.
    """
    by_kind: dict[str, dict[str, list[int]]] = {}
    for number, row in enumerate(rows):
        by_kind.setdefault(row["kind"], {}).setdefault(prompt_hash(row), []).append(number)
    held: list[int] = []
    for groups in by_kind.values():
        size = sum(map(len, groups.values()))
        wanted, taken = round(count * size / len(rows)), 0
        for digest in sorted(groups, key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest()):
            if taken >= wanted:
                break
            held += groups[digest]
            taken += len(groups[digest])
    inside = set(held)
    return [i for i in range(len(rows)) if i not in inside], sorted(held)


def seen(rows: Sequence[Row]) -> str:
    """The prompt hashes of rows, sorted and in one word, as a checkpoint stores them."""
    return "".join(sorted({prompt_hash(row) for row in rows}))


def check_unseen(rows: Sequence[Row], stored: str) -> None:
    """Refuse test rows whose prompts were trained on, or chose the mask.

    Raises:
        ValueError: says how many, and the first of them.
    """
    known = {stored[i : i + 10] for i in range(0, len(stored), 10)}
    found = [number for number, row in enumerate(rows) if prompt_hash(row) in known]
    if found:
        listed = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise ValueError(
            f"{len(found)} of {len(rows)} test prompts were seen in training or by the pruning generator (rows "
            f"{listed}). Their scores would be too high; remove them"
        )


def rows_as_text(rows: Sequence[Row], template: Template) -> list[str]:
    """Prompt and response as one text each: for methods that read plain text."""
    texts = []
    for row in rows:
        parts = template.parts(row)
        texts.append(parts.head + parts.body + parts.tail + parts.response)
    return texts


def tensor_rows(count: int) -> Tensor:
    """Row numbers as blocks of one, for `train.shuffled`."""
    return torch.arange(count)[:, None]
