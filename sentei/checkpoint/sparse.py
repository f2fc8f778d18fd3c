"""The sparse container: `model.sparse.safetensors`, bit-exact, read without trust in what it says.

A plain safetensors file. Its metadata hold `format`, `version` and `manifest` (JSON: tensor -> layout, dtype, shape,
nnz, bits, codecs, crc32). A tensor N of shape S, with R = prod(S[:-1]) rows of C = S[-1], is stored in one layout:

dense     N
bitmask   N::bits uint8 [R, ceil(C/8)], bit j of byte b is column 8b+j, padding 0; N::vals [nnz], row by row
block4    N::bits uint8 [R, ceil(C/32)], one bit per four columns; N::vals [blocks, 4]

An int8 tensor holds codes, with N::scale fp32 [] or [R] beside it; its value is code * scale. `act/<module>::name` are
ranges of activations. Each part may be one zstd frame (uint8, one-dimensional): its size is known from the shape.

The name is not model.safetensors, so that transformers says there are no weights rather than filling in random ones.

Shape legend: R rows, C columns, B bytes of a row of bits.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

FILE = "model.sparse.safetensors"
FORMAT, VERSION = "sentei-sparse", "1"
LAYOUTS, CODECS, BITS = ("dense", "bitmask", "block4"), ("none", "zstd"), ("mask", "nonzero")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U8": 1}
# zstd level: codes are few and released once, so that 3 % smaller is worth the time. A frame must be 5 % smaller.
LEVEL, CODES_LEVEL, WORTH_IT = 3, 19, 0.95
ACTIVATIONS = ("in_scale", "in_zp", "out_scale", "out_zp")
_KEYS = {"layout", "dtype", "shape", "nnz", "bits", "codec", "crc32", "scale"}
_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """One tensor as the manifest describes it, checked against the file's header."""

    layout: str
    dtype: str
    shape: tuple[int, ...]
    nnz: int
    bits: str
    codec: dict[str, str]
    crc32: int
    scale: str | None

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def bytes(self) -> int:
        """Of the dense tensor as it is given to a model: codes become fp32."""
        return math.prod(self.shape) * (4 if self.dtype == "I8" else _SIZES[self.dtype])

    def parts(self, name: str) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Part -> (stored name, dtype, shape) as they are before compression."""
        if self.layout == "dense":
            return {"vals": (name, self.dtype, self.shape)}
        wide = self.layout == "block4"
        width = -(-self.columns // (32 if wide else 8))
        values = (self.nnz // 4, 4) if wide else (self.nnz,)
        return {"bits": (f"{name}::bits", "U8", (self.rows, width)), "vals": (f"{name}::vals", self.dtype, values)}


# --- write ----------------------------------------------------------------------------------------------------------


def write(
    path: str | Path,
    state: dict[str, Tensor],
    *,
    masks: dict[str, Tensor] | None = None,
    scales: dict[str, Tensor] | None = None,
    activations: dict[str, dict[str, float]] | None = None,
    zstd: bool = True,
) -> int:
    """Write tensors, each in its smallest layout; returns the bytes of the file, which appears whole or not at all.

    Args:
        state: name -> tensor; int8 for codes.
        masks: name -> bool tensor of the weights that are kept, where a kept weight may be 0; others: not 0.
        scales: name of an int8 tensor -> fp32 scalar or [R].
        activations: module -> {"in_scale", "in_zp", ...}.
        zstd: compress parts that become smaller by it.
    """
    masks, scales = masks or {}, scales or {}
    parts: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {}
    for name, tensor in state.items():
        if "::" in name or name.startswith("act/") or tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name} ({tensor.dtype}) has no place in a sparse container")
        made, manifest[name] = _encode(name, tensor.detach().cpu().contiguous(), masks.get(name), zstd)
        parts |= made
        if tensor.dtype == torch.int8:
            scale = scales[name].detach().cpu().float()
            if scale.numel() == 1:
                scale = scale.reshape(())
            parts[f"{name}::scale"] = scale.contiguous()
            manifest[name]["scale"] = "tensor" if scale.ndim == 0 else "row"
    for module, ranges in (activations or {}).items():
        for key, value in ranges.items():
            parts[f"act/{module}::{key}"] = torch.tensor(float(value))
    metadata = {"format": FORMAT, "version": VERSION, "manifest": json.dumps(manifest, separators=(",", ":"))}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(parts, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _encode(name: str, tensor: Tensor, mask: Tensor | None, zstd: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored parts of one tensor in its smallest layout, and its line of the manifest."""
    keep = tensor != 0 if mask is None else mask.cpu()
    assert keep.shape == tensor.shape and not bool((tensor[~keep] != 0).any()), f"{name}: a removed weight is not 0"
    clean = torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype))  # -0.0 of a removed weight becomes 0.0
    line = {
        "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "bits": "nonzero" if mask is None else "mask",
        "crc32": _crc(clean),
    }  # fmt: skip
    plans: list[tuple[str, int, dict[str, Tensor]]] = []
    # A mask that keeps a zero is lost in the dense layout; without one the zeros tell it.
    if bool(keep.all()) or not bool((keep & (tensor == 0)).any()) or tensor.ndim < 2:
        plans.append(("dense", int(keep.sum()), {"vals": clean}))
    if tensor.ndim >= 2 and not bool(keep.all()):
        keep_RC, value_RC = keep.reshape(-1, tensor.shape[-1]), clean.reshape(-1, tensor.shape[-1])
        plans.append(("bitmask", int(keep.sum()), {"bits": _pack(keep_RC), "vals": value_RC[keep_RC]}))
        if tensor.shape[-1] % 4 == 0:
            block = keep_RC.reshape(len(keep_RC), -1, 4).any(2)
            if mask is None or bool((block[..., None] == keep_RC.reshape(len(keep_RC), -1, 4)).all()):
                values = value_RC.reshape(len(keep_RC), -1, 4)[block]
                plans.append(("block4", 4 * int(block.sum()), {"bits": _pack(block), "vals": values}))
    level = CODES_LEVEL if tensor.dtype == torch.int8 else LEVEL
    best: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None
    for layout, nnz, pieces in plans:
        coded = {key: _compress(piece, level) if zstd else (piece, "none") for key, piece in pieces.items()}
        size = sum(piece.numel() * piece.element_size() for piece, _ in coded.values())
        if best is None or size < best[0]:
            stored = {name if layout == "dense" else f"{name}::{key}": piece for key, (piece, _) in coded.items()}
            codec = {key: codec for key, (_, codec) in coded.items()}
            best = size, stored, {"layout": layout, "nnz": nnz, "codec": codec} | line
    assert best is not None
    return best[1], best[2]


