"""The removable units of a model, what each costs, and an account of which of them stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sentei.remote.modeling_sentei_folded import ChildLinear
from sentei.structure.families import (
    KINDS,
    SUBLAYERS,
    Family,
    LayerSize,
    count,
    family,
    layer_parameters,
    layers,
    part,
    sizes_of,
)


@dataclass(frozen=True)
class Units:
    """The removable units of a model, ordered by layer, then kind, then index.

    Attributes:
        granularity: the kinds asked for, for example ("heads", "channels").
        kind_U: index into KINDS.
        layer_U: the layer a unit belongs to.
        index_U: KV group or channel within the layer; 0 attention, 1 mlp for sub-layers; 0 for blocks.
        cost_U: parameters that go with the unit.
        layer_parameters: parameters of all blocks, removable or not.
    """

    granularity: tuple[str, ...]
    kind_U: Tensor
    layer_U: Tensor
    index_U: Tensor
    cost_U: Tensor
    num_layers: int
    layer_parameters: int

    def __len__(self) -> int:
        return len(self.cost_U)

    @property
    def total(self) -> int:
        """Parameters that removing every unit would remove."""
        return int(self.cost_U.sum())

    def of(self, layer: int, kind: str) -> Tensor:
        """Positions of one layer's units of one kind, in order of their index."""
        return ((self.layer_U == layer) & (self.kind_U == KINDS.index(kind))).nonzero().flatten()

    def removed_parameters(self, keep_U: Tensor) -> int:
        return int(self.cost_U[~keep_U].sum())


def parse_granularity(granularity: str) -> tuple[str, ...]:
    """`"heads+channels"` -> `("heads", "channels")`, checked."""
    kinds = tuple(granularity.split("+"))
    if not set(kinds) <= set(KINDS[:4]) or len(set(kinds)) < len(kinds):
        raise ValueError(f"granularity is one of {', '.join(KINDS[:4])} or heads+channels; got {granularity!r}")
    if len(kinds) > 1 and set(kinds) != {"heads", "channels"}:
        raise ValueError(
            f"granularity {granularity!r}: these units contain one another; use heads+channels, heads, channels, "
            "sublayers or layers, run two stages for a mixture, or let policy_gradient mix them"
        )
    return kinds


def units(model: nn.Module, granularity: str = "heads+channels") -> Units:
    """All removable units of the given kinds.

    Args:
        granularity: one of KINDS, or "heads+channels".
    Raises:
        ValueError: unknown architecture or granularity, or the model has no such unit left.
    """
    kinds = parse_granularity(granularity)
    row = family(model)
    if any(isinstance(module, ChildLinear) for module in model.modules()):
        raise ValueError(
            "the model is folded: one stored matrix acts in several layers, and none of them can be pruned alone. "
            "Prune first and fold afterwards, or write independent layers with `sentei unfold`"
        )
    table: list[tuple[int, int, int, int]] = []
    for number, layer in enumerate(layers(model)):
        for kind in kinds:
            table += [(KINDS.index(kind), number, i, cost) for i, cost in _costs(layer, row, kind).items()]
    if not table:
        raise ValueError(f"the model has no {granularity} left to remove")
    kind_U, layer_U, index_U, cost_U = torch.tensor(table).T
    return Units(kinds, kind_U, layer_U, index_U, cost_U, len(layers(model)), layer_parameters(model))


def channel_costs(layer: nn.Module, row: Family) -> dict[int, int]:
    """Parameters of each MLP channel of a layer, by its index."""
    return _costs(layer, row, "channels")


