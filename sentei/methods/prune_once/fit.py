"""A sparse start for stage B: every linear is pruned at once, and fitted to what the teacher's makes of the same text.

Not in the paper, whose schedule wants a hundred thousand steps. The kept weights of each output are the least-squares
answer for exactly that pattern, layer by layer, each behind the pruned layers below it. What goes is what costs least,
w^2 / [H^-1]_jj with H the second moments of the inputs (Optimal Brain Surgeon; arXiv 2203.07259), in a few rounds with
a fit after each.

Shape legend: N blocks of text, T tokens, O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.importance import Replay, SecondMoments, Tick, relative_weight, takes_correction
from sentei.methods.prune_once import pattern as patterns
from sentei.methods.prune_once.lock import Matrices

ROUNDS = (0.8, 0.92, 1.0)  # of the sparsity; a round at 0.6 before them takes most of the time and gives little
RIDGE = 0.01  # pull towards the teacher's weight, in units of the mean variance of the inputs


@torch.no_grad()
def fit(
    model: nn.Module,
    teacher: nn.Module,
    matrices: Matrices,
    blocks_NT: Tensor,
    sparsity: float,
    *,
    pattern: str,
    ties: str,
    tick: Tick,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """Prune the matrices of the blocks in place, and give their linears' biases the fitted values.

    Args:
        model: a copy of the teacher.
        matrices: name -> weight, all of them inside the blocks.
        blocks_NT: text; several tokens for each input of the widest matrix.
    Returns:
        name -> [O, I] bool, what stays.
    """
    names = {id(parameter): name for name, parameter in matrices.items()}
    ours, theirs = Replay(model, blocks_NT, batch_size), Replay(teacher, blocks_NT, batch_size)
    masks: dict[str, Tensor] = {}
    for number, layer in enumerate(ours.layers):
        tick("fitting", number, len(ours.layers))
        linears = {
            path: module
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) in names
        }
        for group in _in_order(ours, number, linears):
            seen = _watch(ours, theirs, number, {path: linears[path] for path in group})
            for path in group:
                linear = linears[path]
                masks[names[id(linear.weight)]] = _prune(linear, seen[path], sparsity, pattern, ties)
        ours.advance(number)
        theirs.advance(number)
    return masks


def _in_order(replay: Replay, number: int, linears: dict[str, nn.Linear]) -> list[list[str]]:
    """The linears as they run, those that read the same tensor together."""
    read: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for path, linear in linears.items():
            see = lambda module, inputs, path=path: read.append((path, inputs[0]))  # noqa: E731
            stack.callback(linear.register_forward_pre_hook(see).remove)
        next(replay.run(number))
    return [[path for path, _ in group] for _, group in groupby(read, key=lambda of: id(of[1]))]


def _watch(ours: Replay, theirs: Replay, number: int, linears: dict[str, nn.Linear]) -> dict[str, SecondMoments]:
    """Moments of what the linears read, and of how far their outputs are from the teacher's.

    Where an output is added to a stream that a norm divides by its length, a token counts by what that makes of it, as
    in `importance.refit`: else a decoder's first token, a hundred times as long as all others, has the fit to itself.
    """
    seen: dict[str, SecondMoments] = {}
    layer, row = ours.layers[number], ours.row
    added = {id(structure.reader(layer, row, kind)): kind for kind in ("heads", "channels")}
    added = added if takes_correction(row) else {}
    stream: dict[str, Tensor] = {}  # kind -> [T, H] what the teacher's sub-layer adds to, of the batch under way
    now: dict[str, tuple[Tensor, Tensor]] = {}  # path -> (input, output), each [T, ...], of the batch under way
    wanted: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(into: dict[str, tuple[Tensor, Tensor]], path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            into[path] = inputs[0].flatten(0, -2), output.flatten(0, -2)

        return hook

    with ExitStack() as stack:
        for path, linear in linears.items():
            seen[path] = SecondMoments(linear.in_features, lambda of, path=path: wanted[path][1] - now[path][1])
            taught = theirs.layers[number].get_submodule(path)
            stack.callback(linear.register_forward_hook(keep(now, path)).remove)
            stack.callback(taught.register_forward_hook(keep(wanted, path)).remove)
        for _ in zip(ours.run(number), theirs.run(number, stream if added else None), strict=True):
            for path, linear in linears.items():
                weight_T1: Tensor | float = 1.0
                if (kind := added.get(id(linear))) is not None:
                    weight_T1 = relative_weight(stream[kind] + wanted[path][1])
                seen[path](now[path][0], weight_T1)
    return seen


def _prune(linear: nn.Linear, seen: SecondMoments, sparsity: float, pattern: str, ties: str) -> Tensor:
    with_bias = linear.bias is not None
    old_OI = linear.weight.double().cpu()
    covariance, wanted_OI, mean_I, wanted_O = seen.normal_equations(old_OI, with_bias)
    damping = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    left = covariance + damping * torch.eye(len(covariance), dtype=torch.double)
    right_OI = wanted_OI + damping * old_OI
    cost_I = torch.linalg.inv(left).diagonal().rsqrt()
    new_OI, keep_OI = old_OI, torch.ones_like(old_OI, dtype=torch.bool)
    for part in (1.0,) if pattern == "2:4" else ROUNDS:
        cost_OI = (new_OI * cost_I).float()
        keep_OI = patterns.masks({"": cost_OI}, part * sparsity, pattern=pattern, ties=ties)[""]
        new_OI = _least_squares(left, right_OI, keep_OI)
    linear.weight.copy_(new_OI)
    if with_bias:
        linear.bias.add_((wanted_O - new_OI @ mean_I).to(linear.bias))
    return keep_OI.to(linear.weight.device)


def _least_squares(left_II: Tensor, right_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """Each output's weights, with zeros where nothing is kept."""
    new_OI = torch.zeros_like(right_OI)
    for number, keep_I in enumerate(keep_OI):
        at_K = keep_I.nonzero().flatten()
        new_OI[number, at_K] = torch.linalg.solve(left_II[at_K][:, at_K], right_OI[number, at_K])
    return new_OI
