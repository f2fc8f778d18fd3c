"""Which criterion judges where, and which units go.

A *cell* is a kind of unit in one of four depth blocks. An assignment gives every cell a set of criteria. Percentiles
are taken within a kind over all layers, so a cell with many criteria, or a criterion of another scale, removes no more
than its share of units when the scores are noise: the null test of this method.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sentei.adapters import Unit
from sentei.methods.prune_peft.criteria import CRITERIA, abstains, percentiles, prunability
from sentei.train import mix

Cell = tuple[str, int]
"""(kind, depth block)"""
Assignment = dict[Cell, tuple[str, ...]]

# The released code's table, by depth block; the LoRA row serves every projection.
PAPER: dict[str, tuple[tuple[str, ...], ...]] = {
    "lora": (("activation", "threshold"), ("threshold",), ("zeros",), ("gradient",)),
    "adapter": (
        ("activation", "weight", "sensitivity", "zeros"),
        ("sensitivity", "weight"),
        ("weight", "sensitivity"),
        ("sensitivity",),
    ),
}
SHUFFLES = 10_000


@dataclass(frozen=True)
class Judgement:
    """One round's verdict.

    Attributes:
        order: removable unit ids, most prunable first, by kind.
        probability: unit id -> P in (0, 1).
        combined: unit id -> E, before ranking.
        percentile: criterion -> unit id -> p; criteria that abstain have none for that kind.
        abstained: kind -> criteria.
    """

    order: dict[str, list[str]]
    probability: dict[str, float]
    combined: dict[str, float]
    percentile: dict[str, dict[str, float]]
    abstained: dict[str, list[str]] = field(default_factory=dict)


def depth_blocks(num_layers: int, cuts: Sequence[float] = (0.2, 0.5, 0.8)) -> list[int]:
    """Depth block of each layer: how many cuts lie at or before its middle, (layer + 1/2) / L."""
    return [sum((layer + 0.5) / num_layers >= cut for cut in cuts) for layer in range(num_layers)]


def cells(units: Sequence[Unit], num_layers: int, cuts: Sequence[float]) -> dict[str, Cell]:
    """Unit id -> its cell."""
    blocks = depth_blocks(num_layers, cuts)
    return {unit.id: (unit.kind, blocks[unit.layer]) for unit in units}


def fixed(name: str, cell_of: Mapping[str, Cell]) -> Assignment:
    """ "equal": all six everywhere; "paper": the released code's table; a criterion's name: that one everywhere."""
    if name == "paper":
        return {cell: PAPER["adapter" if cell[0] == "adapter" else "lora"][cell[1]] for cell in set(cell_of.values())}
    chosen = CRITERIA if name == "equal" else (name,)
    return dict.fromkeys(set(cell_of.values()), tuple(chosen))


def from_file(path: str | Path, cell_of: Mapping[str, Cell]) -> Assignment:
    """An assignment saved as JSON: {"lora": [["gradient"], ...], ...}, four lists of criteria for each kind."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        table = table.get("assignment", table)
        found = {cell: tuple(table[cell[0]][cell[1]]) for cell in set(cell_of.values())}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no assignment for these units ({type(error).__name__}: {error}); expected JSON "
            '{"lora": [[criteria of the first depth block], ... four of them], "adapter": [...]}'
        ) from error
    unknown = {criterion for criteria in found.values() for criterion in criteria} - set(CRITERIA)
    if unknown or not all(found.values()):
        raise ValueError(f"{path}: {', '.join(map(str, unknown)) or 'an empty cell'}; known: {', '.join(CRITERIA)}")
    return found


def as_table(assignment: Assignment) -> dict[str, list[list[str]]]:
    """For JSON: kind -> criteria of each depth block; empty where no unit is."""
    kinds = sorted({kind for kind, _ in assignment})
    return {kind: [list(assignment.get((kind, block), ())) for block in range(4)] for kind in kinds}


# --- matching by a warm-up ----------------------------------------------------------------------


