"""Units in, training, units out: one bench on which rounds, warm-up turns and the final training all run alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import adapters
from sentei.adapters import Unit
from sentei.data.examples import Row
from sentei.methods.prune_peft.criteria import Recorder
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
        for parameter in self.head_parameters():
            parameter.data = parameter.data.float()
        self._head_start = [p.detach().clone() for p in self.head_parameters()]

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
        """The pooler as it was loaded; what the task adds drawn anew."""
        for parameter, start in zip(self.head_parameters(), self._head_start, strict=True):
            parameter.copy_(start)
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
        """Train what requires gradients; seconds that it took, of all sittings."""
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
        run = train(
            self.model,
            self.task.batches(rows, f.batch_size, seed=number),
            loss,
            settings,
            folder=folder,
            fingerprint=str(len(rows)),
            on_gradients=None if recorder is None else recorder.gradients,
        )
        begun, seconds = time.monotonic(), 0.0
        with closing(run):
            for step in run:
                seconds = step.seconds
                if recorder is not None:
                    recorder.scoring = step.step >= f.score_from * steps
                if say is not None:
                    say(step.step, steps, step.losses["loss"])
        return seconds or time.monotonic() - begun

    def measure(
        self, living: Sequence[Unit], rows: Sequence[Row], steps: int, *, seed: object, say: Any = None
    ) -> tuple[dict[str, dict[str, float]], float]:
        """A fresh start, a training, and the six scores of its units; seconds."""
        self.put(living, seed)
        f = self.fields
        recorder = Recorder(
            self.model, living, init=f.adapter_init, threshold=f.threshold, threshold_mode=f.threshold_mode
        )
        try:
            seconds = self.fit(rows, steps, seed=seed, final_lr=1.0, recorder=recorder, say=say)
            return recorder.scores(), seconds
        finally:
            recorder.close()

    def score(self, rows: Sequence[Row]) -> float:
        return self.task.score(self.model, rows, batch_size=4 * self.fields.batch_size, precision=self.precision)