def _pack(keep_RC: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(keep_RC.numpy(), axis=1, bitorder="little"))


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(_raw(tensor))


def _compress(tensor: Tensor, level: int) -> tuple[Tensor, str]:
    raw = _raw(tensor)
    if not raw:
        return tensor, "none"
    frame = pyarrow.Codec("zstd", compression_level=level).compress(raw, asbytes=True)
    if len(frame) > WORTH_IT * len(raw):
        return tensor, "none"
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8), "zstd"


# --- read -----------------------------------------------------------------------------------------------------------


def inspect(path: str | Path, *, max_bytes: int | None = None) -> dict[str, Entry]:
    """The tensors of a container, every claim checked that can be without reading a tensor.

    Args:
        max_bytes: of all dense tensors together; default a gigabyte, or 64 times the file where that is more.
    Raises:
        ValueError: what is wrong with the file.
    """
    path = Path(path)
    header, metadata = _header(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a sparse container of sentei (format {metadata.get('format')!r})")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')!r}, known is {VERSION}: use a newer sentei")
    try:
        manifest = json.loads(metadata["manifest"])
        _require(isinstance(manifest, dict) and bool(manifest))
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"{path} has no manifest that can be read; get it again") from None
    limit = max(1 << 30, 64 * path.stat().st_size) if max_bytes is None else max_bytes
    entries, used = {}, set()
    for name, line in manifest.items():
        entry = entries[name] = _entry(path, name, line)
        expected = {
            stored: (dtype, shape, entry.codec[part]) for part, (stored, dtype, shape) in entry.parts(name).items()
        }
        if entry.scale is not None:
            expected[f"{name}::scale"] = ("F32", () if entry.scale == "tensor" else (entry.rows,), "none")
        for stored, (dtype, shape, codec) in expected.items():
            if stored in used or stored not in header:
                raise ValueError(f"{path}: tensor {stored} is {'named twice' if stored in used else 'missing'}")
            used.add(stored)
            found = header[stored]
            if codec == "zstd":
                if found[0] != "U8" or len(found[1]) != 1:
                    raise ValueError(f"{path}: {stored} is no zstd frame")
            elif found != (dtype, shape):
                raise ValueError(
                    f"{path}: {stored} is {found[0]} {list(found[1])}, its manifest says {dtype} {list(shape)}"
                )
        limit -= entry.bytes
        if limit < 0:
            raise ValueError(f"{path} would unpack to more than is allowed (max_bytes); {name} is {list(entry.shape)}")
    for stored in set(header) - used:
        module, _, key = stored.removeprefix("act/").partition("::")
        if not stored.startswith("act/") or not module or key not in ACTIVATIONS or header[stored] != ("F32", ()):
            raise ValueError(f"{path}: tensor {stored} is not in the manifest")
    return entries


