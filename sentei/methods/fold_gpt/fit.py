"""Scales and low-rank terms by least squares: what a folded block's sub-layers put out, fitted to what they put out.

A shared weight meets other heads and channels than its own output linear was made for, so that the difference of two
weights says little. Here the output linear of each sub-layer, in the order in which they run, gets the scale s and the
low-rank term B A for which s (W x + b + B A x) comes nearest to the block's own output for the same stream, and makes
good a share of what the stream lacks by then. The term is the exact answer for its rank (reduced-rank regression:
Izenman 1975, doi:10.1016/0047-259X(75)90042-1); no gradients, one pass over the text.

Shape legend: T tokens, O outputs and I inputs of a linear, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.importance import Replay, SecondMoments, Tick, takes_correction
from sentei.methods.fold_gpt.folder import Folder
from sentei.remote.modeling_sentei_folded import ChildLinear
from sentei.structure import Family

LEAST_SCALE = 0.05  # B is divided by it
TURNS = 5  # of scale and low-rank term


@torch.no_grad()
def fit(
    folder: Folder,
    dense: nn.Module,
    origin: Sequence[int],
    blocks_NT: Tensor,
    *,
    ridge: float,
    correction: float,
    tick: Tick,
    batch_size: int = 8,
) -> None:
    """Give the output linears of folded blocks the fitted corrections, in place.

    Args:
        folder: of a model that is folded.
        dense: the model before anything was removed or folded.
        origin: of each layer its number in `dense`.
        ridge: pull of B A towards 0, in units of the mean square of the inputs.
        correction: share of what the stream lacks that each sub-layer is asked to make good.
    """
    ours = Replay(folder.model, blocks_NT, batch_size)
    share = correction if takes_correction(ours.row) else 0.0
    theirs = Replay(dense, blocks_NT, batch_size) if share else None
    corrected = {n: found for n, layer in enumerate(ours.layers) if (found := _corrected(layer, ours.row))}
    passed = 0  # layers of the dense model that the text is through
    depth = max(corrected, default=-1) + 1
    for number in range(depth):
        tick("fitting", number, depth)
        if number in corrected:
            streams: dict[str, Tensor] = {}
            if theirs is not None:
                for below in range(passed, origin[number]):
                    theirs.advance(below)
                streams = theirs.streams(origin[number])
                passed = origin[number] + 1
            for kind, linear in corrected[number].items():
                own = _own_outputs(folder, ours, number, kind)
                _fit(linear, _moments(ours, number, kind, own, streams.get(kind), share), ridge)
        ours.advance(number)


def _corrected(layer: nn.Module, row: Family) -> dict[str, ChildLinear]:
    """kind -> the output linear of a sub-layer that has something to fit."""
    found = {kind: structure.reader(layer, row, kind) for kind in ("heads", "channels")}
    return {
        kind: linear
        for kind, linear in found.items()
        if isinstance(linear, ChildLinear) and (linear.A is not None or linear.scale is not None)
    }


def _own_outputs(folder: Folder, replay: Replay, number: int, kind: str) -> list[Tensor]:
    """Of each batch, what a sub-layer's output linear gives when it runs as it was before it was folded, [T, O]."""
    found: list[Tensor] = []
    with folder.as_it_was(number, kind):
        linear = structure.reader(replay.layers[number], replay.row, kind)
        assert linear is not None
        hook = linear.register_forward_hook(lambda module, inputs, output: found.append(output.flatten(0, -2).float()))
        try:
            for _ in replay.run(number):
                pass
        finally:
            hook.remove()
    return found


def _moments(
    replay: Replay, number: int, kind: str, own: list[Tensor], stream_TH: Tensor | None, share: float
) -> SecondMoments:
    """Of what the output linear reads now, beside what it should put out: its own and a share of what the stream lacks.

    First tokens are left out: activations are huge there.
    """
    linear: Any = structure.reader(replay.layers[number], replay.row, kind)
    sizes = [len(output) for output in own]
    batches = iter(zip(own, [None] * len(own) if stream_TH is None else stream_TH.split(sizes), strict=True))
    now: dict[str, Tensor] = {}
    wanted = torch.zeros(())
    seen = SecondMoments(linear.in_features, lambda of: wanted)

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal wanted
        x_BTI = inputs[0]
        output, dense_TH = next(batches)
        if dense_TH is not None:
            output = output + share * (dense_TH - now[kind]).to(output)
        wanted = output.view(*x_BTI.shape[:2], -1)[:, 1:].flatten(0, 1)
        seen(x_BTI[:, 1:].flatten(0, 1))

    hook = linear.register_forward_pre_hook(look)
    try:
        for _ in replay.run(number, None if stream_TH is None else now):
            pass
    finally:
        hook.remove()
    return seen


def _fit(child: ChildLinear, seen: SecondMoments, ridge: float) -> None:
    """The scale for the term that there is, then the term for that scale, in turn: each is exact for the other."""
    shared: Any = child.shared()
    weight_OI = shared.weight.double().cpu()
    bias_O = torch.zeros(len(weight_OI), dtype=torch.double) if shared.bias is None else shared.bias.double().cpu()
    square_II, mean_I = seen.xx / seen.count, seen.x / seen.count
    wanted_OI, wanted_O = seen.ex / seen.count, seen.e / seen.count  # E[t x'], E[t]
    through_OI = weight_OI @ square_II + torch.outer(bias_O, mean_I)  # E[y x'], y = W x + b
    y_square_O = (through_OI * weight_OI).sum(1) + bias_O * (weight_OI @ mean_I + bias_O)
    damping = ridge * square_II.diagonal().mean().clamp_min(1e-30)
    factor_II = torch.linalg.cholesky(square_II + damping * torch.eye(len(square_II), dtype=torch.double))
    scale_O, term_OI = torch.ones(len(weight_OI), dtype=torch.double), torch.zeros_like(weight_OI)
    for _ in range(TURNS):
        if child.scale is not None:
            left_OI, left_O = wanted_OI - term_OI @ square_II, wanted_O - term_OI @ mean_I
            y_left_O = (left_OI * weight_OI).sum(1) + left_O * bias_O
            scale_O = torch.where(y_square_O > 0, y_left_O / y_square_O.clamp_min(1e-30), scale_O)
            scale_O = torch.where(scale_O.abs() < LEAST_SCALE, LEAST_SCALE, scale_O)
        if child.A is not None and child.B is not None:
            left_OI = wanted_OI - scale_O[:, None] * through_OI
            a_RI, b_OR = reduced_rank(torch.cholesky_solve(left_OI.T, factor_II).T, left_OI, len(child.A))
            term_OI = b_OR @ a_RI
            child.A.zero_()[: len(a_RI)] = a_RI.to(child.A)
            child.B.zero_()[:, : len(a_RI)] = (b_OR / scale_O[:, None]).to(child.B)
    if child.scale is not None:
        child.scale.copy_(scale_O)


def reduced_rank(full_OI: Tensor, wanted_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [R, I], B [O, R]) of that rank for which B A x is nearest to t, balanced: each row of A as long as B's column.

    Args:
        full_OI: the answer of full rank, E[t x'] (E[x x'] + ridge)^-1.
        wanted_OI: E[t x'].
    """
    _, vectors_OO = torch.linalg.eigh(full_OI @ wanted_OI.T)
    b_OR = vectors_OO[:, -min(rank, len(vectors_OO)) :]
    a_RI = b_OR.T @ full_OI
    length_R = a_RI.norm(dim=1).clamp_min(1e-30).sqrt()
    return a_RI / length_R[:, None], b_OR * length_R
