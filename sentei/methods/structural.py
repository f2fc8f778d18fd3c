"""What every structural method shares: the budget and shape fields, calibration text, compensation and the cut."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sentei import data, importance, masks, structure
from sentei.distill import Distillation, head
from sentei.methods import Progress, option
from sentei.structure import KINDS, Units
from sentei.train import Batch, causal_batch, masked_batch, mix

COMPENSATIONS = ("auto", "none", "mean", "least-squares")
SHAPES = ("heterogeneous", "uniform", "padded")


@dataclass
class Run:
    """One compression under way: the model, its units and the text it is judged on."""

    model: nn.Module
    tokenizer: Any
    units: Units
    text: data.Text
    method: Structural
    workdir: Path | None
    report: Progress | None
    began: float

    @cached_property
    def calibration(self) -> Tensor:
        """[N, T] token ids of the training part of the text."""
        method = self.method
        return self.blocks(method.calibration_samples, method.calibration_seq_len)

    @cached_property
    def moments(self) -> dict[tuple[int, str], importance.Moments]:
        """What the dense model's reading linears take in on the calibration text, by (layer, kind)."""
        return importance.moments(self.model, self.calibration, self.units.granularity, tick=self.tick)

    @cached_property
    def fill(self) -> masks.Fill:
        """Mean activations of the dense model on the calibration text: for a search and for the cut after it."""
        return importance.mean_fill(self.moments)

    def blocks(self, num: int | None, seq_len: int, part: str = "train", most: int | None = None) -> Tensor:
        documents = getattr(self.text, part)
        return data.blocks(documents, self.tokenizer, seq_len, num=num, most=most, seed=self.method.seed)

    def loss(self, model: nn.Module, ids_BT: Tensor, seed: int = 0) -> Tensor:
        """Mean next-token cross-entropy; for encoders that of 15 % masked tokens, chosen by the seed."""
        return Distillation()(model, self.batch(ids_BT, seed))["loss"]

    def batch(self, ids_BT: Tensor, seed: int = 0) -> Batch:
        """Tokens and what is asked of them, on the model's device."""
        if structure.is_causal(self.model):
            batch = causal_batch(ids_BT)
        else:  # drawn on the CPU: the same tokens whatever the device
            batch = masked_batch(ids_BT.cpu(), self.tokenizer, seed=mix(self.method.seed, seed))
        device = next(self.model.parameters()).device
        return {name: x.to(device) for name, x in batch.items()}

    @torch.no_grad()
    def mean_loss(self, blocks_NT: Tensor, batch_size: int = 8) -> float:
        batches = blocks_NT.split(batch_size)
        total = sum(float(self.loss(self.model, ids_BT, i)) * len(ids_BT) for i, ids_BT in enumerate(batches))
        return total / len(blocks_NT)

    def tick(self, what: str, done: int, of: int) -> None:
        if self.report is not None:
            self.report({"step": done, "of": of, "message": what})


