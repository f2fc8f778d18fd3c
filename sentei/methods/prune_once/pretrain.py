"""Prune Once for All, stages A and B: a teacher, and a sparse student of it that serves every task (arXiv 2111.05754).

A. `Teacher`: train the dense language model on the pruning corpus, so that it is at home there. A headless encoder gets
   a masked-language-model head.
B. `Student`, which starts as a copy of the teacher (or, with `start="fit"`, at its final sparsity, see `fit`; its
   pattern then stays). After optimiser step t, every few steps while pruning:
   1. sparsity s(t), a cubic rise to the target                                            `Schedule.sparsity`
   2. in every matrix the smallest |w|, dormant weights included, are removed              `pattern.masks`, `Lock.move`
   3. between two masks the zeros stay zeros                                               `Lock`
   The loss is hard * CE + soft * t^2 KL(teacher || student), the KL at every position     `Distillation`
   and, where asked for, the distance of every layer's output from the teacher's           `HiddenDistillation`
   or, with objective="hidden", this distance alone: no head is needed, and no stage A     `HiddenStates`
   The learning rate is wound back at every mask and falls once at the end                 `Schedule.rate`

The paper's loss of BERT also predicts the next sentence; here that is `objective="mlm_nsp"`, for models with that head.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from sentei import data, structure
from sentei.distill import Distillation, HiddenDistillation, HiddenStates, held_out, same_layers
from sentei.methods import Progress, option
from sentei.methods.prune_once import lock as locks
from sentei.methods.prune_once import pattern as patterns
from sentei.methods.prune_once.fit import fit
from sentei.methods.prune_once.next_sentence import NextSentence, pairs
from sentei.methods.prune_once.schedule import Schedule, linear
from sentei.train import (
    IGNORE,
    Batch,
    Batches,
    Settings,
    causal_batch,
    mix,
    resolve_precision,
    shuffled,
    train,
)

OBJECTIVES = ("auto", "mlm", "mlm_nsp", "clm", "hidden")
PRESETS: dict[str, dict[str, float]] = {
    "paper": {"steps": 100_000, "batch_size": 256, "seq_len": 512, "lr": 5e-5},
    "small_gpu": {"steps": 10_000, "batch_size": 128, "seq_len": 256, "lr": 1e-4},
    "cpu_mini": {"steps": 1_000, "batch_size": 32, "seq_len": 128, "lr": 1e-4},
}


@dataclass(frozen=True)
class Pretraining:
    """What stages A and B share; `preset` fills in what is not given."""

    paper: ClassVar[str] = "arXiv 2111.05754"
    preset: str = option("cpu_mini", "paper, small_gpu or cpu_mini: steps, batch_size, seq_len and lr", "ours")
    objective: str = option(
        "auto",
        "mlm, mlm_nsp (BERT with its next-sentence head) or clm; auto: by the model; hidden, for a student: the "
        "outputs of the teacher's layers alone, with or without a head",
    )
    steps: int | None = option(None, "optimiser steps T; paper 100,000", "authors' code")
    batch_size: int | None = option(None, "blocks per micro-batch; paper 256", "authors' code")
    seq_len: int | None = option(None, "tokens per block; paper 512", "authors' code's default")
    lr: float | None = option(None, "peak learning rate; the paper's is not known, the authors' library has 5e-5")
    accumulate: int = option(1, "micro-batches per optimiser step", "ours")
    warmup: float = option(0.01, "fraction of the run in which the learning rate rises", "authors' code")
    weight_decay: float = option(0.01, "on matrices only", "authors' code")
    clip: float = option(1.0, "largest gradient norm", "authors' library")
    mlm_probability: float = option(0.15, "fraction of the tokens that are predicted (80/10/10)", "authors' code")
    precision: str = option("auto", "fp32, bf16 (autocast over fp32 weights) or auto", "ours")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third slower")
    eval_tokens: int = option(8192, "validation tokens of one measurement, four in a run", "ours")
    save_every: int = option(50, "steps between states on disk", "ours")
    seed: int = option(0, "order of the text, masked tokens, dropout")

    structural: ClassVar[bool] = False
    reads: ClassVar[str] = "text"
    saves: ClassVar[str] = "checkpoint"
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(PRESETS)}; got {self.preset!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is one of {', '.join(OBJECTIVES)}; got {self.objective!r}")
        for name, value in self._preset().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("batch_size", "eval_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.seq_len < 8:  # pyright: ignore[reportOptionalOperand]
            raise ValueError(f"seq_len must be at least 8, got {self.seq_len}")
        if self.objective == "hidden" and self.checkpointing:
            raise ValueError("checkpointing works with dropout on, objective=hidden with it off: leave one of them")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability is a fraction of the tokens, got {self.mlm_probability}")
        self._settings()

    def _preset(self) -> dict[str, float]:
        return PRESETS[self.preset]

    def _settings(self) -> Settings:
        return Settings(
            lr=self.lr or 0.0,
            steps=self.steps,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            clip=self.clip,
            accumulate=self.accumulate,
            precision=self.precision,
            checkpointing=self.checkpointing,
            dropout=self.objective != "hidden",
            save_every=self.save_every,
            seed=self.seed,
        )

    def _objective(self, model: Any, tokenizer: Any) -> str:
        """The resolved objective.

        Raises:
            ValueError: this model cannot be trained so.
        """
        if self.objective == "hidden":
            return "hidden"
        causal = structure.is_causal(model)
        named = self.objective if self.objective != "auto" else "clm" if causal else "mlm"
        if causal != (named == "clm"):
            raise ValueError(f"{type(model).__name__} cannot be trained by {named}; use objective auto")
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no language-model head: use objective hidden, which needs none, or give "
                "it one by prune_once_teacher"
            )
        if named == "mlm_nsp" and not type(model).__name__.endswith("ForPreTraining"):
            raise ValueError(f"{type(model).__name__} has no next-sentence head; use objective mlm")
        if not causal and tokenizer.mask_token_id is None:
            raise ValueError("this encoder's tokenizer has no mask token, so it cannot be trained on plain text")
        return named

    def _data(self, model: Any, tokenizer: Any, text: data.Text, objective: str) -> tuple[Batches, list[Batch]]:
        """Training batches, and the validation batches that every measurement uses."""
        device = next(model.parameters()).device
        size, length = self.batch_size or 1, self.seq_len or 8
        rows = max(1, self.eval_tokens // length)
        if objective == "mlm_nsp":
            made = pairs(text.train, tokenizer, length, seed=self.seed)
            held = pairs(text.validation, tokenizer, length, seed=self.seed)
            make = self._mask(tokenizer)
            batches = made.batches(size, seed=self.seed, mask=make)
            return batches, [held.batch(range(min(rows, len(held))), make, -1)]
        train_NT = data.blocks(text.train, tokenizer, length)
        held_NT = data.blocks(text.validation, tokenizer, length)[:rows]
        masked = self._mask(tokenizer)
        plain = {"clm": causal_batch, "hidden": lambda ids: {"input_ids": ids, "targets": ids}}
        make = (lambda ids, n: plain[objective](ids)) if objective in plain else masked
        held_batches = [make(ids, -1 - i) for i, ids in enumerate(held_NT.split(size))]
        held_batches = [{name: x.to(device) for name, x in batch.items()} for batch in held_batches]
        return shuffled(train_NT, size, seed=self.seed, make=make), held_batches

    def _mask(self, tokenizer: Any) -> Callable[[Tensor, int], Batch]:
        return lambda ids, n: masked_rows(ids, tokenizer, self.mlm_probability, seed=mix(self.seed, "mask", n))

    def _measure(self, model: Any, held: list[Batch], precision: str, loss: Any) -> float:
        """Held-out text: cross-entropy, nats per target; of the objective "hidden" the distance from the teacher."""
        if isinstance(loss, HiddenStates):
            return held_out(model, held, precision, loss)["loss"]
        return held_out(model, (without_pairs(batch) for batch in held), precision)["ce"]

    def _takes(self, held: int) -> str:
        """What training takes, for `outline`; `held` is in bytes."""
        tokens = f"{self.batch_size} x {self.seq_len} tokens"
        return f"{self.steps:,} steps; {held / 1e9:,.2f} GB in each process, and the activations of {tokens}"

    def _run(
        self,
        model: Any,
        batches: Batches,
        held: list[Batch],
        loss: Any,
        rate: Callable[[int], float],
        state: dict[str, Any],
        *,
        fingerprint: str,
        after: Callable[[int], dict[str, Any]],
        restored: Callable[[], None],
        workdir: Path | None,
        report: Progress | None,
    ) -> None:
        """Train, with `after` called between two steps; `state["history"]` gets a line per measurement."""
        steps = self.steps or 0
        precision = resolve_precision(self.precision, next(model.parameters()).device)
        quarter = max(1, steps // 4)
        run = train(
            model, batches, loss, self._settings(), folder=workdir, state=state, rate=rate, restored=restored,
            fingerprint=fingerprint,
        )  # fmt: skip
        with closing(run):
            for step in run:
                more = after(step.step)
                if step.step % quarter == 0 or step.step == steps:
                    line = {"step": step.step, "lr": step.lr, "tokens": step.tokens, **step.losses, **more}
                    state["history"].append(line | {"validation_loss": self._measure(model, held, precision, loss)})
                if report is not None:
                    shown = ", ".join(f"{name} {value:.3g}" for name, value in (step.losses | more).items())
                    report({"step": step.step, "of": steps, "message": shown, **step.losses, **more})


@dataclass(frozen=True)
class Teacher(Pretraining):
    """Stage A: the dense language model, trained on the corpus that the student will be pruned on."""

    train: str = option("all", "all, or head: the layers stay, and with them what they know besides", "ours")
    shape: str = option("dense", "how it is saved")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "hidden":
            raise ValueError("objective=hidden needs a teacher, which stage A makes; it is for prune_once_student")
        if self.train not in ("all", "head"):
            raise ValueError(f"train is all or head, got {self.train!r}")

    def _preset(self) -> dict[str, float]:
        return PRESETS[self.preset] | ({"steps": 300} if self.preset == "cpu_mini" else {})

    def outline(self, model: Any) -> dict[str, str]:
        """What training takes, for `sentei plan`: fp32 weights, gradients and Adam's two moments."""
        return {"training": self._takes(16 * structure.total_parameters(model))}

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        text: data.Text,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Train in place; an encoder without a head comes back as a masked language model, in "saving".

        Returns:
            "history" (a line per measurement), "loss_before", "loss_after" (validation, nats per token), "seconds".
        Raises:
            ValueError: an objective that the model has no head for, too little text, a loss that is not finite.
        """
        started = time.monotonic()
        model = with_language_head(model, self.seed, next_sentence=self.objective == "mlm_nsp")
        objective = self._objective(model, tokenizer)
        batches, held = self._data(model, tokenizer, text, objective)
        to_fp32(model)
        precision = resolve_precision(self.precision, next(model.parameters()).device)
        if self.train == "head":
            structure.base_model(model).requires_grad_(False)
            if not any(p.requires_grad for p in model.parameters()):
                raise ValueError(f"the head of {type(model).__name__} has no weights of its own; use train all")
        loss: Any = NextSentence(Distillation()) if objective == "mlm_nsp" else Distillation()
        before = self._measure(model, held, precision, loss)
        state: dict[str, Any] = {"history": [{"step": 0, "validation_loss": before}]}
        settings = self._settings()
        warmup = int(self.warmup * (self.steps or 0))
        self._run(
            model, batches, held, loss, lambda t: linear(settings.steps or 1, warmup, t), state,
            fingerprint=repr((asdict(self), text.sha256)), after=lambda step: {}, restored=lambda: None,
            workdir=workdir, report=report,
        )  # fmt: skip
        model.requires_grad_(True)
        history = state["history"]
        return {
            "stage": "teacher",
            "objective": objective,
            "corpus": text.sha256,
            "history": history,
            "loss_before": before,
            "loss_after": history[-1]["validation_loss"],
            "seconds": time.monotonic() - started,
            "saving": {"model": model},
        }


@dataclass(frozen=True)
class Student(Pretraining):
    """Stage B: prune the teacher while it teaches; the sparse checkpoint that every task starts from."""

    sparsity: float = option(0.9, "fraction of the prunable weights that go; 1x4: of the blocks", "paper: 0.85, 0.9")
    pattern: str = option("unstructured", "unstructured, 1x4 (four inputs of one output) or 2:4", "ours beyond 1x4")
    scope: str = option("matrix", "matrix: each loses the same fraction (the paper); global: one threshold")
    max_matrix_sparsity: float = option(0.98, "scope global: no matrix loses more", "ours")
    ties: str = option("exact", "exact: exactly k weights go; paper: all that equal the k-th", "ours")
    regrow: bool = option(True, "a removed weight may come back, with its old value", "authors' code")
    start: str = option(
        "dense",
        "dense: the schedule below; fit: pruned before the first step, each linear fitted to the teacher's by least "
        "squares, then trained with this pattern",
        "ours",
    )
    fit_tokens: int = option(16384, "start fit: tokens of the training text", "ours")
    pairs: float = option(
        0.0, "objective hidden: fraction of the batches that are pairs of segments, as tasks of two texts have", "ours"
    )
    prune_start: float = option(0.0, "fraction of the run at which pruning starts, t0", "authors' code")
    prune_end: float = option(0.5, "fraction at which the target is reached, t1", "authors' code")
    prune_freeze: float = option(0.8, "fraction after which the mask no longer moves, t_end", "authors' code")
    prune_every: float = option(0.01, "fraction between two masks", "authors' code")
    rewind: bool = option(True, "wind the learning rate back at every mask; off: one linear decay", "authors' code")
    kd_hard: float = option(0.5, "weight of the cross-entropy", "authors' script")
    kd_soft: float = option(0.5, "weight of the distillation; 0: no teacher", "authors' script")
    kd_hidden: float = option(0.0, "weight of |h - h_teacher|^2 / |h_teacher|^2, mean over layers and tokens", "ours")
    temperature: float = option(2.0, "softens both distributions", "authors' script")
    include: str | None = option(None, "regular expression: prune these weights instead of all in the blocks")
    exclude: str | None = option(None, "regular expression: leave these weights out")
    shape: str = option("sparse", "sparse: container of bits and values; dense: plain, zeros in full")
    zstd: bool = option(True, "compress the parts of the container that become smaller by it")

    def __post_init__(self) -> None:
        super().__post_init__()
        patterns.check(self.pattern, self.sparsity, {})
        if self.scope not in ("matrix", "global"):
            raise ValueError(f"scope is matrix or global, got {self.scope!r}")
        if self.ties not in patterns.TIES:
            raise ValueError(f"ties is one of {', '.join(patterns.TIES)}; got {self.ties!r}")
        if self.start not in ("dense", "fit"):
            raise ValueError(f"start is dense or fit, got {self.start!r}")
        if self.start == "fit" and (self.scope == "global" or self.include):
            raise ValueError("start=fit prunes the linears of one block after the other; leave scope and include")
        if not 0 <= self.pairs <= 1:
            raise ValueError(f"pairs is a fraction of the batches, from 0 to 1; got {self.pairs}")
        if self.pairs and self.objective != "hidden":
            raise ValueError("pairs is for objective=hidden; mlm_nsp has nothing else, the others one segment")
        if self.fit_tokens < 1:
            raise ValueError(f"fit_tokens must be at least 1, got {self.fit_tokens}")
        weights = (self.kd_hard, self.kd_soft, self.kd_hidden)
        if min(weights) < 0 or self.kd_hard + self.kd_soft == 0 or self.temperature <= 0:
            raise ValueError(
                f"kd_hard {self.kd_hard}, kd_soft {self.kd_soft} and kd_hidden {self.kd_hidden}: none below 0, hard or "
                f"soft above 0; temperature {self.temperature}: above 0"
            )
        if self.start == "dense":
            self._schedule()

    @property
    def _distils(self) -> bool:
        return bool(self.kd_soft or self.kd_hidden or self.objective == "hidden")

    def _schedule(self) -> Schedule:
        return Schedule.of(
            self.steps or 0, warmup=self.warmup, start=self.prune_start, end=self.prune_end, freeze=self.prune_freeze,
            every=self.prune_every,
        )  # fmt: skip

    def outline(self, model: Any) -> dict[str, str]:
        """What would be pruned, for `sentei plan`; refuses what `compress` refuses."""
        matrices = locks.prunable(model, self.include, self.exclude)
        patterns.check(self.pattern, self.sparsity, {name: (len(p), p[0].numel()) for name, p in matrices.items()})
        total, count = structure.total_parameters(model), sum(p.numel() for p in matrices.values())
        gone = int(self.sparsity * count)
        kept = count - gone
        bits = count / 8 if self.pattern != "1x4" else count / 32
        held = 16 * total + (5 if self.regrow else 1) * count  # masks, and dormant values in fp32
        held += 4 * total if self._distils else 0
        return {
            "may go": f"{count:,} weights in {len(matrices)} matrices ({count / total:.1%} of the model)",
            "will go": f"{gone:,} weights: {self.sparsity:.0%} of these, {gone / total:.1%} of the model",
            "container": f"about {(bits + 4 * kept + 4 * (total - count)) / 1e6:,.0f} MB in fp32, the matrices "
            f"{(bits + kept) / 1e6:,.1f} MB in int8",
            "training": self._takes(held),
        }

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        text: data.Text,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Prune in place; the model stays of its class and the removed weights are exactly 0.

        Returns:
            "sparsity" (reached, of the prunable weights), "sparsity_of_model", "matrices" (name -> zeros, weights),
            "history", "loss_before", "loss_after" (validation), "mask_sha256", "seconds".
        Raises:
            ValueError: a pattern, a matrix or an objective that cannot be, too little text, another corpus than the
                teacher's, a loss that is not finite.
        """
        started = time.monotonic()
        objective = self._objective(model, tokenizer)
        check_corpus(model, text)
        matrices = locks.prunable(model, self.include, self.exclude)
        patterns.check(self.pattern, self.sparsity, {name: (len(p), p[0].numel()) for name, p in matrices.items()})
        batches, held = self._data(model, tokenizer, text, objective)
        fits = self.start == "fit"
        dense = copy.deepcopy(model).eval().requires_grad_(False) if self._distils or fits else None
        teacher = dense if self._distils else None
        stored = {name: p.dtype for name, p in matrices.items()}
        to_fp32(model)
        schedule = None if fits else self._schedule()
        precision = resolve_precision(self.precision, next(model.parameters()).device)
        loss = self._loss(model, teacher, objective)
        before = self._measure(model, held, precision, loss)
        state: dict[str, Any] = {"history": [{"step": 0, "validation_loss": before}]}
        steps = self.steps or 1
        fitted: dict[str, Tensor] | None = None
        if fits:  # a resumed run too, which `train` knows again by the weights that it starts from
            assert dense is not None
            fitted = self._fit(model.eval(), dense, matrices, tokenizer, text, report)
            state["history"].append({"step": 0, "validation_loss": self._measure(model, held, precision, loss)})
        del dense  # where nothing is distilled it has had its use
        with locks.Lock(matrices, fitted, regrow=self.regrow and not fits) as held_zeros:
            if fitted is not None:
                check_ranks(held_zeros.checksum())
                state["lock"] = held_zeros.state()

            def after(step: int) -> dict[str, Any]:
                if schedule is None or not schedule.due(step):
                    held_zeros.apply()
                    return {"sparsity": held_zeros_sparsity[0]}
                masks = patterns.masks(
                    held_zeros.whole(), schedule.sparsity(step, self.sparsity), pattern=self.pattern,
                    scope=self.scope, ties=self.ties, max_matrix_sparsity=self.max_matrix_sparsity,
                )  # fmt: skip
                turnover = held_zeros.move(masks)
                check_ranks(held_zeros.checksum())
                state["lock"] = held_zeros.state()
                held_zeros_sparsity[0] = held_zeros.sparsity
                return {"sparsity": held_zeros_sparsity[0], "turnover": turnover}

            def restored() -> None:
                if "lock" in state:
                    held_zeros.restore(state["lock"])
                    held_zeros_sparsity[0] = held_zeros.sparsity

            # Counting the zeros of a large model takes longer than a small step.
            held_zeros_sparsity = [held_zeros.sparsity]
            warmup = int(self.warmup * steps)
            rate = schedule.rate if schedule is not None and self.rewind else (lambda t: linear(steps, warmup, t))
            self._run(
                model, batches, held, loss, rate, state, fingerprint=repr((asdict(self), text.sha256)), after=after,
                restored=restored, workdir=workdir, report=report,
            )  # fmt: skip
            masks = held_zeros.masks
        rounded = sum(int((masks[name] & (p.to(stored[name]) == 0)).sum()) for name, p in matrices.items())
        gone = sum(int((~mask).sum()) for mask in masks.values())
        history = state["history"]
        return {
            "stage": "student",
            "objective": objective,
            "corpus": text.sha256,
            "pattern": self.pattern,
            "sparsity": gone / sum(mask.numel() for mask in masks.values()),
            "sparsity_of_model": gone / structure.total_parameters(model),
            "matrices": {name: [int((~mask).sum()), mask.numel()] for name, mask in masks.items()},
            "mask_sha256": held_zeros.checksum(),
            "kept_weights_that_are_zero": rounded,
            "history": history,
            "loss_before": before,
            "loss_after": history[-1]["validation_loss"],
            "seconds": time.monotonic() - started,
            "saving": {"masks": masks, "zstd": self.zstd} if self.shape == "sparse" else {},
        }

    def _data(self, model: Any, tokenizer: Any, text: data.Text, objective: str) -> tuple[Batches, list[Batch]]:
        """Blocks, and among them batches of pairs: the second segment's embedding is in no block."""
        single, held = super()._data(model, tokenizer, text, objective)
        if not self.pairs:
            return single, held
        if getattr(model.config, "type_vocab_size", 1) < 2:
            raise ValueError(f"{type(model).__name__} has one segment only; leave pairs at 0")
        size, length = self.batch_size or 1, self.seq_len or 8
        device = next(model.parameters()).device

        def as_they_are(ids: Tensor, n: int) -> Batch:
            return {"input_ids": ids, "targets": ids}

        def read(batch: Batch) -> Batch:
            targets = batch["targets"].masked_fill(batch["attention_mask"] == 0, IGNORE)
            return without_pairs(batch) | {"targets": targets}

        double = pairs(text.train, tokenizer, length, seed=self.seed).batches(size, seed=self.seed, mask=as_they_are)
        made = pairs(text.validation, tokenizer, length, seed=self.seed)
        rows = range(min(len(made), size * max(1, round(self.pairs * len(held)))))
        held_pairs = [read(made.batch(rows[i : i + size], as_they_are, 0)) for i in range(0, len(rows), size)]
        held = held[: len(held) - round(self.pairs * len(held))]
        held += [{name: x.to(device) for name, x in batch.items()} for batch in held_pairs]

        def batches(n: int) -> Batch:
            before, after = int(n * self.pairs), int((n + 1) * self.pairs)
            return read(double(before)) if after > before else single(n - before)

        return batches, held

    def _loss(self, model: Any, teacher: Any, objective: str) -> Any:
        if objective == "hidden":
            return HiddenStates(teacher, same_layers(model))
        loss = HiddenDistillation(
            teacher, self.temperature, self.kd_hard, self.kd_soft, hidden_weight=self.kd_hidden,
            pairs=same_layers(model), positions="targets" if objective == "clm" else "all",
        )  # fmt: skip
        return NextSentence(loss) if objective == "mlm_nsp" else loss

    def _fit(
        self,
        model: Any,
        dense: Any,
        matrices: locks.Matrices,
        tokenizer: Any,
        text: data.Text,
        report: Progress | None,
    ) -> dict[str, Tensor]:
        """Masks of the target sparsity, and weights to go with them: the blocks by `fit`, a pooler by magnitude."""

        def tick(what: str, done: int, of: int) -> None:
            if report is not None:
                report({"message": f"{what} {done}/{of}"})

        all_NT = data.blocks(text.train, tokenizer, self.seq_len or 8)
        count = min(len(all_NT), max(1, self.fit_tokens // all_NT.shape[1]))
        blocks_NT = all_NT[torch.arange(count) * len(all_NT) // count]  # from everywhere in the text
        masks = fit(model, dense, matrices, blocks_NT, self.sparsity, pattern=self.pattern, ties=self.ties, tick=tick)
        rest = {name: p.detach() for name, p in matrices.items() if name not in masks}
        return masks | patterns.masks(rest, self.sparsity, pattern=self.pattern, ties=self.ties)


def masked_rows(ids_BT: Tensor, tokenizer: Any, probability: float, *, seed: int) -> Batch:
    """A batch for masked-token prediction with the same share of targets in every row, as BERT's own data have it.

    The share is of the row's tokens, special ones counted and padding not. Rows of blocks are full, so that the mean
    over a step does not depend on how the step is cut into micro-batches.
    """
    random = torch.Generator().manual_seed(seed)
    noise_BT, kind_BT = torch.rand(2, *ids_BT.shape, generator=random)
    special_BT = torch.isin(ids_BT, torch.tensor([*tokenizer.all_special_ids]))
    noise_BT = noise_BT.masked_fill(special_BT, 2.0)
    real_BT = torch.ones_like(special_BT) if tokenizer.pad_token_id is None else ids_BT != tokenizer.pad_token_id
    count_B1 = (probability * real_BT.sum(1, keepdim=True).double()).round().clamp(min=1)
    chosen_BT = (noise_BT.argsort(dim=1).argsort(dim=1) < count_B1) & ~special_BT
    inputs_BT = ids_BT.clone()
    inputs_BT[chosen_BT & (kind_BT < 0.8)] = tokenizer.mask_token_id
    other_BT = torch.randint(len(tokenizer), ids_BT.shape, generator=random)
    inputs_BT = torch.where(chosen_BT & (kind_BT >= 0.9), other_BT, inputs_BT)
    return {"input_ids": inputs_BT, "targets": ids_BT.masked_fill(~chosen_BT, IGNORE)}


def without_pairs(batch: Batch) -> Batch:
    return {name: x for name, x in batch.items() if name != "next_sentence"}


def with_language_head(model: Any, seed: int, *, next_sentence: bool = False) -> Any:
    """The model itself, or an encoder without a head as a masked language model with a new one.

    Args:
        next_sentence: make it BERT's pre-training model: checkpoints name one head but may hold both.
    """
    if next_sentence and structure.family_name(model) == "bert" and not type(model).__name__.endswith("ForPreTraining"):
        with torch.random.fork_rng([]):
            torch.manual_seed(mix(seed, "head"))
            made = transformers.BertForPreTraining.from_pretrained(
                model.name_or_path, dtype=torch.float32, use_safetensors=True
            )
        return made.to(next(model.parameters()).device).eval()
    if model.get_output_embeddings() is not None:
        return model
    if structure.is_causal(model) or structure.base_model(model) is not model:
        raise ValueError(f"{type(model).__name__} has no language-model head; give the pre-trained language model")
    with torch.random.fork_rng([]):
        torch.manual_seed(mix(seed, "head"))
        made = transformers.AutoModelForMaskedLM.from_config(model.config)
    base = structure.base_model(made)
    missing = base.load_state_dict(model.state_dict(), strict=False).missing_keys  # only its pooler has no place
    assert not missing, missing
    made.tie_weights()
    made.name_or_path = model.name_or_path
    return made.to(next(model.parameters()).device).eval()


def check_corpus(model: Any, text: data.Text) -> None:
    """A student is pruned on the text that its teacher was trained on.

    Raises:
        ValueError: the checkpoint is a teacher that read something else.
    """
    where = Path(model.name_or_path) / "compression.json"
    record = json.loads(where.read_text(encoding="utf-8"))["stages"][-1]["record"] if where.is_file() else {}
    if record.get("stage") == "teacher" and record["corpus"] != text.sha256:
        raise ValueError(
            f"{model.name_or_path} was trained on another corpus (sha256 {record['corpus'][:12]}) than {text.name} "
            f"({text.sha256[:12]}); give the student the text of its teacher"
        )


def to_fp32(model: nn.Module) -> None:
    """Everything is trained, in fp32: small updates vanish in 16 bits."""
    for p in model.parameters():
        p.data = p.data.float()
        p.requires_grad_(True)


def check_ranks(checksum: str) -> None:
    """All processes of a run must have the same mask.

    Raises:
        ValueError: they do not.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    all_of_them: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_of_them, checksum)
    if len(set(all_of_them)) > 1:
        raise ValueError("the processes of this run disagree on the mask; start again from the last state")
