"""The loop: two updates in turn on two slices of the data, the freeze, the zeros, and tuning of what stays.

Shape legend: U units, B rows, T tokens.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sentei.atomic import replacing
from sentei.data import prompts
from sentei.distill import Distillation, held_out
from sentei.importance import Moments, flap, mean_fill, moments
from sentei.masks import Fill
from sentei.methods import Progress
from sentei.methods import settings as settings_of
from sentei.methods.atp import generator as decisions
from sentei.methods.atp import gradients, health, ranks, selection
from sentei.methods.atp.refit import Refit
from sentei.methods.atp.wiring import Adapters, MaskBook, Teacher, with_adapter
from sentei.step_log import StepLog
from sentei.structure import KINDS, Units
from sentei.train import (
    Batch,
    Batches,
    Settings,
    Step,
    autocast,
    evaluating,
    mix,
    processes,
    recompute_activations,
    shuffled,
    train,
    weights_digest,
)

if TYPE_CHECKING:
    from sentei.methods.atp import ATP

LEAD = "generator.pt"  # in the work folder
MOST_HISTORY = 400  # entries in the record; the log file has every step
CHECK_EVERY = 50  # control steps between two checks that all processes have the same mask
SHRINK_MARGIN = 2.0  # the ramp can take away so many times the largest dropped norm


@dataclass(frozen=True)
class Data:
    """Rows as tokens: LoRA learns on `train`, the generator on `slice`; `held` chooses the best weights at the end.

    `text_NT` are blocks of the rows of `train`, for the refit and the scores of the start; `near_U` is a mask that the
    generator begins near to, if there is one.
    """

    train: prompts.Encoded
    slice: prompts.Encoded
    held: prompts.Encoded
    text_NT: Tensor
    near_U: Tensor | None
    pad: int
    loss_on: str
    prompt_loss_weight: float
    batch_size: int
    steps: int
    fingerprint: str

    def batches(self, of: prompts.Encoded, seed: int) -> Batches:
        rows = torch.arange(len(of))[:, None]

        def make(chosen: Tensor, n: int) -> Batch:
            return self.batch(of, chosen[:, 0].tolist(), self.prompt_loss_weight)

        return shuffled(rows, self.batch_size, seed=seed, make=make)

    def batch(self, of: prompts.Encoded, chosen: list[int], prompt_loss_weight: float = 0.0) -> Batch:
        """Rows to learn from, or without that weight to choose the best step by."""
        return prompts.collate(of, chosen, pad=self.pad, loss_on=self.loss_on, prompt_loss_weight=prompt_loss_weight)


class Tuning:
    """A run under way. Everything that changes is in the parameters, the optimisers and `state`, which are saved."""

    def __init__(
        self,
        method: ATP,
        model: Any,
        units: Units,
        floors: selection.Floors,
        book: MaskBook,
        adapters: Adapters,
        data: Data,
        precision: str,
        workdir: Path | None,
        report: Progress | None,
    ):
        self.method, self.model, self.units, self.floors = method, model, units, floors
        self.book, self.adapters, self.data = book, adapters, data
        self.precision, self.workdir, self.report = precision, workdir, report
        self.device = next(model.parameters()).device
        self.processes = processes()
        learned = method.mask == "learned"
        decided = round(method.control_fraction * data.steps) if learned else 0
        self.lead_steps = max(1, decided) if learned and method.lora_on == "cut" else 0  # before LoRA's first
        self.control_steps = 0 if self.lead_steps else decided
        self.frozen_steps = data.steps - self.control_steps
        gradual = self.control_steps and method.zeroing == "proximal" and not method.refits
        self.ramp = math.ceil(method.ramp * self.frozen_steps) if gradual else 0
        self.eval_every = method.eval_every or max(1, self.frozen_steps // 10)
        self.generator = decisions.Generator(units, seed=method.seed)
        groups = [
            {"params": [p], "lr_scale": method.group_lr_scale if name == "heads.heads" else 1.0}
            for name, p in self.generator.named_parameters()
        ]
        self.generator_optimizer = torch.optim.AdamW(
            groups, lr=method.generator_lr, weight_decay=method.generator_weight_decay
        )
        self.guide: Distillation | None = None
        read = data
        if method.generator_loss == "kl":
            adapter = "default" if method.lora_on == "dense" else None
            self.guide = Distillation(Teacher(model, book, adapter), ce_weight=0.0)
            read = replace(data, loss_on="full")  # near to the dense model on every token; loss_on is what LoRA learns
        self.slice_batches = read.batches(data.slice, mix(method.seed, "slice")) if learned else None
        self.state: dict[str, Any] = {
            "phase": "control" if self.control_steps or self.lead_steps else "frozen",
            "keep": torch.ones(len(units), dtype=torch.bool),
            "history": [],
            "last": {},
            "flips": [],
            "budget": [],
            "slice_tokens": 0,
            "generator_seconds": 0.0,
            "begin_seconds": 0.0,
            "best": None,
            "best_loss": None,
            "best_step": None,
            "without_better": 0,
            "freeze": {},
            "zeroing": {},
            "peak_lasso": 0.0,
        }
        self._mask_of: tuple[Tensor | None, Tensor | None] = (None, None)
        self._loaded = True
        self.refit = Refit(method, model, units, book, data.text_NT, workdir)
        self.log = StepLog(method.log if self.processes.is_main_process else None)
        # Mode "beta" pulls dropped rows down all along and sets them to zero at the very end.
        self._live = method.zeroing == "beta" and self.control_steps > 0

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Both phases; leaves the tuned adapters, zero in dropped rows, and the mask in `state["keep"]`."""
        folder, method = self.workdir, self.method
        resuming = folder is not None and (folder / "train.pt").exists()
        self._loaded = not resuming
        settings = Settings(
            lr=method.lr,
            steps=self.data.steps,
            final_lr=method.final_lr,
            warmup=0.0,
            weight_decay=method.weight_decay,
            betas=(0.9, 0.999),
            clip=method.clip,
            accumulate=method.accumulate,
            precision=method.precision,
            checkpointing=method.checkpointing,
            save_every=method.save_every,
            patience=1,
            seed=method.seed,
        )
        if method.checkpointing:  # the generator's first step comes before the loop that would switch it on
            recompute_activations(self.model)
        with self.book.using("off" if method.mask == "none" else "base", self._mask()):
            # A mask that is there before LoRA's first step is made, and its rows are zeroed, before `train` looks at
            # the weights it starts from: on resuming too. It is the same each time.
            if not resuming or not self.control_steps:
                begun = time.monotonic()
                self._begin()
                self.state["begin_seconds"] = time.monotonic() - begun
            steps = train(
                self.model,
                self.data.batches(self.data.train, method.seed),
                self._lora_loss,
                settings,
                folder=folder,
                state=self.state,
                fingerprint=self._identity(),
            )
            try:
                with closing(steps):
                    for step in steps:
                        if self._after(step):
                            break
            except ValueError as error:
                if "not finite" in str(error):
                    raise ValueError(self._not_finite(str(error))) from error
                raise
            finally:
                self.adapters.unlock()
        return self._finish()

    def _begin(self) -> None:
        """The mask of the first LoRA step."""
        if self.lead_steps:
            self._lead()
        elif self.control_steps:
            self._start()
            self._decide(0)
        elif self.method.mask in ("taylor", "random"):
            self._set_mask(self._fixed_mask())
            self.adapters.zero(self.state["keep"])
            if self.method.refits:
                self.refit.run(self.state["keep"])
            self.adapters.lock(self._keep())

    def _start(self) -> None:
        """The generator's first logits."""
        method, units = self.method, self.units
        if method.first_mask == "dense":
            return
        if method.first_mask == "taylor" or method.units != "groups+channels":
            score_U = self._taylor()
        else:
            score_U = ranks.shared(flap(self.model, units, self._seen).float())
        if (near_U := self.data.near_U) is not None:
            first_U = decisions.start_near(score_U, near_U, units, method.offset)
        else:
            start = decisions.start_logits if method.first_mask == "taylor" else decisions.start_alike
            first_U = start(score_U, units, method.sparsity, method.offset)
        # The network's first output is chance, and as large as a fourteenth of all ranks.
        self.generator.start_U = first_U - self.generator.logits()

    def _lead(self) -> None:
        """All steps of the generator, and the freeze, while LoRA waits; counted up to 0, where LoRA begins."""
        file = self.workdir / LEAD if self.workdir else None
        how = repr((self._identity(), weights_digest(self.model))) if file else ""
        done = 0
        if file is not None and file.exists():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved["run"] != how:
                raise ValueError(f"{file} belongs to another run; delete it or use another folder")
            done = saved["done"]
            self.state.update(saved["state"])
            self.generator.load_state_dict(saved["generator"])
            self.generator_optimizer.load_state_dict(saved["generator_optimizer"])
            self._set_mask(self.state["keep"])
        else:
            self._start()
        begun = time.monotonic()
        for step in range(done, self.lead_steps, self.method.control_every):
            with with_adapter(self.model, None):  # they have learned nothing yet
                self._decide(step)
            done = min(step + self.method.control_every, self.lead_steps)
            entry = {"step": done - self.lead_steps, "phase": "control", **self.state["last"]}
            entry |= {"slice_tokens": self.state["slice_tokens"], "seconds": time.monotonic() - begun}
            if done % math.ceil(self.lead_steps / MOST_HISTORY) == 0 or done == self.lead_steps:
                self.state["history"].append(entry)
            self.log.write(entry)
            if self.report is not None:
                self.report({"step": done, "of": self.lead_steps, "message": self._in_words(entry)})
            due = done == self.lead_steps or done % self.method.save_every < self.method.control_every
            if file is not None and due and self.processes.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                whole = {"run": how, "done": done, "state": self.state, "generator": self.generator.state_dict()}
                with replacing(file) as part:
                    torch.save(whole | {"generator_optimizer": self.generator_optimizer.state_dict()}, part)
        self._freeze(0)

    def _lora_loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with the base masked and the adapters free, plus the pull on dropped rows.

        With lora_on=dense nothing is masked, or pulled, until the mask is frozen.
        """
        if not self._loaded:
            self._restore()
        self.book.mask_U = self._mask()
        if self.control_steps and self.method.lora_on == "dense":
            self.book.mode = "off" if self.state["phase"] == "control" else "base"
        found = Distillation()(model, batch)
        beta = self._beta()
        if not beta:
            return {"loss": found["loss"], "ce": found["ce"]}
        lasso = self.adapters.lasso(self.book.mask_U)
        return {"loss": found["loss"] + beta * lasso, "ce": found["ce"], "lasso": lasso}

    def _beta(self) -> float:
        if self.state["phase"] == "control":
            return self.method.beta if self.method.lora_on == "masked" else 0.0
        return self.method.beta_last if self._live else 0.0

    def _after(self, step: Step) -> bool:
        """What comes between two LoRA steps; True when it is time to stop."""
        state, stop = self.state, False
        entry: dict[str, Any] = {"step": step.step, "phase": state["phase"], "ce": step.losses["ce"]}
        if state["phase"] == "control":
            entry |= state["last"] | self.adapters.levels(self._mask())
            if self.method.lora_on == "masked":
                state["peak_lasso"] = max(state["peak_lasso"], entry["lasso"])
        entry |= {"lora_tokens": step.tokens, "slice_tokens": state["slice_tokens"], "seconds": step.seconds}
        if state["phase"] == "control":
            if step.step >= self.control_steps:
                self._freeze(step.step)
            elif step.step % self.method.control_every == 0:
                self._decide(step.step)
        else:
            stop = self._frozen(step, entry)
            if self.method.mask != "none":
                entry |= self.adapters.levels(self._mask())
        if self.control_steps:
            state["generator"] = self.generator.state_dict()
            state["generator_optimizer"] = self.generator_optimizer.state_dict()
        every = math.ceil(self.data.steps / MOST_HISTORY)
        if step.step % every == 0 or stop or step.step == self.data.steps or "validation_ce" in entry:
            state["history"].append(entry)
        self.log.write(entry)
        if self.report is not None:
            self.report(self._progress(step, entry))
        return stop

    def _restore(self) -> None:
        """The generator and the locks, at the first forward after `train` has filled `state` from a checkpoint."""
        self._loaded = True
        if "generator" in self.state:
            self.generator.load_state_dict(self.state["generator"])
            self.generator_optimizer.load_state_dict(self.state["generator_optimizer"])
            if self.state["freeze"].get("refitted"):
                self.refit.resume()
        if self.state["phase"] == "frozen" and self.method.mask != "none" and not self._live:
            self.adapters.lock(self._keep())

    # --- the generator's step -------------------------------------------------------------------------------------

    def _decide(self, step: int) -> None:
        """One step of the generator on its own slice, then a hard mask for the LoRA steps that follow."""
        begun, method = time.monotonic(), self.method
        late = step >= 0.8 * (self.lead_steps or self.control_steps)
        for group in self.generator_optimizer.param_groups:
            drop = method.generator_lr_drop if late else 1.0
            group["lr"] = method.generator_lr * drop * group["lr_scale"]
        self.generator.train()
        with torch.random.fork_rng([]):
            torch.manual_seed(mix(method.seed, "generator dropout", step))
            logits_U = self.generator()
        noise_U = decisions.gumbel(len(self.units), method.seed, "generator", step)
        soft_U, hard_U = decisions.binarise(logits_U, noise_U, method.temperature, method.offset)
        forward_U = hard_U if method.mask_in_loss == "hard" else soft_U
        losses, gradient_U, tokens = self._mask_gradient(ranks.shared(forward_U.detach()), step)
        cost_U = self.units.cost_U.float()
        kept = (hard_U * cost_U).sum() / cost_U.sum()
        price = decisions.budget_loss(kept, 1 - method.sparsity)
        # The chain rule in two parts: what the model says about the mask, then what the mask says about the network.
        loss = (forward_U * gradient_U).sum() + method.alpha * price
        self.generator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.generator.parameters(), method.generator_clip or math.inf)
        if not (math.isfinite(losses["loss"]) and bool(torch.isfinite(norm))):
            raise ValueError(self._not_finite(f"loss {losses['loss']} on the generator's slice, step {step}"))
        self.generator_optimizer.step()
        before_U = self.state["keep"]
        keep_U, sampled = self._sample(step)
        flips = {
            kind: int((keep_U != before_U)[self.units.kind_U == KINDS.index(kind)].sum())
            for kind in self.units.granularity
        }
        self._set_mask(keep_U)
        if step // method.control_every % max(1, CHECK_EVERY // method.control_every) == 0:
            ranks.check_same(keep_U)
        state = self.state
        state["flips"].append(sum(flips.values()))
        state["budget"].append(float(price.detach()))
        state["slice_tokens"] += tokens
        state["generator_seconds"] += time.monotonic() - begun
        state["last"] = {
            "slice_ce": losses["ce"],
            **({"slice_kl": losses["kl"]} if "kl" in losses else {}),
            "budget_loss": float(price.detach()),
            "kept": sampled,
            "wanted_kept": 1 - method.sparsity,
            "flips": sum(flips.values()),
            **{f"flips_{kind}": count for kind, count in flips.items()},
            **{
                f"kept_{kind}": float(keep_U[self.units.kind_U == KINDS.index(kind)].float().mean())
                for kind in self.units.granularity
            },
        }

    def _mask_gradient(self, mask_U: Tensor, step: int) -> tuple[dict[str, float], Tensor, int]:
        """Losses of the slice's next batches under a mask, the gradient [U] and the number of targets."""
        assert self.slice_batches is not None
        method, world, rank = self.method, self.processes.num_processes, self.processes.process_index
        first = step // method.control_every * method.accumulate * world
        micro = [self.slice_batches(n) for n in range(first + rank, first + method.accumulate * world, world)]
        return gradients.mask_gradient(
            self.model,
            self.book,
            mask_U,
            micro,
            self.precision,
            loss=self.guide,
            fill=self._fill,
            checkpointing=method.checkpointing,
        )

    def _sample(self, step: int) -> tuple[Tensor, float]:
        """A hard mask without the network's dropout and with fresh noise, and the fraction of parameters it keeps."""
        logits_U = self.generator.logits()
        noise_U = decisions.gumbel(len(self.units), self.method.seed, "sample", step)
        soft_U, _ = decisions.binarise(logits_U, noise_U, self.method.temperature, self.method.offset)
        keep_U = selection.revive(soft_U >= 0.5, logits_U, self.units, self.floors)
        keep_U = ranks.shared(keep_U.to(torch.uint8)).bool()
        return keep_U, self._fraction(keep_U)

    # --- the freeze, and what follows -----------------------------------------------------------------------------

    def _freeze(self, step: int) -> None:
        """The final mask, and how it differs from what the run has trained with."""
        method, units, state = self.method, self.units, self.state
        logits_U = self.generator.logits()
        probability_U = decisions.keep_probability(logits_U, method.offset)
        threshold_U = selection.revive(probability_U >= 0.5, logits_U, units, self.floors)
        if method.final_mask == "last_sample":
            keep_U = state["keep"]
        elif method.final_mask == "threshold":
            keep_U = threshold_U
        elif method.shape == "uniform":
            keep_U = selection.uniform(logits_U, units, method.sparsity, self.floors)
        else:
            keep_U = selection.top_k(logits_U, units, method.sparsity, self.floors)
        keep_U = ranks.shared(keep_U.to(torch.uint8)).bool()
        undecided_U = (probability_U > 0.05) & (probability_U < 0.95)
        fifth = max(1, len(state["flips"]) // 5)
        early, late = sum(state["flips"][:-fifth][-fifth:]), sum(state["flips"][-fifth:])
        state["freeze"] = {
            "step": step,
            **self.adapters.levels(self._mask()),
            "kept_before": self._fraction(threshold_U),
            "kept_last_sample": self._fraction(state["keep"]),
            "kept": self._fraction(keep_U),
            "wanted": 1 - method.sparsity,
            "misses_budget_by": self._fraction(keep_U) - (1 - method.sparsity),
            "changed_against_last_sample": int((keep_U != state["keep"]).sum()),
            "undecided": float(undecided_U.double().mean()),
            "flips_fall": late <= early,
        }
        self._set_mask(keep_U)
        state["phase"] = "frozen"
        if self.lead_steps:
            self.adapters.widen(self._keep())
        if method.zeroing == "immediate" or method.refits or self.lead_steps:
            state["zeroing"]["largest_norm"] = self.adapters.zero(self._keep())
            if method.refits:
                state["freeze"] |= self._try_refit(keep_U)
        elif self.ramp:
            state["zeroing"]["shrink"] = self._shrink()
        if not self._live:
            self.adapters.lock(self._keep())

    def _try_refit(self, keep_U: Tensor) -> dict[str, Any]:
        """The refit, unless held-out rows are better off without it.

        It aims at the outputs of the dense model with the adapters on it. Adapters that have learned under a mask
        (lora_on=masked) do not fit that model, nor a base refitted to it.
        """
        before = self.held_loss()
        self.refit.run(keep_U)
        after = self.held_loss()
        stays = after <= before
        if not stays:
            self.refit.undo()
        return {"loss_before_refit": before, "loss_after_refit": after, "refitted": stays}

    def _shrink(self) -> float:
        """How much faster rows shrink at the end of the ramp than Adam can move them: `shrink`, or what it takes.

        Over the ramp's t = 1 .. n a row of r elements loses lr sqrt(r) (1 + shrink t / n) per step. The ones stand
        against Adam; the rest, lr sqrt(r) shrink (n + 1) / 2, must outweigh the largest norm that is to go.
        """
        norm, per_step = self.adapters.largest(self._keep()), self.method.lr * self.method.lora_rank**0.5
        return max(self.method.shrink, SHRINK_MARGIN * 2 * norm / (per_step * (self.ramp + 1)))

    def _frozen(self, step: Step, entry: dict[str, Any]) -> bool:
        """Shrink dropped rows, lock those at zero; after the ramp measure on held-out rows."""
        method, state = self.method, self.state
        done = step.step - self.control_steps
        keep_U = self._keep()
        if method.mask != "none" and not self._live:
            if done <= self.ramp:
                self.adapters.shrink(keep_U, step.lr * (1 + state["zeroing"]["shrink"] * done / self.ramp))
            if done >= self.ramp:  # also after the ramp: Adam's momentum moves rows whose gradient is masked
                largest = self.adapters.zero(keep_U)
                if done == max(self.ramp, 1):
                    state["zeroing"].setdefault("largest_norm", largest)
                    state["zeroing"]["forward_gap"] = gap = self.forward_gap()
                    assert gap <= 1e-3 or self.precision != "fp32", f"the two forwards differ by {gap} after zeroing"
            self.adapters.lock(keep_U)
        if self._live or done < self.ramp or (done % self.eval_every and step.step < self.data.steps):
            return False
        loss = self.held_loss()
        entry["validation_ce"] = loss
        if state["best_loss"] is None or loss < state["best_loss"]:
            best = {n: p.detach().to("cpu", copy=True) for n, p in self.model.named_parameters() if p.requires_grad}
            state.update(best=best, best_loss=loss, best_step=step.step, without_better=0)
        else:
            state["without_better"] += 1
        return bool(method.patience) and state["without_better"] >= method.patience

    @torch.no_grad()
    def _finish(self) -> dict[str, Any]:
        """The best adapters put back, every dropped row zero."""
        state, keep_U = self.state, self._keep()
        if self._live:
            state["zeroing"]["forward_gap_before"] = self.forward_gap()
            state["zeroing"]["largest_norm"] = self.adapters.zero(keep_U)
        if state["best"] is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["best"][name])
        self.adapters.zero(keep_U)
        last = state["history"][-1] if state["history"] else {}
        return {
            "steps": last.get("step", 0),
            "lora_tokens": last.get("lora_tokens", 0),
            "slice_tokens": state["slice_tokens"],
            "generator_seconds": state["generator_seconds"],
            "tuning_seconds": state["begin_seconds"] + last.get("seconds", 0.0),
            "best_step": state["best_step"],
            "validation_loss": state["best_loss"],
            "freeze": state["freeze"],
            "zeroing": state["zeroing"],
            "warnings": health.alarms(
                state, self.lead_steps or self.control_steps, self.method.final_mask, self.method.first_mask == "dense"
            ),
            "history": state["history"],
        }

    @torch.no_grad()
    def forward_gap(self) -> float:
        """Largest difference of the logits between the two masked forwards, dropout off."""
        batch = self.data.batch(self.data.train, [0])
        inputs = {name: x.to(self.device) for name, x in batch.items() if name != "targets"}
        logits = {}
        for mode in ("base", "full"):
            with evaluating(self.model), self.book.using(mode, self._mask()), autocast(self.precision, self.device):
                logits[mode] = self.model(**inputs, use_cache=False).logits.float()
        return float((logits["base"] - logits["full"]).abs().max())

    def held_loss(self) -> float:
        """Mean cross-entropy of the held-out rows as the cut model would have it, nats per target."""
        rows, size = range(min(len(self.data.held), self.method.eval_rows)), self.data.batch_size
        batches = (self.data.batch(self.data.held, [*rows[start : start + size]]) for start in rows[::size])
        with self.book.using("off" if self.method.mask == "none" else "full", self._mask()):
            found = held_out(self.model, batches, self.precision)["ce"]
        return float(ranks.shared(torch.tensor(found, dtype=torch.double)))

    def _fixed_mask(self) -> Tensor:
        """The mask of the baselines: by Taylor scores of the untuned model, or by chance."""
        units, method = self.units, self.method
        if method.mask == "random":
            score_U = torch.rand(len(units), generator=torch.Generator().manual_seed(mix(method.seed, "random")))
        else:
            score_U = self._taylor()
        if method.shape == "uniform":
            return selection.uniform(score_U, units, method.sparsity, self.floors)
        return selection.top_k(score_U, units, method.sparsity, self.floors, by_kind=True)

    @cached_property
    def _seen(self) -> dict[tuple[int, str], Moments]:
        """What the untuned dense model's reading linears take in, on the text of the refit."""
        with evaluating(self.model), with_adapter(self.model, None), self.book.using("off"):
            return moments(self.model, self.data.text_NT, self.units.granularity)

    @cached_property
    def _fill(self) -> Fill:
        """What stands in for masked units while the generator seeks: their means where a refit makes good for them."""
        if not self.method.refits:
            return {}
        return {place: mean_W.to(self.device) for place, mean_W in mean_fill(self._seen).items()}

    def _taylor(self) -> Tensor:
        """Scores [U] of the untuned model on the first training batches."""
        method = self.method
        batches = self.data.batches(self.data.train, method.seed)
        score_U = gradients.taylor(
            self.model, self.book, len(self.units), batches, self.precision, checkpointing=method.checkpointing
        )
        return ranks.shared(score_U)

    # --- masks and words ------------------------------------------------------------------------------------------

    def _set_mask(self, keep_U: Tensor) -> None:
        self.state["keep"] = keep_U.cpu()
        self.book.mask_U = self._mask()

    def _keep(self) -> Tensor:
        return self._mask() > 0

    def _mask(self) -> Tensor:
        """The hard mask on the model's device, as floats."""
        if self._mask_of[0] is not self.state["keep"]:
            self._mask_of = self.state["keep"], self.state["keep"].float().to(self.device)
        assert self._mask_of[1] is not None
        return self._mask_of[1]

    def _fraction(self, keep_U: Tensor) -> float:
        return int(self.units.cost_U[keep_U].sum()) / self.units.total

    def _identity(self) -> str:
        """What a saved state must share with this run, besides weights. Saving more often changes no number."""
        return repr((settings_of(self.method) | {"save_every": 0}, self.data.fingerprint))

    def _not_finite(self, what: str) -> str:
        kept = f"; the last good state is in {self.workdir}" if self.workdir else ""
        return f"{what} (phase {self.state['phase']}, {self.precision}){kept}"

    def _progress(self, step: Step, entry: dict[str, Any]) -> dict[str, Any]:
        tokens = step.tokens + self.state["slice_tokens"]
        message = f"{self._in_words(entry)}, {tokens / max(step.seconds, 1e-9):,.0f} tokens/s"
        return {"step": step.step, "of": self.data.steps, "message": message} | step.losses

    def _in_words(self, entry: dict[str, Any]) -> str:
        words = [f"ce {entry['ce']:.3f}"] if "ce" in entry else []
        if "slice_ce" in entry:
            words.append(f"slice {entry['slice_ce']:.3f}")
            words.append(f"kept {entry['kept']:.3f} (want {entry['wanted_kept']:.3f})")
            rates = (f"{kind} {entry[f'kept_{kind}']:.0%}" for kind in self.units.granularity)
            words.append(", ".join(rates))
            words.append(f"{entry['flips']} flips")
        if "lasso" in entry:
            words.append(f"lasso {entry['lasso']:.3g}")
        if self.state["best_loss"] is not None:
            words.append(f"held out {self.state['best_loss']:.3f}")
        return f"{entry['phase']}: {', '.join(words)}"
