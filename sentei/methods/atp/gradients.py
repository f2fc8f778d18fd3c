"""What the model says about a mask: the gradient of its loss with respect to the mask's values.

Shape legend: U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.distill import Distillation
from sentei.masks import Fill
from sentei.methods.atp.ranks import summed
from sentei.methods.atp.wiring import MaskBook
from sentei.train import IGNORE, Batch, Batches, autocast, evaluating, mass


def mask_gradient(
    model: Any,
    book: MaskBook,
    mask_U: Tensor,
    micro: Sequence[Batch],
    precision: str,
    *,
    loss: Distillation | None = None,
    fill: Fill | None = None,
    checkpointing: bool = False,
) -> tuple[dict[str, float], Tensor, int]:
    """(losses of all processes' micro-batches under a mask, the gradient of "loss" [U] on the CPU, targets).

    The mask is a leaf: nothing upstream of it is touched. The model is called unwrapped, with dropout off, and no
    parameter gets a gradient.

    Args:
        mask_U: hard or soft, any device.
        micro: this process's micro-batches, each as heavy as its targets.
        loss: None is cross-entropy; of one with a teacher, "kl" is among the losses.
        fill: what stands in for masked units.
    """
    device = next(model.parameters()).device
    moved = [{name: x.to(device) for name, x in batch.items()} for batch in micro]
    asked = sum(int((batch["targets"] != IGNORE).sum()) for batch in moved)
    masses = [mass(batch) for batch in moved]
    whole = float(summed(torch.tensor(sum(masses))))
    leaf_U = mask_U.detach().to(device).requires_grad_()
    gradient_U, losses = torch.zeros(len(mask_U)), dict[str, Tensor]()
    with _inference_mode_of_modules(model, checkpointing):
        for batch, part in zip(moved, masses, strict=True):
            with book.using("full", leaf_U, fill):
                with autocast(precision, device):
                    found = (loss or Distillation())(model, batch)
                (grad_U,) = torch.autograd.grad(found["loss"] * (part / whole), leaf_U)
            gradient_U += grad_U.float().cpu()
            for name, value in found.items():
                losses[name] = losses.get(name, torch.zeros(())) + value.detach().float().cpu() * (part / whole)
    return (
        {name: float(summed(value)) for name, value in losses.items()},
        summed(gradient_U),
        int(summed(torch.tensor(float(asked)))),
    )


def taylor(
    model: Any,
    book: MaskBook,
    num_units: int,
    batches: Batches,
    precision: str,
    *,
    checkpointing: bool = False,
    num_batches: int = 10,
) -> Tensor:
    """Scores of the baseline: the sum over batches of |dCE/dm| at m = 1, [U]."""
    whole_U, score_U = torch.ones(num_units), torch.zeros(num_units)
    for n in range(num_batches):
        score_U += mask_gradient(model, book, whole_U, [batches(n)], precision, checkpointing=checkpointing)[1].abs()
    return score_U


@contextmanager
def _inference_mode_of_modules(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Dropout off; yet transformers recomputes activations in blocks that are in train mode only."""
    with evaluating(model):
        if checkpointing:
            for layer in structure.layers(model):
                layer.training = True
        yield
