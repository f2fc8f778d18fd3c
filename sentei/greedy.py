"""Removal of whole blocks or sub-layers by measuring: one by one, and by exchange with those that went.

greedy      drop the unit that is missed least, measure all the others again, and so on ("SLEB", arXiv 2402.09025)
exchange    bring back the dropped unit that helps most, drop another instead, keep that if the loss is lower: the step
            of floating search (Pudil, Novovicova and Kittler, 1994), which leaves pairs that only hurt together

In a round the layers before a candidate compute what they computed for the candidate before it, so they are run once:
half the work of a round, for the candidates lie evenly over the depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    keep_U: Tensor | None = None,
    protected_U: Tensor | None = None,
    batch_size: int = 8,
    tick: Tick | None = None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Drop units, each time the one without which the loss is lowest, until `remove` parameters are gone.

    Args:
        keep_U: [U] bool, what is left at the start; default: all.
        protected_U: [U] bool, units that stay.
    Returns:
        keep_U, and what was dropped in order: {"unit", "loss" without it and all before}.
    Raises:
        ValueError: the units that may go do not hold `remove` parameters.
    """
    keep_U = torch.ones(len(units), dtype=torch.bool) if keep_U is None else keep_U.clone()
    may_go_U = torch.ones_like(keep_U) if protected_U is None else ~protected_U
    if int(units.cost_U[may_go_U].sum()) < remove:
        raise ValueError(f"{remove:,} parameters are to go; the blocks that may go hold fewer: protect fewer blocks")
    order: list[dict[str, float]] = []
    while (gone := units.removed_parameters(keep_U)) < remove:
        candidates = (keep_U & may_go_U).nonzero().flatten().tolist()

        def say(done: int, gone: int = gone) -> None:
            if tick is not None:
                tick("trying blocks", gone + done, remove + len(units))

        losses = _changed(model, units, keep_U, candidates, blocks_NT, loss, batch_size, say)
        worst = min(losses, key=lambda unit: losses[unit])
        keep_U[worst] = False
        order.append({"unit": worst, "loss": losses[worst]})
    return keep_U, order


@torch.no_grad()
def exchange(
    model: nn.Module,
    units: Units,
    blocks_NT: Tensor,
    loss: Loss,
    remove: int,
    keep_U: Tensor,
    *,
    trials: int,
    protected_U: Tensor | None = None,
    batch_size: int = 8,
    tick: Tick | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Swap dropped units for kept ones as long as that lowers the loss; at least `remove` parameters stay gone.

    Args:
        keep_U: [U] bool, where to start; it drops `remove` parameters or more.
        trials: how many times a unit is brought back and another one sought for it.
    Returns:
        keep_U, and the trials: {"back": unit, "dropped": units, "loss" with them, "kept": bool}; the first entry has
        the loss at the start only.
    """
    keep_U = keep_U.clone()
    best = 0.0
    for number, ids_BT in enumerate(blocks_NT.split(batch_size)):
        with masks.masked(model, units, keep_U):
            best += float(loss(model, ids_BT, number)) * len(ids_BT) / len(blocks_NT)
    log: list[dict[str, Any]] = [{"loss": best}]
    losses: dict[int, float] = {}  # with each of those that went brought back; what was tried in vain is not in it
    fresh = False
    for trial in range(trials):
        if not fresh:
            gone = (~keep_U).nonzero().flatten().tolist()
            losses, fresh = _changed(model, units, keep_U, gone, blocks_NT, loss, batch_size), True
        if not losses:
            break
        back = min(losses, key=lambda unit: losses[unit])
        without = losses.pop(back)
        other_U = keep_U.clone()
        other_U[back] = True
        other_U, order = greedy(
            model, units, blocks_NT, loss, remove, keep_U=other_U, protected_U=protected_U, batch_size=batch_size
        )
        found = order[-1]["loss"] if order else without  # more was gone than had to be
        log.append({"back": back, "dropped": [entry["unit"] for entry in order], "loss": found, "kept": found < best})
        if found < best:
            keep_U, best, fresh = other_U, found, False
        if tick is not None:
            tick(f"exchanging blocks: loss {best:.3f}", trial + 1, trials)
    return keep_U, log


def _changed(
    model: nn.Module,
    units: Units,
    keep_U: Tensor,
    candidates: list[int],
    blocks_NT: Tensor,
    loss: Loss,
    batch_size: int,
    say: Callable[[int], None] = lambda done: None,
) -> dict[int, float]:
    """Loss with each of the candidates, in order of depth, changed alone: dropped if it is kept now, else brought back.

    Leaves `keep_U` as it was; `say` is told how many of a batch are done.
    """
    totals = dict.fromkeys(candidates, 0.0)
    for number, ids_BT in enumerate(blocks_NT.split(batch_size)):
        with masks.masked(model, units, keep_U):
            inputs = masks.layer_inputs(model, lambda n=number, ids=ids_BT: loss(model, ids, n))
        for done, unit in enumerate(candidates):
            layer = int(units.layer_U[unit])
            keep_U[unit] = not keep_U[unit]
            with masks.masked(model, units, keep_U), masks.starting_at(model, layer, inputs[layer]):
                totals[unit] += float(loss(model, ids_BT, number)) * len(ids_BT)
            keep_U[unit] = not keep_U[unit]
            say(done)
    return {unit: total / len(blocks_NT) for unit, total in totals.items()}
