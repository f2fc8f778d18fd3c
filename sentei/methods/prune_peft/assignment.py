"""Which criterion judges where, and which units go.

A *cell* is a kind of unit in one of four depth blocks. An assignment gives every cell a set of criteria. Percentiles
are taken within a kind over all layers, so a cell with many criteria, or a criterion of another scale, removes no more
than its share of units when the scores are noise: the null test of this method.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
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
RUNGS = 2  # of a ladder at most in one round: the slices of a layer score alike, and one round would take them all


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

    def add(self, later: Judgement) -> None:
        """A later verdict on some of the units, in place of the earlier one."""
        self.order.update(later.order)
        self.probability.update(later.probability)
        self.combined.update(later.combined)
        self.abstained.update(later.abstained)
        for criterion, of_unit in later.percentile.items():
            self.percentile[criterion].update(of_unit)


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
    """An assignment saved as JSON: {"lora": [["gradient"], ...], ...}, four lists of criteria for each kind.

    Or the prunepeft.json of an earlier search.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        table = table.get("record", table)
        table = table.get("assignment", table)
        found = {cell: tuple(table[cell[0]][cell[1]]) for cell in set(cell_of.values())}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no assignment for these units ({type(error).__name__}: {error}); expected JSON "
            '{"lora": [[criteria of the first depth block], ... four of them], "adapter": [...]}, or a prunepeft.json'
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


def chance(
    votes: Mapping[str, Mapping[str, int]], units: Sequence[Unit], cell_of: Mapping[str, Cell], *, seed: int
) -> float:
    """Probability of votes at least so uneven over the cells, were whole layers dealt to depth blocks at random.

    By 10,000 shuffles: what is true of a layer is true of all its units, and the turns vote for the same ones again,
    so neither are independent.
    """
    import numpy as np

    generator = np.random.default_rng(mix(seed, "chance"))
    block_of = {unit.layer: cell_of[unit.id][1] for unit in units}
    layers = sorted(block_of)
    block_LC = np.array([[block_of[layer] == block for block in range(4)] for layer in layers], dtype=float)
    orders = np.argsort(generator.random((SHUFFLES, len(layers))), axis=1)
    block_NLC = block_LC[np.concatenate([np.arange(len(layers))[None], orders])]  # the first is what was seen
    uneven = np.zeros(1 + SHUFFLES)
    for kind in sorted({unit.kind for unit in units}):
        of_layer = [[unit.id for unit in units if (unit.kind, unit.layer) == (kind, layer)] for layer in layers]
        votes_SL = np.array([[sum(v[name] for name in ids) for ids in of_layer] for v in votes.values()], dtype=float)
        size_NC = np.einsum("l,nlc->nc", np.array([len(ids) for ids in of_layer], dtype=float), block_NLC)
        counts_NSC = np.einsum("sl,nlc->nsc", votes_SL, block_NLC)
        expected_NSC = votes_SL.sum(1)[None, :, None] * size_NC[:, None] / size_NC[:1, None].sum(-1, keepdims=True)
        safe_NSC = np.where(expected_NSC > 0, expected_NSC, 1.0)
        uneven += ((counts_NSC - expected_NSC) ** 2 / safe_NSC).sum((1, 2))
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


def remove(
    space: Sequence[Unit],
    living: Sequence[Unit],
    scores: Mapping[str, Mapping[str, float]],
    cell_of: Mapping[str, Cell],
    assignment: Assignment | None,
    count: int,
    budget: int,
    *,
    slope: float,
    seed: object,
    number: int = 0,
    weights: Mapping[str, float] | None = None,
) -> tuple[list[Unit], Judgement]:
    """The units that go in a round, in the order of removal, and the last verdict on each unit that was judged.

    They go in steps of at most a quarter of what may go, each judged anew on the round's scores: the next slice of a
    ladder is compared as soon as the one above it is gone, and no step must take all tops, whatever their scores.

    Args:
        space: all units of the supernet.
        scores: criterion -> unit id -> score; none are needed where `assignment` is None.
        count: at most so many go, fewer once the budget is met.
        number: of the round; `seed` is the same in all rounds of a search, so that the kinds' turns go on.
        weights: kind -> how much larger a share of its parameters it loses.
    """
    living, gone = list(living), []
    whole, lost = (_by_kind(space, weights or {}), _by_kind(set(space) - set(living), {}))
    total = sum(unit.parameters for unit in living)
    offset = random.Random(mix(seed, "kinds")).random()
    verdict = Judgement({}, {}, {}, {criterion: {} for criterion in CRITERIA})
    while len(gone) < count and total > budget:
        able = removable(living)
        able = [unit for unit in able if sum(unit.modules == other.modules for other in gone) < RUNGS]
        if not able:
            break
        judgement = judge(scores, able, cell_of, assignment, slope=slope, seed=(seed, "judge", number, len(gone)))
        verdict.add(judgement)
        of = {unit.id: unit for unit in able}
        queues = {kind: [of[name] for name in names] for kind, names in judgement.order.items()}
        for _ in range(min(max(1, len(able) // 4), count - len(gone))):
            if total <= budget:
                break
            unit = queues[next_kind(queues, whole, lost, offset)].pop(0)
            lost[unit.kind] = lost.get(unit.kind, 0) + unit.parameters
            total -= unit.parameters
            living.remove(unit)
            gone.append(unit)
    return gone, verdict


def next_kind(
    queues: Mapping[str, Sequence[Unit]], whole: Mapping[str, float], lost: Mapping[str, float], offset: float
) -> str:
    """The kind that gives up the next unit, so that all lose the same share of their parameters.

    Systematic sampling: each kind is behind that share by some units, by one in all; the offset, between 0 and 1, falls
    on one of them.

    Args:
        queues: kind -> units that may go, the next one first.
        whole: kind -> its parameters at first, `lost`: those that are gone.
    """
    price = {kind: units[0].parameters for kind, units in sorted(queues.items()) if units}
    gone = {kind: lost.get(kind, 0) for kind in price}
    share = (1 + sum(gone[kind] / price[kind] for kind in price)) / sum(whole[kind] / price[kind] for kind in price)
    passed = 0.0
    for kind in price:
        passed += (share * whole[kind] - gone[kind]) / price[kind]
        if passed > offset:
            return kind
    return max(price)


def _by_kind(units: Iterable[Unit], weights: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for unit in units:
        found[unit.kind] = found.get(unit.kind, 0) + unit.parameters * weights.get(unit.kind, 1.0)
    return found


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
    below = {(unit.modules, unit.start) for unit in living if unit.start}
    return [unit for unit in living if (unit.modules, unit.rank) not in below]
