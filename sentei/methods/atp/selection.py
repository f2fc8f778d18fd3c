"""From logits to the units that stay: exactly within the parameter budget, without chance.

Shape legend: U units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sentei.structure import KINDS, Units

KIND_WORDS = {"heads": "KV group", "channels": "channels", "qk_pairs": "QK pairs", "v_dims": "V coordinates"}


@dataclass(frozen=True)
class Floors:
    """What every layer keeps whatever happens, and in which steps the rest is kept.

    Attributes:
        least: kind -> units that a layer keeps at least.
        step: kind -> units that are kept or dropped together.
    """

    least: dict[str, int]
    step: dict[str, int]

    @staticmethod
    def of(units: Units, round_channels: int, round_pairs: int, round_values: int) -> Floors:
        """1 KV group, 4 QK pairs, 8 V coordinates, 5 % of the channels in whole steps (never more than there are)."""
        widest = max((len(units.of(layer, "channels")) for layer in range(units.num_layers)), default=0)
        channels = math.ceil(Fraction(widest, 20) / round_channels) * round_channels
        return Floors(
            least={"heads": 1, "qk_pairs": 4, "v_dims": 8, "channels": channels},
            step={"heads": 1, "qk_pairs": round_pairs, "v_dims": round_values, "channels": round_channels},
        )

    def describe(self, units: Units) -> str:
        return ", ".join(f"{self.least[kind]} {KIND_WORDS[kind]}" for kind in units.granularity) + " per layer"


def budget_of(units: Units, sparsity: float) -> float:
    """Parameters that may stay: (1 - sparsity) of what these units hold."""
    return float((1 - Fraction(str(sparsity))) * units.total)


def check_reachable(units: Units, sparsity: float, floors: Floors) -> None:
    """Refuse a budget below the floors.

    Raises:
        ValueError: names the floors and the highest sparsity that they allow.
    """
    held = int(units.cost_U[_floor_units(torch.zeros(len(units)), units, floors)].sum())
    if held > budget_of(units, sparsity):
        highest = math.floor(1000 * (1 - held / units.total)) / 1000
        raise ValueError(
            f"sparsity {sparsity:.2f} cannot be reached: the floors ({floors.describe(units)}) keep "
            f"{held / units.total:.1%} of the prunable parameters; the highest possible value is {highest:.3f}. Lower "
            "`sparsity` or the floors"
        )


def top_k(score_U: Tensor, units: Units, sparsity: float, floors: Floors, *, by_kind: bool = False) -> Tensor:
    """The best units under the budget, [U] bool.

    Floors first; then all items by falling score, each that still fits. A KV group is an item of its own; the other
    units of a layer are sorted by score and bound in steps, an item's score being its mean. So budget - kept is at
    least 0 and below the cost of the cheapest item that was left out. Ties: kind, layer, position.

    Args:
        score_U: rank by logits, not by keep-probabilities: those are all 1.0 in the upper half.
        by_kind: every kind of unit loses the same share (for scores that do not compare across kinds), as nearly as
            whole units allow; what one kind leaves of its share goes to the next.
    """
    score_U = score_U.double().cpu()
    keep_U = torch.zeros(len(units), dtype=torch.bool)
    groups = [(kind,) for kind in units.granularity] if by_kind else [units.granularity]
    left = 0.0 if by_kind else budget_of(units, sparsity)
    for kinds in groups:
        inside_U = torch.isin(units.kind_U, torch.tensor([KINDS.index(kind) for kind in kinds]))
        if by_kind:
            left += float((1 - Fraction(str(sparsity))) * int(units.cost_U[inside_U].sum()))
        items: list[tuple[float, int, int, int, Tensor]] = []
        for kind in kinds:
            for layer in range(units.num_layers):
                of = units.of(layer, kind)
                if not len(of):
                    continue
                best_first = of[torch.sort(score_U[of], descending=True, stable=True).indices]
                least, step = min(floors.least[kind], len(of)), floors.step[kind]
                keep_U[best_first[:least]] = True
                left -= int(units.cost_U[best_first[:least]].sum())
                for position, item in enumerate(best_first[least:].split(step)):
                    mean = float(score_U[item].mean())
                    items.append((-mean, units.granularity.index(kind), layer, position, item))
        for *_, item in sorted(items, key=lambda entry: entry[:4]):
            cost = int(units.cost_U[item].sum())
            if cost <= left:
                keep_U[item] = True
                left -= cost
    return keep_U


def uniform(score_U: Tensor, units: Units, sparsity: float, floors: Floors) -> Tensor:
    """As `top_k`, with one count per kind in all layers, so that a stock architecture can hold the result.

    The count of everything but channels is the rounded mean of the free choice, or less where that would leave the
    channels below their floor; channels then take the largest multiple of their step that fits.

    Raises:
        ValueError: the layers differ already, or the floors alone are above the budget.
    """
    check_reachable(units, sparsity, floors)
    free_U = top_k(score_U, units, sparsity, floors)
    keep_U = torch.zeros(len(units), dtype=torch.bool)
    left = budget_of(units, sparsity)
    kinds = sorted(units.granularity, key=lambda kind: kind == "channels")
    size, cost = {}, {}  # of each kind: units in a layer, and what one in every layer costs
    for kind in kinds:
        sizes = {len(units.of(layer, kind)) for layer in range(units.num_layers)}
        if len(sizes) > 1:
            raise ValueError(f"shape=uniform needs layers of equal size; {kind} differ already: use heterogeneous")
        (size[kind],) = sizes
        cost[kind] = int(units.cost_U[units.of(0, kind)[0]]) * units.num_layers
    least = {kind: min(floors.least[kind], size[kind]) for kind in kinds}
    for number, kind in enumerate(kinds):
        step, room = floors.step[kind], left - sum(least[later] * cost[later] for later in kinds[number + 1 :])
        count = size[kind]
        if kind != "channels":
            mean = int(free_U[units.kind_U == KINDS.index(kind)].sum()) / units.num_layers
            count = min(count, round(mean / step) * step)
        if count * cost[kind] > room:
            count = int(room // (cost[kind] * step)) * step
        count = max(least[kind], count)
        left -= count * cost[kind]
        for layer in range(units.num_layers):
            of = units.of(layer, kind)
            keep_U[of[torch.sort(score_U[of].double(), descending=True, stable=True).indices[:count]]] = True
    return keep_U


def revive(keep_U: Tensor, logits_U: Tensor, units: Units, floors: Floors) -> Tensor:
    """A structure that was sampled below its floor gets its highest logits back."""
    keep_U = keep_U.clone()
    for kind in units.granularity:
        for layer in range(units.num_layers):
            of = units.of(layer, kind)
            least = min(floors.least[kind], len(of))
            if int(keep_U[of].sum()) < least:
                dead = of[~keep_U[of]]
                best = torch.sort(logits_U[dead], descending=True, stable=True).indices
                keep_U[dead[best[: least - int(keep_U[of].sum())]]] = True
    return keep_U


def _floor_units(score_U: Tensor, units: Units, floors: Floors) -> Tensor:
    return revive(torch.zeros(len(units), dtype=torch.bool), score_U, units, floors)


def counts(units: Units, keep_U: Tensor) -> dict[str, list[int]]:
    """Kind -> units kept in every layer."""
    return {
        kind: [int(keep_U[units.of(layer, kind)].sum()) for layer in range(units.num_layers)]
        for kind in units.granularity
    }
