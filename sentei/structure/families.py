"""Where each architecture keeps its parts, and what its layers hold now.

Sizes are read from the modules, never from the config. Shape legend: G query heads per KV head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

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
    model_type = model_or_type if isinstance(model_or_type, str) else str(config_of(model_or_type).model_type)
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


def run_layers(model: nn.Module, ids_BT: Tensor) -> None:
    """A forward for what hooks see of it: without a head, without a cache of keys and values."""
    no_cache = {"use_cache": False} if is_causal(model) else {}
    base_model(model)(input_ids=ids_BT.to(next(model.parameters()).device), **no_cache)


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
    return count(layers(model))


def positions(model: Any) -> int | None:
    """The longest input in tokens, where the configuration says one."""
    found = getattr(model.config, "max_position_embeddings", None)
    if found is not None and "roberta" in model.config.model_type:
        found -= model.config.pad_token_id + 1  # RoBERTa counts its positions from behind the padding token's
    return found


def total_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, a tied tensor once."""
    return count(model)


def count(*modules: nn.Module | None) -> int:
    """Parameters of these modules; None has none."""
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def config_of(module: nn.Module) -> Any:
    """`module.config`, of which a type checker knows nothing."""
    return module.config
