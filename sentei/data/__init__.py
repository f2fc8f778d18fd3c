"""Text for calibration, training and evaluation: from files, datasets or the text that ships inside Python.

The unit is the document. Documents are read, split into train / validation / test in the order of their hashes (chance,
but the same on every machine), and then packed to blocks of tokens.

Shapes: N blocks, T tokens of a block.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentei.data.read import is_dataset, python_documents, read_dataset, read_documents, read_text

__all__ = [
    "Text",
    "batches",
    "blocks",
    "fingerprint",
    "load",
    "read_documents",
    "read_text",
    "sources",
    "special_frame",
]

PYTHON_DOCS = "python-docs"
# Shuffled blocks are drawn from a pool of this many times the blocks asked for: the draw spans many documents, and a
# corpus of gigabytes need not be tokenised to give a hundred blocks.
POOL = 16


@dataclass(frozen=True)
class Text:
    """Documents in three parts that share none; `name` is what was asked for, `sha256` the fingerprint of the parts."""

    train: list[str]
    validation: list[str]
    test: list[str]
    name: str
    sha256: str


def load(
    spec: str | Path | list[str] | dict[str, float] | None = None,
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    text_field: str = "text",
    split: str | None = None,
    limit: int | None = None,
) -> Text:
    """Read documents and split them into train, validation and test.

    Each source is split by itself, so a document is in the same part whether its source is loaded alone, in a mixture,
    or under a `limit`: one stage may not train on what another holds out. Exact copies are kept once. The fractions are
    of characters, met as nearly as whole documents allow.

    Args:
        spec: None or "python-docs" for the reference that ships inside Python; a file (.txt, .raw, .jsonl, .parquet,
            each also .gz); a folder of such files; a Hugging Face dataset, "name" or "name:config"; a list of these;
            or a mixture, "a.txt=0.7,b.jsonl=0.3" or {"a.txt": 0.7, "b.jsonl": 0.3}, whose weights are shares of
            characters in each part. No text is repeated to reach a weight: the scarcest source decides the size.
        text_field: the field of .jsonl, .parquet and datasets which holds the text.
        split: the split to read of a Hugging Face dataset ("train" if not given).
        limit: at most this many documents of each source, chosen by `seed`.

    Raises:
        ValueError: text that cannot be read, or fewer documents than parts.
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}; expected at least 0 and below 1")
    if validation_fraction + test_fraction >= 1:
        raise ValueError("validation_fraction + test_fraction leave nothing to train on; their sum must be below 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1 document")
    weights = sources(spec)
    if split is not None and not any(source != PYTHON_DOCS and is_dataset(source) for source in weights):
        raise ValueError(f"split={split!r} is for Hugging Face datasets; there is none in {_name(weights)}")

    parts: dict[str, dict[str, list[str]]] = {}
    seen: set[str] = set()
    for source in weights:
        documents = _read_source(source, text_field=text_field, split=split)
        # A document that two sources share belongs to the first, or one part could hold it twice.
        documents = [document for document in dict.fromkeys(map(str.strip, documents)) if document not in seen]
        seen.update(documents)
        parts[source] = _split(documents, source, seed, validation_fraction, test_fraction)
        if limit is not None:
            parts[source] = _limit(parts[source], source, limit, seed)

    train, validation, test = (
        _mix({source: parts[source][part] for source in weights}, weights, seed)
        for part in ("train", "validation", "test")
    )
    return Text(train, validation, test, _name(weights), fingerprint(train, validation, test))


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens which the tokenizer itself puts before and after a text: ([BOS], []), ([CLS], [SEP]) or ([], [])."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ValueError(f"{type(tokenizer).__name__} tokenizes 'a' differently with and without its special tokens")


