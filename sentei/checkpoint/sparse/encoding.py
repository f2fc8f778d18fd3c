"""Tensors to a container, each in its smallest form; and how many bytes the same weights take in other forms.

Shape legend: R rows, C columns, W = C or, in blocks, C/4.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from sentei.atomic import replacing
from sentei.checkpoint.sparse.format import DENSER, FILE, FORMAT, MANIFEST, NAMES, SCALES, VERSION, crc, raw_bytes

# zstd level: codes are few and released once, so that 3 % smaller is worth the time. A frame must be 5 % smaller.
LEVEL, CODES_LEVEL, WORTH_IT = 3, 19, 0.95


def write(
    path: str | Path,
    state: dict[str, Tensor],
    *,
    masks: dict[str, Tensor] | None = None,
    scales: dict[str, Tensor] | None = None,
    activations: dict[str, dict[str, float]] | None = None,
    zstd: bool = True,
) -> int:
    """Write tensors, each in its smallest form; returns the bytes of the file, which appears whole or not at all.

    Args:
        state: name -> tensor; int8 for codes.
        masks: name -> bool tensor of the weights that are kept, where a kept weight may be 0; others: not 0.
        scales: name of an int8 tensor -> fp32 scalar or [R].
        activations: module -> {"in_scale", "in_zp", ...}.
        zstd: compress parts that become smaller by it.
    """
    masks, scales = masks or {}, scales or {}
    parts: dict[str, Tensor] = {}
    lines: dict[str, Any] = {}
    steps = [torch.empty(0)]
    for name, tensor in state.items():
        if "::" in name or name.startswith("act/") or tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name} ({tensor.dtype}) has no place in a sparse container")
        scale = scales[name].detach().cpu().float() if tensor.dtype == torch.int8 else None
        made, lines[name] = _encode(name, tensor.detach().cpu().contiguous(), masks.get(name), scale, zstd)
        parts |= made
        if scale is not None:
            lines[name]["scale"] = "tensor" if scale.numel() == 1 else "row"
            steps.append(scale.flatten())
    parts[SCALES], codec = _compress(torch.cat(steps), CODES_LEVEL, zstd)
    manifest = {"tensors": lines, "scales": codec, "activations": activations or {}}
    raw = torch.frombuffer(bytearray(json.dumps(manifest, separators=(",", ":")).encode()), dtype=torch.uint8)
    parts[MANIFEST], codec = _compress(raw, CODES_LEVEL, zstd)
    if len(raw) > DENSER * len(parts[MANIFEST]):
        parts[MANIFEST], codec = raw, "none"
    about = {"codec": codec, "bytes": len(raw), "crc32": crc(raw)}
    metadata = {"format": FORMAT, "version": VERSION, "manifest": json.dumps(about, separators=(",", ":"))}
    path = Path(path)
    with replacing(path) as part:
        save_file(parts, part, metadata=metadata)
    return path.stat().st_size


def _encode(
    name: str, tensor: Tensor, mask: Tensor | None, scale: Tensor | None, zstd: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored parts of one tensor in its smallest form, and its line of the manifest."""
    keep = tensor != 0 if mask is None else mask.cpu()
    assert keep.shape == tensor.shape and not bool((tensor[~keep] != 0).any()), f"{name}: a removed weight is not 0"
    clean = torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype))  # -0.0 of a removed weight becomes 0.0
    line = {
        "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "bits": "nonzero" if mask is None else "mask",
        "crc32": crc(clean) if scale is None else crc(clean, scale),
    }  # fmt: skip
    level = CODES_LEVEL if tensor.dtype == torch.int8 else LEVEL
    plans: list[tuple[str, Tensor | None, Tensor]] = []  # layout, flags, values
    # A mask that keeps a zero is lost in the dense layout; without one the zeros tell it.
    if bool(keep.all()) or not bool((keep & (tensor == 0)).any()) or tensor.ndim < 2:
        plans.append(("dense", None, clean))
    if tensor.ndim >= 2 and not bool(keep.all()):
        keep_RC, value_RC = keep.reshape(-1, tensor.shape[-1]), clean.reshape(-1, tensor.shape[-1])
        plans.append(("bitmask", keep_RC, value_RC[keep_RC]))
        if tensor.shape[-1] % 4 == 0:
            block = keep_RC.reshape(len(keep_RC), -1, 4).any(2)
            if mask is None or bool((block[..., None] == keep_RC.reshape(len(keep_RC), -1, 4)).all()):
                values = value_RC.reshape(len(keep_RC), -1, 4)[block]
                plans.append(("block4", block, values))
    found: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    for layout, flags, values in plans:
        stored, codec = _compress(values, level, zstd)
        if flags is None:
            about = {"layout": layout, "nnz": int(keep.sum()), "codec": {"vals": codec}}
            found.append(({name: stored}, about | line))
            continue
        form, gaps, bits, bits_codec = _smallest_mask(flags, level, zstd)
        about = {"layout": layout, "nnz": values.numel(), "codec": {"bits": bits_codec, "vals": codec}, "mask": form}
        about |= {"gaps": gaps} if form.endswith("gaps") else {}
        found.append(({f"{name}::bits": bits, f"{name}::vals": stored}, about | line))
    return min(found, key=lambda made: sum(part.nbytes for part in made[0].values()))


