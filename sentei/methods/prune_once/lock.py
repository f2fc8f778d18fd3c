"""Zeros that stay zeros: one mechanism for all four stages.

Parameters stay ordinary `nn.Linear.weight`. For every masked matrix a gradient hook zeroes what belongs to removed
weights, before the norm is clipped, and after every optimiser step `apply` writes the zeros again. They are written by
`where`, never by multiplication: w * 0 is -0.0 for a negative w, and two zeros break bit-exact storage.

While the pattern still moves, `dormant` keeps the value that each weight had when it was removed: a new mask ranks kept
and dormant weights together, and a weight that returns has its old value.
"""

from __future__ import annotations

import hashlib
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.checkpoint import sparse as containers

Matrices = dict[str, nn.Parameter]


def prunable(model: nn.Module, include: str | None = None, exclude: str | None = None) -> Matrices:
    """Weights of the linears inside the transformer blocks (and of BERT's pooler, where pre-training uses it).

    Never biases, norms, embeddings, heads or anything tied.

    Args:
        include, exclude: regular expressions searched in the parameter's name; `include` replaces the default choice.
    Raises:
        ValueError: nothing is left, a bad expression, a tied weight, or a fused weight that is no linear's.
    """
    patterns = {}
    for name, text in (("include", include), ("exclude", exclude)):
        try:
            patterns[name] = re.compile(text) if text else None
        except re.error as error:
            raise ValueError(f"{name} is {text!r}, which is no regular expression: {error}") from None
    blocks = {id(module) for block in structure.layers(model) for module in block.modules()}
    embeddings = {id(p): name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    found: Matrices = {}
    for name, module in model.named_modules():
        parameter = getattr(module, "weight", None)
        path = f"{name}.weight"
        if not isinstance(parameter, nn.Parameter) or parameter.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        default = id(module) in blocks or (name.endswith("pooler.dense") and _pools(model))
        if not (patterns["include"].search(path) if patterns["include"] else default):
            continue
        if patterns["exclude"] and patterns["exclude"].search(path):
            continue
        if id(parameter) in embeddings:
            raise ValueError(f"{path} is tied to {embeddings[id(parameter)]}; leave it out with --exclude")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{path} belongs to a {type(module).__name__}; only nn.Linear is pruned: use --exclude")
        if parameter.numel():  # a removed sub-layer leaves an empty linear
            found[path] = parameter
    if not found:
        raise ValueError("no weight is left to prune; change --include and --exclude")
    return found


def _pools(model: nn.Module) -> bool:
    """Is the pooler part of what pre-training trains? Only with next-sentence prediction."""
    return type(model).__name__.endswith("ForPreTraining")


def lockable(model: nn.Module) -> Matrices:
    """Weights that a sparse checkpoint may have pruned: `prunable`, and a pooler wherever it stands."""
    pooler = {name: p for name, p in model.named_parameters() if name.endswith("pooler.dense.weight")}
    return prunable(model) | pooler


def zeros(matrices: Matrices) -> float:
    """Fraction of weights that are exactly zero."""
    return sum(int((p == 0).sum()) for p in matrices.values()) / max(1, sum(p.numel() for p in matrices.values()))


class Lock:
    """The masks of a model's matrices, kept through any optimiser.

    Use as a context: at the end the hooks are gone, masks and zeros stay.
    """

    def __init__(self, matrices: Matrices, masks: dict[str, Tensor] | None = None, *, regrow: bool = True):
        self.matrices = matrices
        self.masks = masks or {name: torch.ones_like(p, dtype=torch.bool) for name, p in matrices.items()}
        # Values of removed weights, only while the pattern may move; zero where a weight is kept.
        self.dormant: dict[str, Tensor] | None = None
        if regrow:
            self.dormant = {name: torch.zeros_like(p) for name, p in matrices.items()}
        self._handles: list[Any] = []

    @classmethod
    def on_zeros(cls, matrices: Matrices, where: str | Path | None = None) -> Lock:
        """Lock the zeros that a model already has; a weight that its container keeps may be 0, and stays free.

        Args:
            where: the checkpoint that the model was loaded from, if any.
        Raises:
            ValueError: hardly any: the model is dense.
        """
        sparse = {name: p for name, p in matrices.items() if float((p == 0).float().mean()) > 0.01}
        if not sparse:
            raise ValueError(
                f"no prunable matrix in {where or 'the model'} has over 1% zeros: nothing to lock. Run "
                "prune_once_student first"
            )
        file = Path(where) / containers.FILE if where else None
        stored = containers.read_masks(file) if file is not None and file.is_file() else {}
        masks = {name: p.detach() != 0 for name, p in sparse.items()}
        for name, mask in masks.items():
            kept = stored.get(name)
            if kept is not None and kept.shape == mask.shape and not bool((mask.cpu() & ~kept).any()):
                masks[name] = kept.to(mask.device)
        return cls(sparse, masks, regrow=False)

    def __enter__(self) -> Lock:
        for name, parameter in self.matrices.items():
            self._handles.append(parameter.register_hook(self._hook(name)))
        self.apply()
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        # By name: a new mask takes the place of the old one without a new hook.
        return lambda grad: torch.where(self.masks[name].to(grad.device), grad, 0.0)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the zeros again; after every optimiser step."""
        for name, parameter in self.matrices.items():
            mask = self.masks[name] = self.masks[name].to(parameter.device)
            parameter.copy_(torch.where(mask, parameter, 0.0))

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """The matrices with removed weights at their last value: what a new mask ranks."""
        if self.dormant is None:
            return {name: p.detach() for name, p in self.matrices.items()}
        return {name: torch.where(self.masks[name], p, self.dormant[name]) for name, p in self.matrices.items()}

    @torch.no_grad()
    def move(self, masks: dict[str, Tensor]) -> float:
        """Take new masks; returns the fraction of weights whose fate changed."""
        changed = sum(int((masks[name] != old).sum()) for name, old in self.masks.items())
        for name, value in self.whole().items():
            self.matrices[name].copy_(torch.where(masks[name], value, 0.0))
            if self.dormant is not None:
                self.dormant[name] = torch.where(masks[name], 0.0, value)
        self.masks = dict(masks)
        return changed / sum(mask.numel() for mask in masks.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of all matrices that the masks remove."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())

    def checksum(self) -> str:
        """sha256 of all masks, in order of name.

        What all names begin with does not count: with a head the same encoder is an attribute of the model.
        """
        digest = hashlib.sha256()
        columns = zip(*(name.split(".") for name in self.masks), strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        for name in sorted(self.masks):
            inside = ".".join(name.split(".")[shared:])
            digest.update(f"{inside} {tuple(self.masks[name].shape)}".encode())
            digest.update(pack(self.masks[name]).numpy().tobytes())
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """Masks (packed) and dormant values, for a checkpoint of the training; see `restore`."""
        packed = {name: pack(mask) for name, mask in self.masks.items()}
        return {"masks": packed, "dormant": self.dormant if self.dormant is not None else {}}

    def restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.matrices.items():
            flat = unpack(state["masks"][name], parameter.numel())
            self.masks[name] = flat.reshape(parameter.shape).to(parameter.device)
            if self.dormant is not None:
                self.dormant[name] = state["dormant"][name].to(parameter.device)
        self.apply()


def pack(mask: Tensor) -> Tensor:
    """Bits of a mask in memory order, eight a byte: uint8 [ceil(n / 8)]."""
    bits = mask.flatten().cpu().to(torch.uint8)
    bits = nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The mask back: bool [count]."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].bool()
