"""BERT's second pre-training task: does the second segment follow the first? (arXiv 1810.04805, section 3.1)

Half of the pairs are neighbours in one document; in the others the second segment comes from another document. With
probability `short` a pair aims at a random shorter length, so that short inputs are not strange to the model.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sentei.distill import Distillation, kl
from sentei.train import IGNORE, Batch, Batches, mix, shuffled

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Pairs:
    """Packed pairs: ids [N, T] padded, segment numbers [N, T], attention [N, T], 1 where the second is random [N].

    They take six bytes a token: ids are int32, segments and attention int8.
    """

    ids: Tensor
    segments: Tensor
    attention: Tensor
    random: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Iterable[int], mask: Callable[[Tensor, int], Batch], n: int) -> Batch:
        rows = list(rows)
        made = mask(self.ids[rows].long(), n)
        return made | {
            "token_type_ids": self.segments[rows].long(), "attention_mask": self.attention[rows].long(),
            "next_sentence": self.random[rows],
        }  # fmt: skip

    def batches(self, size: int, *, seed: int, mask: Callable[[Tensor, int], Batch]) -> Batches:
        places = torch.arange(len(self))[:, None]
        return shuffled(places, size, seed=seed, make=lambda rows, n: self.batch(rows.flatten().tolist(), mask, n))


def pairs(
    documents: list[str], tokenizer: Any, length: int, *, seed: int, random: float = 0.5, short: float = 0.1
) -> Pairs:
    """Pairs of segments made of whole sentences, at most `length` tokens with their special ones.

    Raises:
        ValueError: a tokenizer without the tokens that begin and part a pair, fewer than two documents, or none with
            two sentences.
    """
    begin_of_pair, end_of_part = tokenizer.cls_token_id, tokenizer.sep_token_id
    if begin_of_pair is None or end_of_part is None:
        raise ValueError(f"{type(tokenizer).__name__} has no [CLS] or no [SEP] to make pairs with; use objective mlm")
    sentences = []
    for document in documents:
        found = [part for part in _SENTENCE.split(document) if part.strip()]
        # Arrays: a list of Python's numbers is eight times as large, and a corpus may be.
        ids = [array("i", tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in found]
        sentences.append([part for part in ids if part])
    sentences = [document for document in sentences if document]
    if len(sentences) < 2:
        raise ValueError(
            f"next-sentence prediction needs two documents or more to draw from, found {len(sentences)}; give more "
            "text, or use objective mlm"
        )
    generator = torch.Generator().manual_seed(mix(seed, "pairs"))

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    rows: list[tuple[array[int], array[int], int]] = []
    room = length - 3  # [CLS] first [SEP] second [SEP]
    for number, document in enumerate(sentences):
        start = 0
        while start < len(document) - 1:
            target = 2 + draw(room - 1) if float(torch.rand((), generator=generator)) < short else room
            end, size = start, 0
            while end < len(document) and size < target:
                size += len(document[end])
                end += 1
            cut = start + 1 + (draw(end - start - 1) if end - start > 1 else 0)
            first = _joined(document[start:cut])
            is_random = end - start == 1 or float(torch.rand((), generator=generator)) < random
            if is_random:
                other = sentences[(number + 1 + draw(len(sentences) - 1)) % len(sentences)]
                begin = draw(len(other))
                second = _joined(other[begin:])[: max(1, target - len(first))]
                end = cut  # what was not used starts the next pair
            else:
                second = _joined(document[cut:end])
            rows.append((*_fit(first, second, target), int(is_random)))
            start = end
    if not rows:
        raise ValueError("no document has two sentences to make a pair of; use objective mlm")
    ids = torch.full((len(rows), length), tokenizer.pad_token_id, dtype=torch.int32)
    segments, attention = (torch.zeros(ids.shape, dtype=torch.int8) for _ in range(2))
    for row, (first, second, _) in enumerate(rows):
        whole = [begin_of_pair, *first, end_of_part, *second, end_of_part]
        ids[row, : len(whole)] = torch.tensor(whole, dtype=torch.int32)
        segments[row, len(whole) - len(second) - 1 : len(whole)] = 1
        attention[row, : len(whole)] = 1
    return Pairs(ids, segments, attention, torch.tensor([flag for *_, flag in rows]))


def _joined(parts: list[array[int]]) -> array[int]:
    return array("i", [token for part in parts for token in part])


def _fit(first: array[int], second: array[int], target: int) -> tuple[array[int], array[int]]:
    """Cut the longer one until both fit."""
    while len(first) + len(second) > target:
        (first if len(first) > len(second) else second).pop()
    return first, second


@dataclass(frozen=True)
class NextSentence:
    """The token loss plus the same two parts, cross-entropy and KL, over the two answers; each a mean over pairs."""

    tokens: Distillation

    def __call__(self, student: Any, batch: Batch) -> dict[str, Tensor]:
        wanted = batch["next_sentence"]
        rest = {name: x for name, x in batch.items() if name != "next_sentence"}
        losses, answers, theirs = self.tokens.with_outputs(student, rest)
        nsp = F.cross_entropy(answers.seq_relationship_logits.float(), wanted, ignore_index=IGNORE)
        losses["loss"] = losses["loss"] + self.tokens.ce_weight * nsp
        losses["nsp"] = nsp.detach()
        if theirs is not None:
            divergence = kl(
                answers.seq_relationship_logits, theirs.seq_relationship_logits.clone(), self.tokens.temperature
            )
            losses["loss"] = losses["loss"] + self.tokens.kl_weight * divergence
            losses["nsp_kl"] = divergence.detach()
        return losses