def _smallest_mask(keep_RW: Tensor, level: int, zstd: bool) -> tuple[str, int, Tensor, str]:
    """Form, its bytes before compression, the stored tensor and its codec. Without zstd, bits by rows."""
    forms = {"rows": keep_RW.numpy()}
    if zstd:
        forms["columns"] = np.ascontiguousarray(keep_RW.numpy().T)
        forms |= {f"{form[:-1]} gaps": flags for form, flags in forms.items()}
    found = []
    for form, flags in forms.items():
        raw = _gaps(flags) if form.endswith("gaps") else np.packbits(flags, axis=1, bitorder="little")
        found.append((form, raw.size, *_compress(torch.from_numpy(raw), level, zstd)))
    return min(found, key=lambda made: made[2].nbytes)


def _gaps(flags: np.ndarray) -> np.ndarray:
    """How many False stand before each True, in bytes; 255 says that at least so many do, and the next byte goes on."""
    gap = np.diff(np.flatnonzero(flags), prepend=-1) - 1
    ends = np.cumsum(gap // 255 + 1) - 1
    made = np.full(int(ends[-1]) + 1 if len(ends) else 0, 255, dtype=np.uint8)
    made[ends] = gap % 255
    return made


def _compress(tensor: Tensor, level: int, zstd: bool) -> tuple[Tensor, str]:
    """The tensor as the smallest frame, and its codec; the tensor itself where no frame is worth it."""
    raw = raw_bytes(tensor)
    if not raw or not zstd:
        return tensor, "none"
    inputs = {"zstd": raw}
    if (size := tensor.element_size()) > 1:  # exponents and mantissas of numbers apart
        inputs["planes"] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, size).T.tobytes()
    coder = pyarrow.Codec("zstd", compression_level=level)
    frames = {codec: coder.compress(of, asbytes=True) for codec, of in inputs.items()}
    codec = min(frames, key=lambda codec: len(frames[codec]))
    if len(frames[codec]) > WORTH_IT * len(raw):
        return tensor, "none"
    return torch.frombuffer(bytearray(frames[codec]), dtype=torch.uint8), codec


def size(state: dict[str, Tensor], *, scales: dict[str, Tensor] | None = None, zstd: bool = True) -> int:
    """Bytes of the container that `write` would make."""
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / FILE, state, scales=scales, zstd=zstd)


def byte_table(state: dict[str, Tensor], matrices: set[str]) -> dict[str, dict[str, int]]:
    """What the same weights take in other forms, as files: name of the form -> {"whole", "matrices"} in bytes.

    int8 is one code per weight of every tensor with two axes, embeddings included, a scale per row, no zeros left out;
    "+ zstd" is that file after zstd -19.

    Args:
        matrices: names of the prunable weights, also counted by themselves.
    """
    table: dict[str, dict[str, int]] = {}
    for what, chosen in (("whole", set(state)), ("matrices", matrices)):
        part = {name: tensor.detach().cpu().float() for name, tensor in state.items() if name in chosen}
        codes: dict[str, Tensor] = {}
        for name, tensor in part.items():
            if tensor.ndim < 2:
                codes[name] = tensor
                continue
            scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            codes[name] = (tensor / scale).round().to(torch.int8)
            codes[f"{name}::scale"] = scale.squeeze(-1)
        packed = save(codes)
        forms = {
            "fp32": len(save(part)),
            "fp16": len(save({name: tensor.half() for name, tensor in part.items()})),
            "int8": len(packed),
            "int8 + zstd -19": len(pyarrow.Codec("zstd", compression_level=19).compress(packed, asbytes=True)),
        }
        for form, size in forms.items():
            table.setdefault(form, {})[what] = size
    return table
