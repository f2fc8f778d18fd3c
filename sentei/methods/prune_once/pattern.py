"""Which weights of a matrix stay: the smallest |w| go, one by one, in blocks of 1x4, or two of every four.

k-th smallest values are exact and nothing is sorted. Scores come from fp32 weights: thresholds of 16-bit copies tie.

Shape legend: O outputs, I inputs of a matrix; S scores (one per weight, block or group).
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("unstructured", "1x4", "2:4")
TIES = ("exact", "paper")


def check(pattern: str, target: float, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a pattern that these matrices or this target cannot have.

    Args:
        shapes: name -> (O, I).
    Raises:
        ValueError: says which and how to mend it.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is one of {', '.join(PATTERNS)}; got {pattern!r}")
    if not 0 < target < 1:
        raise ValueError(f"sparsity is the fraction of prunable weights removed, between 0 and 1; got {target}")
    if pattern == "2:4" and target != 0.5:
        raise ValueError(f"2:4 removes exactly half: set sparsity 0.5 (got {target}), or use unstructured or 1x4")
    for name, (_, inputs) in shapes.items():
        if pattern != "unstructured" and inputs % 4:
            raise ValueError(
                f"{name} has {inputs} inputs, not a multiple of 4 as {pattern} needs; leave it out with --exclude "
                "REGEX, or use pattern unstructured"
            )


def masks(
    weights: dict[str, Tensor],
    sparsity: float,
    *,
    pattern: str = "unstructured",
    scope: str = "matrix",
    ties: str = "exact",
    max_matrix_sparsity: float = 0.98,
) -> dict[str, Tensor]:
    """Masks of the weights that stay, True keeps.

    Args:
        weights: name -> [O, I] fp32.
        sparsity: fraction of the weights (unstructured), of the blocks (1x4) or, doubled, of the groups of four (2:4).
        scope: "matrix": every matrix loses the same fraction by its own threshold (the paper); "global": one threshold
            for all, but no matrix loses more than `max_matrix_sparsity`.
        ties: "exact": exactly k scores go, of equal ones those first in memory; "paper": all at the threshold go.
    Returns:
        name -> [O, I] bool.
    """
    score_S = {name: scores(weight, pattern) for name, weight in weights.items()}
    share = 2 * sparsity if pattern == "2:4" else sparsity
    if scope == "global":
        gone = _global(score_S, share, max_matrix_sparsity, ties)
    else:
        gone = {name: smallest(score, int(share * score.numel()), ties) for name, score in score_S.items()}
    return {name: expand(~gone[name], weights[name], pattern) for name in weights}


def scores(weight_OI: Tensor, pattern: str) -> Tensor:
    """|w| of every weight, the mean over each block of four inputs, or what 2:4 would cost a group; flat [S]."""
    size_OI = weight_OI.detach().float().abs()
    if pattern == "unstructured":
        return size_OI.flatten()
    group_S4 = size_OI.reshape(-1, 4)
    if pattern == "1x4":
        return group_S4.mean(1)
    return group_S4.topk(2, largest=False).values.sum(1)


def smallest(score_S: Tensor, k: int, ties: str = "exact") -> Tensor:
    """[S] bool, True for the k smallest scores; of ties at the border the first ones, or all (`ties="paper"`)."""
    if k <= 0:
        return torch.zeros_like(score_S, dtype=torch.bool)
    threshold = score_S.kthvalue(k).values
    if ties == "paper":
        return score_S <= threshold
    below_S = score_S < threshold
    equal = (score_S == threshold).nonzero().flatten()
    below_S[equal[: k - int(below_S.sum())]] = True
    return below_S


def expand(keep_S: Tensor, weight_OI: Tensor, pattern: str) -> Tensor:
    """From one flag per score to one per weight [O, I]. A flag of 2:4 says: this group stays as it is."""
    if pattern == "unstructured":
        return keep_S.reshape(weight_OI.shape)
    if pattern == "1x4":
        return keep_S[:, None].expand(-1, 4).reshape(weight_OI.shape)
    size_S4 = weight_OI.detach().float().abs().reshape(-1, 4)
    # The two largest of four; of equal ones the later stay, as the first go elsewhere.
    rank_S4 = size_S4.argsort(dim=1, stable=True).argsort(dim=1)
    return (keep_S[:, None] | (rank_S4 >= 2)).reshape(weight_OI.shape)


def _global(score_S: dict[str, Tensor], share: float, cap: float, ties: str) -> dict[str, Tensor]:
    """One threshold over all matrices; those above the cap are held there and the rest is solved again."""
    total = int(share * sum(score.numel() for score in score_S.values()))
    held: dict[str, Tensor] = {}
    while True:
        free = {name: score for name, score in score_S.items() if name not in held}
        k = total - sum(int(gone.sum()) for gone in held.values())
        room = sum(score.numel() for score in free.values())
        if k > room or not free:
            raise ValueError(f"max_matrix_sparsity {cap} leaves no room for a sparsity of {share}; raise it")
        flat = smallest(torch.cat(list(free.values())), k, ties)
        gone = dict(zip(free, flat.split([score.numel() for score in free.values()]), strict=True))
        over = [name for name, flags in gone.items() if int(flags.sum()) > int(cap * flags.numel())]
        if not over:
            return {name: held[name] if name in held else gone[name] for name in score_S}
        for name in over:
            held[name] = smallest(score_S[name], int(cap * score_S[name].numel()), ties)
