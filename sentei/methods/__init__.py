"""The methods by name, and what they share: a frozen dataclass whose fields are the paper's hyper-parameters.

The fields are also the command-line flags and the recipe keys. Nothing here imports torch, so that help is quick.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

METHODS: dict[str, str] = {
    "one_shot": "sentei.methods.one_shot:OneShot",
    "policy_gradient": "sentei.methods.policy_gradient:PolicyGradient",
    "fold_gpt": "sentei.methods.fold_gpt:FoldGPT",
    "heal": "sentei.methods.heal:Heal",
    "prune_peft": "sentei.methods.prune_peft:PrunePEFT",
    "atp": "sentei.methods.atp:ATP",
    "prune_once_teacher": "sentei.methods.prune_once.pretrain:Teacher",
    "prune_once_student": "sentei.methods.prune_once.pretrain:Student",
    "prune_once_transfer": "sentei.methods.prune_once.transfer:Transfer",
    "prune_once_quantise": "sentei.methods.prune_once.quantise:Quantise",
}

Progress = Callable[[dict[str, Any]], None]
"""Called now and then with at least {"step", "of", "message"}; the caller draws the bar."""


class Method(Protocol):
    """What every method offers. `compress` changes the model in place and returns a JSON-able record of what it did.

    The record holds "kept" (from `structure.kept`, structural methods), "seconds", "history" (a list of dicts) and
    whatever the method wants in the report.

    `reads` says what `compress` is given: "text" is a `data.Text`; "examples" is what the method's own
    `read(spec, text_field)` returns, a `data.examples.Examples`, and its `head(rows)` is then what the model is loaded
    with: arguments of `checkpoint.load` such as {"task": "QuestionAnswering"}, or {}. How many forward passes it will
    take, for a dry run: `forwards(rows, tokenizer, teacher=...)`.

    `saves` says what becomes of the model: "checkpoint", or "adapter" where its weights stay as they are and the
    record's "adapter" tells what was put in; `pages(record)` is then the text of files beside it. Where the record has
    a "fallback" too, its tensors are in the work folder's file `fallback`.
    """

    structural: bool
    reads: str
    saves: str

    def compress(
        self, model: Any, tokenizer: Any, text: Any, *, workdir: Path | None = None, report: Progress | None = None
    ) -> dict[str, Any]: ...


def option(default: Any, help: str, source: str = "", *, transient: bool = False) -> Any:
    """A dataclass field with its help text and the place its default comes from.

    A transient field says how to go on with a run and is no part of what the run is: see `settings`.
    """
    return field(default=default, metadata={"help": help, "source": source, "transient": transient})


def with_preset(paper: dict[str, Any]) -> Callable[[type[T]], type[T]]:
    """Let a method's field `preset="paper"` stand for these settings, of which any that is given still wins."""

    def preset(kind: type[T]) -> type[T]:
        init = kind.__init__

        @functools.wraps(init)
        def __init__(self: T, *values: Any, **fields: Any) -> None:
            init(self, *values, **(paper if fields.get("preset") == "paper" else {}) | fields)

        kind.__init__ = __init__
        return kind

    return preset


def settings(method: Any) -> dict[str, Any]:
    """A method's fields but the transient ones: a saved state belongs to a run whose settings are equal."""
    return {item.name: getattr(method, item.name) for item in fields(method) if not item.metadata.get("transient")}


def load(name: str) -> type:
    """The class of a method.

    Raises:
        ValueError: no such method; names the nearest.
    """
    if name not in METHODS:
        import difflib

        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no method {name!r}{hint} Known: {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
