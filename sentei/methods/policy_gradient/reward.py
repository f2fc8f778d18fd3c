"""What a search rewards: the language-model loss, or any function of the user's.

A reward is `function(model, batch) -> float`, higher is better, forward passes only; it need not be differentiable:
accuracy, exact match, ROUGE of generated text, a program's verdict. The search minimises L = -value.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei.data.examples import read_rows
from sentei.train import mix

# Short names of the functions that come with sentei; any other name is the user's module:function.
BUILT_IN = {
    "choice_accuracy": "sentei.evaluate.rewards:choice_accuracy",
    "choice_probability": "sentei.evaluate.rewards:choice_probability",
    "label_accuracy": "sentei.evaluate.rewards:label_accuracy",
    "label_probability": "sentei.evaluate.rewards:label_probability",
    "exact_match": "sentei.evaluate.rewards:exact_match",
    "rouge_l": "sentei.evaluate.rewards:rouge_l",
}


@dataclass(frozen=True)
class Batch:
    """What a reward function sees.

    Attributes:
        tokenizer: the model's.
        device: where the model's inputs belong.
        examples: rows of the file `reward_data`, as they were read.
        input_ids: [B, T] blocks of the text, where no `reward_data` is given.
    """

    tokenizer: Any
    device: torch.device
    examples: list[dict[str, Any]] = field(default_factory=list)
    input_ids: Tensor | None = None


class Reward:
    """A user's function, called and checked."""

    def __init__(self, name: str):
        self.name = name
        self.function = _find(BUILT_IN.get(name, name))

    def __call__(self, model: nn.Module, batch: Batch) -> float:
        """-value, to be minimised.

        Raises:
            ValueError: not a number, or the function needs gradients; of a built-in reward, rows it cannot score.
            RuntimeError: from what a command line takes for wrong input, which in a function of the user's is a fault
                that they must see with its traceback. What else the function raises passes through.
        """
        try:
            value = self.function(model, batch)
        except RuntimeError as error:
            if "require grad" in str(error) or "nference tensor" in str(error):
                raise ValueError(f"reward {self.name}: reward functions run forward only ({error})") from error
            raise
        except (ValueError, OSError, MemoryError) as error:
            if self.name in BUILT_IN and isinstance(error, ValueError):
                raise
            raise RuntimeError(f"reward {self.name} failed") from error
        try:
            return -float(value)
        except (TypeError, ValueError):
            raise ValueError(f"reward {self.name} returned {value!r}; expected one number, higher is better") from None


def _find(name: str) -> Callable[[nn.Module, Batch], Any]:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"reward is kl, lm_loss, {', '.join(BUILT_IN)} or module:function of yours; got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # the user's own file, beside the command
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name}: cannot import it ({error})") from None


def examples(file: str, held: float = 0.2, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a file, shuffled and dealt to search and held-out part by a hash of the row: equal rows land on one side.

    Raises:
        ValueError: no such file, a row that cannot be read, or too few.
    """
    rows = [row for row, _ in read_rows(file)]
    part: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    hashed = ((mix(seed, json.dumps(row, sort_keys=True)), row) for row in rows)
    for number, row in sorted(hashed, key=lambda pair: pair[0]):  # files are sorted by task or by answer
        part[number % 1000 < 1000 * held].append(row)
    if min(map(len, part)) < 2:
        raise ValueError(f"reward_data {file} holds {len(rows)} rows; a search needs ten at least, better hundreds")
    return part
