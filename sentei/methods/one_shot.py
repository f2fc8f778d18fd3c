"""One-shot pruning: score every unit once, keep the best under the parameter budget. The peers everyone compares with.

=================  ===========================================================  ===============================
criterion          score                                                        source
=================  ===========================================================  ===============================
random             uniform noise from the seed                                  -
magnitude          mean |w| of the unit                                         -
wanda              |W| times input norm, layer by layer ("Wanda-sp")            arXiv 2306.11695, 2312.11983
flap               input variance times squared weight norm, standardised       arXiv 2312.11983
taylor             |dL/dm|; the one criterion that needs a backward pass        arXiv 2305.11627
block_influence    1 - cos(block input, block output) ("ShortGPT")              arXiv 2403.03853
greedy             drop the block whose loss rises least, again and again       arXiv 2402.09025 ("SLEB")
=================  ===========================================================  ===============================

1. Score the units on calibration text                                  `_scores`, `greedy.greedy`
2. Keep the best under the budget                                       `masks.select`
3. Make up for what goes: mean activations or a least-squares refit     `structural.cut`
4. Cut                                                                  `structure.remove`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sentei import importance, masks
from sentei.greedy import greedy
from sentei.methods import option
from sentei.methods.structural import Run, Structural

CRITERIA = ("random", "magnitude", "wanda", "flap", "taylor", "block_influence", "greedy")
WHOLE = ("block_influence", "greedy")  # criteria over whole blocks or sub-layers


@dataclass(frozen=True)
class OneShot(Structural):
    """Score once, cut once."""

    paper: ClassVar[str] = "peers: magnitude, Wanda-sp, FLAP, LLM-Pruner's Taylor, ShortGPT, SLEB"
    several_devices: ClassVar[bool] = True

    criterion: str = option("wanda", f"one of {', '.join(CRITERIA)}")
    granularity: str = option(
        "auto", "heads+channels, heads, channels, layers or sublayers; auto: layers for block_influence and greedy"
    )
    scope: str = option(
        "auto",
        "layer: every layer and kind loses the same fraction; family: every kind; global: all units compete; "
        "auto: global for flap, taylor and whole blocks, layer otherwise",
    )
    sequential: bool = option(True, "wanda: feed the pruned layer's output to the next layer", "arXiv 2306.11695")

    def check(self) -> None:
        super().check()
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is one of {', '.join(CRITERIA)}; got {self.criterion!r}")
        if self.whole != (self.criterion in WHOLE) and self.criterion != "random":
            fits = "layers or sublayers" if self.criterion in WHOLE else "heads, channels or heads+channels"
            raise ValueError(f"criterion {self.criterion} scores {fits}; got granularity {self.resolved_granularity!r}")

    @property
    def reads_loss(self) -> bool:
        return self.criterion in ("taylor", "greedy")

    @property
    def resolved_granularity(self) -> str:
        if self.granularity != "auto":
            return self.granularity
        return "layers" if self.criterion in WHOLE else "heads+channels"

    @property
    def resolved_scope(self) -> str:
        if self.scope != "auto":
            return self.scope
        return "global" if self.whole or self.criterion in ("flap", "taylor") else "layer"

    def choose(self, run: Run) -> tuple[Tensor, dict[str, Any]]:
        if self.criterion == "greedy":
            target = masks.removal_target(run.units, self.sparsity)
            keep_U, _ = greedy(run.model, run.units, run.calibration, run.loss, target, tick=run.tick)
        else:
            keep_U = self.select(self._scores(run), run.units, self.resolved_scope)
        return keep_U, {"scope": self.resolved_scope}

    def _scores(self, run: Run) -> Tensor:
        model, units, tick = run.model, run.units, run.tick
        if self.criterion == "random":
            return torch.rand(len(units), generator=torch.Generator().manual_seed(self.seed))
        if self.criterion == "magnitude":
            return importance.magnitude(model, units)
        blocks_NT = run.calibration
        if self.criterion == "wanda":
            fraction = masks.removal_target(units, self.sparsity) / units.total
            return importance.wanda(model, units, blocks_NT, fraction, sequential=self.sequential, tick=tick)
        if self.criterion == "flap":
            return importance.flap(model, units, run.moments)
        if self.criterion == "taylor":
            score_U = importance.taylor(model, units, blocks_NT, run.loss, tick=tick)
            # A global choice buys parameters with importance, so what counts is importance per parameter.
            return score_U / units.cost_U if self.resolved_scope == "global" else score_U
        return importance.block_influence(model, units, blocks_NT, tick=tick)