def read(path: str | Path, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Name -> dense tensor, floats to the bit; codes come as fp32, code * scale.

    Raises:
        ValueError: as `inspect`, or contents that are not what the manifest says.
    """
    return {name: _value(codes, scale) for name, (codes, scale) in read_codes(path, max_bytes=max_bytes).items()}


def read_codes(path: str | Path, *, max_bytes: int | None = None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """As `read`, but int8 tensors stay codes: name -> (tensor, scale or None)."""
    path = Path(path)
    entries = inspect(path, max_bytes=max_bytes)
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    with _opened(path) as file:
        for name, entry in entries.items():
            parts = {}
            for part, (stored, dtype, shape) in entry.parts(name).items():
                tensor = file.get_tensor(stored)
                parts[part] = _expand(path, stored, tensor, dtype, shape) if entry.codec[part] == "zstd" else tensor
            tensor = _decode(path, name, entry, parts)
            if _crc(tensor) != entry.crc32:
                raise ValueError(f"{path}: {name} is damaged (checksum); get the file again")
            scale = file.get_tensor(f"{name}::scale") if entry.scale is not None else None
            if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError(f"{path}: the scale of {name} is not a positive number")
            found[name] = tensor, scale
    return found


def read_activations(path: str | Path) -> dict[str, dict[str, float]]:
    """Module -> ranges of its inputs and outputs, where the container has them."""
    inspect(path)
    found: dict[str, dict[str, float]] = {}
    with _opened(Path(path)) as file:
        for stored in file.keys():  # noqa: SIM118 (not a dict)
            if stored.startswith("act/"):
                module, _, key = stored.removeprefix("act/").partition("::")
                found.setdefault(module, {})[key] = float(file.get_tensor(stored))
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from None


def _value(codes: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return codes
    return codes.float() * (scale if scale.ndim == 0 else scale.reshape(*codes.shape[:-1], 1))


def _header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Stored tensors and metadata of a safetensors file; every offset lies in the file and none overlap."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER):
            raise ValueError(f"{path} is not a safetensors file, or is cut short; get it again")
        try:
            raw = json.loads(stream.read(length))
            metadata = raw.pop("__metadata__", {})
            _require(isinstance(metadata, dict))
            header, spans = {}, []
            for name, line in raw.items():
                dtype, shape, span = line["dtype"], tuple(line["shape"]), tuple(line["data_offsets"])
                _require(dtype in _SIZES and all(type(n) is int and n >= 0 for n in (*shape, *span)) and len(span) == 2)
                _require(span[1] - span[0] == math.prod(shape) * _SIZES[dtype])
                header[name] = dtype, shape
                spans.append(span)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} has a damaged header; get it again") from None
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"{path} has a damaged header (tensors overlap or leave a gap); get it again")
        end = last
    if 8 + length + end != size:
        raise ValueError(f"{path} is cut short: {size} bytes, its header describes {8 + length + end}")
    return header, metadata


def _require(condition: bool) -> None:
    """For what a stranger wrote: unlike `assert`, not switched off by -O."""
    if not condition:
        raise ValueError


def _entry(path: Path, name: str, line: Any) -> Entry:
    try:
        _require(isinstance(line, dict) and set(line) <= _KEYS and "::" not in name)
        shape: tuple[int, ...] = tuple(line["shape"])
        layout, dtype, codec = line["layout"], line["dtype"], dict(line["codec"])
        _require(layout in LAYOUTS and dtype in DTYPES and line["bits"] in BITS)
        _require(all(type(n) is int and 0 <= n < 1 << 40 for n in (*shape, line["nnz"])) and len(shape) <= 8)
        _require(type(line["crc32"]) is int and set(codec.values()) <= set(CODECS))
        scale = line.get("scale")
        _require((scale in ("tensor", "row")) == (dtype == "I8"))
        entry = Entry(layout, dtype, shape, line["nnz"], line["bits"], codec, line["crc32"], scale)
        _require(entry.nnz <= math.prod(shape) and set(codec) == set(entry.parts(name)))
        _require(layout == "dense" or len(shape) >= 2)
        _require(layout != "block4" or (entry.columns % 4 == 0 and entry.nnz % 4 == 0))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: the manifest's line for {str(name)[:80]!r} makes no sense; get it again") from None
    return entry


def _expand(path: Path, stored: str, frame: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A zstd frame as the tensor that the manifest describes; its size must be exactly that."""
    size = math.prod(shape) * _SIZES[dtype]
    try:
        raw = pyarrow.Codec("zstd").decompress(frame.numpy().tobytes(), decompressed_size=size, asbytes=True)
        _require(len(raw) == size)
    except (pyarrow.ArrowException, OSError, ValueError):
        raise ValueError(f"{path}: {stored} does not unpack to {size} bytes; get the file again") from None
    kind = torch.uint8 if dtype == "U8" else DTYPES[dtype]
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if size else torch.empty(shape, dtype=kind)


def _decode(path: Path, name: str, entry: Entry, parts: dict[str, Tensor]) -> Tensor:
    values = parts["vals"]
    if entry.layout == "dense":
        return values
    step = 4 if entry.layout == "block4" else 1
    width = entry.columns // step
    flags = np.unpackbits(parts["bits"].numpy(), axis=1, bitorder="little")
    if flags[:, width:].any():
        raise ValueError(f"{path}: {name} has bits set beyond its last column")
    keep = torch.from_numpy(flags[:, :width].astype(bool))
    if int(keep.sum()) * step != entry.nnz:
        raise ValueError(
            f"{path}: {name} has {int(keep.sum()) * step} weights by its bits, {entry.nnz} by its manifest"
        )
    dense = torch.zeros(entry.rows, width, step, dtype=values.dtype)
    dense[keep] = values.reshape(-1, step)
    return dense.reshape(entry.shape)


# --- sizes ----------------------------------------------------------------------------------------------------------


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
