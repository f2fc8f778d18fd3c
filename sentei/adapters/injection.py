"""Units into a model and out of it again: exact, with first weights of their own, merged where that can be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from sentei import structure
from sentei.adapters.bottleneck import HOSTS, Bottleneck, Host, KeepResidual
from sentei.adapters.names import pattern
from sentei.adapters.space import Unit
from sentei.train import mix

INITS = ("zero", "paper", "hub")
NAME = "default"  # peft's name for an adapter


def inject(
    model: nn.Module,
    living: Sequence[Unit],
    *,
    alpha_per_rank: float = 1.0,
    dropout: float = 0.0,
    init: str = "zero",
    seed: object = 0,
) -> None:
    """Put units into a model; their parameters, and no others, require gradients. Exact no-op at first with "zero".

    Args:
        alpha_per_rank: LoRA's product is scaled by it (alpha / r).
        init: of bottlenecks. "zero": Down ~ N(0, 0.02), Up 0; "hub": both N(0, 0.02); "paper": both N(0, 1 / sqrt(H)).
            LoRA starts as peft has it: A Kaiming-uniform, B 0.
        seed: a unit's first weights depend on it and on the unit's id, not on which others live.
    """
    model.requires_grad_(False)
    lora = [unit for unit in living if unit.is_lora]
    if lora:
        with torch.random.fork_rng():  # peft draws weights, which are drawn again below
            inject_adapter_in_model(lora_config(lora, alpha_per_rank, dropout), model)
    name = structure.family_name(model)
    for unit in living:
        if not unit.is_lora:
            _wrap(model, unit, dropout, HOSTS[name])
    for unit in living:
        initialise(model, unit, init, seed)
    for parameter in parameters(model, living):
        parameter.requires_grad_(True)


def lora_config(living: Sequence[Unit], alpha_per_rank: float, dropout: float, **more: Any) -> LoraConfig:
    """peft's configuration: `r` alone where all ranks are equal, since some loaders know no patterns."""
    rank_of: dict[str, int] = {}
    for unit in sorted((unit for unit in living if unit.is_lora), key=lambda unit: unit.rank):
        rank_of |= dict.fromkeys(unit.modules, unit.rank)
    ranks = list(rank_of.values())
    common = max(set(ranks), key=lambda rank: (ranks.count(rank), rank)) if ranks else 8
    others = {re.escape(name): rank for name, rank in rank_of.items() if rank != common}
    alphas = {name: _alpha(alpha_per_rank * rank) for name, rank in others.items()}
    return LoraConfig(
        r=common,
        lora_alpha=_alpha(alpha_per_rank * common),
        lora_dropout=dropout,
        target_modules=pattern(living),
        rank_pattern=others,
        alpha_pattern=alphas,
        bias="none",
        **more,
    )


def _alpha(value: float) -> Any:
    return int(value) if float(value).is_integer() else value


def _wrap(model: nn.Module, unit: Unit, dropout: float, host: Host) -> None:
    (name,) = unit.modules
    inner, hidden = model.get_submodule(name), unit.sizes[0][0]
    layer = model.get_submodule(name.removesuffix(f".{host.path}"))
    norm = layer.get_submodule(host.norm) if host.norm else None
    adapter = Bottleneck(inner, hidden, unit.rank, dropout, None if host.pre_norm else norm, host.pre_norm)
    device = next(inner.parameters()).device
    for part in (adapter.down, adapter.up):
        part.to(device=device, dtype=torch.float32)
    adapter.train(inner.training)
    if host.pre_norm:
        assert norm is not None
        adapter._hook = norm.register_forward_pre_hook(KeepResidual(adapter))
    model.set_submodule(name, adapter)


@torch.no_grad()
def initialise(model: nn.Module, unit: Unit, init: str, seed: object) -> None:
    """First values of a unit's weights, biases 0; drawn by its id, whichever others live."""
    assert init in INITS
    random = torch.Generator().manual_seed(mix(seed, unit.id))
    for (role, weight), variance in zip(matrices(model, unit), init_variances(unit, init), strict=True):
        weight.data = weight.data.float()
        own = unit.own(role, weight.data)
        drawn = torch.zeros(own.shape)
        if variance and unit.is_lora:
            bound = (3 * variance) ** 0.5
            drawn.uniform_(-bound, bound, generator=random)
        elif variance:
            drawn.normal_(0, variance**0.5, generator=random)
        own.copy_(drawn)
    for module in modules(model, unit):
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.down.bias)
            nn.init.zeros_(module.up.bias)


def init_variances(unit: Unit, init: str) -> list[float]:
    """Variance of each of the unit's `matrices` when it starts; 0 for those that start at 0."""
    if unit.is_lora:  # Kaiming-uniform with a = sqrt(5): uniform in +-1 / sqrt(inputs)
        return [variance for inputs, _ in unit.sizes for variance in (1 / (3 * inputs), 0.0)]
    hidden = unit.sizes[0][0]
    return {"zero": [4e-4, 0.0], "hub": [4e-4, 4e-4], "paper": [1 / hidden, 1 / hidden]}[init]


def matrices(model: nn.Module, unit: Unit) -> list[tuple[str, nn.Parameter]]:
    """The unit's weight matrices with their roles ("q.A", "q.B", ...; "down", "up"); biases are not among them.

    Of a ladder they are whole, all slices together: `Unit.own` has the unit's part.
    """
    found: list[tuple[str, Any]] = []
    for name, module in zip(unit.modules, modules(model, unit), strict=True):
        if isinstance(module, Bottleneck):
            found += [("down", module.down.weight), ("up", module.up.weight)]
        else:
            role = name.rpartition(".")[2]
            found += [(f"{role}.A", module.lora_A[NAME].weight), (f"{role}.B", module.lora_B[NAME].weight)]
    return found


def modules(model: nn.Module, unit: Unit) -> list[Any]:
    """The unit's injected modules: peft's LoRA layers, or one Bottleneck."""
    found = [model.get_submodule(name) for name in unit.modules]
    assert all(isinstance(module, LoraLayer if unit.is_lora else Bottleneck) for module in found), unit.id
    return found


def parameters(model: nn.Module, living: Iterable[Unit]) -> list[nn.Parameter]:
    """All trained parameters of the units, biases included; what slices share, once."""
    found = list({id(weight): weight for unit in living for _, weight in matrices(model, unit)}.values())
    for unit in living:
        if not unit.is_lora:
            (adapter,) = modules(model, unit)
            found += [adapter.down.bias, adapter.up.bias]
    return found


def unload(model: nn.Module) -> None:
    """Take everything injected out again, deepest first, hooks too; the model is as it was before `inject`."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer | Bottleneck)]
    for name, module in sorted(named, key=lambda item: -item[0].count(".")):
        if isinstance(module, Bottleneck) and module._hook is not None:
            module._hook.remove()
        model.set_submodule(name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch everything injected on, or off: the model then computes as its base does."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.enabled = enabled
        elif isinstance(module, LoraLayer):
            module.enable_adapters(enabled)


def merge_lora(model: nn.Module) -> None:
    """Add LoRA into the base weights and take it out.

    Raises:
        ValueError: bottlenecks are there, which no weight of the base can hold.
    """
    if any(isinstance(module, Bottleneck) for module in model.modules()):
        raise ValueError("a serial adapter cannot be merged into the weights; use kinds=lora for that")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    unload(model)
