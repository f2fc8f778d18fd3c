"""The ways to write a pruned model, and what each cannot hold.

uniform        every layer the same sizes: a stock configuration, retyped where the family's own is too narrow
heterogeneous  sizes differ per layer: `per_layer_config` and the modelling file in sentei/remote
padded         heterogeneous, filled up with zeros to the widest layer: a stock configuration, same outputs
folded         what a model whose layers share weights is written as, see folded.py

A model whose layers are all equal (also: whole blocks removed) is written uniform even where heterogeneous is allowed.
`form` needs the model's modules and config only, so that a shape can be refused before the work is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from sentei import folding, structure
from sentei.remote import modeling_sentei
from sentei.structure import LayerSize

SHAPES = ("heterogeneous", "uniform", "padded")
# These configurations have no head_dim, they divide the hidden size by the number of heads: keep the parent's number.
HEAD_DIM_DERIVED = {"qwen2", "phi3", "bert", "roberta", "distilbert"}
ENCODERS = {"bert", "roberta", "distilbert"}
_OURS = ("per_layer_config", "auto_map", "architectures", "attention_output_bias", "mlp_output_bias", "fold")


@dataclass(frozen=True)
class Form:
    """How a model will be written.

    Attributes:
        shape: what it turned out to be, one of SHAPES or "folded".
        config: the configuration to write.
        model_class: the class that `config` builds.
        sizes: what each layer holds before padding.
    """

    shape: str
    config: Any
    model_class: Any
    sizes: tuple[LayerSize, ...]

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def needs_modeling_file(self) -> bool:
        return self.model_type.startswith("sentei_")


def form(model: Any, shape: str = "heterogeneous") -> Form:
    """The form in which a model is written when `shape` is asked for.

    Raises:
        ValueError: this shape cannot hold the model; the message says which one can, or which sizes would do.
    """
    if folding.is_folded(model):
        from sentei.checkpoint import folded  # which builds on this file

        return folded.form(model, shape)
    return unshared(model, "heterogeneous" if shape == "folded" else shape)


def unshared(model: Any, shape: str) -> Form:
    """`form` of a model whose layers share nothing, or as if they did not."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not known; use {', '.join(SHAPES)}")
    sizes = tuple(structure.sizes(model))
    widths = {replace(size, attention_bias=False, mlp_bias=False) for size in sizes}
    widest = _widest(model, sizes)
    if shape == "uniform" and len(widths) > 1:
        raise ValueError(
            f"the layers differ ({_range(size.num_heads for size in sizes)} heads, "
            f"{_range(size.intermediate_size for size in sizes)} channels); prune with --shape uniform so that they "
            "stay equal, or write with --shape heterogeneous or padded"
        )
    narrow = any(size.qk_pairs for size in sizes)
    if narrow and shape != "heterogeneous":
        raise ValueError(
            "a plain architecture would recompute rotary frequencies and the attention scale for the new head size; "
            "use --shape heterogeneous"
        )
    if shape == "padded":
        return _padded(model, sizes, widest)
    if len(widths) == 1 and not narrow:
        try:
            config = plain_config(model, next(iter(widths)), widest.attention_bias, widest.mlp_bias)
            return Form("uniform", config, _stock_class(model, config), sizes)
        except ValueError:
            if shape == "uniform":
                raise
    name = structure.family_name(model)
    task = "AutoModel" + (f"For{_task(model)}" if _task(model) else "")
    classes = modeling_sentei.auto_classes(name)
    if task not in classes:
        raise ValueError(f"{type(model).__name__}: no heterogeneous form for this head; known: {', '.join(classes)}")
    config_class = getattr(modeling_sentei, classes["AutoConfig"])
    config = config_class(**_heterogeneous_values(model, sizes, widest))
    config.auto_map = {auto: f"modeling_sentei.{made}" for auto, made in classes.items()}
    return Form("heterogeneous", config, getattr(modeling_sentei, classes[task]), sizes)


def values(model: Any, written: Form) -> dict[str, Any]:
    """The fields of a form's configuration: what another class needs to hold the same layers."""
    if written.shape == "heterogeneous":
        return _heterogeneous_values(model, written.sizes, _widest(model, written.sizes))
    return _values_of(written.config)


