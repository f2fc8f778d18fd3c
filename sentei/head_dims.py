"""Cutting inside heads: rotary pairs of queries and keys, and coordinates of values.

============  ======================================================================  =============================
kind          what is removed from one layer                                          parameters (w: linear has bias)
============  ======================================================================  =============================
``qk_pairs``  the rotary pair (i, i + D/2) of every query and key head                2 (Q + K) (H + w), + 4 with norms
``v_dims``    coordinate j of every value head, and the columns of `o` that read it   (Q + K) H + w K
============  ======================================================================  =============================

Single coordinates of queries and keys cannot be removed: rotation mixes a coordinate with its partner, so one that was
zeroed comes back. The cut attention is `NarrowAttention` in `sentei/remote/modeling_sentei.py`.

Shape legend: U units, H hidden width, D head_dim, Q query heads, K KV heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.remote.modeling_sentei import NarrowAttention, narrow_norm
from sentei.structure import KINDS, Family, LayerSize, Units

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GRANULARITY = ("qk_pairs", "v_dims", "channels")


def units(model: nn.Module) -> Units:
    """Rotary pairs, value coordinates and MLP channels of every layer.

    Raises:
        ValueError: an architecture whose attention is not rotary over whole heads, or heads that were cut already.
    """
    name, row = structure.family_name(model), structure.family(model)
    if name not in FAMILIES:
        raise ValueError(
            f"heads can be cut inside for {', '.join(FAMILIES)}; this model is {name}: use groups+channels"
        )
    rotary = (getattr(model.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)  # pyright: ignore
    if rotary not in (None, 1, 1.0):
        raise ValueError("only a part of each head is rotary here; cut whole groups: use groups+channels")
    table: list[tuple[int, int, int, int]] = []
    for number, layer in enumerate(structure.layers(model)):
        size = structure.sizes_of(layer, row)
        if size.qk_pairs:
            raise ValueError("the heads of this model were cut inside before; use groups+channels on its parent")
        for kind in GRANULARITY:
            if kind == "channels":
                costs = structure.channel_costs(layer, row)
            else:
                costs = _costs(layer, row, size, kind)
            table += [(KINDS.index(kind), number, i, cost) for i, cost in costs.items()]
    kind_U, layer_U, index_U, cost_U = torch.tensor(table).T
    layers = structure.layers(model)
    return Units(GRANULARITY, kind_U, layer_U, index_U, cost_U, len(layers), structure.layer_parameters(model))


def _costs(layer: nn.Module, row: Family, size: LayerSize, kind: str) -> dict[int, int]:
    if not size.num_heads:
        return {}
    heads, hidden = size.num_heads + size.num_kv_heads, int(structure.part(layer, row.output).out_features)
    biased = int(structure.part(layer, row.query).bias is not None)
    if kind == "v_dims":
        return dict.fromkeys(range(size.head_dim), heads * hidden + biased * size.num_kv_heads)
    norms = 4 if hasattr(structure.part(layer, row.attention), "q_norm") else 0
    return dict.fromkeys(range(size.head_dim // 2), 2 * heads * (hidden + biased) + norms)


def pair_rows(pairs_K: Tensor, head_dim: int) -> Tensor:
    """The coordinates of rotary pairs within a head, first halves first."""
    return torch.cat([pairs_K, pairs_K + head_dim // 2])


def remove(model: nn.Module, units: Units, keep_U: Tensor) -> None:
    """Cut the dropped pairs, coordinates and channels out of the model, in place."""
    row = structure.family(model)
    for number, layer in enumerate(structure.layers(model)):
        stays = {kind: units.index_U[of][keep_U[of]] for kind in GRANULARITY if len(of := units.of(number, kind))}
        if "channels" in stays and len(stays["channels"]) < len(units.of(number, "channels")):
            structure.keep_channels(layer, row, stays["channels"])
        if "qk_pairs" in stays and not bool(keep_U[(units.layer_U == number)].all()):
            whole = len(stays["qk_pairs"]) == len(units.of(number, "qk_pairs"))
            if not whole or len(stays["v_dims"]) < len(units.of(number, "v_dims")):
                _cut_attention(layer, row, stays["qk_pairs"], stays["v_dims"])


def _cut_attention(layer: nn.Module, row: Family, pairs_K: Tensor, values_K: Tensor) -> None:
    assert len(pairs_K) and len(values_K)
    size, attention = structure.sizes_of(layer, row), structure.part(layer, row.attention)
    full = size.head_dim

    def rows(num_heads: int, inside_K: Tensor) -> Tensor:
        return (torch.arange(num_heads)[:, None] * full + inside_K).flatten()

    coordinates = pair_rows(pairs_K, full)
    structure.slice_linear(attention.q_proj, rows=rows(size.num_heads, coordinates))
    structure.slice_linear(attention.k_proj, rows=rows(size.num_kv_heads, coordinates))
    structure.slice_linear(attention.v_proj, rows=rows(size.num_kv_heads, values_K))
    structure.slice_linear(attention.o_proj, cols=rows(size.num_heads, values_K))
    for name in ("q_norm", "k_norm"):
        norm = attention._modules.get(name)
        if norm is not None:
            small = narrow_norm(norm, len(coordinates), full)
            with torch.no_grad():
                kept = norm.weight.index_select(0, coordinates.to(norm.weight.device))
                small.weight = nn.Parameter(
                    (kept.float() * (full / len(coordinates)) ** 0.5).to(kept.dtype), norm.weight.requires_grad
                )
            setattr(attention, name, small)
    narrow = NarrowAttention(attention, pairs_K.tolist(), len(values_K))
    layer.set_submodule(row.attention, narrow.train(attention.training))
