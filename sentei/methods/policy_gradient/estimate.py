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


def project(z: Tensor, weight: Tensor, budget: float) -> Tensor:
    """The point nearest to z with 0 <= s <= 1 and sum(weight * s) <= budget.

    It is clip(z - v weight, 0, 1) with v = 0 if that fits, else the v > 0 that spends the budget exactly: bisection,
    then a closed form on the coordinates strictly inside.

    Args:
        z, weight: [n] float64; weight positive.
        budget: in units of weight.
    """
    scale = weight.mean()
    w, budget = weight / scale, budget / float(scale)

    def spent(v: float) -> float:
        return float((w * (z - v * w).clamp(0, 1)).sum())

    if spent(0.0) <= budget:
        return z.clamp(0, 1)
    low, high = 0.0, float((z / w).max())
    for _ in range(64):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    y = z - high * w
    inside, full = (y > 0) & (y < 1), y >= 1
    if inside.any():
        v = float(((w * z)[inside].sum() + w[full].sum() - budget) / w[inside].square().sum())
        if low <= v and spent(v) <= budget:
            return (z - v * w).clamp(0, 1)
    return y.clamp(0, 1)


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