def tensors(model: Any, written: Form) -> dict[str, Tensor]:
    """The state dict of `written.model_class`: the model's own tensors, padded with zeros where the form is wider."""
    with torch.device("meta"):
        target = written.model_class(written.config)
    state = model.state_dict()
    row = structure.family(model)
    base = f"{model.base_model_prefix}." if structure.base_model(model) is not model else ""
    fused: dict[str, list[int]] = {}  # name of a fused weight -> rows of its parts
    for index, size in enumerate(written.sizes):
        layer = f"{base}{row.layers}.{index}."
        if row.fused_qkv and "attention" not in size.skip:
            heads, kv_heads = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
            fused[f"{layer}{row.query}.weight"] = [heads, kv_heads, kv_heads]
        if row.fused_up and "mlp" not in size.skip:
            fused[f"{layer}{row.up[0]}.weight"] = [size.intermediate_size] * 2
    result = {}
    for name, wanted in target.state_dict().items():
        have = state.get(name)
        if have is None:  # a removed branch, or a bias that only the wider class has
            assert written.shape != "heterogeneous", name
            made = torch.ones if "norm" in name.lower() and name.endswith("weight") else torch.zeros
            result[name] = made(wanted.shape, dtype=next(model.parameters()).dtype)
        elif have.shape == wanted.shape:
            result[name] = have
        elif name in fused:
            parts = have.split(fused[name])
            rows = _fused_rows(written, name, row, len(parts))
            result[name] = torch.cat([_pad(part, (n, *wanted.shape[1:])) for part, n in zip(parts, rows, strict=True)])
        else:
            assert written.shape == "padded", f"{name}: {tuple(have.shape)} does not fit {tuple(wanted.shape)}"
            result[name] = _pad(have, tuple(wanted.shape))
    lost = set(state) - set(result)
    assert not lost, f"no place for {sorted(lost)[:3]} in {written.model_class.__name__}"
    return result


def plain_config(model: Any, size: LayerSize, attention_bias: bool, mlp_bias: bool) -> Any:
    """A stock configuration for layers that are all of one size.

    Llama demands that the head count divides the hidden size; Mistral does not and computes the same. Qwen2 derives
    head_dim from the head count in other runtimes; Llama with attention_bias does not.

    Args:
        attention_bias: some output linear of an attention has a bias.
        mlp_bias: some down projection has one.
    Raises:
        ValueError: no stock architecture computes this.
    """
    name, values = structure.family_name(model), _stock_values(model)
    hidden, heads = model.config.hidden_size, size.num_heads
    if size.skip or not heads or not size.intermediate_size:
        raise ValueError(
            "a layer without attention or without MLP has no place in a stock architecture; "
            "use --shape heterogeneous or padded"
        )
    values |= _width_values(name, size)
    if name in ENCODERS:
        if heads * size.head_dim != hidden:
            raise ValueError(
                f"{name} computes its head size as hidden size / heads, so {heads} heads of {size.head_dim} in "
                f"{hidden} cannot be written plainly; nearest possible: all {hidden // size.head_dim} heads (prune "
                "with granularity channels). Or use --shape heterogeneous or padded"
            )
        return _config_class(name)(**values)
    if name in ("gemma2", "gemma3_text", "qwen3", "phi3"):
        if mlp_bias or (attention_bias and name == "phi3"):
            raise ValueError(
                f"{name} has no place for the biases that compensation (auto, mean, least-squares) adds; use "
                "--compensate none, or --shape heterogeneous"
            )
        if name.startswith("gemma"):
            _check_divides(hidden, size, name)
        if attention_bias:
            values["attention_bias"] = True
        return _config_class(name)(**values)
    # Llama, Mistral and Qwen2 compute the same; they differ in which biases and head counts they allow.
    slides = name == "mistral" and values.get("sliding_window") is not None
    slides |= "sliding_attention" in (values.get("layer_types") or ())
    biased = name == "qwen2" or bool(values.get("attention_bias")) or attention_bias or mlp_bias
    if name == "mistral" and not biased:
        return _config_class(name)(**values)
    if name == "qwen2" and not (attention_bias or mlp_bias) and heads * size.head_dim == hidden:
        return _config_class(name)(**values)
    if slides:
        if attention_bias or mlp_bias:
            raise ValueError(
                f"{name} with a sliding window has no place for the biases that compensation (auto, mean, "
                "least-squares) adds; use --compensate none, or --shape heterogeneous"
            )
        raise ValueError(
            f"{name} with a sliding window has no stock class with {heads} heads; use --shape heterogeneous or padded"
        )
    for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
        values.pop(key, None)
    if biased or hidden % heads == 0:
        _check_divides(hidden, size, "llama")
        flags = {"attention_bias": name == "qwen2" or bool(values.get("attention_bias")) or attention_bias}
        return _config_class("llama")(**values | flags | {"mlp_bias": mlp_bias})
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(key, None)
    return _config_class("mistral")(**values, sliding_window=None)


