"""Scores over units, and compensation of what was removed.

Every score is higher for a unit that matters more. Scores that need activations see them at the reading linears
(`o_proj`, `down_proj` and their like): column j of the input is what unit j feeds back into the residual stream.

=================  ==========================================================================  =====================
magnitude          mean |w| over all weights of the unit
wanda              |W| sqrt(sum of x^2), column mean; the pruned layer feeds the next          arXiv 2306.11695
flap               variance of x times squared column norm, z-scored per layer and kind        arXiv 2312.11983
taylor             |dL/dm| at m = 1, m a factor on the unit's output                           arXiv 2305.11627
block_influence    1 - cos(input, output) of a block                                           arXiv 2403.03853
=================  ==========================================================================  =====================

Shape legend: U units, N blocks of text, B batch, T tokens, H hidden width, W inputs of a reading linear, K kept inputs.
"""

from sentei.importance.compensation import (
    SecondMoments,
    check_refit_tokens,
    mean_bias,
    mean_fill,
    refit,
    refit_tokens,
    relative_weight,
    takes_correction,
)
from sentei.importance.replay import Moments, Replay, Tick, moments
from sentei.importance.scores import (
    block_influence,
    flap,
    magnitude,
    standardised,
    taylor,
    wanda,
)

__all__ = [
    "Moments",
    "Replay",
    "SecondMoments",
    "Tick",
    "block_influence",
    "check_refit_tokens",
    "flap",
    "magnitude",
    "mean_bias",
    "mean_fill",
    "moments",
    "refit",
    "refit_tokens",
    "relative_weight",
    "standardised",
    "takes_correction",
    "taylor",
    "wanda",
]