def _costs(layer: nn.Module, row: Family, kind: str) -> dict[int, int]:
    """Parameters of each unit of one kind in one layer, by the unit's index."""
    size = sizes_of(layer, row)
    if kind == "layers":
        return {0: count(layer)}
    if kind == "sublayers":
        if row.pre_norm:
            attention = count(part(layer, row.attention), *(part(layer, name) for name in row.attention_norms))
            mlp = count(part(layer, row.mlp), *(part(layer, name) for name in row.mlp_norms))
        else:  # the norm stays, and so does the reading linear's bias, as zeros
            attention = size.num_kv_heads * _group_cost(layer, row, size)
            mlp = size.intermediate_size * _channel_cost(layer, row)
        return {i: cost for i, cost in enumerate((attention, mlp)) if SUBLAYERS[i] not in size.skip and cost}
    if kind == "heads":
        if size.qk_pairs:
            raise ValueError("heads that were cut inside (head-dims) cannot be removed as wholes; use channels")
        return dict.fromkeys(range(size.num_kv_heads), _group_cost(layer, row, size))
    return dict.fromkeys(range(size.intermediate_size), _channel_cost(layer, row))


def _group_cost(layer: nn.Module, row: Family, size: LayerSize) -> int:
    if not size.num_kv_heads:
        return 0
    readers = [part(layer, path) for path in dict.fromkeys((row.query, row.key, row.value))]
    written = sum(count(linear) for linear in readers)
    return (written + part(layer, row.output).weight.numel()) // size.num_kv_heads


def _channel_cost(layer: nn.Module, row: Family) -> int:
    down = part(layer, row.down)
    if down is None or not down.in_features:
        return 0
    return (sum(count(part(layer, path)) for path in row.up) + down.weight.numel()) // down.in_features


def columns(size: LayerSize, kind: str, units_K: Tensor) -> Tensor:
    """Input columns of the reading linear that belong to some of a layer's units.

    Args:
        units_K: indices of KV groups or channels, in the order wanted.
    Returns:
        column indices; a KV group owns G * head_dim neighbours, a channel one.
    """
    width = size.group_size * size.head_dim if kind == "heads" else 1
    return (units_K[:, None] * width + torch.arange(width, device=units_K.device)).flatten()


def kept(units: Units, keep_U: Tensor) -> dict[str, Any]:
    """A JSON-able account of a mask: for every layer and kind, which units stay, numbered as in the parent.

    Runs are written short: "0-31,40". Sub-layers are "attention" and "mlp"; a block is the single unit "0".
    """
    account = []
    for number in range(units.num_layers):
        entry: dict[str, Any] = {"layer": number}
        for kind in units.granularity:
            of = units.of(number, kind)
            stays = units.index_U[of][keep_U[of]].tolist()
            names = [SUBLAYERS[i] for i in stays] if kind == "sublayers" else _runs(stays)
            entry[kind] = {"of": len(of), "kept": len(stays), "units": names}
        account.append(entry)
    return {"granularity": "+".join(units.granularity), "layers": account}


def kept_mask(units: Units, account: dict[str, Any]) -> Tensor:
    """The mask, [U] bool, of which `kept` gave an account: units inside the layers of a model of the same sizes.

    Raises:
        ValueError: an account of other units, layers or sizes, or none at all.
    """
    asked = "+".join(units.granularity)
    layers = account.get("layers") if isinstance(account, dict) else None
    if not isinstance(layers, list) or account.get("granularity") != asked or len(layers) != units.num_layers:
        found = account.get("granularity") if isinstance(account, dict) else None
        raise ValueError(f"expected an account of {asked} in {units.num_layers} layers; found {found}")
    keep_U = torch.zeros(len(units), dtype=torch.bool)
    for number, entry in enumerate(layers):
        for kind in units.granularity:
            of, found = units.of(number, kind), entry.get(kind) if isinstance(entry, dict) else None
            if not isinstance(found, dict):
                raise ValueError(f"layer {number} tells nothing of {kind}")
            stays = _numbers(str(found.get("units", "")), len(of))
            if found.get("of") != len(of) or found.get("kept") != len(stays):
                raise ValueError(f"layer {number} has {len(of)} {kind} here, {found.get('of')} in the account")
            keep_U[of[torch.isin(units.index_U[of], torch.tensor(stays, dtype=torch.long))]] = True
    return keep_U


def _numbers(runs: str, below: int) -> list[int]:
    """What `_runs` has written.

    Raises:
        ValueError: something else, or a number that is not below `below`.
    """
    numbers: list[int] = []
    for run in filter(None, runs.split(",")):
        first, _, last = run.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < below):
            raise ValueError(f"{run!r} names no units of {below}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
