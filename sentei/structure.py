"""What can be removed from this architecture, and removing it for good.

A *unit* is a removable piece of a transformer layer:

====================  ========================================================  ==================================
kind                  what is removed                                           parameters (H hidden, D head_dim)
====================  ========================================================  ==================================
``heads``             a KV group: one KV head with its G query heads            (2G + 2) D H, plus biases
``channels``          one channel of the MLP's inner width                      3 H gated, 2 H plain, plus biases
``sublayers``         a whole attention or MLP branch (the residual stays)      its linears and the norms only it uses
``layers``            a whole block; its output becomes its input               everything in the block
====================  ========================================================  ==================================

Hidden width, head_dim, embeddings, final norm and LM head are never cut. Sizes are read from the modules, never from
the config, so an already pruned model is pruned again like any other.

Shape legend: U units, L layers, H hidden width, D head_dim, G query heads per KV head, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sentei.remote.modeling_sentei import LayerConfig, NoAttention, NoMLP
from sentei.remote.modeling_sentei_folded import ChildLinear

# The last two are the inner dimensions of heads; `sentei.head_dims` lists and removes them.
KINDS = ("heads", "channels", "sublayers", "layers", "qk_pairs", "v_dims")
SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts; dotted paths start at a layer, `layers` at the base model.

    A fused attention (Phi-3) names the same linear for query, key and value; a fused gate and up projection sets
    `fused_up`. `*_norms` are the norms that only this sub-layer uses, removed with it. Encoders put the norm after the
    residual sum, where it also serves the other branch, so they name none and keep it.
    """

    layers: str
    attention: str
    head_dim: str
    query: str
    key: str
    value: str
    output: str
    mlp: str
    up: tuple[str, ...]
    down: str
    fused_up: bool = False
    attention_norms: tuple[str, ...] = ()
    mlp_norms: tuple[str, ...] = ()

    @property
    def fused_qkv(self) -> bool:
        return self.query == self.key

    @property
    def pre_norm(self) -> bool:
        return bool(self.attention_norms)


_LLAMA = Family(
    layers="layers",
    attention="self_attn",
    head_dim="self_attn.head_dim",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    mlp="mlp",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    attention_norms=("input_layernorm",),
    mlp_norms=("post_attention_layernorm",),
)
_GEMMA = replace(
    _LLAMA,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_FUSED = "self_attn.qkv_proj"
_PHI3 = replace(_LLAMA, query=_FUSED, key=_FUSED, value=_FUSED, up=("mlp.gate_up_proj",), fused_up=True)
_BERT = Family(
    layers="encoder.layer",
    attention="attention",
    head_dim="attention.self.attention_head_size",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    mlp="output",
    up=("intermediate.dense",),
    down="output.dense",
)
_DISTILBERT = Family(
    layers="transformer.layer",
    attention="attention",
    head_dim="attention.attention_head_size",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    mlp="ffn",
    up=("ffn.lin1",),
    down="ffn.lin2",
)

# To add an architecture, add its row here (CONTRIBUTING.md, "Add an architecture").
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _PHI3,
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _DISTILBERT,
}


def family_name(model_or_type: nn.Module | str) -> str:
    """The architecture's stock `model_type`: "sentei_llama" and "sentei_folded_llama", ours, are "llama"."""
    model_type = model_or_type if isinstance(model_or_type, str) else str(_config(model_or_type).model_type)
    return model_type.removeprefix("sentei_").removeprefix("folded_")


def family(model_or_type: nn.Module | str) -> Family:
    """The row of names of a model's architecture.

    Raises:
        ValueError: the architecture is not known; the message lists the known ones.
    """
    name = family_name(model_or_type)
    if name not in FAMILIES:
        raise ValueError(
            f"architecture {name!r} is not supported; known: {', '.join(FAMILIES)}. "
            'To add one, see "Add an architecture" in CONTRIBUTING.md'
        )
    return FAMILIES[name]


@dataclass(frozen=True)
class LayerSize:
    """What one layer holds now; `skip` names sub-layers that are gone, `*_bias`: the reading linear has a bias.

    Where heads were cut inside (`head_dims`), `qk_pairs` are the rotary pairs left, `head_dim` the values' width.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    skip: tuple[str, ...] = ()
    qk_pairs: tuple[int, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def group_size(self) -> int:
        """Query heads per KV head; 0 when no head is left."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 0


def layers(model: nn.Module) -> nn.ModuleList:
    """The model's blocks, in order."""
    return base_model(model).get_submodule(family(model).layers)  # pyright: ignore[reportReturnType]