def count_votes(
    scores: Sequence[Mapping[str, Mapping[str, float]]], cell_of: Mapping[str, Cell], top: float, *, seed: object
) -> dict[str, dict[str, int]]:
    """Criterion -> unit id -> in how many turns it was in the criterion's most prunable share `top` of its kind.

    Ties are broken by chance, another one for every turn, kind and criterion.
    """
    votes = {criterion: dict.fromkeys(sorted(cell_of), 0) for criterion in CRITERIA}
    for number, turn in enumerate(scores):
        for criterion, of_unit in turn.items():
            for kind in sorted({cell[0] for cell in cell_of.values()}):
                ids = sorted(name for name in of_unit if cell_of[name][0] == kind)
                d = [prunability(criterion, of_unit[name]) for name in ids]
                if abstains(d):
                    continue
                draw = [mix(seed, "votes", number, kind, criterion, name) for name in ids]
                order = sorted(zip(d, draw, ids, strict=True), reverse=True)
                for _, _, name in order[: max(1, round(top * len(ids)))]:
                    votes[criterion][name] += 1
    return votes


def by_cell(votes: Mapping[str, Mapping[str, int]], cell_of: Mapping[str, Cell]) -> dict[str, dict[Cell, int]]:
    """Criterion -> cell -> votes of its units."""
    found = {criterion: dict.fromkeys(sorted(set(cell_of.values())), 0) for criterion in votes}
    for criterion, of_unit in votes.items():
        for name, count in of_unit.items():
            found[criterion][cell_of[name]] += count
    return found


def match(votes: Mapping[str, Mapping[Cell, int]], sizes: Mapping[Cell, int]) -> Assignment:
    """Each cell takes the criteria with most votes in it; each criterion also goes where it votes most, by rate.

    Counts decide within a cell, counts divided by the cell's size between cells: a large cell has more to vote for.
    The second rule runs within each kind, since a criterion votes the same number of times in all of them.
    """
    found: dict[Cell, list[str]] = {cell: [] for cell in sizes}
    for cell in sizes:
        most = max((votes[criterion][cell] for criterion in votes), default=0)
        if most:
            found[cell] += [criterion for criterion in votes if votes[criterion][cell] == most]
    for criterion, of_cell in votes.items():
        for kind in sorted({cell[0] for cell in sizes}):
            rates = {cell: of_cell[cell] / size for cell, size in sizes.items() if cell[0] == kind}
            best = max(rates.values())
            for cell, rate in rates.items():
                if best > 0 and rate == best and criterion not in found[cell]:
                    found[cell].append(criterion)
    # A cell without any vote is judged by all.
    return {cell: tuple(c for c in CRITERIA if c in criteria) or CRITERIA for cell, criteria in found.items()}


def chance(votes: Mapping[str, Mapping[str, int]], cell_of: Mapping[str, Cell], *, seed: int) -> float:
    """Probability of votes at least so uneven over the cells, were units dealt to cells at random within their kind.

    By 10,000 shuffles of whole units: the turns vote for the same units again, so votes are not independent.
    """
    import numpy as np

    generator = np.random.default_rng(mix(seed, "chance"))
    uneven = np.zeros(1 + SHUFFLES)  # the first is what was seen
    for kind in sorted({cell[0] for cell in cell_of.values()}):
        ids = sorted(name for name, cell in cell_of.items() if cell[0] == kind)
        votes_SU = np.array([[of_unit[name] for name in ids] for of_unit in votes.values()], dtype=float)
        cell_UC = np.array([[cell_of[name][1] == block for block in range(4)] for name in ids], dtype=float)
        expected_SC = votes_SU.sum(1, keepdims=True) * cell_UC.sum(0) / len(ids)
        orders = np.argsort(generator.random((SHUFFLES, len(ids))), axis=1)
        orders = np.concatenate([np.arange(len(ids))[None], orders])
        counts_NSC = np.einsum("su,nuc->nsc", votes_SU, cell_UC[orders])
        safe_SC = np.where(expected_SC > 0, expected_SC, 1.0)
        uneven += ((counts_NSC - expected_SC) ** 2 / safe_SC).sum((1, 2))
    return float((uneven >= uneven[0] - 1e-9).mean())


# --- removal ------------------------------------------------------------------------------------