def blocks(
    documents: list[str],
    tokenizer: Any,
    seq_len: int,
    *,
    num: int | None = None,
    most: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Documents packed to blocks without padding, LongTensor[N, T = seq_len].

    An end-of-text token stands after each document (the separator, for encoders without one). Where the tokenizer
    frames a text (BOS; CLS and SEP), every block is framed. The rest after the last full block is left out.

    Args:
        num: the number of blocks; all there are if not given.
        most: without num, how many are enough: a large text is not tokenised to its end.
        seed: None takes the blocks in order, else they are drawn at random, the same for the same seed.

    Raises:
        ValueError: fewer than `num` blocks (or none) in the documents.
    """
    prefix, suffix = special_frame(tokenizer)
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise ValueError(f"seq_len is {seq_len}; expected more than the {seq_len - body} special tokens of a block")
    if num is not None and num < 1:
        raise ValueError(f"num is {num}; expected at least 1 block")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    order = list(range(len(documents)))
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
        order = torch.randperm(len(documents), generator=generator).tolist()
    enough = most if num is None else num
    wanted = None if enough is None else enough * (1 if seed is None else POOL)

    rows: list[list[int]] = []
    rest: list[int] = []
    for index in order:
        # verbose: the documents are longer than the model's context, as they should be; no warning.
        rest += tokenizer(documents[index], add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            rest.append(end)
        full = len(rest) - len(rest) % body
        rows += [prefix + rest[start : start + body] + suffix for start in range(0, full, body)]
        rest = rest[full:]
        if wanted is not None and len(rows) >= wanted:
            break
    if len(rows) < (num or 1):
        raise ValueError(
            f"found {len(rows)} blocks of {seq_len} tokens, need {num or 1}; lower seq_len or give more text"
        )
    block_NT = torch.tensor(rows, dtype=torch.long)
    if seed is not None:
        block_NT = block_NT[torch.randperm(len(rows), generator=generator)]
    return block_NT[:enough]


def batches(blocks: Tensor, batch_size: int) -> list[Tensor]:
    """Blocks LongTensor[N, T] in batches of `batch_size` rows, in order; the last may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    return list(blocks.split(batch_size))


def fingerprint(*parts: Iterable[str]) -> str:
    """sha256 (hex) of parts of documents. Where a document or a part ends counts, not only the characters."""
    digest = hashlib.sha256()
    for part in parts:
        documents = [document.encode() for document in part]
        digest.update(f"{len(documents)} documents\n".encode())
        for document in documents:
            digest.update(f"{len(document)} bytes\n".encode() + document)
    return digest.hexdigest()


# --- what was asked for ---------------------------------------------------------------------------------------------


def sources(spec: str | Path | list[str] | dict[str, float] | None) -> dict[str, float | None]:
    """What a spec of `load` names: source -> weight, None for all that is there. ValueError if it names nothing."""
    if spec is None:
        return {PYTHON_DOCS: None}
    if isinstance(spec, dict):
        weights: dict[str, float | None] = {str(source): weight for source, weight in spec.items()}
    elif isinstance(spec, list):
        weights = {str(source): None for source in spec}
    elif isinstance(spec, Path) or Path(spec).expanduser().exists():
        weights = {str(spec): None}
    else:
        weights = {}
        for item in spec.split(","):
            source, equals, weight = item.strip().rpartition("=")
            if not equals:
                source, weight = item.strip(), None
            if source in weights:
                raise ValueError(f"{source!r} appears twice in the mixture {spec!r}")
            try:
                weights[source] = None if weight is None else float(weight)
            except ValueError:
                raise ValueError(f"the weight of {source!r} in {spec!r} is {weight!r}; expected a number") from None
    if not weights or "" in weights:
        raise ValueError(f"no text is named in {spec!r}; expected a file, a folder, a dataset name or {PYTHON_DOCS!r}")
    given = [weight for weight in weights.values() if weight is not None]
    if given and len(given) < len(weights):
        raise ValueError(f"some sources of {spec!r} have a weight and some have none; give each one a weight, or none")
    if not all(isinstance(weight, int | float) and 0 < weight < float("inf") for weight in given):
        raise ValueError(f"the weights of {spec!r} must be numbers above 0")
    return weights


def _name(weights: dict[str, float | None]) -> str:
    return ",".join(source if weight is None else f"{source}={weight:g}" for source, weight in weights.items())


def _read_source(source: str, *, text_field: str, split: str | None) -> list[str]:
    if source == PYTHON_DOCS:
        return python_documents()
    if is_dataset(source):
        return read_dataset(source, text_field, split or "train")
    return read_documents(source, text_field=text_field)


# --- parts --------------------------------------------------------------------------------------


def _by_chance(documents: list[str], salt: str) -> list[str]:
    """Documents in the order of their salted hashes: the same for the same documents, in whatever order they come."""
    return sorted(documents, key=lambda document: hashlib.sha256(f"{salt}\n{document}".encode()).digest())


def _split(
    documents: list[str], source: str, seed: int, validation_fraction: float, test_fraction: float
) -> dict[str, list[str]]:
    """Distinct documents -> part -> documents, in their order."""
    characters = sum(map(len, documents))
    # Dealt by size: one document may be a thousand times another, and a tenth of the documents then a half of the text.
    share = {"test": test_fraction * characters, "validation": validation_fraction * characters}
    room = dict(share)
    part_of = {}
    for document in _by_chance(documents, f"split {seed}"):
        # A part made of one document far above the average says little about the others: half the part at most.
        largest = {part: max(share[part] / 2, characters / len(documents)) for part in room}
        fits = [part for part in room if len(document) <= largest[part] and len(document) / 2 <= room[part]]
        part_of[document] = fits[0] if fits else "train"
        if part_of[document] in room:
            room[part_of[document]] -= len(document)

    parts = {
        part: [document for document in documents if part_of[document] == part]
        for part in ("train", "validation", "test")
    }
    for part, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if (
            fraction and not parts[part] and parts["train"]
        ):  # no document is as small as the part: the smallest there is
            parts[part].append(min(parts["train"], key=len))
            parts["train"].remove(parts[part][0])
    wanted = ["train", *(["validation"] if validation_fraction else []), *(["test"] if test_fraction else [])]
    if not all(parts[part] for part in wanted):
        raise ValueError(
            f"found {len(documents)} documents in {source}, too few to split them into {', '.join(wanted)};"
            " give more text, or set validation_fraction and test_fraction to 0"
        )
    return parts


def _limit(parts: dict[str, list[str]], source: str, limit: int, seed: int) -> dict[str, list[str]]:
    """At most `limit` documents, in the proportion of the parts, none of which becomes empty."""
    count = sum(map(len, parts.values()))
    if limit >= count:
        return parts
    sizes = {part: max(1, round(limit * len(parts[part]) / count)) for part in ("validation", "test") if parts[part]}
    sizes["train"] = limit - sum(sizes.values())
    if sizes["train"] < 1:
        raise ValueError(f"limit is {limit} documents of {source}; expected at least {len(sizes)}, one for each part")
    chosen = {part: set(_by_chance(parts[part], f"limit {seed}")[:size]) for part, size in sizes.items()}
    return {part: [document for document in parts[part] if document in chosen.get(part, ())] for part in parts}


def _mix(parts: dict[str, list[str]], weights: dict[str, float | None], seed: int) -> list[str]:
    """The sources' documents as one list, characters in the ratio of the weights, as many as the scarcest allows."""
    if None in weights.values():
        return [document for documents in parts.values() for document in documents]
    sizes = {source: sum(map(len, documents)) for source, documents in parts.items()}
    total = min(sizes[source] / weight for source, weight in weights.items() if weight is not None)
    mixed: list[str] = []
    for source, documents in parts.items():
        target, taken = total * (weights[source] or 0), 0
        for document in _by_chance(documents, f"mix {seed}"):
            if taken and taken + len(document) / 2 > target:
                break
            mixed.append(document)
            taken += len(document)
    # Sources take turns by chance, or the first blocks in order would all be of the first source.
    return _by_chance(mixed, f"order {seed}")
