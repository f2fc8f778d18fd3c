"""What a search may cost, and what follows from it: steps, rounds and rows, before anything is trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sentei.adapters import Unit
from sentei.methods.prune_peft import assignment as assigning
from sentei.methods.prune_peft.criteria import CRITERIA

LEAST_STEPS = 16  # of a round: fewer tell units apart by chance
# Seconds of a search step over those of a plain LoRA step. Planning by a constant, and not by a clock, keeps the plan
# (and so the mask) the same on every machine; what the search really cost is measured and reported.
STEP_COST = 1.4
TRIALS = 9  # removals that are played through for the number of rounds


@dataclass(frozen=True)
class Plan:
    """Sizes of a search.

    Attributes:
        steps: of the full training, per round, of the warm-up in all.
        rounds: as many as scores need that say nothing, or that strip one layer after the other, whichever is more.
        rows: of the slice that every round trains on.
        assignment: as asked, or "paper" where there is no room for a warm-up.
        ratio: what is planned, search steps x STEP_COST / steps of the full training.
        notes: what was changed, and why.
    """

    budget: int
    steps: int
    round_steps: int
    warmup_steps: int
    units_per_round: int
    rounds: int
    rows: int
    assignment: str
    ratio: float
    notes: tuple[str, ...] = ()

    def cost(self, rounds: int) -> float:
        """The ratio, were it so many rounds."""
        return (rounds * self.round_steps + self.warmup_steps) * STEP_COST / self.steps


def budget_parameters(budget: float, budget_of: str, space: Sequence[Unit], base: int, head: int) -> int:
    """The budget as parameters of units. `head` is what counts of the head, 0 if it does not.

    Raises:
        ValueError: nothing would be removed, or nothing could stay.
    """
    total = sum(unit.parameters for unit in space)
    if budget <= 0 or (budget > 1 and not float(budget).is_integer()):
        raise ValueError(f"budget is {budget:g}; expected a number of parameters, or a share between 0 and 1")
    whole = total + head if budget_of == "supernet" else base
    limit = (int(budget) if budget > 1 else math.floor(budget * whole)) - head
    if budget == 1 or limit >= total:
        raise ValueError(
            f"budget {budget:g}: nothing would be removed; the search space has {total:,} parameters. Give less"
        )
    cheapest = min(space, key=lambda unit: (unit.parameters, unit.id))
    if limit < cheapest.parameters:
        raise ValueError(
            f"a budget of {limit:,} parameters is below the cheapest unit, {cheapest.id} with {cheapest.parameters:,}; "
            "give more, or lower lora_r or adapter_width"
        )
    return limit


def count_rounds(space: Sequence[Unit], budget: int, k: int, weights: Mapping[str, float] | None = None) -> int:
    """Rounds until the budget is met: the most of some removals on scores that are made up.

    How many depends on who goes: a ladder gives up more parameters with its top than with the slices below. So the
    scores are noise, or strip one layer after the other.
    """
    by_layer = {criterion: {unit.id: float(unit.layer) for unit in space} for criterion in CRITERIA}
    cell_of = {unit.id: (unit.kind, 0) for unit in space}
    found = []
    for seed in range(TRIALS):
        scores, assignment = ({}, None) if seed else (by_layer, assigning.fixed("weight", cell_of))
        living, count = list(space), 0
        while sum(unit.parameters for unit in living) > budget:
            gone, _ = assigning.remove(
                space, living, scores, cell_of, assignment, k, budget, slope=1, seed=seed, number=count, weights=weights
            )
            removed = set(gone)
            living = [unit for unit in living if unit not in removed]
            count += 1
        found.append(count)
    return max(found)


def plan(
    space: Sequence[Unit],
    budget: int,
    *,
    train_rows: int,
    search_rows: int,
    steps: int,
    batch_size: int,
    warmup_steps: int,
    assignment: str,
    units_per_round: int | None,
    steps_per_round: int | None,
    search_fraction: float | None,
    max_ratio: float,
    least_rows: int,
    patience: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """Fit a search into `max_ratio` of a training: larger removals first, then no warm-up, then a note that it is more.

    Args:
        budget: parameters of units that may stay.
        train_rows, search_rows: of the whole training, and of what may be searched on.
        warmup_steps: 0 where the assignment needs none.
        least_rows: two of each label.
        patience: of a search that watches a metric, which takes a round more; None for others.
        weights: of the kinds, as `assignment.remove` has them.
    """
    first = units_per_round or max(1, round(len(space) / 12))
    allowed = max_ratio * steps / STEP_COST
    notes: list[str] = []

    @functools.cache
    def removals(k: int) -> int:
        return count_rounds(space, budget, k, weights)

    def rounds(k: int) -> int:
        return removals(k) + (patience is not None)

    def room(k: int, warmup: int) -> int:
        return math.floor((allowed - warmup) / rounds(k))

    chosen, warmup, k = assignment, warmup_steps, first
    round_steps = steps_per_round or room(k, warmup)
    if steps_per_round is None and round_steps < LEAST_STEPS:
        ks = [first]
        # Never to a single round, which would not see what the first removals change.
        least = max(2, removals(len(space)))
        while units_per_round is None and removals(ks[-1]) > least and removals(ks[-1] + 1) >= least:
            ks.append(ks[-1] + 1)
        fewest = min(ks, key=lambda k: (rounds(k), k))
        for option in (warmup_steps, 0) if warmup_steps else (0,):
            k = next((k for k in ks if room(k, option) >= LEAST_STEPS), fewest)
            warmup, round_steps = option, room(k, option)
            if round_steps >= LEAST_STEPS:
                break
        if warmup_steps and not warmup:
            chosen = "paper"
            notes.append("the data are too few for a warm-up: the paper's table assigns the criteria")
        if k != first:
            notes.append(
                f"{k} units are removed per round in place of {first}, to leave each round {LEAST_STEPS} steps"
            )
        round_steps = max(round_steps, LEAST_STEPS)
    if patience is not None and rounds(k) <= patience:
        notes.append(
            f"max_drop will stop nothing: {patience} rounds after the first must fall, and {rounds(k)} are planned; "
            "lower patience or units_per_round"
        )
    rows = round_steps * batch_size
    if search_fraction is not None:
        rows = round(search_fraction * train_rows)
    elif train_rows >= 2000:
        rows = min(rows, train_rows // 10)
    rows = min(max(rows, least_rows, 2 * batch_size), search_rows)
    found = Plan(budget, steps, round_steps, warmup, k, rounds(k), rows, chosen, 0.0)
    ratio = found.cost(found.rounds)
    if ratio > max_ratio * 1.001:
        notes.append(f"the search will cost {ratio:.2f}x of one training, goal {max_ratio:.2f}")
    return replace(found, ratio=ratio, notes=tuple(notes))
