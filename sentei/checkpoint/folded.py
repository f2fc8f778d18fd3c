"""The folded form: every logical layer has its modules, each shared tensor is written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentei import folding, structure
from sentei.checkpoint import forms
from sentei.remote import modeling_sentei_folded


def form(model: Any, shape: str) -> forms.Form:
    """The folded form of a model whose layers share weights.

    Raises:
        ValueError: another shape was asked for, or the task has no class.
    """
    if shape in ("uniform", "padded"):
        raise ValueError(
            f"layers of this model share weights, which the stock class of shape {shape} cannot express; leave the "
            "shape out, or write independent layers with `sentei unfold`"
        )
    inner = forms.unshared(model, "heterogeneous")
    name = structure.family_name(inner.model_type)
    classes = modeling_sentei_folded.auto_classes(name) if name in modeling_sentei_folded.FAMILIES else {}
    task = type(model).__name__.partition("For")[2]
    auto_class = f"AutoModelFor{task}" if task else "AutoModel"
    if auto_class not in classes:
        raise ValueError(f"{type(model).__name__}: no folded form for this head; known: {', '.join(classes) or 'none'}")
    values = forms.values(model, inner) | {"fold": folding.layout(model)}
    config = getattr(modeling_sentei_folded, classes["AutoConfig"])(**values)
    config.auto_map = {auto: f"modeling_sentei_folded.{made}" for auto, made in classes.items()}
    made = getattr(modeling_sentei_folded, classes[auto_class])
    return forms.Form("folded", config, made, inner.sizes)


def check_bytes(folder: Path, saved: Any) -> None:
    """Each tensor once on disk, or the folder is worth nothing.

    Raises:
        ValueError: the files do not hold the unique tensors and nothing else.
    """
    unique = {id(x): x.numel() * x.element_size() for x in (*saved.parameters(), *_stored_buffers(saved))}
    found = sum(_data_bytes(file) for file in folder.glob("*.safetensors"))
    if found != sum(unique.values()):
        raise ValueError(
            f"the folded checkpoint holds {found:,} bytes of weights, its tensors {sum(unique.values()):,}: what is "
            "shared was not written exactly once, so nothing was written; please report this with the command"
        )


def _data_bytes(file: Path) -> int:
    """Bytes of a safetensors file without its header, whose length is in the first eight bytes."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _stored_buffers(model: Any) -> list[Any]:
    state = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in state]
