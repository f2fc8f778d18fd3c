"""When to prune, how much, and with which learning rate (arXiv 2111.05754, authors' code).

t counts optimiser steps of a run of T; pruning starts at t0, reaches its target at t1 and moves its last mask at
t_end, each a multiple of every. W is the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Steps of a pruning run, all absolute numbers.

    Attributes:
        steps: T.
        warmup: W.
        start, end, freeze: t0, t1 and t_end: target reached at `end`, mask last recomputed at `freeze`.
        every: steps between two masks, also the period of the learning-rate rewinding.
    """

    steps: int
    warmup: int
    start: int
    end: int
    freeze: int
    every: int

    @staticmethod
    def of(steps: int, *, warmup: float, start: float, end: float, freeze: float, every: float) -> Schedule:
        """From fractions of the run.

        Raises:
            ValueError: fewer than 100 steps (a mask would be due more than once a step), or fractions out of order.
        """
        if steps < 100:
            raise ValueError(f"gradual pruning needs at least 100 steps, got {steps}: its schedule moves 100 times")
        if not 0 <= start < end <= freeze <= 1:
            raise ValueError(
                f"pruning must start, end and freeze in this order inside the run: 0 <= prune_start {start} < "
                f"prune_end {end} <= prune_freeze {freeze} <= 1"
            )
        if not 0 <= warmup < 1 or not 0 < every < 1:
            raise ValueError(f"warmup {warmup} and prune_every {every} are fractions of the run, below 1")
        made = Schedule(
            steps, int(warmup * steps), int(start * steps), int(end * steps), int(freeze * steps),
            max(1, int(every * steps)),
        )  # fmt: skip
        if made.steps - (made.end - made.start) <= made.warmup:
            raise ValueError(
                f"warmup {warmup} and pruning from {start} to {end} leave no step in which the learning rate falls; "
                "lower prune_end or warmup"
            )
        return made

    def sparsity(self, t: int, target: float) -> float:
        """Cubic rise from 0 at t0 to the target at t1."""
        left = 1 - (t - self.start) / (self.end - self.start)
        return target * (1 - min(1.0, max(0.0, left**3)))

    def due(self, t: int) -> bool:
        """Is a new mask due after optimiser step t (the first is 1)?"""
        on_time = self.start <= t <= self.freeze and (t - self.start) % self.every == 0
        return on_time or t == self.end

    def rate(self, t: int) -> float:
        """Learning rate of step t (the first is 0) as a multiple of the peak.

        While pruning, the rate is wound back to the same height every `every` steps, and falls in between as it would
        in a run of T - (t1 - t0) steps; then it falls to 0 once. The height exceeds 1, as in the authors' code.
        """
        if t < self.warmup:
            return t / self.warmup
        pruning = self.end - self.start
        rest = self.steps - pruning  # steps of the schedule that is wound back
        decay = rest - self.warmup
        if self.start <= t < self.end:
            return (rest - t + (t - self.start) // self.every * self.every) / decay
        return (self.steps - t - (pruning if t < self.start else 0)) / decay


def linear(steps: int, warmup: int, t: int) -> float:
    """The usual rise and fall, for stages that prune nothing; t counts from 0."""
    return t / warmup if t < warmup else (steps - t) / max(1, steps - warmup)