@dataclass(frozen=True)
class Structural:
    """Fields and steps of every method that removes units."""

    structural: ClassVar[bool] = True
    reads: ClassVar[str] = "text"
    saves: ClassVar[str] = "checkpoint"
    needs_teacher: ClassVar[bool] = False
    several_devices: ClassVar[bool] = False  # works on a model whose layers lie on more than one
    may_keep_all: ClassVar[bool] = False  # a sparsity of 0 makes sense: the method does more than remove

    sparsity: float = option(0.3, "fraction of the decoder-layer parameters to remove, in [0, 1)")
    granularity: str = option("heads+channels", "heads+channels, heads, channels, sublayers or layers")
    compensate: str = option(
        "none", "none; mean: a removed unit leaves its mean activation as a bias; least-squares: refit the kept weights"
    )
    shape: str = option(
        "heterogeneous", "heterogeneous: layers differ in width; uniform: all alike; padded: zero-filled"
    )
    round_to: int | None = option(
        None, "keep channels in multiples of this; none: of 32 where every MLP has 1,024 or more of them, else 1"
    )
    calibration_samples: int = option(128, "blocks of calibration text")
    calibration_seq_len: int = option(128, "tokens per block")
    ridge: float = option(0.1, "least-squares: pull towards the old weights, in units of the mean input variance")
    correction: float = option(
        0.3,
        "least-squares: share of the errors of the layers below that each refit makes good; pays from 16,000 tokens",
    )
    seed: int = option(0, "for every random choice")

    def check(self) -> None:
        """Refuse what cannot work, before any model is loaded.

        Raises:
            ValueError: which field, what was expected.
        """
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is the fraction of decoder-layer parameters removed, in [0, 1); got {self.sparsity}"
            )
        if self.compensate not in COMPENSATIONS:
            raise ValueError(f"compensate is one of {', '.join(COMPENSATIONS)}; got {self.compensate!r}")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge is a finite number from 0 on; got {self.ridge}")
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction is a share from 0 to 1; got {self.correction}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape is one of {', '.join(SHAPES)}; got {self.shape!r}")
        for name in ("round_to", "calibration_samples", "calibration_seq_len"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"{name} must be at least 1; got {given}")
        if self.compensate in COMPENSATIONS[2:] and self.whole:
            raise ValueError(
                f"compensate={self.compensate} is for heads and channels; use none with {self.resolved_granularity}"
            )

    @property
    def resolved_granularity(self) -> str:
        return self.granularity

    @property
    def reads_loss(self) -> bool:
        """Does the method compute the language-model loss?"""
        return False

    def units_of(self, model: nn.Module) -> Units:
        """What may go of this model."""
        return structure.units(model, self.resolved_granularity)

    def remove(self, model: nn.Module, units: Units, keep_U: Tensor) -> None:
        """Cut, without any compensation."""
        structure.remove(model, units, keep_U)

    @property
    def whole(self) -> bool:
        """True when the units are whole blocks or sub-layers."""
        return not set(structure.parse_granularity(self.resolved_granularity)) & {"heads", "channels"}

    @property
    def compensates(self) -> bool:
        """Whether something is left in the place of what goes: a mean at least."""
        return self.compensate != "none" and not self.whole

    def compensation(self, model: nn.Module, units: Units) -> str:
        """What `compensate` comes to for this model: auto refits where the text is enough for its width."""
        if self.compensate != "auto" or self.whole:
            return self.compensate if self.compensates else "none"
        enough = self.calibration_samples * self.calibration_seq_len >= importance.refit_tokens(model, units)
        return "least-squares" if enough else "mean"

    def compress(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: data.Text,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Prune `model` in place.

        Args:
            workdir: where a long search keeps its state, so that the same call goes on after a stop.
            report: called with {"step", "of", "message"} while work goes on.
        Returns:
            the record for compression.json: what stays ("kept"), how much went, seconds, and the method's own account.
        Raises:
            ValueError: a field, the text or the budget cannot work; the message says how to mend it.
        """
        run = self.start(model, tokenizer, text, workdir=workdir, report=report)
        keep_U, account = self.choose(run)
        return self.cut(run, keep_U) | account

    def choose(self, run: Run) -> tuple[Tensor, dict[str, Any]]:
        """The units to keep, [U] bool, and the method's own account of how it found them. The model is not changed."""
        raise TypeError(f"{type(self).__name__} must define choose()")

    def forecast(self, model: nn.Module) -> dict[str, str]:
        """What a dry run should say beside sizes and time: name -> line."""
        return {}

    def start(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: data.Text,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> Run:
        """Check the fields against the model and gather what `choose` and `cut` need."""
        self.check()
        model.eval()
        units = self.units_of(model)
        masks.removal_target(units, self.sparsity)
        if self.reads_loss and head(model) is None:
            raise ValueError(f"{type(model).__name__} has no language-model head: no tokens to predict")
        if self.reads_loss and not structure.is_causal(model) and tokenizer.mask_token_id is None:
            raise ValueError("this encoder's tokenizer has no mask token, so there is no loss to compute on plain text")
        if self.compensate == "least-squares":  # the refit comes after the search: say it before
            importance.check_refit_tokens(model, units, self.calibration_samples * self.calibration_seq_len)
        return Run(model, tokenizer, units, text, self, workdir, report, time.monotonic())

    def select(self, score_U: Tensor, units: Units, scope: str, tie_break_U: Tensor | None = None) -> Tensor:
        target = masks.removal_target(units, self.sparsity)
        uniform, round_to = self.shape == "uniform", self._round_to(units)
        return masks.select(score_U, units, target, scope, tie_break_U=tie_break_U, uniform=uniform, round_to=round_to)

    def _round_to(self, units: Units) -> int:
        """Matrix kernels, and the 8-bit blocks of a GGUF file, want widths in multiples of 32."""
        _, channels_L = units.layer_U[units.kind_U == KINDS.index("channels")].unique(return_counts=True)
        return self.round_to or (32 if bool((channels_L >= 1024).all()) else 1)

    def cut(self, run: Run, keep_U: Tensor) -> dict[str, Any]:
        """Compensate, remove, and account for it."""
        units, model = run.units, run.model
        found = time.monotonic()
        compensation, bias = self.compensation(model, units), None
        if keep_U.all():
            pass
        elif compensation == "mean":
            bias = importance.mean_bias(model, units, keep_U, run.fill)
        elif compensation == "least-squares":
            bias = importance.refit(
                model, units, keep_U, run.calibration, ridge=self.ridge, correction=self.correction, tick=run.tick
            )
        before = structure.layer_parameters(model), structure.total_parameters(model)
        account = structure.kept(units, keep_U)
        structure.remove(model, units, keep_U, bias)
        after = structure.layer_parameters(model), structure.total_parameters(model)
        removed = 1 - after[0] / before[0]
        if run.report is not None and abs(removed - self.sparsity) > 0.005:
            run.report(
                {"message": f"{removed:.1%} of the layers' parameters went, {self.sparsity:.1%} were asked for: "
                            f"{self.granularity} of this model come in no finer steps"}
            )  # fmt: skip
        ended = time.monotonic()
        return {
            "kept": account,
            "asked_sparsity": self.sparsity,
            "compensate": compensation,
            "removed_of_layers": removed,
            "removed_of_model": 1 - after[1] / before[1],
            "removed_parameters": before[1] - after[1],
            "search_seconds": found - run.began,
            "cut_seconds": ended - found,
            "seconds": ended - run.began,
            "history": [],
        }
