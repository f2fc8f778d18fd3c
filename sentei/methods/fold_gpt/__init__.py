"""FoldGPT-style compression along depth: drop blocks by learnable gates, let neighbours share weights, heal the tail.

After "FoldGPT: Simple and Effective Large Language Model Compression Scheme", arXiv 2407.00928, of which only the
abstract was at hand: that gates rank blocks together, that kept blocks share weights inside groups, and that a little
training with distillation of the tail follows is the paper's; every formula is ours, and no number is FoldGPT's.

1. Refuse a model whose blocks differ; show how alike blocks are                         `check.check`, `.similarity`
2. Rank blocks: gates under a budget, trained together while all weights stand still     `gates.Gates`
   and in the same run, to compare: block influence, greedy, Taylor, random              `ranking.choose`
   Then swap dropped blocks for kept ones where that lowers the measured loss            `greedy.exchange`
3. Drop blocks until `sparsity` of the blocks' parameters is gone; renumber the rest     `Structural.cut`
4. Let runs of `group_size` neighbours share the linears of one of them until `target_*` is met: whose, with whose
   norms, with which scale and low-rank term is decided by measured KL to the dense model `folder.Folder`, `plan.choose`
   Then fit scales and terms of o_proj and down_proj, without gradients, to the block's own outputs         `fit.fit`
5. Train what is a layer's own: norms, scales, low-rank terms                            `healing.heal`

Removal makes a model smaller, faster and its KV cache shorter. Sharing makes it smaller only: every layer still runs.
The dense model that teaches holds the same tensors as the folded one, so it costs no second set of weights.

Shape legend: U units, N blocks of text, T tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sentei import data, folding, masks, structure
from sentei.distill import HiddenDistillation, check_head
from sentei.methods import Progress, option
from sentei.methods.fold_gpt import check, healing, plan, ranking, states
from sentei.methods.fold_gpt.check import TARGETS
from sentei.methods.fold_gpt.fit import fit
from sentei.methods.fold_gpt.folder import Folder
from sentei.methods.fold_gpt.judge import Judge
from sentei.methods.fold_gpt.ranking import SCORES
from sentei.methods.structural import Run, Structural
from sentei.structure import Units
from sentei.train import Settings, mix

PLANS = ("auto", "greedy", "dp", "all")
PARENTS = ("best", "first", "average")


@dataclass
class FoldRun(Run):
    """One compression under way, with text for each purpose."""

    method: FoldGPT

    @cached_property
    def texts(self) -> dict[str, Tensor]:
        """Blocks [N, T] of training text for "calibration", "fold", "gates" and "heal", none of them twice."""
        return self.method.split(self)

    @cached_property
    def calibration(self) -> Tensor:
        return self.texts["calibration"]

    @cached_property
    def held(self) -> Tensor:
        """Blocks [N, T] of validation text: scores and healing are judged on them."""
        return self.blocks(None, self.method.calibration_seq_len, "validation")[: self.method.eval_samples]


@dataclass(frozen=True)
class FoldGPT(Structural):
    """Drop blocks, share weights between neighbours, heal."""

    paper: ClassVar[str] = "FoldGPT-style, after arXiv 2407.00928"
    may_keep_all: ClassVar[bool] = True

    sparsity: float = option(0.2, "fraction of the blocks' parameters to remove; 0 only folds", "a rate: the paper")
    granularity: str = option("layers", "layers: whole blocks; sublayers: attention and MLP apart")
    calibration_samples: int = option(16, "blocks of text for similarity and for the scores other than gates", "ours")
    calibration_seq_len: int = option(256, "tokens per block of all text here", "ours")
    score: tuple[str, ...] = option(("gates",), f"of {', '.join(SCORES)}; the first decides, the rest is reported")
    exchange: int = option(8, "trials to swap a dropped unit for a kept one, by measuring; 0: none", "ours, measured")
    protect_first: int = option(1, "blocks at the start that are neither removed nor folded", "ours, measured")
    protect_last: int = option(1, "blocks at the end that are neither removed nor folded", "ours, measured")

    gate_steps: int = option(200, "training steps of the gates", "ours")
    gate_batch: int = option(8, "blocks of text per step", "ours")
    gate_lr: float | None = option(None, "Adam's step, in units of sqrt(eps); default 20 / gate_steps", "ours")
    gate_eps: float = option(0.02, "width of the gates in the first half of the steps", "ours")
    gate_eps_end: float = option(0.0005, "width at the end", "ours")
    gate_init: float = option(0.98, "all gates at the start", "ours")
    gate_dual_init: float = option(0.0, "multiplier of the budget at the start", "ours")
    gate_dual_lr: float = option(0.3, "its step", "ours")
    gate_quad: float = option(10.0, "weight of the squared miss of the budget", "ours")
    gate_cost: str = option("params", "what the budget counts: params, or flops of a text block", "ours")

    target_blocks: float | None = option(None, "fold until this fraction of the blocks' parameters is stored")
    target_model: float | None = option(None, "fold until this fraction of all parameters is stored")
    target_bytes: int | None = option(None, "fold until the weight file has at most so many bytes")
    bytes_per_parameter: int | None = option(None, "of the saved file; default: those of the checkpoint")
    group_size: int = option(2, "neighbours that share weights", "ours")
    plan: str = option("auto", "greedy; dp: exact for costs that add; auto: the better of both; all: every free block")
    parent: str = option("best", "whose weights a group uses: best (by KL), first, or average", "first: second hand")
    lora_rank: int = option(8, "rank of each folded block's own term in every linear; 0: none", "ours")
    scale: bool = option(True, "each folded block's own output scales; never where norms follow", "ours")
    align: bool = option(True, "renumber heads and channels like the parent's before weights are compared", "ours")
    fold_samples: int = option(16, "blocks of text for every KL of the folding plan", "ours")
    fit_samples: int = option(
        64,
        "blocks of the text for healing, gates and scores that scales and low-rank terms of o_proj and down_proj are "
        "fitted on, by least squares, when the plan is made; 0: not fitted",
        "ours, measured",
    )

    heal_steps: int = option(200, "optimiser steps of the healing; 0: none", "ours")
    batch_size: int = option(4, "blocks of text per step of the healing", "ours")
    accumulate: int = option(1, "micro-batches per step", "ours")
    heal_lr: float = option(3e-3, "peak learning rate of low-rank terms and adapters", "ours, measured")
    heal_vector_lr: float = option(1e-3, "peak learning rate of norms and scales", "ours")
    warmup: float = option(0.03, "fraction of the healing in which the rates rise", "ours")
    ce_weight: float = option(1.0, "weight of the cross-entropy on the text", "ours")
    kl_weight: float = option(1.0, "weight of the KL divergence to the dense model", "ours")
    temperature: float = option(1.0, "softens both distributions inside the KL term", "ours")
    hidden_weight: float = option(1.0, "weight of the match of the tail's hidden states", "tail: the paper; form: ours")
    tail_layers: int = option(2, "layers whose outputs are matched, counted from the end", "ours")
    heal_lora_rank: int | None = option(
        None, "rank of temporary adapters on stored linears, merged at the end; default 8 if nothing is folded, else 0"
    )
    eval_samples: int = option(16, "validation blocks of a measurement", "ours")
    precision: str = option("auto", "of the healing: fp32, bf16 (autocast) or auto: bf16 where the device has it")
    checkpointing: bool = option(False, "recompute activations in the backward pass of the healing")
    save_every: int = option(10, "steps between saves of the state, when there is a work folder")

    def __post_init__(self) -> None:
        names = self.score.split(",") if isinstance(self.score, str) else self.score
        object.__setattr__(self, "score", tuple(name.strip() for name in names))

    def check(self) -> None:
        super().check()
        for name, value, known in (
            ("plan", self.plan, PLANS),
            ("parent", self.parent, PARENTS),
            ("granularity", self.granularity, ("layers", "sublayers")),
            ("gate_cost", self.gate_cost, ("params", "flops")),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}")
        if not self.score or not set(self.score) <= set(SCORES) or len(set(self.score)) < len(self.score):
            raise ValueError(f"score is a list of {', '.join(SCORES)}; got {', '.join(self.score) or 'nothing'}")
        if self.compensate not in ("auto", "none"):
            raise ValueError(f"compensate={self.compensate} is for heads and channels; use none with whole blocks")
        positive = (
            "gate_steps", "gate_batch", "gate_lr", "gate_eps", "gate_eps_end", "fold_samples", "batch_size",
            "accumulate", "heal_lr", "heal_vector_lr", "temperature", "eval_samples", "save_every",
            "bytes_per_parameter",
        )  # fmt: skip
        for name in positive:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        not_below_0 = (
            "exchange", "protect_first", "protect_last", "lora_rank", "fit_samples", "heal_steps", "tail_layers",
            "hidden_weight",
        )  # fmt: skip
        for name in not_below_0:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0; got {getattr(self, name)}")
        if not 0 < self.gate_init < 1:
            raise ValueError(f"gate_init is between 0 and 1; got {self.gate_init}")
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"one target is enough, got {' and '.join(given)}")
        for name in ("target_blocks", "target_model"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise ValueError(f"{name} is the fraction that stays, between 0 and 1; got {value}")
        if self.target_bytes is not None and self.target_bytes < 1:
            raise ValueError(f"target_bytes must be above 0; got {self.target_bytes}")
        if self.folds and self.shape != "heterogeneous":
            raise ValueError(
                f"shape={self.shape} is a stock class, where layers cannot share weights; leave it out, and write "
                "independent layers afterwards with `sentei unfold`"
            )
        if self.group_size < 2:
            raise ValueError(f"group_size is at least 2, or nothing is shared; got {self.group_size}")
        if min(self.ce_weight, self.kl_weight) < 0 or self.ce_weight + self.kl_weight == 0:
            raise ValueError(f"ce_weight {self.ce_weight} and kl_weight {self.kl_weight}: none below 0, one above 0")
        if self.calibration_seq_len < 3:
            raise ValueError(f"calibration_seq_len must be at least 3; got {self.calibration_seq_len}")
        if not self.sparsity and not self.folds and not self.heal_steps:
            return
        self._heal_settings()

    @property
    def folds(self) -> bool:
        """Is anything to be shared?"""
        return self.plan == "all" or any(getattr(self, name) is not None for name in TARGETS)

    def compress(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: data.Text,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Remove, fold and heal `model` in place; see the module's docstring.

        Returns:
            what `Structural.compress` returns, and "similarity", "scores" (a row for each), "gates" (a row for each
            step), "fold" (owners, groups and what they save) and "healing".
        Raises:
            ValueError: a field, the model, the text or the budget cannot work; the message says how to mend it.
        """
        run = self.start(model, tokenizer, text, workdir=workdir, report=report)
        if not self.sparsity and not self.folds:
            return self.cut(run, torch.ones(len(run.units), dtype=torch.bool)) | {"scores": [], "fold": None}
        device = next(model.parameters()).device
        with torch.no_grad():
            check_head(model, run.calibration[:1, :8].to(device))
        dense = healing.aliased(model)
        run.tick("how alike the blocks are", 0, 1)
        alike = check.similarity(model, run.calibration[:8], lambda ids: self._forward(model, ids))
        keep_U, account = self.choose(run)
        record = self.cut(run, keep_U) | account | {"similarity": alike}
        origin = self.origin(run.units, keep_U)
        folded = self.fold(run, dense, origin) if self.folds else None
        record["fold"] = folded
        if self.heal_steps:
            record["healing"] = self.heal(run, dense, origin, folded is not None)
            record["history"] = record["healing"].pop("history")
        after = structure.layer_parameters(model), structure.total_parameters(model)
        before = structure.layer_parameters(dense), structure.total_parameters(dense)
        record["stored_of_layers"], record["stored_of_model"] = after[0] / before[0], after[1] / before[1]
        record["outside_of_model"] = 1 - before[0] / before[1]  # embeddings, final norm and head: they do not shrink
        width = check.stored_bytes(self, model)
        record["kv_bytes_per_token"] = {"dense": width * _cached(dense), "now": width * _cached(model)}
        record["seconds"] = time.monotonic() - run.began
        return record

    def start(self, model: nn.Module, tokenizer: Any, text: data.Text, **keywords: Any) -> FoldRun:
        run = FoldRun(**vars(super().start(model, tokenizer, text, **keywords)))
        check.check(model, fold=self.folds)
        free_U = ~ranking.protected(self, run.units)
        target = masks.removal_target(run.units, self.sparsity)
        if int(run.units.cost_U[free_U].sum()) < target:
            raise ValueError(
                f"sparsity {self.sparsity} asks for {target:,} parameters; the {int(free_U.sum())} units between "
                f"protect_first={self.protect_first} and protect_last={self.protect_last} hold fewer. Lower one of them"
            )
        if self.folds:
            check.reach(self, model, target)
        return run

    def forecast(self, model: nn.Module) -> dict[str, str]:
        """What folding would come to, for a dry run."""
        check.check(model, fold=self.folds)
        if not self.folds:
            return {"folding": "none: no target is given"}
        return {"folding": check.reach(self, model, int(self.sparsity * structure.layer_parameters(model) + 0.5))}

    # --- text ---------------------------------------------------------------------------------------------------------

    def split(self, run: Run) -> dict[str, Tensor]:
        """Blocks [N, T] of training text for each purpose, none of them twice."""
        seq_len = self.calibration_seq_len
        fixed = {"calibration": self.calibration_samples, "fold": self.fold_samples if self.folds else 0}
        asked = {
            "gates": self.gate_steps * self.gate_batch if "gates" in self.score and self.sparsity else 0,
            "heal": self.heal_steps * self.batch_size * self.accumulate,
        }
        documents = run.text.train
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(mix(self.seed, "documents")))
        left = 8 * seq_len * (sum(fixed.values()) + sum(asked.values()))  # characters; a token holds fewer than eight
        chosen: list[str] = []
        for i in order.tolist():
            if left <= 0:
                break
            chosen.append(documents[i][:left])
            left -= len(chosen[-1])
        all_NT = data.blocks(chosen, run.tokenizer, seq_len)
        least = sum(fixed.values()) + sum(count > 0 for count in asked.values())
        if len(all_NT) < least:
            raise ValueError(
                f"found {len(all_NT)} blocks of {seq_len} tokens, need {least} at least; give more text, or lower "
                "calibration_seq_len, calibration_samples or fold_samples"
            )
        shuffle = torch.Generator().manual_seed(mix(self.seed, "blocks"))
        all_NT = all_NT[torch.randperm(len(all_NT), generator=shuffle)]
        found: dict[str, Tensor] = {}
        start = 0
        for name, count in fixed.items():
            found[name] = all_NT[start : start + count]
            start += count
        rest, total = len(all_NT) - start, sum(asked.values())
        for name, count in asked.items():
            share = min(count, max(1, rest * count // total)) if count else 0
            found[name] = all_NT[start : start + share]
            start += share
        return found

    def _forward(self, model: nn.Module, ids_BT: Tensor) -> Any:
        return structure.base_model(model)(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)

    # --- removal ----------------------------------------------------------------------------------------------------

    @staticmethod
    def origin(units: Units, keep_U: Tensor) -> list[int]:
        """Number in the dense model of each layer that is left."""
        gone = set(units.layer_U[~keep_U].tolist()) if "layers" in units.granularity else set()
        return [number for number in range(units.num_layers) if number not in gone]

    def choose(self, run: FoldRun) -> tuple[Tensor, dict[str, Any]]:
        return ranking.choose(run)

    # --- folding ----------------------------------------------------------------------------------------------------

    def scaled(self, model: nn.Module) -> bool:
        """Are there output scales? A norm after the linear would undo one, and can learn it itself."""
        return self.scale and len(structure.family(model).attention_norms) == 1

    def free(self, count: int) -> list[bool]:
        """Of each of so many layers, may it share?"""
        return [self.protect_first <= number < count - self.protect_last for number in range(count)]

    def fold(self, run: FoldRun, dense: nn.Module, origin: list[int]) -> dict[str, Any] | None:
        """Let neighbours share weights until the target is met; None if nothing had to be shared.

        Args:
            dense: the model before anything was removed, `healing.aliased`.
            origin: of each layer its number in `dense`.
        """
        model = run.model
        began = time.monotonic()
        before, allowed = structure.total_parameters(model), check.allowed(self, dense)
        need = 0 if allowed is None else before - allowed
        if self.plan != "all" and need <= 0:
            return None
        check.check_pairs(model, self.group_size, self.free(len(origin)))
        scale = self.scaled(model)
        folder = Folder(
            model, Judge(dense, run.texts["fold"], self.batch_size), free=self.free(len(origin)), size=self.group_size,
            parent=self.parent, rank=self.lora_rank, scale=scale, align=self.align,
            file=run.workdir / "plan.json" if run.workdir else None,
            identity=states.of_plan(run, dense, origin, scale), tick=run.tick,
        )  # fmt: skip
        try:
            groups = plan.choose(folder, self.plan, need)
        except ValueError as error:
            raise ValueError(f"{error}: raise group_size, sparsity or the target, or lower lora_rank") from error
        fitted = self._fit(folder, run, dense, origin) if self.fit_samples and groups else None
        folder.free_terms(self.seed)
        rate = self.sparsity if self.sparsity and self.score[0] == "gates" else None
        known = {"origin": origin, "base_layers": len(structure.layers(dense))}
        folding.note(model, known | {"parent": self.parent, "gate_rate": rate})
        after = structure.total_parameters(model)
        return {
            "groups": groups,
            **folding.layout(model),
            "saved_parameters": before - after,
            "asked_parameters": None if allowed is None else before - need,
            "obtained_parameters": after,
            "singles": [folder.known[key] for key in folder.known if " " not in key],
            "fit": fitted,
            "measurements": folder.measured,
            "fold_seconds": time.monotonic() - began,
        }

    def _fit(self, folder: Folder, run: FoldRun, dense: nn.Module, origin: list[int]) -> dict[str, Any]:
        """Fit the corrections of all folded layers; they stay where the KL on other text is lower for it."""
        parts = [run.texts[name] for name in ("heal", "gates", "calibration") if name in run.texts]
        blocks_NT = torch.cat(parts)[: self.fit_samples]
        before = [folder.corrections(number) for number in range(len(folder.layers))]
        kl = folder.judge.kl(run.model)
        fit(folder, dense, origin, blocks_NT, ridge=self.ridge, correction=self.correction, tick=run.tick)
        fitted = folder.judge.kl(run.model)
        if not fitted < kl:
            for number, corrections in enumerate(before):
                folder.put_back(number, corrections)
        return {"tokens": blocks_NT.numel(), "kl_before": kl, "kl_after": fitted, "kept": fitted < kl}

    # --- healing ----------------------------------------------------------------------------------------------------

    def _heal_settings(self) -> Settings:
        return Settings(
            lr=self.heal_lr, vector_lr=self.heal_vector_lr, steps=max(1, self.heal_steps), warmup=self.warmup,
            accumulate=self.accumulate, precision=self.precision, checkpointing=self.checkpointing,
            save_every=self.save_every, seed=self.seed,
        )  # fmt: skip

    def heal(self, run: FoldRun, dense: nn.Module, origin: list[int], folded: bool) -> dict[str, Any]:
        """Train what is small, see `healing.heal`; the arguments are those of `fold`."""
        rank = self.heal_lora_rank if self.heal_lora_rank is not None else (0 if folded else 8)
        if not rank and not folded:
            raise ValueError("nothing is folded and heal_lora_rank is 0: nothing to train; set heal_steps=0")
        pairs = healing.tail_pairs(origin, len(structure.layers(dense)), self.tail_layers)
        loss = HiddenDistillation(
            dense.eval(), self.temperature, self.ce_weight, self.kl_weight, hidden_weight=self.hidden_weight,
            pairs=pairs,
        )  # fmt: skip
        return healing.heal(
            run.model, dense, run.texts["heal"], run.held, loss, self._heal_settings(), batch_size=self.batch_size,
            lora_rank=rank, folder=run.workdir / "healing" if run.workdir else None, report=run.report,
        )  # fmt: skip


def _cached(model: nn.Module) -> int:
    """Numbers that the KV cache holds for a token: keys and values of every layer, shared weights or not."""
    return sum(
        size.num_kv_heads * ((2 * len(size.qk_pairs) or size.head_dim) + size.head_dim)
        for size in structure.sizes(model)
    )
