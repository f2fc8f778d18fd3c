"""The trained tensors under the names that peft gives them in a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sentei.adapters.injection import NAME, parameters
from sentei.adapters.names import head
from sentei.adapters.space import Unit


def state(model: nn.Module, living: Sequence[Unit]) -> dict[str, Tensor]:
    """The units' and the head's tensors, under the names that peft gives them in a file."""
    trained = {id(p) for p in parameters(model, living)}
    heads = tuple(f"{name}." for name in head(model)) or ("\0",)
    return {
        _in_file(name): tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.named_parameters()
        if id(tensor) in trained or name.startswith(heads)
    }


def _in_file(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


@torch.no_grad()
def load_state(model: nn.Module, living: Sequence[Unit], tensors: dict[str, Tensor]) -> None:
    """Put tensors of `state` back. ValueError where names or shapes differ."""
    own = {_in_file(name): p for name, p in model.named_parameters()}
    wanted = state(model, living)
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))[0]
        raise ValueError(f"the adapter file and its configuration differ, in {odd} and maybe others; get it again")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"the adapter's {name} is {list(tensor.shape)}, the base needs {list(own[name].shape)}")
        own[name].copy_(tensor)
