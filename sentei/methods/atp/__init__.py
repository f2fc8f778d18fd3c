"""ATP: tune LoRA for a domain and learn what to remove at the same time, then cut.

"All-in-One Tuning and Structural Pruning for Domain-Specific LLMs", arXiv 2412.14426. A pruned structure fits the
weights it was chosen for; tuning moves them. Here a small network proposes the structure anew while LoRA trains, a
penalty empties the LoRA rows of what is to go, and the cut at the end takes away nothing that computes.

1. Find the removable units and wire every row of every linear to its unit              `wiring.units_of`, `wiring.wire`
2. Split the rows: LoRA learns on most, the generator on a slice of its own             `prompts.hold_out`
3. Control phase. In turn, in the paper:                                                `Tuning.run`
   a. the generator: soft masks from its logits and Gumbel noise, base and LoRA masked;
      minimise CE(slice) + alpha log(max(r, p) / min(r, p)), r kept and p wanted        `Tuning._decide`
   b. draw a hard mask; LoRA: base masked, LoRA free; minimise CE + beta R_GL, R_GL the
      group lasso over LoRA rows of dropped units                                       `Tuning._lora_loss`
   In ours, the default, all steps of a come first, from what policy gradient's search
   of the layers' widths keeps, on the rows of LoRA, with KL(dense || masked) in place
   of CE and means for what is masked                                                   `_near`, `Tuning._lead`
4. Freeze: the units with the highest logits, exactly within the budget; ours: a
   least-squares refit of what reads them                                               `selection.top_k`, `Refit`
5. Frozen phase: LoRA rows of dropped units to exact zeros (gradually where they have   `Tuning._frozen`
   learned, without a refit), then go on tuning the others, the base masked; keep the
   best on held-out rows
6. Optionally distil the tuned dense model into the masked one                          `healing.heal`
7. Merge LoRA in fp32, cut, compare the cut model with the masked one                   `ATP.compress`

From the paper's public code and its training logs: the generator, the two losses, the alternation and their constants.
Ours: KV groups or rotary pairs as units (single query and key coordinates cannot be cut: rotation mixes pairs), a final
mask by rank instead of the last noisy sample, exact zeros by a proximal step, a generator slice taken from the training
rows, and everything from the merge on. And what the mask is chosen for, and when: one that may lower the cross-entropy
learns the domain by spending structure, which LoRA learns as fast; the nearest to the dense model was better, and what
LoRA had learned before the cut was lost by it (results/, LOG.md). `preset=paper` has the paper's form.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sentei import lora, structure
from sentei.data import Text, blocks, fingerprint, prompts
from sentei.data.examples import Examples
from sentei.data.examples import load as load_rows
from sentei.methods import Progress, option, with_preset
from sentei.methods import load as load_method
from sentei.methods.atp import selection, wiring
from sentei.methods.atp.healing import heal
from sentei.methods.atp.refit import TOKENS, refit_text
from sentei.methods.atp.tuning import LEAD, Data, Tuning
from sentei.structure import Units
from sentei.train import processes, resolve_precision

MASKS = ("learned", "taylor", "random", "none")
STARTS = ("auto", "dense", "taylor", "flap", "slopes")
ZEROING = ("proximal", "beta", "immediate")
FINAL_MASKS = ("topk", "last_sample", "threshold")
COMPENSATIONS = ("auto", "none", "least-squares")
PAPER: dict[str, Any] = {
    "start": "dense", "lora_on": "masked", "generator_loss": "ce", "generator_lr": 1e-3, "compensate": "none",
    "control_fraction": 0.5,
}  # fmt: skip
"""What differs from the defaults in the paper's form; numbers from the authors' code."""
CODE, OURS = "authors' code", "ours"
VERIFY_TOLERANCE = 1e-4
MOST_TOLERANCE = 1e-2  # however large the rounding is
ROUNDING = 2.0**-22  # a relative error of two units in the last place of fp32
SHAKEN = 10.0  # the cut model may differ by so many times what such an error of its embeddings does
VERIFY_TOKENS = 128
LEAST_SLICE = 64
SEARCH_BLOCKS, SEARCH_LENGTH = 4, 128  # of text in a forward of the search for a start


@with_preset(PAPER)
@dataclass(frozen=True)
class ATP:
    """Tune for a domain and prune in one run."""

    structural: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    reads: ClassVar[str] = "examples"
    saves: ClassVar[str] = "checkpoint"
    paper: ClassVar[str] = "arXiv 2412.14426"

    preset: str = option("ours", "ours, or paper: its own form (any field that is given still wins)")
    sparsity: float = option(0.4, "fraction of the prunable parameters to remove, in [0, 1)", "paper: 40 %")
    units: str = option(
        "groups+channels",
        "groups+channels: whole KV groups, loads everywhere; head-dims+channels: inside heads, as in the paper",
        OURS,
    )
    shape: str = option("heterogeneous", "heterogeneous: layers differ in width; uniform: all alike", OURS)
    mask: str = option(
        "learned", "learned; or a baseline on the same data and steps: taylor, random, none (dense LoRA)", OURS
    )
    steps: int | None = option(None, "optimiser steps of LoRA; none: max(epochs, 500 steps)", OURS)
    epochs: float = option(2.0, "passes over the training rows, where steps is not given", CODE)
    batch_size: int | None = option(None, "rows per micro-batch; none: 20 from 5,000 rows on, else rows / 250", OURS)
    accumulate: int = option(1, "micro-batches per optimiser step", OURS)
    seq_len: int = option(512, "tokens per row; prompts are cut to fit, responses never", OURS)
    template: str = option("plain", "plain, or chat: the tokenizer's own chat template", OURS)
    loss_on: str = option("full", "tokens that LoRA learns: full, of prompt and response, or response alone", CODE)
    prompt_loss_weight: float = option(
        0.0,
        "with loss_on=response, what a token of a prompt counts beside 1 of a response: 0.01 to 0.1 where responses "
        "are a word or two",
        "arXiv 2401.13586",
    )
    lora_rank: int = option(8, "rank r of the adapters", CODE)
    lora_alpha: int | None = option(None, "the adapters' product is scaled by alpha / r; none: r", CODE)
    lora_dropout: float = option(0.1, "on the adapters' input", CODE)
    lr: float = option(1e-4, "learning rate of LoRA", CODE)
    final_lr: float = option(1.0, "what a cosine leaves of it at the end; 1: constant, as in the authors' code", CODE)
    weight_decay: float = option(0.01, "of LoRA", CODE)
    clip: float = option(1.0, "largest gradient norm of LoRA; 0 does not clip", CODE)
    generator_lr: float = option(1e-2, "learning rate of the generator; 1e-3 in the authors' code, from dense", OURS)
    generator_weight_decay: float = option(0.01, "of the generator", "AdamW's default in the authors' code")
    generator_clip: float = option(3.0, "largest gradient norm of the generator", CODE)
    generator_lr_drop: float = option(0.2, "factor on its learning rate in the last fifth of the control phase", CODE)
    group_lr_scale: float = option(1.0, "factor on the learning rate of the KV groups' heads", OURS)
    start: str = option(
        "auto",
        "near the budget. slopes: what policy_gradient keeps, which searches the layers' widths on the rows first; a "
        "folder: what was kept of the same model when any method made this checkpoint; flap: by scores, every layer "
        "alike and heads going half as often; taylor: by scores, over all layers. dense: the first masks keep all, the "
        "authors' way. auto: slopes for whole heads where layers may differ in width, or flap; else taylor",
        OURS,
    )
    temperature: float = option(0.4, "of the sigmoid that binarises", CODE)
    offset: float = option(3.0, "added to every logit, which are near 0 at first: the run starts dense", CODE)
    mask_in_loss: str = option("soft", "what masks the model in the generator's step: soft, or hard", CODE)
    generator_loss: str = option(
        "kl",
        "what the generator lowers on its rows: kl, the divergence from the dense model (with lora_on=dense as it is "
        "tuned by then); or ce, the paper's cross-entropy",
        OURS,
    )
    lora_on: str = option(
        "cut",
        "what LoRA trains on in the control phase: masked, as in the paper, with the lasso; dense, nothing masked; "
        "cut: nothing, it waits for the final mask, and has all its steps after the generator's",
        OURS,
    )
    slice_rows: int | None = option(
        None,
        "training rows for the generator alone; none: with lora_on=cut and generator_loss=kl it reads all rows, and "
        "LoRA too, else a tenth, at least 64",
        OURS,
    )
    alpha: float = option(5.0, "weight of the budget term", CODE)
    beta: float = option(0.3, "weight of the group lasso in the control phase", CODE)
    control_every: int = option(1, "LoRA steps per generator step; more is quicker", CODE)
    control_fraction: float = option(
        0.25,
        "part of the steps in which the mask may change, 0.5 in the authors' code; with lora_on=cut the generator's, "
        "before `steps` of LoRA",
        OURS,
    )
    final_mask: str = option("topk", "topk: by rank, exact; for comparison last_sample (the authors'), threshold", OURS)
    zeroing: str = option("proximal", "proximal: gradual, exact; beta: lasso of weight beta_last; immediate", OURS)
    beta_last: float = option(1000.0, "weight of the lasso in the frozen phase, zeroing=beta", CODE)
    shrink: float = option(4.0, "proximal: how much faster rows shrink at the end of the ramp", OURS)
    ramp: float = option(0.3, "proximal: part of the frozen phase until every dropped row is zero", OURS)
    round_channels: int = option(32, "keep channels in steps of this", OURS)
    round_pairs: int = option(4, "keep rotary pairs in steps of this", OURS)
    round_values: int = option(8, "keep value coordinates in steps of this", OURS)
    compensate: str = option(
        "auto",
        "none; least-squares: dropped rows are zero at the freeze, and o_proj and down_proj are refitted on training "
        "rows to do without them, unless held-out rows are worse off with a learned mask so refitted; auto: "
        "least-squares for a learned mask over whole heads, without zeroing=beta",
        OURS,
    )
    refit_tokens: int | None = option(
        None, "least-squares: tokens of the training rows; none: 16,384, or what the widest linear needs", OURS
    )
    correction: float = option(
        0.3, "least-squares: share of the errors of the layers below that each refit makes good", OURS
    )
    eval_every: int | None = option(None, "frozen steps between measurements; none: ten in the phase", OURS)
    eval_rows: int = option(64, "held-out rows of one measurement", OURS)
    patience: int = option(3, "stop after so many measurements without a better one; 0: never", OURS)
    heal_steps: int = option(0, "steps of distillation from a dense model tuned alike, trained first", OURS)
    heal_weight: float = option(0.5, "of the KL term, against 1 - it of the cross-entropy", OURS)
    heal_temperature: float = option(2.0, "softens both distributions inside the KL term", OURS)
    precision: str = option("auto", "fp32, bf16 (base in bf16, LoRA in fp32), or auto: bf16 where the device has it")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")
    save_every: int = option(50, "optimiser steps between checkpoints of the run")
    log: str | None = option(None, "a file for one JSON line per step", transient=True)
    seed: int = option(0, "first values, noise, slice and order of rows")

    @property
    def first_mask(self) -> str:
        """`start` without "auto"."""
        if self.start != "auto":
            return self.start
        if self.units != "groups+channels":
            return "taylor"
        return "slopes" if self.shape == "heterogeneous" else "flap"

    @property
    def shares_rows(self) -> bool:
        """Do the generator and LoRA read the same rows? What follows the dense model cannot learn answers by heart."""
        follows = self.lora_on == "cut" and self.generator_loss == "kl"
        return self.mask == "learned" and self.slice_rows is None and follows

    @property
    def refits(self) -> bool:
        """Is there a least-squares refit at the freeze?"""
        if self.compensate == "auto":
            return self.units == "groups+channels" and self.zeroing != "beta" and self.mask == "learned"
        return self.compensate == "least-squares" and self.mask != "none"

    # --- what the house asks of a structural method ---------------------------------------------------------------

    @property
    def resolved_granularity(self) -> str:
        return "heads+channels" if self.units == "groups+channels" else "qk_pairs+v_dims+channels"

    def units_of(self, model: nn.Module) -> Units:
        return wiring.units_of(model, self.units)

    def remove(self, model: nn.Module, units: Units, keep_U: Tensor) -> None:
        wiring.remove(model, units, keep_U)

    def forecast(self, model: nn.Module) -> dict[str, str]:
        """What a dry run should say beside sizes and time: where the masks begin."""
        if self.mask != "learned":
            return {"mask": self.mask}
        return {"mask": f"learned, from {self.first_mask}" + (", then a refit" if self.refits else "")}

    def pace(self, rows: int) -> tuple[int, int]:
        """Rows of a micro-batch and optimiser steps, where LoRA learns from so many rows."""
        batch_size = self.batch_size or (20 if rows >= 5000 else max(4, rows // 250))
        per_step = batch_size * self.accumulate * processes().num_processes
        return batch_size, self.steps or max(math.ceil(self.epochs * rows / per_step), 500)

    def forwards(self, rows: Examples, tokenizer: Any, *, teacher: bool) -> float:
        """Forward passes of training, a backward counted as two; without the search for a start."""
        num = len(rows.train) - self._slice_size(len(rows.train))
        steps = self.pace(num)[1] * self.accumulate
        decided = self.control_fraction * steps / self.control_every if self.mask == "learned" else 0.0
        tuned = 3 * steps * (2 if self.heal_steps else 1)  # the teacher is tuned as long
        return tuned + (4 if self.generator_loss == "kl" else 3) * decided + 4 * self.heal_steps * self.accumulate

    def select(self, score_U: Tensor, units: Units, scope: str = "global") -> Tensor:
        """The final choice, for any scores; refuses a budget that the floors do not allow."""
        if self.mask == "none":
            return torch.ones(len(units), dtype=torch.bool)
        floors = self._floors(units)
        selection.check_reachable(units, self.sparsity, floors)
        choose = selection.uniform if self.shape == "uniform" else selection.top_k
        return choose(score_U, units, self.sparsity, floors)

    def read(self, spec: Any, text_field: str) -> Examples:
        """Rows of prompts and responses; a row of the test part is not learned, nor is its prompt's copy elsewhere."""
        return load_rows(spec, kind="response", make=prompts.make_row)

    def head(self, rows: Examples) -> dict[str, Any]:
        return {}

    def check(self) -> None:
        """Refuse what cannot work, before any model is loaded.

        Raises:
            ValueError: which field, what was expected.
        """
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the part of the prunable parameters removed, in [0, 1); got {self.sparsity}")
        for name, known in (
            ("preset", ("ours", "paper")),
            ("units", wiring.SPACES), ("shape", ("heterogeneous", "uniform")), ("mask", MASKS), ("zeroing", ZEROING),
            ("final_mask", FINAL_MASKS), ("template", prompts.TEMPLATES), ("loss_on", prompts.LOSSES),
            ("mask_in_loss", ("soft", "hard")), ("precision", ("auto", "fp32", "bf16")),
            ("compensate", COMPENSATIONS), ("generator_loss", ("ce", "kl")),
            ("lora_on", ("masked", "dense", "cut")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.start not in STARTS and not (Path(self.start) / "compression.json").is_file():
            raise ValueError(
                f"start is {', '.join(STARTS)}, or a folder that sentei has written; got {self.start!r}, without a "
                "compression.json"
            )
        if self.units == "head-dims+channels" and self.start in ("flap", "slopes"):
            raise ValueError(f"start={self.start} scores whole heads; use start taylor, or units groups+channels")
        if self.shape == "uniform" and self.start == "slopes":
            raise ValueError("shape=uniform leaves no widths to search over; use start flap")
        if self.units == "head-dims+channels" and self.shape == "uniform":
            raise ValueError(
                "a plain architecture would recompute RoPE frequencies and attention scale for the new head size; use "
                "shape heterogeneous"
            )
        if self.shape == "uniform" and self.final_mask != "topk":
            raise ValueError(f"shape=uniform counts units by rank; final_mask={self.final_mask} does not: use topk")
        if self.heal_steps and self.mask == "none":
            raise ValueError("mask=none removes nothing, so there is nothing to heal; leave heal_steps at 0")
        if self.compensate == "least-squares":
            if self.units != "groups+channels":
                raise ValueError("compensate refits linears that read whole heads; use units groups+channels")
            if self.zeroing == "beta":
                raise ValueError("compensate needs dropped rows at zero when the mask is frozen; leave zeroing=beta")
        positive = ("accumulate", "lora_rank", "lr", "generator_lr", "temperature", "control_every", "round_channels",
                    "round_pairs", "round_values", "eval_rows", "save_every", "epochs", "heal_temperature")  # fmt: skip
        for name in (*positive, "steps", "batch_size", "lora_alpha", "eval_every", "refit_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        if self.prompt_loss_weight and self.loss_on == "full":
            raise ValueError("loss_on=full counts every token alike; prompt_loss_weight goes with loss_on=response")
        for name in ("lora_dropout", "control_fraction", "ramp", "heal_weight", "correction", "prompt_loss_weight",
                     "final_lr"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction, from 0 to 1; got {getattr(self, name)}")
        if self.mask == "learned" and not 0 < self.control_fraction < 1:
            raise ValueError(
                f"control_fraction is {self.control_fraction}; a learned mask needs steps of both phases, so a number "
                "between 0 and 1"
            )
        if self.seq_len < 8:
            raise ValueError(f"seq_len is {self.seq_len}; a prompt and its response need at least 8 tokens")
        for name in ("alpha", "beta", "beta_last", "shrink", "heal_steps", "patience", "group_lr_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0; got {getattr(self, name)}")

    # --- the method -----------------------------------------------------------------------------------------------

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        examples: Examples,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Tune and prune `model` in place.

        Args:
            examples: rows of `sentei.data.prompts`, as `sentei.data.examples.load` splits them; `test` is not read.
            workdir: checkpoints of the run go here, and one found here is continued.
            report: called after each optimiser step.
        Returns:
            the record: "kept", parameters removed, "freeze" (how the final mask was found), "zeroing",
            "cut_against_masked" (the largest difference of a logit between the cut model and the masked one in fp32,
            divided by the largest logit where that is above 1), "cut_against_masked_absolute" (not divided),
            "cut_limit" (what it may be: 1e-4, or ten times what a rounding error of the embeddings does, up to 1e-2),
            "cast_against_masked" (divided; the cut model in its own dtype), tokens, seconds ("tuning_seconds": of the
            loop alone), "history", "seen_prompts".
        Raises:
            ValueError: a field, the rows, the model or the budget cannot work; a loss that is not finite; a cut model
                that differs from the masked one. The model is as it was then, but for the last.
        """
        began = time.monotonic()
        self.check()
        units = self.units_of(model)
        floors = self._floors(units)
        self.select(torch.zeros(len(units)), units)
        self.start_mask(units)
        data, texts, counts = self._data(model, units, tokenizer, examples)
        before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        sizes = structure.layer_parameters(model), structure.total_parameters(model)
        _refuse_sharding()
        if report is not None:
            report({"message": self._in_words(units, sizes[1], data)})
        device = next(model.parameters()).device
        if processes().num_processes > 1:
            device = torch.device(processes().device)  # pyright: ignore[reportArgumentType]
        model.to(device).eval()
        precision = resolve_precision(self.precision, device)
        if precision == "fp32":  # 16-bit products are slow on such a device, and these casts are exact both ways
            _cast(model, torch.float32)
        searched = time.monotonic()
        if self.mask == "learned":
            data = replace(data, near_U=self._near(model, units, tokenizer, texts, workdir, report))
        searched = time.monotonic() - searched
        rows = wiring.wire(model, units)
        adapted = [row.name for row in rows]
        lora.attach(
            model,
            adapted,
            rank=self.lora_rank,
            alpha=self.lora_alpha or self.lora_rank,
            dropout=self.lora_dropout,
            seed=self.seed,
        )
        book = wiring.MaskBook(model, units, rows)
        run: Tuning | None = None
        try:
            wiring.probe(model, units, rows, book, torch.tensor([data.train.ids[0][:16]]))
            taught = 0
            if self.heal_steps:
                taught = self._tune_teacher(model, units, floors, rows, book, data, precision, workdir, report)
            run = Tuning(
                self, model, units, floors, book, wiring.Adapters(model, units, rows), data, precision, workdir, report
            )
            account = run.run()
            account |= {"search_seconds": searched, "tuning_seconds": account["tuning_seconds"] + searched}
            keep_U = run.state["keep"]
            if self.heal_steps:
                account["heal"] = {**self._heal(run, model, book, report), "teacher_tokens": taught}
            _cast(model, torch.float32)  # merged and compared in full precision, rounded once
            dropped = self.mask != "none"
            checks = [torch.tensor([ids[:VERIFY_TOKENS]], device=device) for ids in data.train.ids[:8]]
            with book.using("full" if dropped else "off", keep_U.float().to(device)):
                expected = _logits(model, checks)
                limits = [
                    max(VERIFY_TOLERANCE, min(MOST_TOLERANCE, SHAKEN * gap))
                    for gap, _ in _gaps(_logits(model, checks, shaken=True), expected)
                ]
        except BaseException:
            book.remove()
            lora.detach(model, adapted, merge=False)
            if run is not None:
                run.refit.undo()
            _restore(model, before)
            raise
        book.remove()
        lora.detach(model, adapted)
        self.remove(model, units, keep_U)
        difference, absolute = _compare(_logits(model, checks), expected, limits)
        _restore(model, before)
        rounded = max(gap for gap, _ in _gaps(_logits(model, checks), expected))
        after = structure.layer_parameters(model), structure.total_parameters(model)
        for alarm in account["warnings"]:
            warnings.warn(alarm, stacklevel=2)
        removed = units.removed_parameters(keep_U)
        return {
            "kept": structure.kept(units, keep_U),
            "compensate": "least-squares" if self.refits and account["freeze"].get("refitted", True) else "none",
            "asked_sparsity": self.sparsity if dropped else 0.0,
            "prunable_parameters": units.total,
            "removed_parameters": sizes[1] - after[1],
            "removed_of_prunable": removed / units.total,
            "removed_of_layers": 1 - after[0] / sizes[0],
            "removed_of_model": 1 - after[1] / sizes[1],
            "cut_against_masked": difference,
            "cut_against_masked_absolute": absolute,
            "cut_limit": max(limits),
            "cast_against_masked": rounded,
            "precision": precision,
            "processes": processes().num_processes,
            "batch_size": data.batch_size,
            **counts,
            **account,
            "seconds": time.monotonic() - began,
            "seen_prompts": prompts.seen([*examples.train, *examples.validation]),
        }

    def _near(
        self,
        model: Any,
        units: Units,
        tokenizer: Any,
        texts: list[str],
        workdir: Path | None,
        report: Progress | None,
    ) -> Tensor | None:
        """The mask that the generator begins near to, [U] bool: the folder's or the search's; None where scores do."""
        if self.first_mask != "slopes":
            return self.start_mask(units)
        if workdir is not None and any((workdir / name).exists() for name in (LEAD, "train.pt")):
            return None  # a run that goes on has the generator's logits
        cut = max(1, len(texts) // 10)
        text = Text(texts[cut:], texts[:cut], [], "rows", fingerprint(texts))
        search = self.search(units)
        found = blocks(text.train, tokenizer, search.seq_len, most=search.calibration_samples)
        search = replace(search, calibration_samples=len(found))
        run = search.start(model, tokenizer, text, workdir=workdir / "search" if workdir else None, report=report)
        keep_U, _ = search.choose(run)
        return structure.kept_mask(units, structure.kept(run.units, keep_U))

    def search(self, units: Units) -> Any:
        """The method that `start=slopes` takes its widths from, calibrated on as many tokens as the refit."""
        length = min(self.seq_len, SEARCH_LENGTH)
        return load_method("policy_gradient")(
            sparsity=self.sparsity * units.total / units.layer_parameters,
            compensate="mean" if self.refits else "none",
            round_to=self.round_channels,
            calibration_samples=math.ceil((self.refit_tokens or TOKENS) / length),
            calibration_seq_len=length,
            batch_size=SEARCH_BLOCKS,
            seq_len=length,
            eval_samples=2 * SEARCH_BLOCKS,
            seed=self.seed,
        )

    def start_mask(self, units: Units) -> Tensor | None:
        """What the checkpoint that `start` names has kept of the same model, [U] bool; None where it names none.

        Raises:
            ValueError: it was made of a model of other sizes, or by removing other units.
        """
        if self.start in STARTS:
            return None
        where = Path(self.start) / "compression.json"
        try:
            stages = json.loads(where.read_text(encoding="utf-8"))["stages"]
            accounts = [stage["record"]["kept"] for stage in stages if "kept" in stage["record"]]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"start: {where} does not tell of stages as sentei writes them") from None
        if len(accounts) != 1:
            raise ValueError(f"start: {where} tells of {len(accounts)} stages that removed units; expected one")
        try:
            return structure.kept_mask(units, accounts[0])
        except ValueError as error:
            raise ValueError(f"start: {where} is not of this model and its units: {error}") from error

    def _in_words(self, units: Units, total: int, data: Data) -> str:
        """Sparsity is what goes, not what stays: said before the work begins."""
        rows = f"{data.steps} steps of {data.batch_size} rows, {len(data.train)} for LoRA" + (
            f", {len(data.slice)} for the mask" if len(data.slice) and not self.shares_rows else ""
        )
        if self.mask == "none":
            return f"tuning, nothing is removed: {rows}"
        gone = self.sparsity * units.total
        return (
            f"removing {self.sparsity:.0%} of {units.total:,} parameters ({self.units}), {gone / total:.1%} of "
            f"the model: {rows}"
        )

    def _floors(self, units: Units) -> selection.Floors:
        return selection.Floors.of(units, self.round_channels, self.round_pairs, self.round_values)

    def _data(
        self, model: Any, units: Units, tokenizer: Any, examples: Examples
    ) -> tuple[Data, list[str], dict[str, Any]]:
        """Rows as tokens in three parts, blocks for the refit and scores, batch size and steps; LoRA's rows as text."""
        template = prompts.Template(tokenizer, self.template)
        rows = examples.train
        size = self._slice_size(len(rows))
        rest, held = prompts.hold_out(rows, size, self.seed) if size else (list(range(len(rows))), [])
        train = prompts.encode([rows[i] for i in rest], template, self.seq_len)
        slice = train if self.shares_rows else prompts.encode([rows[i] for i in held], template, self.seq_len)
        validation = prompts.encode(examples.validation, template, self.seq_len)
        if not len(train) or (self.mask == "learned" and not len(slice)):
            raise ValueError(f"{len(rows)} rows leave nothing to train on; add rows, or raise seq_len")
        batch_size, steps = self.pace(len(train))
        parts = (train, validation) if self.shares_rows else (train, slice, validation)
        texts = prompts.rows_as_text([rows[i] for i in rest], template)
        text_NT = torch.empty(0, 0, dtype=torch.long)
        scored = self.units == "groups+channels" and self.first_mask not in ("dense", "taylor")
        if self.refits or (self.mask == "learned" and scored):
            text_NT = refit_text(self, model, units, tokenizer, texts)
        read = [*(part.ids for part in parts), text_NT.tolist()]
        digest = hashlib.sha256(repr((read, steps, batch_size)).encode()).hexdigest()
        chosen_on = "validation" if len(validation) else "slice" if len(slice) and not self.shares_rows else "train"
        held_out = {"validation": validation, "slice": slice, "train": train}[chosen_on]
        pad = prompts.pad_id(tokenizer)
        data = Data(
            train, slice, held_out, text_NT, None, pad, self.loss_on, self.prompt_loss_weight, batch_size, steps, digest
        )
        counts = {
            "rows": {"lora": len(train), "generator": len(slice), "validation": len(validation)},
            "rows_dropped": sum(part.dropped for part in parts),
            "prompts_cut": sum(part.cut for part in parts),
            # The slice has chosen the mask, so its cross-entropy is optimistic, though LoRA never learned from it.
            "best_chosen_on": chosen_on,
        }
        return data, texts, counts

    def _slice_size(self, num_rows: int) -> int:
        if self.shares_rows or (self.mask != "learned" and not self.slice_rows):
            return 0
        least = LEAST_SLICE if self.slice_rows is None else self.slice_rows
        if least < 1:
            raise ValueError(f"slice_rows is {self.slice_rows}; a learned mask needs rows for the generator")
        if num_rows < 3 * least:
            raise ValueError(
                f"{num_rows} rows: the generator needs a held-out slice of {least} and twice that for tuning. Add rows "
                "or set slice_rows"
            )
        return least if self.slice_rows is not None else min(max(least, num_rows // 10), num_rows // 3)

    def _tune_teacher(
        self,
        model: Any,
        units: Units,
        floors: selection.Floors,
        rows: list[wiring.Row],
        book: wiring.MaskBook,
        data: Data,
        precision: str,
        workdir: Path | None,
        report: Progress | None,
    ) -> int:
        """Tune the dense model on the same rows and steps, and keep the result as a second adapter, "teacher".

        Returns:
            tokens it has learned from.
        """
        initial = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        dense = replace(self, mask="none", heal_steps=0, log=None)
        folder = workdir / "teacher" if workdir else None
        adapters = wiring.Adapters(model, units, rows)
        account = Tuning(dense, model, units, floors, book, adapters, data, precision, folder, report).run()
        tuned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        wiring.add_adapter(model, rows, "teacher", rank=self.lora_rank, alpha=self.lora_alpha or self.lora_rank)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".default." in name:
                    p.copy_(initial[name])
                elif ".teacher." in name:
                    p.copy_(tuned[name.replace(".teacher.", ".default.")])
        return account["lora_tokens"]

    def _heal(self, run: Tuning, model: Any, book: wiring.MaskBook, report: Progress | None) -> dict[str, Any]:
        before, tokens = run.held_loss(), 0
        teacher = wiring.Teacher(model, book, "teacher", run.refit.undone)
        steps = heal(run, teacher, self.heal_steps, weight=self.heal_weight, temperature=self.heal_temperature)
        for step in steps:
            tokens = step.tokens
            if report is not None:
                report({"step": step.step, "of": self.heal_steps, "message": f"healing: ce {step.losses['ce']:.3f}"})
        return {"steps": self.heal_steps, "tokens": tokens, "loss_before": before, "loss_after": run.held_loss()}


def _refuse_sharding() -> None:
    import os

    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("ATP masks and cuts whole weights, which FSDP and DeepSpeed shard; use plain data parallelism")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies must not be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _restore(model: nn.Module, before: dict[str, tuple[torch.dtype, bool]]) -> None:
    for name, parameter in model.named_parameters():
        dtype, requires_grad = before.get(name) or before[name.removesuffix("bias") + "weight"]  # a refit adds biases
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(requires_grad)
        parameter.grad = None


@torch.no_grad()
def _logits(model: Any, inputs: list[Tensor], *, shaken: bool = False) -> list[tuple[Tensor, ...]]:
    """Logits of each input, and in front of the first one's the output of every layer.

    Args:
        shaken: with an error in every embedding as large as rounding makes: what this does to the logits tells how far
            two ways to compute the same model may be apart.
    """
    model.eval()
    random = torch.Generator().manual_seed(0)

    def shake(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        sign = torch.randint(0, 2, output.shape, generator=random).to(output) * 2 - 1
        return output * (1 + ROUNDING * sign)

    found = []
    for number, ids_BT in enumerate(inputs):
        hidden: list[Tensor] = []
        with ExitStack() as stack:
            if shaken:
                stack.callback(model.get_input_embeddings().register_forward_hook(shake).remove)
            for layer in () if number else structure.layers(model):
                keep = lambda module, args, output: hidden.append(output)  # noqa: B023, E731
                stack.callback(layer.register_forward_hook(keep).remove)
            logits = model(input_ids=ids_BT, use_cache=False).logits.float()
        found.append((*hidden, logits))
    return found


def _gaps(some: list[tuple[Tensor, ...]], others: list[tuple[Tensor, ...]]) -> list[tuple[float, float]]:
    """Of each input the largest difference of a logit: relative to the largest one where that is above 1, and not."""
    pairs = [(a[-1], b[-1]) for a, b in zip(some, others, strict=True)]
    absolute = [float((a - b).abs().max()) for a, b in pairs]
    return [(gap / max(1.0, float(b.abs().max())), gap) for gap, (_, b) in zip(absolute, pairs, strict=True)]


def _compare(
    cut: list[tuple[Tensor, ...]], masked: list[tuple[Tensor, ...]], limits: list[float]
) -> tuple[float, float]:
    """The largest of `_gaps`, relative and absolute.

    Args:
        limits: of each input, relative.
    Raises:
        ValueError: a relative one is above its limit; says from which layer on.
    """
    gaps = _gaps(cut, masked)
    for (relative, _), limit in zip(gaps, limits, strict=True):
        if relative <= limit:
            continue  # what is not a number is not
        layers = [float((a.float() - b.float()).abs().max()) for a, b in zip(cut[0], masked[0], strict=True)]
        first = next((i for i, d in enumerate(layers[:-1]) if not d <= VERIFY_TOLERANCE), len(layers) - 1)
        raise ValueError(
            f"cut and masked model differ by {relative:.2g} of the largest logit (limit {limit:.2g}), first at layer "
            f"{first}; the state of the run is kept, no final model was written"
        )
    return max(relative for relative, _ in gaps), max(absolute for _, absolute in gaps)
