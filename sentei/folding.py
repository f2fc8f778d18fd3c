"""Let layers of a model share weights, see which may, and make them independent again.

A folded model runs every logical layer, with its own norms, its own attention object and its own place in the KV cache;
the linears of a group are stored once, in its *owner*. The modules are `ChildLinear` of the modelling file that travels
with the checkpoint. Sharing saves parameters, bytes on disk and weight memory; it saves neither time nor KV cache.

Shape legend: H hidden width, C MLP channels, O outputs and I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.remote.modeling_sentei_folded import SCALED, ChildLinear, linears, share
from sentei.structure import Family

__all__ = ["ChildLinear", "align", "fold", "is_folded", "kind", "layout", "linears", "note", "saving", "unfold"]

VERSION = 1
NOTED = ("origin", "base_layers", "parent", "gate_rate")


def is_folded(model: nn.Module) -> bool:
    return any(isinstance(module, ChildLinear) for module in model.modules())


def layout(model: nn.Module) -> dict[str, Any]:
    """Who owns the linears of whom, read from the modules: lists with an entry per layer.

    "owner": the layer that holds this one's linears; "corrected": it has a scale or a low-rank term on top;
    "origin", "base_layers": numbers in the model before blocks were removed; "parent": how a group's weights were
    chosen; "gate_rate": the rate that the gates were trained for. What is known of these, see `note`.
    """
    owner, corrected, rank, scale = [], [], 0, False
    for number, layer in enumerate(structure.layers(model)):
        first = next(iter(linears(layer).values()), None)
        is_child = isinstance(first, ChildLinear)
        owner.append(first.owner if is_child else number)
        corrected.append(is_child)
        for linear in linears(layer).values():
            if isinstance(linear, ChildLinear):
                rank, scale = 0 if linear.A is None else len(linear.A), scale or linear.scale is not None
    config: Any = structure.base_model(model).config
    known = getattr(config, "fold", None) or {}
    more = {name: known[name] for name in NOTED if name in known}
    return {"version": VERSION, "owner": owner, "corrected": corrected, "rank": rank, "scale": scale} | more


def note(model: nn.Module, origin: dict[str, Any] | None) -> None:
    """Let the model's configuration remember what its modules do not: the NOTED part of `layout`."""
    config: Any = structure.base_model(model).config
    if origin is not None or getattr(config, "fold", None) is not None:
        config.fold = origin


def kind(model: nn.Module, number: int) -> tuple[Any, ...]:
    """What must be equal for layers to run with the same linears: their shapes, biases, and how attention looks."""
    layer = structure.layers(model)[number]
    types = getattr(structure.base_model(model).config, "layer_types", None)
    shapes = tuple(
        (path, linear.out_features, linear.in_features, linear.bias is not None)
        for path, linear in linears(layer).items()
    )
    return (None if types is None else types[number]), shapes


def saving(layer: nn.Module, rank: int, scale: bool) -> tuple[int, int]:
    """(parameters that a layer's linears hold, parameters that its corrections would): the first minus the second."""
    held = added = 0
    for path, linear in linears(layer).items():
        held += linear.in_features * linear.out_features + (linear.out_features if linear.bias is not None else 0)
        added += rank * (linear.in_features + linear.out_features)
        added += linear.out_features if scale and path.rpartition(".")[2] in SCALED else 0
    return held, added


def fold(
    model: nn.Module, members: Sequence[int], owner: int, *, rank: int, scale: bool, average: bool = False
) -> None:
    """Let `members` run with the linears of `owner`, one of them. Corrections start at nothing: scale 1, A and B 0.

    Args:
        average: the owner is corrected as well; its linears hold what the caller puts there, such as a mean.
    """
    assert owner in members and len({kind(model, number) for number in members}) == 1
    layers = structure.layers(model)
    for number in members:
        if number != owner or average:
            share(layers, number, owner, rank, scale)


@torch.no_grad()
def unfold(model: nn.Module) -> None:
    """Give every layer linears of its own, in place: W_m = diag(scale) (W + B A), in fp32, rounded once."""
    layers = structure.layers(model)
    made: list[tuple[int, str, nn.Linear]] = []
    for number, layer in enumerate(layers):
        for path, linear in linears(layer).items():
            if isinstance(linear, ChildLinear):
                made.append((number, path, _own(linear)))
    for number, path, linear in made:  # after all are made: an owner may be a ChildLinear itself
        layers[number].set_submodule(path, linear)
    note(model, None)


def _own(child: ChildLinear) -> nn.Linear:
    shared = child.shared()
    assert isinstance(shared, nn.Linear), "unfold before quantising, and after merging adapters"
    dtype = shared.weight.dtype
    weight_OI = shared.weight.float()
    bias_O = None if shared.bias is None else shared.bias.float()
    if child.A is not None and child.B is not None:
        weight_OI = weight_OI + child.B.float() @ child.A.float()
    if child.scale is not None:
        weight_OI = child.scale.float()[:, None] * weight_OI
        bias_O = None if bias_O is None else child.scale.float() * bias_O
    linear = nn.Linear(child.in_features, child.out_features, bias_O is not None, device="meta")
    linear.weight = nn.Parameter(weight_OI.to(dtype, copy=True), requires_grad=shared.weight.requires_grad)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.to(dtype, copy=True), requires_grad=shared.weight.requires_grad)
    return linear.train(child.training)


