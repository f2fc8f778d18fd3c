"""Greedy removal of whole blocks or sub-layers ("SLEB", arXiv 2402.09025): drop the one that is missed least, again.

In a round the layers before a candidate compute what they computed for the candidate before it, so they are run once:
half the work of a round, for the candidates lie evenly over the depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sentei import masks
from sentei.importance import Tick
from sentei.structure import Units

Loss = Callable[[nn.Module, Tensor, int], Tensor]
"""(model, ids [B, T], number of the batch) -> scalar."""


@torch.no_grad()
def greedy(
    model: nn.Module,
    units: Units,
    blocks_NT: Tensor,
    loss: Loss,
    remove: int,
    *,
    protected_U: Tensor | None = None,
    batch_size: int = 8,
    tick: Tick | None = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Drop units, each time the one without which the loss is lowest, until `remove` parameters are gone.

    Args:
        protected_U: [U] bool, units that stay.
    Returns:
        keep_U, and what was dropped in order: {"unit", "loss" without it and all before}.
    Raises:
        ValueError: the units that may go do not hold `remove` parameters.
    """
    keep_U = torch.ones(len(units), dtype=torch.bool)
    may_go_U = torch.ones_like(keep_U) if protected_U is None else ~protected_U
    if int(units.cost_U[may_go_U].sum()) < remove:
        raise ValueError(f"{remove:,} parameters are to go; the blocks that may go hold fewer: protect fewer blocks")
    order: list[dict[str, float]] = []
    while units.removed_parameters(keep_U) < remove:
        candidates = (keep_U & may_go_U).nonzero().flatten().tolist()
        totals = dict.fromkeys(candidates, 0.0)
        for number, ids_BT in enumerate(blocks_NT.split(batch_size)):
            with masks.masked(model, units, keep_U):
                inputs = masks.layer_inputs(model, lambda n=number, ids=ids_BT: loss(model, ids, n))
            for done, unit in enumerate(candidates):
                layer = int(units.layer_U[unit])
                keep_U[unit] = False
                with masks.masked(model, units, keep_U), masks.starting_at(model, layer, inputs[layer]):
                    totals[unit] += float(loss(model, ids_BT, number)) * len(ids_BT)
                keep_U[unit] = True
                if tick is not None:
                    tick("trying blocks", units.removed_parameters(keep_U) + done, remove + len(units))
        worst = min(totals, key=lambda unit: totals[unit])
        keep_U[worst] = False
        order.append({"unit": worst, "loss": totals[worst] / len(blocks_NT)})
    return keep_U, order
