"""Models whose layers share weights. This file travels with the checkpoint, beside modeling_sentei.py which it reads.

A logical layer is a stock block with its own norms, its own attention object and its own place in the KV cache. The
linears of an *owner* are ordinary; those of the layers that use them are `ChildLinear`s:

    "fold": {"owner": [0, 1, 1, 3], "corrected": [false, false, true, false], "rank": 8, "scale": true, ...}

Here layer 2 runs with the weights of layer 1, which are stored once, in the file and in memory. Forward passes, caches,
masks and losses are the stock ones. Layers may also differ in width, by `per_layer_config` as in modeling_sentei.py.
"""

import sys
from functools import reduce

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn

from .modeling_sentei import FAMILIES as RESIZED
from .modeling_sentei import SenteiConfig, _auto_class, _decoder

FAMILIES = {name: names for name, names in RESIZED.items() if name not in ("bert", "roberta", "distilbert")}
SCALED = ("o_proj", "down_proj")  # the linears that write into the residual stream
FEW_TOKENS = 4  # as in a step of generation


class ChildLinear(nn.Module):
    """A linear with another one's weight: y = scale * (W x + b + B A x), W and b of the shared linear.

    It holds the block that owns the weight unregistered and looks the linear up at each call: a quantiser or an adapter
    that replaces the owner's linear acts in every layer that uses it, and each tensor is registered once.

    `weight` is a tripwire of one element, the owner's number: a stock class that opens the checkpoint finds a wrong
    shape there and stops, instead of running with random weights. One element, for empty tensors count as shared.
    """

    weight: torch.Tensor
    A: nn.Parameter | None
    B: nn.Parameter | None
    scale: nn.Parameter | None

    def __init__(self, linear, path, owner, block, rank=0, scaled=False):
        """Args:
        linear: what stood here, which gives sizes, dtype and device.
        path: of the linear inside a block.
        owner: number of the layer that owns the weight.
        block: that layer; None: `linear` itself holds the shared weight (the owner of an average is corrected too).
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.path, self.owner = path, owner
        self._block = (block,)  # in a tuple, or torch would register it here a second time
        self.register_module("base", linear if block is None else None)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.register_buffer("weight", torch.full((1,), float(owner), **like))
        self.register_parameter("A", nn.Parameter(torch.zeros(rank, self.in_features, **like)) if rank else None)
        self.register_parameter("B", nn.Parameter(torch.zeros(self.out_features, rank, **like)) if rank else None)
        self.register_parameter("scale", nn.Parameter(torch.ones(self.out_features, **like)) if scaled else None)

    def shared(self):
        """The linear that holds the weight, or what a quantiser or an adapter has put in its place."""
        if self.base is not None:
            return self.base
        found = reduce(getattr, self.path.split("."), self._block[0])  # get_submodule is a tenth of a small linear
        return found.base if isinstance(found, ChildLinear) else found

    @property
    def bias(self):
        return self.shared().bias

    def forward(self, x):
        y = self.shared()(x)
        if self.A is not None and self.B is not None:
            # A CPU's 16-bit kernels take longer to begin with a few tokens than fp32 takes for all of it.
            few = x.device.type == "cpu" and x.numel() <= FEW_TOKENS * self.in_features
            dtype = torch.float32 if few else x.dtype
            low = nn.functional.linear(x.to(dtype), self.A.to(dtype))
            y = y + nn.functional.linear(low, self.B.to(dtype)).to(y.dtype)
        return y if self.scale is None else y * self.scale.to(y.dtype)

    def extra_repr(self):
        rank = 0 if self.A is None else len(self.A)
        return (
            f"{self.in_features}, {self.out_features}, owner={self.owner}, rank={rank}, scale={self.scale is not None}"
        )


def linears(block):
    """path -> linear (or ChildLinear) of a block, in order; the `base` inside a ChildLinear is not one of its own."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, ChildLinear)) and not path.endswith(".base"):
            found[path] = module
    return found


def share(layers, index, owner, rank, scale):
    """Let one layer of a model run with the linears of another: `layers[owner]`, or its own if that is itself."""
    for path, linear in linears(layers[index]).items():
        block = None if owner == index else layers[owner]
        scaled = scale and path.rpartition(".")[2] in SCALED
        layers[index].set_submodule(path, ChildLinear(linear, path, owner, block, rank, scaled))


class FoldedModel:
    """Mixed into a stock model: built by the stock code, then layers are linked (free on the meta device)."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        base = self.base_model
        if base is not self and isinstance(base, FoldedModel):
            return  # made by AutoModel, folded already
        fold = config.fold
        for index, layer in enumerate(base.layers):
            if config.is_heterogeneous:
                size = config.per_layer_config[index]
                _decoder(layer, index, size, set(getattr(size, "skip", ())), config)
        for index, (owner, corrected) in enumerate(zip(fold["owner"], fold["corrected"], strict=True)):
            if corrected:
                share(base.layers, index, owner, fold["rank"], fold["scale"])

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, module in model.named_modules():
            if isinstance(module, ChildLinear) and (stored := int(module.weight.item())) != module.owner:
                raise ValueError(
                    f"{name} was saved as a user of layer {stored}, config.json says layer {module.owner}: "
                    "config.json and the weights do not belong together"
                )
        return loaded

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # the attention is the stock one


class FoldedConfig(SenteiConfig):
    """Mixed into a stock configuration; `fold` says which layer owns the linears of which."""

    fold = None

    def validate_architecture(self):
        if self.is_heterogeneous:
            super().validate_architecture()


def auto_classes(model_type):
    """What `auto_map` of a family's config.json holds, in terms of this file."""
    config, *models = FAMILIES[model_type].split()
    return {"AutoConfig": f"SenteiFolded{config}"} | {_auto_class(model): f"SenteiFolded{model}" for model in models}


def __getattr__(name):
    """Make `SenteiFoldedLlamaConfig`, `SenteiFoldedLlamaForCausalLM`, ... at first use."""
    stock_name = name.removeprefix("SenteiFolded")
    for model_type, names in FAMILIES.items():
        if name == stock_name or stock_name not in names.split():
            continue
        stock = getattr(transformers, stock_name)
        body = {"__module__": __name__, "__doc__": f"{stock_name} whose layers share weights."}
        if stock_name.endswith("Config"):
            body |= {"model_type": f"sentei_folded_{model_type}", "_auto_class": "AutoConfig"}
            made = strict(type(name, (FoldedConfig, stock), body))
        else:
            config = getattr(sys.modules[__name__], f"SenteiFolded{names.split()[0]}")
            body |= {"config_class": config, "_auto_class": _auto_class(stock_name)}
            made = type(name, (FoldedModel, stock), body)
            if stock_name.endswith("Model"):  # the classifiers of decoders ask AutoModel for their base
                transformers.AutoModel.register(config, made, exist_ok=True)
            else:
                getattr(sys.modules[__name__], f"SenteiFolded{names.split()[1]}")
        return globals().setdefault(name, made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