# --- alignment ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def align(parent: nn.Module, member: nn.Module, row: Family) -> dict[str, Tensor]:
    """The member's linear weights and biases, by name, with MLP channels and heads renumbered like the parent's.

    Blocks number their channels, KV groups and the query heads inside a group differently; the block's function does
    not depend on the numbers. The best pairs by cosine are matched first (greedy). Positions inside a head stay, for
    rotary embeddings tell them apart. The member itself is not changed.
    """
    size = structure.sizes_of(member, row)
    state = linears(member)
    found: dict[str, Tensor] = {}

    def parts_of(block: nn.Module, path: str) -> list[Tensor]:
        """A linear's weight, as the parts that it fuses."""
        weight = structure.part(block, path).weight
        if path == row.query and row.fused_qkv:
            return list(weight.split([size.num_heads * size.head_dim] + [size.num_kv_heads * size.head_dim] * 2))
        return list(weight.chunk(2)) if path in row.up and row.fused_up else [weight]

    if size.intermediate_size:

        def channels(block: nn.Module) -> Tensor:
            rows = [part for path in row.up for part in parts_of(block, path)]
            return torch.cat([*rows, structure.part(block, row.down).weight.T], 1).float()

        order_C = _match(channels(parent), channels(member))
        rows = torch.cat([order_C, order_C + size.intermediate_size]) if row.fused_up else order_C
        for path in row.up:
            _permuted(found, path, state[path], rows=rows)
        _permuted(found, row.down, state[row.down], columns=order_C)
    if size.num_heads:
        groups, heads, width = size.num_kv_heads, size.group_size, size.head_dim

        def query_output(block: nn.Module) -> Tensor:
            query = parts_of(block, row.query)[0]
            output = structure.part(block, row.output).weight.T
            return torch.cat([query, output], 1).float().reshape(groups, heads, width, -1)

        def key_value(block: nn.Module) -> Tensor:
            parts = parts_of(block, row.query)[1:] if row.fused_qkv else []
            parts = parts or [structure.part(block, path).weight for path in (row.key, row.value)]
            return torch.cat(parts, 1).float().reshape(groups, -1)

        ours, theirs = query_output(parent), query_output(member)
        kv_ours, kv_theirs = key_value(parent), key_value(member)
        inside = torch.stack(  # [parent's group, member's group, head]: which of the member's heads stands there
            [torch.stack([_match(a.flatten(1), b.flatten(1)) for b in theirs]) for a in ours]
        )
        flat = [
            torch.stack([torch.cat([theirs[b][inside[a, b]].flatten(), kv_theirs[b]]) for b in range(groups)])
            for a in range(groups)
        ]
        own = torch.cat([ours.flatten(1), kv_ours], 1)
        alike = torch.stack([nn.functional.cosine_similarity(own[a][None], flat[a], dim=1) for a in range(groups)])
        order_G = _greedy(alike)
        heads_Q = torch.cat([order_G[a] * heads + inside[a, order_G[a]] for a in range(groups)])
        query_rows, kv_rows = _spread(heads_Q, width), _spread(order_G, width)
        if row.fused_qkv:
            end, kv_width = size.num_heads * width, groups * width
            rows = torch.cat([query_rows, kv_rows + end, kv_rows + end + kv_width])
            _permuted(found, row.query, state[row.query], rows=rows)
        else:
            for path, rows in ((row.query, query_rows), (row.key, kv_rows), (row.value, kv_rows)):
                _permuted(found, path, state[path], rows=rows)
        _permuted(found, row.output, state[row.output], columns=query_rows)
    return found


def _permuted(
    found: dict[str, Tensor], path: str, linear: Any, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    found[f"{path}.weight"] = weight
    if bias is not None:
        found[f"{path}.bias"] = bias


def _spread(units_K: Tensor, width: int) -> Tensor:
    return (units_K[:, None] * width + torch.arange(width)).flatten()


def _match(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each row of `ours` the row of `theirs` that stands for it, by cosine."""
    return _greedy(nn.functional.normalize(ours, dim=1) @ nn.functional.normalize(theirs, dim=1).T)


def _greedy(alike: Tensor) -> Tensor:
    """One-to-one pairs, the most alike first: in each round all pairs that are each other's best."""
    alike = alike.float().cpu().clone()
    chosen = torch.full((len(alike),), -1)
    while (chosen < 0).any():
        free = (chosen < 0).nonzero().flatten()
        best = alike[free].argmax(1)
        mutual = free[alike[:, best].argmax(0) == free]
        columns = alike[mutual].argmax(1)
        chosen[mutual] = columns
        alike[mutual] = -torch.inf
        alike[:, columns] = -torch.inf
    return chosen
