"""A folded checkpoint as an ordinary one: for runtimes that cannot let layers share weights."""

from __future__ import annotations

from pathlib import Path

from sentei import folding
from sentei.checkpoint import reading, writing
from sentei.checkpoint.source import inspect


def unfold(path: str | Path, out: str | Path, *, force: bool = False) -> tuple[Path, int, int]:
    """Write a folded checkpoint with independent layers; any runtime of the architecture loads it. It is larger.

    Shared weights, low-rank terms and scales are multiplied out in fp32 and rounded once to the checkpoint's dtype.

    Returns:
        the folder, bytes of the weights with sharing, and without.
    Raises:
        ValueError: not a folded checkpoint, or `out` cannot be written.
    """
    out = writing.check_output(out, parent=path, force=force)
    source = inspect(path)
    model, tokenizer = reading.load(path, device="cpu")
    if not folding.is_folded(model):
        raise ValueError(f"{path} is not folded: its layers share no weights, any runtime can have it as it is")
    groups = len(set(folding.layout(model)["owner"]))
    folding.unfold(model)
    record = {"method": "unfold", "fields": {}, "seed": None, "record": {"stored_blocks_before": groups}}
    writing.save(model, tokenizer, out, parent=path, record=record, force=force)
    return out, source.bytes, inspect(out).bytes
