"""Checkpoints whose weights are full of zeros: the stock architecture, in the sparse container or as plain tensors.

The two shapes are "sparse" (`sparse.FILE`: a bit per weight and the values that are left) and "dense" (an ordinary
model.safetensors with the zeros in it, as large as the parent, for every other tool).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sentei.atomic import replacing_folder
from sentei.checkpoint import sparse
from sentei.checkpoint.reading import load
from sentei.checkpoint.source import Source

SHAPES = ("sparse", "dense")


def unique(model: Any) -> dict[str, Tensor]:
    """The model's state, tied tensors once, under the first of their names."""
    seen: dict[tuple[int, torch.Size], str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        seen.setdefault((tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape), name)
    return {name: state[name] for name in seen.values()}


def write(
    folder: Path,
    model: Any,
    shape: str,
    dtype: torch.dtype,
    masks: dict[str, Tensor] | None,
    scales: dict[str, Tensor] | None,
    activations: dict[str, dict[str, float]] | None,
    zstd: bool,
) -> None:
    """Configuration and weights into a folder; weights with a scale become codes."""
    model.config.dtype = dtype
    if shape == "dense":
        state = {name: tensor.detach().cpu().to(_stored(tensor, dtype)) for name, tensor in unique(model).items()}
        model.save_pretrained(folder, state_dict=state)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    state = {}
    for name, tensor in unique(model).items():
        tensor = tensor.detach().cpu()
        if scales and name in scales:
            scale = scales[name].cpu().float()
            scale = scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (tensor.ndim - 1))
            state[name] = (tensor.float() / scale).round().to(torch.int8)
        else:
            state[name] = tensor.to(_stored(tensor, dtype))
    sparse.write(folder / sparse.FILE, state, masks=masks, scales=scales, activations=activations, zstd=zstd)


def check(folder: Path, model: Any, dtype: torch.dtype, scales: dict[str, Tensor] | None) -> float:
    """Load what was written and compare every weight to the bit.

    Raises:
        ValueError: a weight differs.
    """
    loaded, _ = load(folder, dtype=torch.float32, device="cpu")
    found = loaded.state_dict()
    for name, tensor in unique(model).items():
        tensor = tensor.detach().cpu()
        wanted = tensor.float() if scales and name in scales else tensor.to(_stored(tensor, dtype)).float()
        if not torch.equal(found[name].float(), wanted):
            raise ValueError(f"the weight {name} was written and read back differently, so nothing was written")
    return 0.0


def export_dense(folder: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """A checkpoint in the sparse container as an ordinary one, for tools that do not know the container.

    Raises:
        ValueError: there is no container in the folder, or `out` exists.
    """
    from sentei.checkpoint import writing

    folder = Path(folder)
    if not (folder / sparse.FILE).is_file():
        raise ValueError(f"{folder} holds no {sparse.FILE}: there is nothing to make dense")
    out = writing.check_output(out, parent=folder, force=force)
    model, tokenizer = load(folder, device="cpu")
    with replacing_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name in ("compression.json", "recipe.yaml", "task.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    return out


def build(source: Source, auto_class: Any, dtype: torch.dtype, head: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of a sparse container, in transformers' own class; what was missing, as `from_pretrained` reports it.

    Every tensor is compared with the configuration's before memory is taken for it.

    Args:
        head: what a new head changes in the configuration; with any, tensors outside the base model, and a pooler, may
            be missing, of another shape, or without a place.
    Raises:
        ValueError: the container does not hold the model that config.json describes.
    """
    file = source.files[0]
    more = {"ignore_mismatched_sizes": True} if head else {}
    values = {key: value for key, value in (source.config | dict(head)).items() if key not in ("auto_map", *more)}
    config = transformers.AutoConfig.for_model(**values)
    count = getattr(config, "num_hidden_layers", 0)
    if count > len(source.tensors):
        raise ValueError(f"{source.path}: config.json names {count} layers, the container has fewer tensors")
    with torch.device("meta"):
        twin = auto_class.from_config(config)
    _check_twin(source, twin, new_head=bool(head))
    model, report = type(twin).from_pretrained(
        None, config=config, state_dict=sparse.read(file), dtype=dtype, output_loading_info=True, **more
    )
    if report["unexpected_keys"] and not head:
        raise ValueError(f"{file}: no place for {sorted(report['unexpected_keys'])[0]}")
    model.config._name_or_path = model.name_or_path = str(source.path)
    return model, report


def _check_twin(source: Source, twin: Any, *, new_head: bool) -> None:
    """The container has the tensors of the weightless twin, in their shapes; what is new is not larger than it may be.

    Raises:
        ValueError: it has not.
    """
    file, base = source.files[0], f"{twin.base_model_prefix}."
    wanted = twin.state_dict(keep_vars=True)

    def of_head(name: str) -> bool:
        return new_head and not name.startswith(base)

    def may_be_new(name: str) -> bool:
        return of_head(name) or (new_head and name.startswith(f"{base}pooler."))

    there: set[int] = set()  # a tied tensor is there once
    for name, (_, shape) in source.tensors.items():
        place = f"{base}{name}" if f"{base}{name}" in wanted else name  # of a model without a head
        if place not in wanted:
            if may_be_new(place):
                continue
            raise ValueError(f"{file}: {type(twin).__name__} has no tensor {name}")
        if tuple(wanted[place].shape) != shape and not of_head(place):
            raise ValueError(f"{file}: {name} is {list(shape)}, config.json makes it {list(wanted[place].shape)}")
        there.add(id(wanted[place]))
    absent: dict[int, str] = {}  # by its first name
    for name, tensor in wanted.items():
        if id(tensor) not in there:
            absent.setdefault(id(tensor), name)
    for name in absent.values():
        if not may_be_new(name):
            raise ValueError(f"{file} lacks {name}, which config.json makes {list(wanted[name].shape)}")
    new = sum(wanted[name].nbytes for name in absent.values()) + sum(buffer.nbytes for buffer in twin.buffers())
    if new > sparse.limit(file):
        raise ValueError(f"{source.path}: config.json asks for a head of {new:,} bytes, more than is allowed")


def _stored(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype
