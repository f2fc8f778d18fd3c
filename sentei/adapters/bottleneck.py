"""The serial bottleneck adapter (arXiv 2005.00247), and where each family hosts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Host:
    """Where a family's bottleneck goes, from a layer; `norm` is None where the host holds it."""

    path: str
    norm: str | None
    pre_norm: bool


HOSTS = {
    "bert": Host("output", None, False),
    "roberta": Host("output", None, False),
    "distilbert": Host("ffn", "output_layer_norm", False),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Host("mlp", "post_attention_layernorm", True)),
}


class Bottleneck(nn.Module):
    """A host module (feed-forward, or an encoder's output block) with a serial adapter behind it.

    Args:
        host: takes what it took before; in BERT also the residual.
        norm: the LayerNorm after the residual sum, of post-norm layers; it is used, not owned.
        pre_norm: the residual is caught at the norm before the host, by the hook `keep_residual`.
    """

    def __init__(self, host: nn.Module, hidden: int, width: int, dropout: float, norm: Any, pre_norm: bool):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        self.enabled = True
        self.watch: Any = None
        self._norm = (norm,)  # in a tuple: a child would be saved twice
        self._residual_BTH: Tensor | None = None
        self._hook: Any = None
        self.base_layer = host  # last: names that are not ours by now are looked up in it

    def __getattr__(self, name: str) -> Any:
        """The host's children keep their paths: layers that share weights, and LoRA, look them up there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("base_layer")
            if host is None:
                raise
            return getattr(host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A child of the host that is replaced by its path is replaced in the host."""
        own = self.__dict__.get("_modules", {})
        to_host = name not in own and "base_layer" in own and name in self.base_layer._modules
        if to_host:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, hidden_BTH: Tensor, *rest: Tensor) -> Tensor:
        if rest:  # BERT's output block: linear, dropout, and the norm of the sum
            (residual_BTH,) = rest
            host: Any = self.base_layer
            sum_BTH = host.dropout(host.dense(hidden_BTH)) + residual_BTH
            normed_BTH = host.LayerNorm(sum_BTH)
            if not self.enabled:
                return normed_BTH
            return host.LayerNorm(sum_BTH + self.change(normed_BTH, normed_BTH))
        output_BTH = self.base_layer(hidden_BTH)
        residual_BTH = hidden_BTH
        if self.pre_norm:
            assert self._residual_BTH is not None, "the norm before the host did not run"
            residual_BTH, self._residual_BTH = self._residual_BTH, None
        if not self.enabled:
            return output_BTH
        sum_BTH = output_BTH + residual_BTH
        read_BTH = sum_BTH if self.pre_norm else self._norm[0](sum_BTH)
        return output_BTH + self.change(read_BTH, output_BTH)

    def change(self, read_BTH: Tensor, host_BTH: Tensor) -> Tensor:
        """drop(Up(relu(Down(a)))), in the adapter's own precision, under autocast too."""
        with torch.autocast(read_BTH.device.type, enabled=False):
            added_BTH = self.up(torch.relu(self.down(read_BTH.to(self.down.weight.dtype))))
        if self.watch is not None:
            self.watch(added_BTH.detach(), host_BTH.detach())
        return self.dropout(added_BTH).to(host_BTH.dtype)


class KeepResidual:
    """Forward-pre-hook of the norm before a host. An object, not a closure: it is copied with the model."""

    def __init__(self, adapter: Bottleneck):
        self.adapter = adapter

    def __call__(self, norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.adapter._residual_BTH = arguments[0]