def judge(
    scores: Mapping[str, Mapping[str, float]],
    removable: Sequence[Unit],
    cell_of: Mapping[str, Cell],
    assignment: Assignment | None,
    *,
    slope: float,
    seed: object,
) -> Judgement:
    """Rank the removable units of each kind.

    Args:
        scores: criterion -> unit id -> score.
        assignment: None removes at random.
        slope: beta of the rank weight, sigmoid(beta (2 p - 1)): it grows with prunability.
    """
    judgement = Judgement({}, {}, {}, {criterion: {} for criterion in CRITERIA})
    for kind in sorted({unit.kind for unit in removable}):
        ids = sorted(unit.id for unit in removable if unit.kind == kind)
        tie_breaker = random.Random(mix(seed, "ties", kind))
        draw = {name: tie_breaker.random() for name in ids}
        heard: list[str] = []
        for criterion in CRITERIA if assignment is not None else ():
            d = [prunability(criterion, scores[criterion][name]) for name in ids]
            if abstains(d):
                judgement.abstained.setdefault(kind, []).append(criterion)
                continue
            heard.append(criterion)
            judgement.percentile[criterion].update(zip(ids, percentiles(d), strict=True))

        if heard and assignment is not None:
            of_set: dict[tuple[str, ...], dict[str, tuple[float, float]]] = {}
            for name in ids:
                mine = tuple(c for c in assignment[cell_of[name]] if c in heard) or tuple(heard)
                if mine not in of_set:
                    of_set[mine] = _combine([judgement.percentile[c] for c in mine], draw, slope)
                # Against all layers under the same criteria: what a cell's set adds up to does not matter.
                own = of_set[mine][name]
                judgement.combined[name] = own[0]
                judgement.probability[name] = (sum(other < own for other in of_set[mine].values()) + 0.5) / len(ids)
        else:
            by_chance = percentiles([draw[name] for name in ids])
            judgement.probability.update(zip(ids, by_chance, strict=True))
        judgement.order[kind] = sorted(ids, key=lambda name: (-judgement.probability[name], draw[name]))
    return judgement


def _combine(
    percentiles: Sequence[Mapping[str, float]], draw: Mapping[str, float], slope: float
) -> dict[str, tuple[float, float]]:
    """E of every unit of a kind under some criteria, with its draw for ties."""
    return {name: (sum(weigh(p[name], slope) for p in percentiles), draw[name]) for name in draw}


def weigh(p: float, slope: float) -> float:
    """A term of equation 1, repaired: p sigmoid(beta (2 p - 1)), increasing on (0, 1)."""
    return p / (1 + math.exp(-slope * (2 * p - 1)))


def share(
    counts: Mapping[str, int], count: int, *, seed: object, weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """How many of `count` removals each kind gets: in proportion to its units, rounded by systematic sampling."""
    weights = weights or {}
    sizes = {kind: counts[kind] * weights.get(kind, 1.0) for kind in sorted(counts)}
    total, count = sum(sizes.values()), min(count, sum(counts.values()))
    if not total:
        return dict.fromkeys(counts, 0)
    start = random.Random(mix(seed, "share")).random()
    found, edge = {}, 0.0
    for kind, size in sizes.items():
        before, edge = edge, edge + count * size / total
        found[kind] = min(counts[kind], math.ceil(edge - start - 1e-9) - math.ceil(before - start - 1e-9))
    for kind in sorted(counts, key=lambda kind: -counts[kind]):  # a weight may ask for more than a kind has
        found[kind] += min(counts[kind] - found[kind], count - sum(found.values()))
    return found


def remove(
    living: Sequence[Unit],
    judgement: Judgement,
    count: int,
    budget: int,
    *,
    seed: object,
    weights: Mapping[str, float] | None = None,
) -> list[Unit]:
    """The units that go in this round, most prunable first: at most `count`, fewer once the budget is met."""
    of = {unit.id: unit for unit in living}
    counts = {kind: len(ids) for kind, ids in judgement.order.items()}
    quota = share(counts, count, seed=seed, weights=weights)
    chosen = [name for kind, ids in judgement.order.items() for name in ids[: quota[kind]]]
    chosen.sort(key=lambda name: (-judgement.probability[name], mix(seed, "between", name)))
    total, gone = sum(unit.parameters for unit in living), []
    for name in chosen:
        if total <= budget:
            break
        gone.append(of[name])
        total -= of[name].parameters
    return gone


def put_back(living: Sequence[Unit], removed: Sequence[Sequence[Unit]], budget: int) -> list[Unit]:
    """Removed units that still fit: latest round first, least prunable first.

    Args:
        removed: by round, each in the order of removal.
    """
    total, back = sum(unit.parameters for unit in living), []
    for turn in reversed(removed):
        for unit in reversed(turn):
            stands = unit.start == 0 or any(unit.stands_on(other) for other in (*living, *back))
            if stands and total + unit.parameters <= budget:
                back.append(unit)
                total += unit.parameters
    return back


def removable(living: Sequence[Unit]) -> list[Unit]:
    """What may go next: all but the slices of a ladder that another one stands on."""
    return [unit for unit in living if not any(other.stands_on(unit) for other in living)]