def base_model(model: nn.Module) -> nn.Module:
    """The headless transformer inside a task model (the model itself if it has no head)."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def is_causal(model: nn.Module) -> bool:
    """True for decoders, False for encoders."""
    return family(model).pre_norm


def part(layer: nn.Module, path: str) -> Any:
    """A submodule or attribute of a layer by dotted path; None if the sub-layer that held it is gone."""
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def reader(layer: nn.Module, row: Family, kind: str) -> nn.Linear | None:
    """The linear that reads a layer's heads or channels: where masks and biases act. None if the sub-layer is gone."""
    return part(layer, row.output if kind == "heads" else row.down)


def sizes(model: nn.Module) -> list[LayerSize]:
    """What each layer holds now, read from its modules."""
    row = family(model)
    return [sizes_of(layer, row) for layer in layers(model)]


def sizes_of(layer: nn.Module, row: Family) -> LayerSize:
    """What one layer holds now."""
    output, down = reader(layer, row, "heads"), reader(layer, row, "channels")
    num_heads = num_kv_heads = head_dim = 0
    if output is not None:
        head_dim = part(layer, row.head_dim)
        num_heads = output.in_features // head_dim
        rows = part(layer, row.value).out_features  # keys may be narrower than values, see `head_dims`
        num_kv_heads = (rows // head_dim - num_heads) // 2 if row.fused_qkv else rows // head_dim
    return LayerSize(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=0 if down is None else down.in_features,
        skip=tuple(name for name, linear in zip(SUBLAYERS, (output, down), strict=True) if linear is None),
        qk_pairs=tuple(getattr(part(layer, row.attention), "qk_pairs", ())),
        attention_bias=output is not None and output.bias is not None,
        mlp_bias=down is not None and down.bias is not None,
    )


def layer_parameters(model: nn.Module) -> int:
    """Parameters of all blocks: the base of every budget."""
    return _count(layers(model))


def positions(model: Any) -> int | None:
    """The longest input in tokens, where the configuration says one."""
    found = getattr(model.config, "max_position_embeddings", None)
    if found is not None and "roberta" in model.config.model_type:
        found -= model.config.pad_token_id + 1  # RoBERTa counts its positions from behind the padding token's
    return found


def total_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, a tied tensor once."""
    return _count(model)


def _count(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


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
        return {0: _count(layer)}
    if kind == "sublayers":
        if row.pre_norm:
            attention = _count(part(layer, row.attention), *(part(layer, name) for name in row.attention_norms))
            mlp = _count(part(layer, row.mlp), *(part(layer, name) for name in row.mlp_norms))
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
    written = sum(_count(linear) for linear in readers)
    return (written + part(layer, row.output).weight.numel()) // size.num_kv_heads


def _channel_cost(layer: nn.Module, row: Family) -> int:
    down = part(layer, row.down)
    if down is None or not down.in_features:
        return 0
    return (sum(_count(part(layer, path)) for path in row.up) + down.weight.numel()) // down.in_features


def columns(size: LayerSize, kind: str, units_K: Tensor) -> Tensor:
    """Input columns of the reading linear that belong to some of a layer's units.

    Args:
        units_K: indices of KV groups or channels, in the order wanted.
    Returns:
        column indices; a KV group owns G * head_dim neighbours, a channel one.
    """
    width = size.group_size * size.head_dim if kind == "heads" else 1
    return (units_K[:, None] * width + torch.arange(width, device=units_K.device)).flatten()


def remove(model: nn.Module, units: Units, keep_U: Tensor, bias: dict[tuple[int, str], Tensor] | None = None) -> None:
    """Cut the dropped units out of the model, in place, one linear at a time.

    A pre-norm sub-layer left without any unit and without a bias is replaced by a module that does nothing. A dropped
    block leaves the list of layers; those after it are renumbered.

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
    if dropped_layers:
        _remove_layers(model, row, set(dropped_layers))


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
        attention.config = LayerConfig(_config(layer), num_attention_heads=len(kept) * size.group_size)
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
    config = _config(model)
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if (per_layer := getattr(config, name, None)) is not None:
            setattr(config, name, [entry for i, entry in enumerate(per_layer) if i not in dropped])
    if (full := getattr(config, "max_window_layers", None)) is not None:  # the layers below this number see everything
        config.max_window_layers = full - sum(number < full for number in dropped)
    config.num_hidden_layers = len(blocks)


def _config(model: nn.Module) -> Any:
    return model.config


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


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
