"""Pruned models whose layers differ in width. This file travels with the checkpoint; it needs transformers and torch.

Every class here is a stock transformers class whose linears are resized, layer by layer, to `config.per_layer_config`:

    "per_layer_config": {"3": {"intermediate_size": 640, "num_attention_heads": 6, "num_key_value_heads": 2},
                         "7": {"skip": ["attention"]}, "9": {"qk_pairs": [0, 1, 5], "v_head_dim": 48}}

Forward passes, caches, masks and losses are the stock ones. `SenteiLlamaForCausalLM` is `LlamaForCausalLM`, and so on
for the families of FAMILIES below; classes are made at first use by `__getattr__` at the end. The file reads no other
file, opens no connection and runs nothing when imported.

Two fields beside transformers' own: `attention_output_bias` and `mlp_output_bias` (true, false, or null for the
family's default) tell whether the last linear of a sub-layer has a bias; what was removed leaves its mean there.
A layer with `qk_pairs` keeps only these rotary pairs of its query and key heads, and `v_head_dim` of its values
(`NarrowAttention`, the one attention here with a forward of its own).
"""

import sys

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn

# Stock model type -> stock configuration, then the stock models we resize, the base model first.
FAMILIES = {
    "llama": "LlamaConfig LlamaModel LlamaForCausalLM LlamaForSequenceClassification LlamaForTokenClassification",
    "mistral": "MistralConfig MistralModel MistralForCausalLM MistralForSequenceClassification",
    "qwen2": "Qwen2Config Qwen2Model Qwen2ForCausalLM Qwen2ForSequenceClassification Qwen2ForTokenClassification",
    "qwen3": "Qwen3Config Qwen3Model Qwen3ForCausalLM Qwen3ForSequenceClassification Qwen3ForTokenClassification",
    "gemma2": "Gemma2Config Gemma2Model Gemma2ForCausalLM Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextConfig Gemma3TextModel Gemma3ForCausalLM Gemma3TextForSequenceClassification",
    "phi3": "Phi3Config Phi3Model Phi3ForCausalLM Phi3ForSequenceClassification Phi3ForTokenClassification",
    "bert": "BertConfig BertModel BertForMaskedLM BertForSequenceClassification BertForTokenClassification "
    "BertForQuestionAnswering",
    "roberta": "RobertaConfig RobertaModel RobertaForMaskedLM RobertaForSequenceClassification "
    "RobertaForTokenClassification RobertaForQuestionAnswering",
    "distilbert": "DistilBertConfig DistilBertModel DistilBertForMaskedLM DistilBertForSequenceClassification "
    "DistilBertForTokenClassification DistilBertForQuestionAnswering",
}
PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_heads", "hidden_dim")
PER_LAYER += ("attention_output_bias", "mlp_output_bias")


class SenteiConfig:
    """Mixed into a stock configuration. The global sizes hold the widest layer and may be read freely."""

    attention_output_bias = None
    mlp_output_bias = None
    allow_global_per_layer_attribute_access = True

    def __getattribute__(self, name):
        # transformers warns, or raises, when a size that differs per layer is read globally
        if name in PER_LAYER and name not in type(self).attribute_map:
            return object.__getattribute__(self, name)
        return super().__getattribute__(name)

    def validate_architecture(self):
        for index, layer in enumerate(self.per_layer_config):
            heads = layer.num_attention_heads
            if heads % (getattr(layer, "num_key_value_heads", None) or 1):
                raise ValueError(
                    f"layer {index}: {heads} query heads are not a multiple of {layer.num_key_value_heads} KV heads"
                )


