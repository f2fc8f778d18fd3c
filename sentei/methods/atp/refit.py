"""At the freeze: what stays makes up for what goes, by the least-squares refit of the other structural methods.

Not in the paper. LoRA has a few hundred steps to make up for a third of the model; the refit takes one pass over some
of the same rows, and leaves LoRA the rest. Dropped rows of the adapters must be zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sentei import data, structure
from sentei.atomic import replacing
from sentei.importance import refit, refit_tokens
from sentei.methods.atp.ranks import shared
from sentei.methods.atp.wiring import MaskBook
from sentei.structure import Units
from sentei.train import evaluating, processes

if TYPE_CHECKING:
    from sentei.methods.atp import ATP

TOKENS = 16384
FILE = "refit.safetensors"  # in the work folder: the checkpoints of a run hold no weights of the base


def refit_text(method: ATP, model: nn.Module, units: Units, tokenizer: Any, texts: list[str]) -> Tensor:
    """Training rows drawn at random, whole: the refit learns more of what `seq_len` cuts off than of prompts alike.

    Returns:
        [N, T] blocks of at most `seq_len` tokens.
    Raises:
        ValueError: a refit is asked for, and the rows are too few for the widest linear.
    """
    needed = refit_tokens(model, units)
    count = method.refit_tokens or max(TOKENS, needed)
    length = min(method.seq_len, count)
    found_NT = data.blocks(texts, tokenizer, length, most=math.ceil(count / length), seed=method.seed)
    if method.refits and found_NT.numel() < needed:
        raise ValueError(
            f"compensate=least-squares needs at least {needed:,} tokens for linears of width {needed // 2}; the "
            f"training rows give {found_NT.numel():,}: add rows, raise refit_tokens, or use compensate=none"
        )
    return found_NT


class Refit:
    """New weights and biases where dropped units are read; the old ones are kept until the run is over."""

    def __init__(self, method: ATP, model: Any, units: Units, book: MaskBook, text_NT: Tensor, workdir: Path | None):
        self.method, self.model, self.units, self.book, self.text_NT = method, model, units, book, text_NT
        self.file = workdir / FILE if workdir else None
        self._old: dict[str, tuple[nn.Linear, Tensor, nn.Parameter | None]] = {}

    def run(self, keep_U: Tensor) -> None:
        self._prepare()
        with evaluating(self.model), self.book.using("off"):  # dropped columns are zero, in the adapters too
            bias = refit(
                self.model,
                self.units,
                keep_U,
                self.text_NT,
                correction=self.method.correction,
                with_bias=self.method.shape == "heterogeneous",  # plain architectures have no place for it
            )
        with torch.no_grad():
            for name, (linear, *_) in self._old.items():
                linear.weight.copy_(shared(linear.weight.data))
                number, _, kind = name.partition(".")
                if (shift_H := bias.get((int(number), kind))) is not None:
                    shift_H = shift_H.to(linear.weight) + (0 if linear.bias is None else linear.bias)
                    linear.bias = nn.Parameter(shared(shift_H), requires_grad=False)
        if self.file is not None and processes().is_main_process:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as part:
                save_file(self._tensors(), part)

    @torch.no_grad()
    def resume(self) -> None:
        assert self.file is not None
        self._prepare()
        for name, tensor in load_file(self.file).items():
            linear = self._old[name.rpartition(".")[0]][0]
            setattr(linear, name.rpartition(".")[2], nn.Parameter(tensor.to(linear.weight), requires_grad=False))

    def undo(self) -> None:
        self._put_back()
        self._old = {}

    def _put_back(self) -> None:
        for linear, weight, bias in self._old.values():
            linear.weight, linear.bias = weight, bias

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside the block the model has its old weights."""
        new = [(linear, linear.weight, linear.bias) for linear, *_ in self._old.values()]
        self._put_back()
        try:
            yield
        finally:
            for linear, weight, bias in new:
                linear.weight, linear.bias = weight, bias

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"{name}.weight": linear.weight.data for name, (linear, *_) in self._old.items()}
        biases = {f"{name}.bias": linear.bias for name, (linear, *_) in self._old.items()}
        return found | {name: bias.data for name, bias in biases.items() if bias is not None}

    def _prepare(self) -> None:
        """A second copy of every linear that reads units, for the refit to write into."""
        self.undo()
        row = structure.family(self.model)
        for number, layer in enumerate(structure.layers(self.model)):
            for kind in self.units.granularity:
                wrapped = structure.reader(layer, row, kind)
                if isinstance(wrapped, LoraLayer):
                    linear = wrapped.get_base_layer()
                    assert isinstance(linear, nn.Linear)
                    self._old[f"{number}.{kind}"] = linear, linear.weight, linear.bias
                    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
