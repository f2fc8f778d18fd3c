"""Structural pruning learned from forward passes only, by policy gradient.

"Optimization-based Structural Pruning for Large Language Models without Back-Propagation", arXiv 2406.10576.

Every removable unit i has a keep-probability s_i; masks are sampled, the frozen model runs forward under them, and s
moves along a REINFORCE estimate under the parameter budget sum_i w_i s_i <= R. No gradient is taken, no weight changes.

1. Score the units once; that is the start                                              `_initial_metric`, `sigmap`
2. Coarse levels (ours): each layer and kind has one keep-fraction, the order inside a
   layer is the initial one
   a. sub-layers or blocks that go as a whole, when asked for                           `levels.Drops`
   b. slopes of the loss in one fraction after the other, sharing the layers below it   `levels.Slopes`
   c. antithetic Gaussian steps on all fractions at once                                `levels.Widths`
3. Fine level (the paper's): in each step, K masks m ~ Bernoulli(s) on one batch        `levels.Bits`
   a. losses L_k of the masked model (unless asked otherwise, the divergence of its
      predictions from the dense model's), baseline d = moving average of their mean
   b. phi = (m - s) / sqrt(s (1 - s)),  g = sum_k (L_k - d) phi_k / (K - 1)             `estimate`
   c. s <- project(s - lr g) onto 0 <= s <= 1, sum w s <= R                             `project`
4. Keep the units with the highest s, exactly to the budget                             `masks.select`
5. Cut them out; removed units may leave their mean activation, or a refit              `Structural.cut`

Now and then the hard mask is evaluated on held-out text; the best one seen wins, the start included. The state is saved
every `save_every` steps, and randomness depends on (seed, step, sample) alone, so a resumed run continues exactly.

Shape legend: U units, K samples, P pairs of (layer, kind).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sentei import masks
from sentei.methods import option, with_preset
from sentei.methods.policy_gradient.estimate import ESTIMATORS
from sentei.methods.policy_gradient.reward import BUILT_IN
from sentei.methods.policy_gradient.search import Search
from sentei.methods.structural import Run, Structural
from sentei.train import processes

INITS = ("wanda", "flap", "magnitude", "taylor", "block_influence", "random")

# The authors' own settings (their scripts for 7B models): single channels, two separate budgets, no coarse level.
PAPER: dict[str, Any] = {
    "granularity": "heads+channels", "compensate": "none", "shape": "heterogeneous", "round_to": 1,
    "calibration_samples": 128, "calibration_seq_len": 1024, "init": "wanda", "budget": "family",
    "slope_sweeps": 0, "coarse_steps": 0, "steps": 15_000, "samples": 2, "estimator": "moving_average",
    "baseline_window": 5, "lr": 2e-3, "batch_size": 8, "seq_len": 128, "phi_eps": 1e-7, "channel_group": 1,
    "score_floor": 0.0, "reward": "lm_loss", "eval_every": 1000, "save_every": 100,
}  # fmt: skip


@with_preset(PAPER)
@dataclass(frozen=True)
class PolicyGradient(Structural):
    """Learn which units to keep, from forward passes only."""

    paper: ClassVar[str] = "arXiv 2406.10576"
    several_devices: ClassVar[bool] = True

    preset: str = option("ours", "ours, or paper: the authors' settings (any field that is given still wins)")
    granularity: str = option(
        "heads+channels",
        "heads+channels, heads, channels, sublayers or layers; with sublayers+ before one of the first three, or "
        "layers+ before heads+channels, whole ones may go as well, inside the same budget",
    )
    compensate: str = option(
        "auto",
        "none, mean or least-squares; auto: least-squares for heads and channels where the calibration text is enough "
        "for their width, else mean; unless none, the search fills in the means",
    )
    init: str = option(
        "auto",
        f"initial scores: {', '.join(INITS)}; auto: flap or wanda where means are filled in, whichever starts at the "
        "lower held-out loss, else wanda; block_influence for whole blocks",
        "wanda: authors' code",
    )
    budget: str = option("global", "global: all units compete; family: heads and channels lose the same fraction")
    slope_sweeps: int = option(
        3, "sweeps of one forward per layer and kind, each sharing the layers below; 0 leaves this level out", "ours"
    )
    slope_delta: float = option(0.1, "how much of a layer's units gives way in such a forward", "ours")
    slope_rate: float = option(4.0, "assumed decay of the loss in a keep-fraction: higher moves less", "ours")
    coarse_steps: int = option(0, "antithetic pairs of the search over keep-fractions; 0 leaves it out", "ours")
    coarse_sigma: float = option(0.05, "standard deviation of the perturbed keep-fractions")
    coarse_lr: float = option(0.02, "typical move of a keep-fraction in one step, cosine to 0")
    steps: int = option(0, "steps of the search over units", "15,000 in the authors' scripts")
    samples: int = option(2, "masks per step, K", "authors' scripts")
    estimator: str = option("moving_average", f"one of {', '.join(ESTIMATORS)}", "moving_average: authors' code")
    baseline_window: int = option(5, "window T of the moving-average baseline", "authors' scripts")
    lr: float | None = option(None, "step size of s, cosine to 0; default 30 / steps", "2e-3 at 15,000 steps")
    batch_size: int = option(8, "blocks per forward", "authors' scripts")
    seq_len: int = option(128, "tokens per block", "authors' scripts")
    phi_eps: float = option(1e-7, "keeps phi finite at s = 0 and s = 1", "authors' code")
    score_floor: float = option(
        0.01, "lowest s while the search over units goes on, linearly to 0: a unit at 0 could not return", "ours"
    )
    channel_group: int = option(32, "channels that share one bit in the search over units; 1 in the authors' code")
    reward: str = option(
        "kl",
        "what is lowered: kl, the divergence from the dense model on the text; lm_loss, the loss of the text (masked "
        f"tokens for encoders); or what is raised: {', '.join(BUILT_IN)}, or module:function of yours with "
        "(model, batch) -> float",
        "ours; lm_loss: authors' code",
    )
    reward_data: str | None = option(None, "JSONL rows given to the reward as batch.examples; a fifth is held out")
    reward_scale: str = option(
        "auto", "none; std: the search over units scales rewards to a common spread; auto: std for functions of yours"
    )
    eval_every: int = option(10, "steps between evaluations of the hard mask on held-out text")
    eval_samples: int = option(16, "held-out blocks of those evaluations")
    save_every: int = option(10, "steps between saves of the state, when there is a work folder")
    keep_best: bool = option(True, "return the best hard mask evaluated, the start included, instead of the last")
    log: str | None = option(None, "a file for one JSON line per step", transient=True)
    finish: bool = option(
        False, "do not search on: cut the best mask that an interrupted search has saved", transient=True
    )

    def check(self) -> None:
        super().check()
        if self.preset not in ("ours", "paper"):
            raise ValueError(f"preset is ours or paper; got {self.preset!r}")
        for name, value, known in (("estimator", self.estimator, ESTIMATORS), ("init", self.inits[0], INITS)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}")
        if self.budget not in ("global", "family"):
            raise ValueError(f"budget is global or family; got {self.budget!r}")
        if self.samples < 2:
            raise ValueError("samples must be at least 2: the estimate divides by samples - 1")
        if self.estimator == "antithetic" and self.samples % 2:
            raise ValueError(f"antithetic needs an even number of samples; got {self.samples}")
        if self.reward_scale not in ("auto", "none", "std"):
            raise ValueError(f"reward_scale is auto, none or std; got {self.reward_scale!r}")
        if self.reward_data is not None and self.on_text:
            raise ValueError("reward_data is for a reward function; give reward too, or the text by data")
        whole_numbers = {
            "slope_sweeps": 0, "coarse_steps": 0, "steps": 0, "seq_len": 2, "batch_size": 1, "channel_group": 1,
            "baseline_window": 1, "eval_every": 1, "eval_samples": 1, "save_every": 1,
        }  # fmt: skip
        for name, least in whole_numbers.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        for name in ("slope_delta", "slope_rate", "coarse_sigma", "coarse_lr", "lr", "phi_eps"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0; got {value}")
        if self.whole != (self.inits == ("block_influence",)) and self.init != "random":
            raise ValueError(f"init={self.init} does not score {self.granularity}; block_influence scores whole blocks")
        if self.whole_units is not None and (self.whole or self.shape == "uniform"):
            raise ValueError(
                f"granularity={self.granularity}: {self.whole_units}+ goes before heads and channels, and "
                f"layers then differ in width; got shape={self.shape}"
            )
        if self.whole_units == "layers" and self.resolved_granularity != "heads+channels":
            raise ValueError(
                f"granularity={self.granularity}: a whole block is its heads and its channels; use "
                f"layers+heads+channels, or sublayers+{self.resolved_granularity}"
            )
        if not 0 <= self.score_floor < 0.5:
            raise ValueError(f"score_floor is a small probability, from 0 to below 0.5; got {self.score_floor}")
        if self.shape == "uniform" and not self.steps:
            raise ValueError(
                "shape=uniform leaves no widths to search over: give steps, for example 200, to search which units stay"
                " in each layer; or take method one_shot, which does not search"
            )
        if self.whole and not self.steps:
            raise ValueError(f"{self.granularity} have no widths to search over: give steps, for example 200")

    @property
    def whole_units(self) -> str | None:
        """ "layers" or "sublayers" where they may go as a whole beside heads and channels."""
        first, _, finer = self.granularity.partition("+")
        return first if first in ("layers", "sublayers") and finer else None

    @property
    def resolved_granularity(self) -> str:
        return self.granularity.removeprefix(f"{self.whole_units}+")

    @property
    def on_text(self) -> bool:
        """No function of the user's: the model's own predictions on the text are judged."""
        return self.reward in ("kl", "lm_loss")

    @property
    def reads_loss(self) -> bool:
        return self.on_text or self.init == "taylor"

    @property
    def inits(self) -> tuple[str, ...]:
        """The initial scores to choose from."""
        if self.init != "auto":
            return (self.init,)
        if self.whole:
            return ("block_influence",)
        if not self.compensates:
            return ("wanda",)
        return ("flap", "wanda") if self.on_text and self.shape != "uniform" else ("flap",)

    @property
    def resolved_reward_scale(self) -> str:
        return ("none" if self.on_text else "std") if self.reward_scale == "auto" else self.reward_scale

    def choose(self, run: Run) -> tuple[Tensor, dict[str, Any]]:
        if processes().num_processes > 1:  # each on a device of its own, where the cut model then stays
            run.model.to(torch.device(processes().device))  # pyright: ignore[reportArgumentType]
        with masks.column_major(run.model, run.units), torch.inference_mode():
            search = Search(self, run)
            keep_U = search.best_U() if search.remove > 0 else torch.ones(len(run.units), dtype=torch.bool)
        return keep_U, search.account()