class SenteiModel:
    """Mixed into a stock model: built by the stock code, then every layer is resized (free on the meta device)."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        base = self.base_model
        if base is not self and isinstance(base, SenteiModel):
            return  # made by AutoModel, resized already
        build, layers = _BUILDERS.get(config.model_type.removeprefix("sentei_"), (_decoder, "layers"))
        for index, layer in enumerate(base.get_submodule(layers)):
            size = config.per_layer_config[index]
            build(layer, index, size, set(getattr(size, "skip", ())), config)

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # the attention is the stock one; transformers would guess otherwise from NoAttention below


class NoAttention(nn.Module):
    """An attention without heads: adds nothing, or its output bias (`linears` then holds the empty ones)."""

    def __init__(self, layer_idx, head_dim, linears=()):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = head_dim
        self.o_proj = None
        for name, module in dict(linears).items():
            setattr(self, name, module)

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            # A cache counts the tokens seen so far in one of its layers, which may be this one: one head of zeros.
            count = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], self.head_dim)
            past_key_values.update(count, count, self.layer_idx)
        if self.o_proj is None:
            return torch.zeros_like(hidden_states), None
        return self.o_proj(hidden_states[..., :0]), None


class NarrowAttention(nn.Module):
    """Attention whose queries and keys keep some rotary pairs (i, i + d/2) only, and whose values have another width.

    A pair that is left turns by its own old angle, and scores are still divided by the root of the old head size d:
    the cut changes nothing but what was removed. A norm over a query or key head takes its mean over all d coordinates;
    over the d' that are left it computes the same with its weight times sqrt(d / d') and its epsilon times d / d'.

    Args:
        attention: the stock attention of Llama, Mistral, Qwen2 or Qwen3; its linears and norms are taken over as they
            are, already in their new sizes.
        qk_pairs: the pairs left, in the old numbering.
        v_head_dim: width of a value head.
    """

    def __init__(self, attention, qk_pairs, v_head_dim):
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.full_head_dim = getattr(attention, "full_head_dim", attention.head_dim)
        self.qk_pairs, self.head_dim = tuple(qk_pairs), v_head_dim
        self.num_key_value_groups = attention.num_key_value_groups
        self.scaling, self.attention_dropout = attention.scaling, attention.attention_dropout
        self.is_causal = True
        for name, module in attention.named_children():
            setattr(self, name, module)
        self._index = None  # not a buffer: one made on the meta device would never get its values

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        kind = self.config._attn_implementation
        if kind not in ("sdpa", "eager"):
            raise ValueError(f"{kind} needs keys and values of one width; load with attn_implementation='sdpa'")
        leading = hidden_states.shape[:-1]
        query, key = (
            linear(hidden_states).view(*leading, -1, 2 * len(self.qk_pairs)) for linear in (self.q_proj, self.k_proj)
        )
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden_states).view(*leading, -1, self.head_dim).transpose(1, 2)
        if self._index is None or self._index.device != hidden_states.device:
            pairs = torch.tensor(self.qk_pairs, device=hidden_states.device)
            self._index = torch.cat([pairs, pairs + self.full_head_dim // 2])
        cos, sin = (table[..., self._index].unsqueeze(1) for table in position_embeddings)
        query, key = (self._turn(x.transpose(1, 2), cos, sin) for x in (query, key))
        if past_key_values is not None:
            if type(past_key_values).__name__ == "StaticCache":
                raise ValueError(
                    "a static cache needs keys and values of one width; use cache_implementation='dynamic'"
                )
            key, value = past_key_values.update(key, value, self.layer_idx)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        attend = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*leading, -1).contiguous()), weights

    @staticmethod
    def _turn(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


def narrow_norm(norm, kept, full):
    """A query or key norm for `kept` of `full` coordinates, the others being zero; weights are left to the loader."""
    small = type(norm)(kept, eps=norm.variance_epsilon * full / kept)
    return small.to(device=norm.weight.device, dtype=norm.weight.dtype)


class NoMLP(nn.Module):
    """An MLP that was removed: adds nothing."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class LayerConfig:
    """The model's configuration seen by one layer: a few values differ, the others follow it, later changes too."""

    def __init__(self, config, **overrides):
        self.__dict__.update(overrides, _config=config)

    def __getattr__(self, name):
        return getattr(self.__dict__["_config"], name)


def _resize(linear, rows=None, columns=None, bias=None):
    """The same linear with other sizes; None keeps what it has. Weights are left to the loader."""
    bias = linear.bias is not None if bias is None else bias
    rows, columns = linear.out_features if rows is None else rows, linear.in_features if columns is None else columns
    if (rows, columns, bias) == (linear.out_features, linear.in_features, linear.bias is not None):
        return linear
    return nn.Linear(columns, rows, bias, device=linear.weight.device, dtype=linear.weight.dtype)


