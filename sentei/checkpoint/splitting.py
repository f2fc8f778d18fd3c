"""How byte-level BPE tokenizers split text before they merge bytes, by llama.cpp's names (`tokenizer.ggml.pre`).

transformers does not read that field of every .gguf file and then splits as GPT-2 does, so that runs of spaces before a
number came out as other tokens than the model was trained on.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, pre_tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": ("bytes",),
    "smollm": ("digits", "bytes"),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}",),
    "qwen2": (_WORDS % r"\p{N}",),
}


def name_of(tokenizer: Any) -> str | None:
    """llama.cpp's name for the way a tokenizer splits; None where we know none."""
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    table: dict[str, Any] = {} if splitter is None else json.loads(splitter.__getstate__())
    steps: list[str] = []
    for step in table.get("pretokenizers", [table] if table else []):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            steps += ["bytes"] if step.get("use_regex", True) else []
        elif kind == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return next((name for name, known in SPLITS.items() if known == tuple(steps)), None)


def restore(tokenizer: Any, name: str | None) -> None:
    """Make a tokenizer that splits as one of SPLITS split as `name` says; others, and other names, change nothing."""
    if name in SPLITS and name_of(tokenizer) not in (None, name):
        tokenizer.backend_tokenizer.pre_tokenizer = made(name)


def made(name: str) -> Any:
    """The pre-tokenizer of the `tokenizers` package that splits as one of SPLITS."""
    steps: list[Any] = []
    for step in SPLITS[name]:
        if step == "bytes":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        elif step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(step), "isolated"))
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
