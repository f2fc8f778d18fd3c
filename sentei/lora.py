"""LoRA on chosen linears while a stage trains, and plain linears again afterwards (arXiv 2106.09685, through peft).

The stages hand back plain checkpoints, so an adapter here is always temporary; adapters as a *result* are in
`sentei.adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from sentei import structure
from sentei.train import mix


def linears(model: nn.Module) -> list[str]:
    """Names of the linears inside the blocks; one without inputs or outputs is what is left of a removed sub-layer."""
    blocks = {id(module) for block in structure.layers(model) for module in block.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in blocks and isinstance(module, nn.Linear) and module.weight.numel()
    ]


def attach(model: nn.Module, names: Sequence[str], *, rank: int, alpha: int, seed: int, dropout: float = 0.0) -> None:
    """Put fp32 adapters on the named linears, in place, in the model's train or eval mode; nothing else is trained.

    The starting weights depend on the seed alone; the global generator is left as it was.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=[*names],
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(mix(seed, "lora"))
        inject_adapter_in_model(config, model)
    assert all(isinstance(model.get_submodule(name), LoraLayer) for name in names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train(model.training)  # new modules come in train mode


@torch.no_grad()
def detach(model: nn.Module, names: Iterable[str], *, merge: bool = True) -> None:
    """Put the plain linears back; with `merge`, of W + (alpha / rank) B A, added in fp32 and rounded once to W's dtype.

    A zero row of B and a zero column of A add exact zeros. A merged weight is a new tensor: another model may hold
    the old one.
    """
    for name in names:
        wrapped = model.get_submodule(name)
        if not isinstance(wrapped, LoraLayer):
            continue
        linear = wrapped.get_base_layer()
        assert isinstance(linear, nn.Linear)
        if merge:
            weight = linear.weight.float() + wrapped.get_delta_weight("default").float()
            linear.weight = nn.Parameter(weight.to(linear.weight.dtype), linear.weight.requires_grad)
        model.set_submodule(name, linear)
    if "peft_config" in vars(model):
        del model.peft_config
