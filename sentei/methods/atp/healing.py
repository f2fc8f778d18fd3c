"""Healing: the tuned dense model teaches the masked one, as a second adapter on the same base weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from sentei.distill import Distillation
from sentei.methods import settings as settings_of
from sentei.methods.atp.tuning import Tuning
from sentei.train import Settings, Step, mix, train


def heal(
    tuning: Tuning, teacher: Callable[..., Any], steps: int, *, weight: float, temperature: float
) -> Iterator[Step]:
    """Distil the tuned dense model into the masked one; dropped rows stay zero.

    Loss: (1 - weight) CE + weight t^2 KL(teacher || student) on the positions of the CE.

    Args:
        teacher: a `wiring.Teacher` of that adapter.
    """
    method, keep_U = tuning.method, tuning._keep()
    settings = Settings(
        lr=method.lr, steps=steps, final_lr=method.final_lr, warmup=0.0, weight_decay=method.weight_decay,
        betas=(0.9, 0.999), clip=method.clip, accumulate=method.accumulate, precision=method.precision,
        checkpointing=method.checkpointing, save_every=method.save_every, seed=mix(method.seed, "heal") % 2**31,
    )  # fmt: skip
    folder = tuning.workdir / "heal" if tuning.workdir else None
    tuning.adapters.lock(keep_U)
    loss = Distillation(teacher, temperature, 1 - weight, weight)  # pyright: ignore[reportArgumentType]
    batches = tuning.data.batches(tuning.data.train, settings.seed)
    with tuning.book.using("full", keep_U.float()):
        steps_made = train(
            tuning.model,
            batches,
            loss,
            settings,
            folder=folder,
            fingerprint=repr(settings_of(method) | {"save_every": 0}),
        )
        try:
            with closing(steps_made):
                for step in steps_made:
                    tuning.adapters.zero(keep_U)
                    yield step
        finally:
            tuning.adapters.unlock()
    tuning.adapters.zero(keep_U)
