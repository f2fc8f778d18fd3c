"""The maths of the paper: the start of the scores, the projection onto the budget, and the estimate of a step.

Shape legend: U units (or bits), K samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sentei import importance
from sentei.train import mix

ESTIMATORS = ("moving_average", "leave_one_out", "antithetic", "no_baseline")


def sigmap(metric: Tensor, ratio: float) -> Tensor:
    """The start of s: sigmoid of the z-scored metric, shifted to mean `ratio`, clamped to [0, 1] (authors' code)."""
    s = importance.standardised(metric.double()).sigmoid()
    return (s + ratio - s.mean()).clamp(0, 1)


def project(z: Tensor, weight: Tensor, budget: float, floor: float = 0.0) -> Tensor:
    """The point nearest to z with floor <= s <= 1 and sum(weight * s) <= budget.

    It is clip(z - v weight, floor, 1) with v = 0 if that fits, else the v > 0 that spends the budget exactly:
    bisection, then a closed form on the coordinates strictly inside.

    Args:
        z, weight: [n] float64; weight positive.
        budget: in units of weight; at least the floor's own.
    """
    if floor:  # s = floor + (1 - floor) t, and t has no floor
        inner = (budget - floor * float(weight.sum())) / (1 - floor)
        return floor + (1 - floor) * project((z - floor) / (1 - floor), weight, inner)
    scale = weight.mean()
    w, budget = weight / scale, budget / float(scale)

    def spent(v: float) -> float:
        return float((w * (z - v * w).clamp(0, 1)).sum())

    if spent(0.0) <= budget:
        return z.clamp(0, 1)
    low, high = _bracket(z, w, budget)
    y = z - high * w
    inside, full = (y > 0) & (y < 1), y >= 1
    if inside.any():
        v = float(((w * z)[inside].sum() + w[full].sum() - budget) / w[inside].square().sum())
        if low <= v and spent(v) <= budget:
            return (z - v * w).clamp(0, 1)
    return y.clamp(0, 1)


def _bracket(z: Tensor, w: Tensor, budget: float) -> tuple[float, float]:
    """The v of `project` between two neighbouring numbers, by 64 halvings.

    What sum(w clip(z - v w, 0, 1)) owes to coordinates that stay at 1, at 0 or strictly inside for every v between the
    bounds is `constant - v * slope`. Of many coordinates these are settled as the bounds close in, so that the sum is
    taken over all of them a few times only.
    """
    low, high = 0.0, float((z / w).max())
    constant = slope = 0.0
    for halving in range(64):
        middle = 0.5 * (low + high)
        over = constant - middle * slope + float((w * (z - middle * w).clamp(0, 1)).sum()) > budget
        low, high = (middle, high) if over else (low, middle)
        if halving % 4 == 3 and len(z) > 4096:
            most, least = z - low * w, z - high * w
            full, inside = least >= 1, (least >= 0) & (most <= 1)
            constant += float(w[full].sum() + (w * z)[inside & ~full].sum())
            slope += float(w[inside & ~full].square().sum())
            open_ = ~full & ~inside & (most > 0)
            z, w = z[open_], w[open_]
    return low, high


def shift(z: Tensor, weight: Tensor, budget: float) -> Tensor:
    """clip(z + v, 0, 1) with the v that spends the budget: sum(weight * s) = budget, and nothing changes places."""
    low, high = float(-z.max()), float(1 - z.min())  # everything at 0, everything at 1
    for _ in range(64):
        middle = 0.5 * (low + high)
        over = float((weight * (z + middle).clamp(0, 1)).sum()) > budget
        low, high = (low, middle) if over else (middle, high)
    return (z + low).clamp(0, 1)


def estimate(
    name: str, bits_KU: Tensor, s_U: Tensor, losses_K: Tensor, baseline: float, window: int, eps: float = 1e-7
) -> Tensor:
    """The preconditioned REINFORCE estimate g of one step, by the named estimator.

    All have the same mean c sqrt(s (1 - s)) dE[L]/ds with c = (K - 1/T) / (K - 1), so one step size serves all. In
    "antithetic" samples 2j and 2j + 1 are a pair made from u and 1 - u, and the weight is DisARM's (arXiv 2006.10680).
    Samples whose loss is not finite are left out of the sum; the divisor stays.
    """
    count = len(losses_K)
    phi_KU = (bits_KU - s_U) / ((s_U + eps) * (1 - s_U + eps)).sqrt()
    c = (count - 1 / window) / (count - 1)
    finite = torch.isfinite(losses_K)
    losses_K = torch.where(finite, losses_K, torch.zeros_like(losses_K))
    if name == "antithetic":
        paired = (finite[0::2] & finite[1::2]).double()
        difference = (losses_K[0::2] - losses_K[1::2]) * paired
        spread = torch.maximum(s_U, 1 - s_U) / ((s_U + eps) * (1 - s_U + eps)).sqrt()
        pairs_KU = difference[:, None] * (bits_KU[0::2] - bits_KU[1::2]) * spread
        return 0.5 * c * pairs_KU.mean(0)
    if name == "leave_one_out":
        weight_K, factor = losses_K - losses_K[finite].mean(), c / (count - 1)
    elif name == "no_baseline":
        weight_K, factor = losses_K, (count - 1 / window) / count / (count - 1)
    else:
        weight_K, factor = losses_K - baseline, 1 / (count - 1)
    return factor * ((weight_K * finite)[:, None] * phi_KU).sum(0)


def uniform(seed: int, step: int, sample: int, count: int) -> Tensor:
    """[count] float32 in (0, 1), odd multiples of 2^-24: u and 1 - u are both exact and never 0 or 1."""
    generator = torch.Generator().manual_seed(mix(seed, step, sample))
    return (2 * torch.randint(0, 2**23, (count,), generator=generator) + 1).float() / 2**24