def _decoder(layer, index, size, skip, config):
    """Llama, Mistral, Qwen, Gemma: norm -> sub-layer -> (Gemma: norm) -> residual sum."""
    gemma = config.model_type.endswith(("_gemma2", "_gemma3_text"))
    phi3 = config.model_type.endswith("_phi3")
    heads, head_dim, width = size.num_attention_heads, config.head_dim, size.intermediate_size
    kv_heads = size.num_key_value_heads if heads else 0
    attention, mlp = layer.self_attn, layer.mlp
    if "attention" in skip:
        layer.self_attn = NoAttention(index, head_dim)
        layer.input_layernorm = nn.Identity()
        if gemma:
            layer.post_attention_layernorm = nn.Identity()
    else:
        if phi3:  # query, key and value in one linear, split by these two numbers
            attention.qkv_proj = _resize(attention.qkv_proj, rows=(heads + 2 * kv_heads) * head_dim)
            attention.num_key_value_heads = kv_heads
            attention.config = LayerConfig(config, num_attention_heads=heads)
        else:
            attention.q_proj = _resize(attention.q_proj, rows=heads * head_dim)
            attention.k_proj = _resize(attention.k_proj, rows=kv_heads * head_dim)
            attention.v_proj = _resize(attention.v_proj, rows=kv_heads * head_dim)
        pairs = getattr(size, "qk_pairs", ())
        value_dim = size.v_head_dim if pairs else head_dim
        attention.o_proj = _resize(attention.o_proj, columns=heads * value_dim, bias=size.attention_output_bias)
        if heads:
            attention.num_key_value_groups = heads // kv_heads
            if pairs:
                attention.q_proj = _resize(attention.q_proj, rows=heads * 2 * len(pairs))
                attention.k_proj = _resize(attention.k_proj, rows=kv_heads * 2 * len(pairs))
                attention.v_proj = _resize(attention.v_proj, rows=kv_heads * value_dim)
                if "q_norm" in attention._modules:
                    attention.q_norm, attention.k_norm = (
                        narrow_norm(norm, 2 * len(pairs), head_dim) for norm in (attention.q_norm, attention.k_norm)
                    )
                layer.self_attn = NarrowAttention(attention, pairs, value_dim)
        else:
            layer.self_attn = NoAttention(index, head_dim, attention.named_children())
    if "mlp" in skip:
        layer.mlp = NoMLP()
        if gemma:
            layer.pre_feedforward_layernorm = layer.post_feedforward_layernorm = nn.Identity()
        else:
            layer.post_attention_layernorm = nn.Identity()
    else:
        if phi3:
            mlp.gate_up_proj = _resize(mlp.gate_up_proj, rows=2 * width)
        else:
            mlp.gate_proj = _resize(mlp.gate_proj, rows=width)
            mlp.up_proj = _resize(mlp.up_proj, rows=width)
        mlp.down_proj = _resize(mlp.down_proj, columns=width, bias=size.mlp_output_bias)


def _bert(layer, index, size, skip, config):
    """BERT, RoBERTa: sub-layer -> residual sum -> norm; a sub-layer without units keeps its output bias."""
    attention, heads = layer.attention.self, size.num_attention_heads
    rows = heads * attention.attention_head_size
    attention.query = _resize(attention.query, rows=rows)
    attention.key = _resize(attention.key, rows=rows)
    attention.value = _resize(attention.value, rows=rows)
    attention.num_attention_heads, attention.all_head_size = heads, rows
    layer.attention.output.dense = _resize(layer.attention.output.dense, columns=rows)
    layer.intermediate.dense = _resize(layer.intermediate.dense, rows=size.intermediate_size)
    layer.output.dense = _resize(layer.output.dense, columns=size.intermediate_size)


def _distilbert(layer, index, size, skip, config):
    """As BERT, under other names."""
    attention, rows = layer.attention, size.num_attention_heads * layer.attention.attention_head_size
    attention.q_lin = _resize(attention.q_lin, rows=rows)
    attention.k_lin = _resize(attention.k_lin, rows=rows)
    attention.v_lin = _resize(attention.v_lin, rows=rows)
    attention.out_lin = _resize(attention.out_lin, columns=rows)
    attention.n_heads = size.num_attention_heads
    layer.ffn.lin1 = _resize(layer.ffn.lin1, rows=size.hidden_dim)
    layer.ffn.lin2 = _resize(layer.ffn.lin2, columns=size.hidden_dim)


_BUILDERS = {  # the others are built by _decoder
    "bert": (_bert, "encoder.layer"),
    "roberta": (_bert, "encoder.layer"),
    "distilbert": (_distilbert, "transformer.layer"),
}


def auto_classes(model_type):
    """What `auto_map` of a family's config.json holds, in terms of this file."""
    config, *models = FAMILIES[model_type].split()
    return {"AutoConfig": f"Sentei{config}"} | {_auto_class(model): f"Sentei{model}" for model in models}


def _auto_class(model):
    task = model.partition("For")[2]
    return f"AutoModelFor{task}" if task else "AutoModel"


def __getattr__(name):
    """Make `SenteiLlamaConfig`, `SenteiLlamaForCausalLM`, ... at first use."""
    stock_name = name.removeprefix("Sentei")
    for model_type, names in FAMILIES.items():
        if name == stock_name or stock_name not in names.split():
            continue
        stock = getattr(transformers, stock_name)
        body = {"__module__": __name__, "__doc__": f"{stock_name} with layers of different width."}
        if stock_name.endswith("Config"):
            body |= {"model_type": f"sentei_{model_type}", "_auto_class": "AutoConfig"}
            made = strict(type(name, (SenteiConfig, stock), body))  # or the stock validator of head counts still runs
        else:
            config = getattr(sys.modules[__name__], f"Sentei{names.split()[0]}")
            made = type(
                name, (SenteiModel, stock), body | {"config_class": config, "_auto_class": _auto_class(stock_name)}
            )
            if stock_name.endswith("Model"):  # the classifiers of decoders ask AutoModel for their base
                transformers.AutoModel.register(config, made, exist_ok=True)
            else:
                getattr(sys.modules[__name__], f"Sentei{names.split()[1]}")
        return globals().setdefault(name, made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
