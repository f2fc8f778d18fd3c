"""Removing units for good: slices of linears, sub-layers that do nothing, blocks that leave the list."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sentei.remote.modeling_sentei import LayerConfig, NoAttention, NoMLP
from sentei.structure.families import SUBLAYERS, Family, config_of, family, layers, part, reader, sizes_of
from sentei.structure.removable import Units, columns


def remove(model: nn.Module, units: Units, keep_U: Tensor, bias: dict[tuple[int, str], Tensor] | None = None) -> None:
    """Cut the dropped units out of the model, in place, one linear at a time.

    A pre-norm sub-layer left without any unit and without a bias is replaced by a module that does nothing. A dropped
    block leaves the list of layers, as one does whose sub-layers have both gone; those after it are renumbered.

    Args:
        keep_U: [U] bool, True keeps.
        bias: (layer, kind) -> [H], added to the bias of that reading linear (made if it has none); from `importance`.
    """
    assert keep_U.shape == units.cost_U.shape and keep_U.dtype == torch.bool
    row, blocks = family(model), layers(model)
    dropped_layers: list[int] = []
    for number, layer in enumerate(blocks):
        for kind in units.granularity:
            of = units.of(number, kind)
            kept = units.index_U[of][keep_U[of]]
            gone = units.index_U[of][~keep_U[of]].tolist()
            if kind == "layers":
                dropped_layers += [number] * len(gone)
            elif kind == "sublayers":
                for index in gone:
                    _remove_sublayer(layer, row, SUBLAYERS[index])
            else:
                extra = (bias or {}).get((number, kind))
                if gone:
                    (_keep_groups if kind == "heads" else keep_channels)(layer, row, kept)
                if extra is not None:
                    _add_bias(reader(layer, row, kind), extra)
                linear = reader(layer, row, kind)
                if row.pre_norm and linear is not None and not linear.in_features:
                    _retire(layer, row, kind, linear)
    empty = {number for number, layer in enumerate(blocks) if sizes_of(layer, row).skip == SUBLAYERS}
    if gone_as_wholes := set(dropped_layers) | empty:
        _remove_layers(model, row, gone_as_wholes)


def _retire(layer: nn.Module, row: Family, kind: str, linear: nn.Linear) -> None:
    """A sub-layer without units: gone if it adds nothing; an attention that still adds a bias only counts the cache."""
    if linear.bias is None:
        _remove_sublayer(layer, row, "attention" if kind == "heads" else "mlp")
    elif kind == "heads":
        attention = part(layer, row.attention)
        rest = NoAttention(attention.layer_idx, attention.head_dim, attention.named_children())
        layer.set_submodule(row.attention, rest)


def _keep_groups(layer: nn.Module, row: Family, kept: Tensor) -> None:
    size = sizes_of(layer, row)
    q_rows = columns(size, "heads", kept)
    kv_rows = (kept[:, None] * size.head_dim + torch.arange(size.head_dim)).flatten()
    if row.fused_qkv:
        q_end, k_end = size.num_heads * size.head_dim, (size.num_heads + size.num_kv_heads) * size.head_dim
        slice_linear(part(layer, row.query), rows=torch.cat([q_rows, kv_rows + q_end, kv_rows + k_end]))
        attention = part(layer, row.attention)  # Phi-3 splits the fused output by these two numbers
        attention.num_key_value_heads = len(kept)
        attention.config = LayerConfig(config_of(layer), num_attention_heads=len(kept) * size.group_size)
    else:
        slice_linear(part(layer, row.query), rows=q_rows)
        slice_linear(part(layer, row.key), rows=kv_rows)
        slice_linear(part(layer, row.value), rows=kv_rows)
    slice_linear(part(layer, row.output), cols=q_rows)


def keep_channels(layer: nn.Module, row: Family, kept: Tensor) -> None:
    """Keep these channels of a layer's MLP, in place."""
    down = part(layer, row.down)
    rows = torch.cat([kept, kept + down.in_features]) if row.fused_up else kept
    for path in row.up:
        slice_linear(part(layer, path), rows=rows)
    slice_linear(down, cols=kept)


def slice_linear(linear: nn.Linear, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
    """Keep these output rows (and their biases) or these input columns of a linear, in place."""
    with torch.no_grad():
        if rows is not None:
            linear.weight = _like(linear.weight, linear.weight.index_select(0, rows.to(linear.weight.device)))
            if linear.bias is not None:
                linear.bias = _like(linear.bias, linear.bias.index_select(0, rows.to(linear.bias.device)))
            linear.out_features = len(rows)
        if cols is not None:
            linear.weight = _like(linear.weight, linear.weight.index_select(1, cols.to(linear.weight.device)))
            linear.in_features = len(cols)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)


def _add_bias(linear: nn.Linear | None, extra_H: Tensor) -> None:
    if linear is None:
        return
    extra_H = extra_H.to(linear.weight)
    with torch.no_grad():
        new = extra_H.clone() if linear.bias is None else linear.bias + extra_H
    linear.bias = nn.Parameter(new, requires_grad=linear.weight.requires_grad)


def _remove_sublayer(layer: nn.Module, row: Family, name: str) -> None:
    if not row.pre_norm:  # keep the norm of the residual sum; the branch itself becomes exactly zero
        none = torch.arange(0)
        if name == "attention":
            _keep_groups(layer, row, none)
        else:
            keep_channels(layer, row, none)
        linear = reader(layer, row, "heads" if name == "attention" else "channels")
        assert linear is not None
        if linear.bias is not None:
            linear.bias = _like(linear.bias, torch.zeros_like(linear.bias))
        return
    path, norms = (row.attention, row.attention_norms) if name == "attention" else (row.mlp, row.mlp_norms)
    if name == "attention":
        attention = part(layer, path)
        layer.set_submodule(path, NoAttention(attention.layer_idx, attention.head_dim))
    else:
        layer.set_submodule(path, NoMLP())
    for norm in norms:
        layer.set_submodule(norm, nn.Identity())


def _remove_layers(model: nn.Module, row: Family, dropped: set[int]) -> None:
    blocks = layers(model)
    if len(dropped) == len(blocks):
        raise ValueError(f"all {len(blocks)} blocks would be removed; lower the sparsity")
    for number in sorted(dropped, reverse=True):
        del blocks[number]
    for number, layer in enumerate(blocks):
        for module in layer.modules():  # the cache slot of each layer
            if "layer_idx" in module.__dict__:
                module.layer_idx = number  # pyright: ignore[reportArgumentType]
    config = config_of(model)
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if (per_layer := getattr(config, name, None)) is not None:
            setattr(config, name, [entry for i, entry in enumerate(per_layer) if i not in dropped])
    if (full := getattr(config, "max_window_layers", None)) is not None:  # the layers below this number see everything
        config.max_window_layers = full - sum(number < full for number in dropped)
    config.num_hidden_layers = len(blocks)
