"""The search itself: who judges which cell, and the rounds that remove units until the budget is met."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sentei.adapters import Unit
from sentei.data import examples
from sentei.methods import Progress
from sentei.methods.prune_peft import assignment as assigning
from sentei.methods.prune_peft.planning import Plan
from sentei.methods.prune_peft.state import State
from sentei.methods.prune_peft.training import Bench


@dataclass(frozen=True)
class Search:
    """What the steps of one search share.

    Attributes:
        fields: the method.
        space: all units of the supernet; `cell_of` has the cell of each.
        labels: their number, where rows have some.
    """

    fields: Any
    bench: Bench
    space: list[Unit]
    cell_of: dict[str, assigning.Cell]
    labels: int | None
    plan: Plan
    state: State
    say: Progress

    def tell(self, what: str) -> Callable[[int, int, float], None]:
        """Reports the steps of a training."""
        return lambda step, of, loss: self.say({"step": step, "of": of, "message": f"{what}: loss {loss:.3f}"})


def assign(search: Search, rows: list[examples.Row]) -> None:
    """Step 3, or what stands in for it, into the state."""
    state, plan = search.state, search.plan
    if "assignment" in state.values:
        return
    with state.timed("warmup"):
        if plan.assignment.startswith("file:"):
            found = assigning.from_file(plan.assignment[5:], search.cell_of)
        elif plan.assignment != "warmup":
            found = None if plan.assignment == "random" else assigning.fixed(plan.assignment, search.cell_of)
        else:
            found = warm_up(search, rows)
    state.values["assignment"] = None if found is None else assigning.as_table(found)
    state.save()


def warm_up(search: Search, rows: list[examples.Row]) -> assigning.Assignment:
    """Short runs on few rows, in which every criterion votes."""
    f, cell_of, turns = search.fields, search.cell_of, []
    steps = search.plan.warmup_steps // f.warmup_turns
    for turn in range(f.warmup_turns):
        few = examples.stratified(rows, f.warmup_examples, seed=f.seed + 1000 * (turn + 1), labels=search.labels)
        tell = search.tell(f"warm-up {turn + 1} of {f.warmup_turns}")
        turns.append(search.bench.measure(search.space, few, steps, seed=("warm-up", turn), say=tell))
    votes = assigning.count_votes(turns, cell_of, f.warmup_top, seed=f.seed)
    sizes = {cell: list(cell_of.values()).count(cell) for cell in set(cell_of.values())}
    p = assigning.chance(votes, search.space, cell_of, seed=f.seed)
    search.state.values |= {"votes": votes, "chance": p}
    if p > 0.05:
        note = f"the warm-up's votes are as uneven by chance with probability {p:.2f}: the table says little"
        search.state.values.setdefault("notes", []).append(note)
        search.say({"message": note})
    return assigning.match(assigning.by_cell(votes, cell_of), sizes)


def rounds(search: Search, rows: list[examples.Row], watched: list[examples.Row]) -> list[Unit]:
    """Steps 4 and 5; the units that stay."""
    state, plan = search.state, search.plan
    by_id = {unit.id: unit for unit in search.space}
    living = [by_id[name] for name in state.values["living"]]

    def unfinished() -> bool:
        """Above the budget; or at it, by a removal that the watched metric has not yet seen."""
        done = state.values["rounds"]
        unseen = search.fields.max_drop is not None and done and done[-1]["removed"]
        return sum(unit.parameters for unit in living) > plan.budget or bool(unseen)

    while state.values["status"] == "searching" and unfinished():
        _keep_to_the_plan(search)
        with state.timed("rounds"):
            found = one_round(search, living, rows, watched)
        state.values["rounds"].append(found)
        gone = set(found.get("removed", ()))
        living = [unit for unit in living if unit.id not in gone]
        if "back_to" in found:
            living = [by_id[name] for name in found["back_to"]]
            state.values["status"] = "stopped_early"
        state.values["living"] = [unit.id for unit in living]
        state.save()
    if state.values["status"] == "searching":
        removed = [[by_id[name] for name in found["removed"]] for found in state.values["rounds"]]
        back = assigning.put_back(living, removed, plan.budget)
        names = {unit.id for unit in [*living, *back]}
        living = [unit for unit in search.space if unit.id in names]
        state.values |= {
            "put_back": [unit.id for unit in back],
            "living": [unit.id for unit in living],
            "status": "found",
        }
        state.save()
    return living


def _keep_to_the_plan(search: Search) -> None:
    """Say so, or stop a strict search, before a round that was not planned and costs more than was allowed."""
    f, plan, values = search.fields, search.plan, search.state.values
    number = len(values["rounds"]) + 1
    if number <= plan.rounds or plan.cost(number) <= f.max_search_ratio * 1.001 or not trains(f):
        return
    note = (
        f"the search takes round {number}, {plan.rounds} were planned: it will cost {plan.cost(number):.2f}x of one "
        f"training, goal {f.max_search_ratio:.2f}"
    )
    if f.strict_search_ratio:
        raise ValueError(f"{note}; raise max_search_ratio or units_per_round, or leave strict_search_ratio out")
    if note not in values.setdefault("notes", []):  # a round that is resumed
        values["notes"].append(note)
    warnings.warn(note, stacklevel=2)
    search.say({"message": note})


def trains(fields: Any) -> bool:
    """Do rounds train? Removal at random looks at nothing, unless a metric is watched."""
    return fields.assignment != "random" or fields.max_drop is not None


def one_round(
    search: Search, living: list[Unit], rows: list[examples.Row], watched: list[examples.Row]
) -> dict[str, Any]:
    """Train and score the living units, and choose those that go; "back_to": the watched metric ends the search."""
    f, plan, state = search.fields, search.plan, search.state
    number = len(state.values["rounds"])
    found: dict[str, Any] = {"living": [unit.id for unit in living]}
    measured: dict[str, dict[str, float]] = {}
    if trains(f):
        tell = search.tell(f"round {number + 1} of about {plan.rounds}, {len(living)} units")
        measured = search.bench.measure(living, rows, plan.round_steps, seed=("round", number), say=tell)
    if f.max_drop is not None:
        found["watched"] = search.bench.score(watched)
        if (mask := failing([*state.values["rounds"], found], f.max_drop, f.patience)) is not None:
            return found | {"back_to": mask}
    table = state.values["assignment"]
    cells = set(search.cell_of.values())
    assignment = None if table is None else {cell: tuple(table[cell[0]][cell[1]]) for cell in cells}
    gone, judgement = assigning.remove(
        search.space, living, measured, search.cell_of, assignment, plan.units_per_round, plan.budget,
        slope=f.rank_slope, seed=f.seed, number=number, weights=f.weights(search.space),
    )  # fmt: skip
    return found | {
        "removed": [unit.id for unit in gone],
        "scores": measured,
        "percentiles": judgement.percentile,
        "combined": judgement.combined,
        "probability": judgement.probability,
        "abstained": judgement.abstained,
    }


def failing(found: Sequence[dict[str, Any]], max_drop: float, patience: int) -> list[str] | None:
    """The mask to go back to, if the watched metric was too low for `patience` rounds up to the last."""
    floor = found[0]["watched"] - max_drop
    if len(found) <= patience or not all(one["watched"] < floor for one in found[-patience:]):
        return None
    return found[-patience - 1]["living"]
