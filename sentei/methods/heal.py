"""Heal: recover what pruning cost, by a short training against the dense parent.

Pruning leaves a model whose layers no longer fit each other; some training brings much of the quality back. Structural
methods end in such a stage (LLM-Pruner, arXiv 2305.11627, heals with LoRA; Minitron, arXiv 2407.14679, by distillation
from the parent); here it is one stage that follows any of them.

1. Cut the training text into blocks and put them in an order that depends on the seed alone       `Heal._blocks`
2. Choose what moves:                                                                              `_adapt`
   - "lora": adapters (arXiv 2106.09685) on every linear of the blocks, W x + (alpha / r) B A x, all else frozen;
   - "full": every weight of the blocks and the final norm. Embeddings and LM head were not pruned and stay.
3. Minimise ce_weight CE(text) + kl_weight t^2 KL(parent || pruned)                                `Distillation`
   with AdamW, warm-up and cosine                                                                  `train.train`
4. Now and then measure cross-entropy on validation text; remember the best weights (those at the
   start count too), and stop after `patience` measurements without a better one                   `Heal._train`
5. Put the best weights back and merge: W <- W + (alpha / r) B A, so that plain linears remain     `_merge`

Where rounding happens. Trained numbers (adapters, or all weights in "full") are fp32 throughout. Weights that came in
16 bits are rounded once, at the end: W + (alpha / r) B A is computed in fp32 and cast to W's own dtype. Weights that
came in fp32 are not rounded here, but when they are saved in 16 bits. "loss_after" is measured on the merged weights,
in the dtype that they are returned in.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sentei import data, lora, structure
from sentei.distill import Distillation, check_head, held_out
from sentei.methods import Progress, option
from sentei.train import (
    Batch,
    Settings,
    Step,
    autocast,
    causal_batch,
    masked_batch,
    mix,
    resolve_precision,
    shuffled,
    train,
)

MODES = ("lora", "full")


@dataclass(frozen=True)
class Heal:
    """Short training of a pruned model, on text and against its dense parent."""

    mode: str = option("lora", "lora: adapters, merged afterwards; full: all weights of the blocks", "ours")
    steps: int | None = option(None, "optimiser steps; with minutes too, whichever ends first")
    minutes: float | None = option(
        None, "time limit; such a run is not reproducible. Neither steps nor minutes: 200 steps"
    )
    lr: float | None = option(None, "peak learning rate; default 3e-3 for lora, 1e-4 for full", "ours")
    batch_size: int = option(4, "blocks per optimiser step and micro-batch", "ours")
    accumulate: int = option(1, "micro-batches per optimiser step", "ours")
    seq_len: int = option(128, "tokens per block", "ours")
    lora_rank: int = option(16, "rank r of the adapters", "ours")
    lora_alpha: int = option(32, "the adapters' product is scaled by alpha / r", "ours")
    ce_weight: float = option(1.0, "weight of the cross-entropy on the text", "ours")
    # Without KL more steps fit into the same time and the loss on the training domain falls further, but text of other
    # kinds is forgotten: the weight is 1 for the sake of the latter.
    kl_weight: float = option(1.0, "weight of the KL divergence to the dense parent", "ours")
    temperature: float = option(1.0, "softens both distributions inside the KL term", "ours")
    warmup: float = option(0.1, "fraction of the run in which the learning rate rises", "ours")
    weight_decay: float = option(0.0, "on matrices only", "ours")
    eval_every: int = option(0, "steps between measurements on validation text; 0: four times in a run", "ours")
    eval_tokens: int = option(2048, "validation tokens of one measurement", "ours")
    patience: int = option(3, "stop after so many measurements in a row without a better one", "ours")
    precision: str = option("auto", "fp32, bf16 (autocast) or auto: bf16 where the device has it", "ours")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")
    seed: int = option(0, "order of the text, and the adapters' first values")

    structural: ClassVar[bool] = False
    reads: ClassVar[str] = "text"
    saves: ClassVar[str] = "checkpoint"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is lora or full, got {self.mode!r}")
        for name in ("batch_size", "accumulate", "lora_rank", "lora_alpha", "temperature", "eval_tokens", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2 to have a next token, got {self.seq_len}")
        if min(self.ce_weight, self.kl_weight) < 0 or self.ce_weight + self.kl_weight == 0:
            raise ValueError(f"ce_weight {self.ce_weight} and kl_weight {self.kl_weight}: none below 0, one above 0")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        self._settings(None)

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        text: data.Text,
        *,
        teacher: Any | None = None,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Train a pruned model in place; nothing is removed and the weights keep their dtypes.

        Uses `text.train` and `text.validation`, never `text.test`.

        Args:
            teacher: the dense parent, with the same vocabulary, on the same device; None trains on the text alone.
            workdir: checkpoints go here, and a run found here is continued.
            report: called after each optimiser step.
        Returns:
            "loss_before", "loss_after" (validation, nats per token), "best_step", "steps", "tokens", "seconds",
            "trained_parameters", "stopped_early", "history" (one entry per measurement).
        Raises:
            ValueError: teacher of another vocabulary, too little text, a loss that is not finite, or a workdir that
                holds another run.
        """
        started = time.monotonic()
        self._check(model, teacher)
        device = next(model.parameters()).device
        precision = resolve_precision(self.precision, device)
        make = _batch_maker(model, tokenizer, self.seed)
        train_NT = self._blocks(text.train, tokenizer, device)
        held_NT = data.blocks(text.validation, tokenizer, self.seq_len)[: max(1, self.eval_tokens // self.seq_len)]
        if not len(train_NT) or not len(held_NT):
            raise ValueError(
                f"healing needs training and validation text: found {len(train_NT)} and {len(held_NT)} blocks of "
                f"{self.seq_len} tokens; give more text or lower seq_len"
            )
        held = [make(rows, -1) for rows in held_NT.to(device).split(self.batch_size)]
        with torch.inference_mode(), autocast(precision, device):
            check_head(model, held_NT[:1, :8].to(device))

        before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        was_training = model.training
        if not self.kl_weight:
            teacher = None
        if teacher is not None:
            teacher.eval()
        if precision == "fp32":  # a 16-bit product is slow on such a device, and these casts are exact both ways
            for p in model.parameters():
                p.data = p.data.float()
        adapters = _adapt(model, self)
        try:
            record = self._train(model, make, train_NT, held, teacher, precision, started, workdir, report)
        finally:
            lora.detach(model, adapters)
            for name, p in model.named_parameters():
                dtype, requires_grad = before[name]
                p.data = p.data.to(dtype)
                p.requires_grad_(requires_grad)
            model.train(was_training)
        record["loss_after"] = held_out(model, held, precision)["ce"]
        record["seconds"] = time.monotonic() - started
        return record

    def _check(self, model: Any, teacher: Any | None) -> None:
        if teacher is model:
            raise ValueError("the teacher is the model itself; load the dense parent a second time")
        if teacher is None:
            if self.ce_weight == 0:
                raise ValueError("ce_weight is 0 and there is no teacher: nothing to learn from")
            if self.kl_weight:
                warnings.warn("healing without the dense parent: cross-entropy on the text alone", stacklevel=3)
            return
        student_words, teacher_words = (m.get_input_embeddings().weight.shape[0] for m in (model, teacher))
        if student_words != teacher_words:
            raise ValueError(
                f"the teacher has a vocabulary of {teacher_words}, the model of {student_words}; "
                "give the model's own dense parent"
            )

    def _settings(self, seconds: float | None) -> Settings:
        steps = 200 if self.steps is None and self.minutes is None else self.steps
        return Settings(
            lr=self.lr if self.lr is not None else {"lora": 3e-3, "full": 1e-4}[self.mode],
            steps=steps,
            seconds=seconds if seconds is not None else (60 * self.minutes if self.minutes is not None else None),
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            accumulate=self.accumulate,
            precision=self.precision,
            checkpointing=self.checkpointing,
            save_every=self.eval_every or 20,
            seed=self.seed,
        )

    def _blocks(self, documents: list[str], tokenizer: Any, device: torch.device) -> Tensor:
        """Training blocks [N, seq_len], from no more text than the run can read: tokenising takes time too."""
        limits = []
        if (steps := self._settings(None).steps) is not None:
            limits.append(steps * self.batch_size * self.accumulate * self.seq_len)
        if self.minutes is not None:
            limits.append(int(self.minutes * 60) * (5_000 if device.type == "cpu" else 200_000))
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(mix(self.seed, "documents")))
        wanted = 8 * min(limits)  # characters; a token of any language holds fewer than eight on average
        chosen: list[str] = []
        for i in order.tolist():
            if wanted <= 0:
                break
            chosen.append(documents[i][:wanted])
            wanted -= len(documents[i])
        return data.blocks(chosen, tokenizer, self.seq_len)

    def _train(
        self,
        model: Any,
        make: Callable[[Tensor, int], Batch],
        train_NT: Tensor,
        held: list[Batch],
        teacher: Any | None,
        precision: str,
        started: float,
        workdir: Path | None,
        report: Progress | None,
    ) -> dict[str, Any]:
        """Train, measure, stop early; leaves the best weights in the model."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        begun = time.monotonic()
        loss = held_out(model, held, precision)["ce"]
        measuring = time.monotonic() - begun
        if not math.isfinite(loss):
            raise ValueError(
                "the model's loss on validation text is not finite before any training: its weights are broken"
            )
        seconds = None
        if self.minutes is not None:  # the limit covers what was done so far and two measurements at the end
            seconds = max(1.0, 60 * self.minutes - (time.monotonic() - started) - 2 * measuring)
        state: dict[str, Any] = {
            "history": [{"step": 0, "validation_loss": loss}],
            "best": _copy(trained),
            "best_step": 0,
            "without_better": 0,
        }
        run = train(
            model,
            shuffled(train_NT, self.batch_size, seed=self.seed, make=make),
            Distillation(teacher, self.temperature, self.ce_weight, self.kl_weight),
            self._settings(seconds),
            folder=workdir,
            state=state,
            fingerprint=repr((asdict(self), teacher is None, int(train_NT.sum()), len(train_NT))),
        )
        step: Step | None = None
        stopped = False
        with closing(run):
            for step in run:
                if self._due(step, state):
                    stopped = self._measure(model, trained, held, precision, step, state)
                if report is not None:
                    report(_progress(step, self._settings(None).steps, state))
                if stopped:
                    break
        if step is not None and not stopped and state["history"][-1]["step"] < step.step:
            self._measure(
                model, trained, held, precision, step, state
            )  # the time limit came before the next measurement
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["best"][name])
        history = state["history"]
        return {
            "loss_before": history[0]["validation_loss"],
            "best_step": state["best_step"],
            "steps": history[-1]["step"],
            "tokens": history[-1].get("tokens", 0),
            "trained_parameters": sum(p.numel() for p in trained.values()),
            "stopped_early": stopped,
            "precision": precision,
            "history": history,
        }

    def _due(self, step: Step, state: dict[str, Any]) -> bool:
        if step.progress >= 1:
            return True
        if self.eval_every:
            return step.step % self.eval_every == 0
        return int(4 * step.progress) > int(4 * state["history"][-1].get("progress", 0.0))

    def _measure(
        self,
        model: Any,
        trained: dict[str, Tensor],
        held: list[Batch],
        precision: str,
        step: Step,
        state: dict[str, Any],
    ) -> bool:
        """One measurement on validation text, into `state`; True when it is time to stop."""
        loss = held_out(model, held, precision)["ce"]
        best = min(entry["validation_loss"] for entry in state["history"])
        state["history"].append({**asdict(step), "validation_loss": loss})
        if loss < best:
            state.update(best=_copy(trained), best_step=step.step, without_better=0)
        else:
            state["without_better"] += 1
        return state["without_better"] >= self.patience


def _batch_maker(model: Any, tokenizer: Any, seed: int) -> Callable[[Tensor, int], Batch]:
    """Next-token prediction for decoders, masked-token prediction for encoders."""
    if structure.is_causal(model):
        return lambda rows, n: causal_batch(rows)
    if tokenizer.mask_token_id is None:
        raise ValueError("this encoder's tokenizer has no mask token, so it cannot be trained on plain text")
    return lambda rows, n: masked_batch(rows.cpu(), tokenizer, seed=mix(seed, "mask", n))


def _adapt(model: nn.Module, how: Heal) -> list[str]:
    """Say which parameters move; the names of the linears that got an adapter (none in "full")."""
    model.requires_grad_(False)
    if how.mode == "full":
        outside = {
            id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()
        }
        rest = [p for p in structure.base_model(model).parameters() if p.ndim < 2 and id(p) not in outside]
        for p in [*rest, *(p for block in structure.layers(model) for p in block.parameters())]:
            p.requires_grad_(p.numel() > 0)
            p.data = p.data.float()
        return []
    names = lora.linears(model)
    lora.attach(model, names, rank=how.lora_rank, alpha=how.lora_alpha, seed=how.seed)
    return names


def _copy(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}


def _progress(step: Step, steps: int | None, state: dict[str, Any]) -> dict[str, Any]:
    held = state["history"][-1]["validation_loss"]
    # A run limited by time has no number of steps; its bar counts thousandths of the time.
    done = {"step": step.step, "of": steps} if steps is not None else {"step": round(1000 * step.progress), "of": 1000}
    return {**done, "message": f"loss {step.losses['loss']:.3f}, held out {held:.3f}", **step.losses}
