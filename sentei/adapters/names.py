"""Names of modules: one checked expression for all that is adapted, the head of a task, the base's fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from sentei.adapters.space import Unit


def pattern(living: Sequence[Unit]) -> str:
    """One regular expression that fully matches the names of the units' modules, bare or below a head's prefix."""
    layers_of: dict[tuple[str, str], set[int]] = {}
    for unit in living:
        for name in unit.modules:
            before, _, after = name.partition(f".{unit.layer}.")
            layers_of.setdefault((_stack(before), after), set()).add(unit.layer)
    by_layers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stack, after), layers in layers_of.items():
        by_layers.setdefault((stack, tuple(sorted(layers))), []).append(after)
    parts = [
        rf"{re.escape(stack)}\.{_either(map(str, layers))}\.{_either(map(re.escape, sorted(afters)))}"
        for (stack, layers), afters in by_layers.items()
    ]
    return rf"(?:.*\.)?{_either(parts)}"


def _stack(before: str) -> str:
    """The list of layers without the model around it: "encoder.layer" of "bert.encoder.layer", "layers"."""
    *above, last = before.split(".")
    return ".".join([*above[-1:], last]) if last == "layer" else last


def _either(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def check_pattern(expression: str, model: nn.Module, living: Sequence[Unit]) -> dict[str, int]:
    """How many modules of the bare model the expression matches: {"expected", "matched", "others"}.

    Raises:
        ValueError: it misses one, or matches another.
    """
    compiled = re.compile(expression)
    hits = {name for name, _ in model.named_modules() if compiled.fullmatch(name)}
    expected = {name for unit in living for name in unit.modules}
    if hits != expected:
        odd = sorted(hits ^ expected)[0]
        raise ValueError(
            f"the expression {expression} matches {len(hits)} modules, expected {len(expected)}; see {odd}"
        )
    return {"expected": len(expected), "matched": len(hits & expected), "others": len(hits - expected)}


def head(model: Any) -> list[str]:
    """Names of the modules that a task adds to the model, and its pooler; empty for language models."""
    if not re.search("For(SequenceClassification|QuestionAnswering|TokenClassification)$", type(model).__name__):
        return []
    base = model.base_model_prefix
    found = [name for name, module in model.named_children() if name != base and any(True for _ in module.parameters())]
    pooler = getattr(getattr(model, base), "pooler", None)
    return [*found, *([f"{base}.pooler"] if pooler is not None else [])]


def fingerprint(model: nn.Module) -> str:
    """Of a bare model's architecture: names and shapes, the head left out."""
    skip = tuple(f"{name}." for name in head(model))
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters() if not name.startswith(skip or ("\0",))]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
