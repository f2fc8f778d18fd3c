"""Units in, training, units out: one bench on which rounds, warm-up turns and the final training all run alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import adapters
from sentei.adapters import Unit
from sentei.data.examples import Row
from sentei.methods.prune_peft.criteria import THRESHOLDS, Recorder
from sentei.methods.prune_peft.tasks import Task
from sentei.train import Batch, Settings, mix, resolve_precision, train


class Bench:
    """A model between trainings; the base weights stay as they are.

    Args:
        fields: the method (rates, batch sizes, dropout and so on).
    """

    def __init__(self, model: Any, task: Task, fields: Any, alpha_per_rank: float):
        self.model, self.task, self.fields, self.alpha_per_rank = model, task, fields, alpha_per_rank
        device = next(model.parameters()).device
        self.precision = resolve_precision(fields.precision, device)
        if self.precision == "fp32":  # exact, and 16-bit products are slow on such a device
            model.float()
        self.head = adapters.head(model)
        self._head_dtypes = [p.dtype for p in self.head_parameters()]
        self._head_start = [p.detach().float().clone() for p in self.head_parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        return [p for name in self.head for p in self.model.get_submodule(name).parameters()]

    def put(self, living: Sequence[Unit], seed: object) -> None:
        """A fresh start: the pre-trained weights, a new head, these units at their first values."""
        adapters.unload(self.model)
        f = self.fields
        adapters.inject(
            self.model,
            living,
            alpha_per_rank=self.alpha_per_rank,
            dropout=f.dropout,
            init=f.adapter_init,
            seed=mix(f.seed, "units", seed),
        )
        self.start_head(seed)

    @torch.no_grad()
    def start_head(self, seed: object) -> None:
        """The pooler as it was loaded; what the task adds drawn anew. Both in fp32, to be trained."""
        for parameter, start in zip(self.head_parameters(), self._head_start, strict=True):
            parameter.data = start.to(parameter.device, copy=True)
            parameter.requires_grad_(True)
        random = torch.Generator().manual_seed(mix(self.fields.seed, "head", seed))
        for name in self.head:
            if name.endswith("pooler"):
                continue
            for parameter in self.model.get_submodule(name).parameters():
                drawn = torch.zeros(parameter.shape)
                if parameter.ndim >= 2:
                    drawn.normal_(0, 0.02, generator=random)
                parameter.copy_(drawn)

    def settle_head(self) -> None:
        """The head in the dtype that it came in and will be loaded in: what is measured is what is saved."""
        for parameter, dtype in zip(self.head_parameters(), self._head_dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)

    def fit(
        self,
        rows: Sequence[Row],
        steps: int,
        *,
        seed: object,
        final_lr: float = 0.0,
        lr: float | None = None,
        recorder: Recorder | None = None,
        folder: Path | None = None,
        say: Callable[[int, int, float], None] | None = None,
    ) -> float:
        """Train what requires gradients; seconds that the steps took, of all sittings."""
        f = self.fields
        number = mix(f.seed, "training", seed)
        settings = Settings(
            lr=lr or f.lr,
            steps=steps,
            final_lr=final_lr,
            warmup=0.1,
            weight_decay=f.weight_decay,
            betas=(0.9, 0.999),
            accumulate=f.accumulate,
            precision=self.precision,
            save_every=f.save_every,
            seed=number,
        )

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            if recorder is not None:
                recorder.begin(batch.get("attention_mask"))
            return self.task.loss(model, batch)

        if recorder is not None:
            recorder.scoring = f.score_from <= 0
        spent = {"seconds": 0.0}  # kept with the checkpoint: one that is complete makes no step, and yet took time
        run = train(
            self.model,
            self.task.batches(rows, f.batch_size, seed=number),
            loss,
            settings,
            folder=folder,
            state=spent,
            fingerprint=str(len(rows)),
            on_gradients=None if recorder is None else recorder.gradients,
        )
        with closing(run):
            for step in run:
                spent["seconds"] = step.seconds
                if recorder is not None:
                    recorder.scoring = step.step >= f.score_from * steps
                if say is not None:
                    say(step.step, steps, step.losses["loss"])
        return spent["seconds"]

    def measure(
        self, living: Sequence[Unit], rows: Sequence[Row], steps: int, *, seed: object, say: Any = None
    ) -> dict[str, dict[str, float]]:
        """A fresh start, a training, and the six scores of its units."""
        self.put(living, seed)
        f = self.fields
        limit = THRESHOLDS[f.threshold_mode] if f.threshold is None else f.threshold
        recorder = Recorder(self.model, living, init=f.adapter_init, threshold=limit, threshold_mode=f.threshold_mode)
        try:
            self.fit(rows, steps, seed=seed, final_lr=1.0, recorder=recorder, say=say)
            return recorder.scores()
        finally:
            recorder.close()

    def score(self, rows: Sequence[Row]) -> float:
        return self.task.score(self.model, rows, batch_size=4 * self.fields.batch_size, precision=self.precision)