def _padded(model: Any, sizes: tuple[LayerSize, ...], widest: LayerSize) -> Form:
    """The narrowest stock configuration that every layer fits into."""
    groups = {size.group_size for size in sizes if size.num_heads}
    if len(groups) != 1:
        raise ValueError(f"layers have {sorted(groups)} query heads per KV head; padding needs one number in all")
    (group,) = groups
    refusal = None
    for kv_heads in range(widest.num_kv_heads, 4 * widest.num_kv_heads + model.config.hidden_size // widest.head_dim):
        size = replace(widest, num_heads=kv_heads * group, num_kv_heads=kv_heads)
        try:
            config = plain_config(model, size, widest.attention_bias, widest.mlp_bias)
        except ValueError as error:
            refusal = refusal or error
            continue
        return Form("padded", config, _stock_class(model, config), sizes)
    assert refusal is not None
    raise refusal


def _fused_rows(written: Form, name: str, row: structure.Family, num_parts: int) -> list[int]:
    config = written.config
    if num_parts == 2:
        return [config.intermediate_size] * 2
    return [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2


def _heterogeneous_values(model: Any, sizes: tuple[LayerSize, ...], widest: LayerSize) -> dict[str, Any]:
    name, values = structure.family_name(model), _stock_values(model)
    per_layer: dict[int, dict[str, Any]] = {}
    for index, size in enumerate(sizes):
        entry = _width_values(name, size)
        entry.pop("head_dim", None)
        if size.qk_pairs:
            entry |= {"qk_pairs": list(size.qk_pairs), "v_head_dim": size.head_dim}
        if name not in ENCODERS:
            entry["attention_output_bias"], entry["mlp_output_bias"] = size.attention_bias, size.mlp_bias
            if not size.num_heads:
                entry["num_key_value_heads"] = 1  # what NoAttention writes into a cache
            if "attention" in size.skip:
                del entry["num_attention_heads"], entry["attention_output_bias"]
            if "mlp" in size.skip:
                del entry["intermediate_size"], entry["mlp_output_bias"]
        per_layer[index] = entry | ({"skip": list(size.skip)} if size.skip else {})
    if name not in HEAD_DIM_DERIVED:
        values |= _width_values(name, widest)
    # Layers whose heads were cut inside keep the rotary angles and the attention scale of the full head.
    full = max(getattr(layer, "full_head_dim", 0) for layer in _attentions(model))
    ffn = "hidden_dim" if name == "distilbert" else "intermediate_size"
    values |= {ffn: widest.intermediate_size, "head_dim": full or widest.head_dim}
    if name not in ENCODERS:
        values |= {"attention_output_bias": widest.attention_bias, "mlp_output_bias": widest.mlp_bias}
    return values | {"per_layer_config": per_layer}


def _attentions(model: Any) -> list[Any]:
    row = structure.family(model)
    return [structure.part(layer, row.attention) for layer in structure.layers(model)]


def _width_values(name: str, size: LayerSize) -> dict[str, Any]:
    """One layer's sizes under the names of its configuration."""
    if name == "distilbert":
        return {"n_heads": size.num_heads, "hidden_dim": size.intermediate_size}
    values = {"num_attention_heads": size.num_heads, "intermediate_size": size.intermediate_size}
    if name not in ENCODERS:
        values |= {"num_key_value_heads": size.num_kv_heads, "head_dim": size.head_dim}
    return values


def _stock_values(model: Any) -> dict[str, Any]:
    """The fields of the model's configuration, less what is ours and what depends on where it came from."""
    return _values_of(model.config)


def _values_of(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    for key in (*_OURS, "model_type", "transformers_version", "_name_or_path", "quantization_config"):
        values.pop(key, None)
    return values


def _widest(model: Any, sizes: tuple[LayerSize, ...]) -> LayerSize:
    """Each dimension at its widest. A model without any attention left keeps the head size of its config."""
    config = model.config
    kv_heads = max(size.num_kv_heads for size in sizes) or 1
    group = max(size.group_size for size in sizes) or 1
    head_dim = max(size.head_dim for size in sizes) or getattr(config, "head_dim", None)
    return LayerSize(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=max(size.intermediate_size for size in sizes) or 1,
        attention_bias=any(size.attention_bias for size in sizes),
        mlp_bias=any(size.mlp_bias for size in sizes),
    )


def _check_divides(hidden: int, size: LayerSize, name: str) -> None:
    if hidden % size.num_heads == 0:
        return
    possible = [n for n in range(size.group_size, hidden + 1, size.group_size) if hidden % n == 0]
    near = [max((n for n in possible if n < size.num_heads), default=None)]
    near += [min((n for n in possible if n > size.num_heads), default=None)]
    words = " or ".join(f"{n} heads ({n // size.group_size} KV groups)" for n in near if n)
    raise ValueError(
        f"{size.num_heads} heads do not divide the hidden size {hidden}, which {name} demands; nearest possible: "
        f"{words or 'none'}. Prune to that many, or use --shape heterogeneous or padded"
    )


def _config_class(name: str) -> Any:
    return getattr(transformers, modeling_sentei.FAMILIES[name].split()[0])


def _stock_class(model: Any, config: Any) -> Any:
    if type(model).config_class is type(config):
        return type(model)
    auto = f"AutoModelFor{_task(model)}" if _task(model) else "AutoModel"
    return getattr(transformers, auto)._model_mapping[type(config)]


def _task(model: Any) -> str:
    return type(model).__name__.partition("For")[2]


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(width) for width in tensor.shape)] = tensor
    return padded


def _range(numbers: Any) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
