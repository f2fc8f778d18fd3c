"""What a container may hold, and a check of what a file says of itself; the form is described in the package.

Shape legend: R rows, C columns, W = C or, in blocks, C/4.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FILE = "model.sparse.safetensors"
FORMAT, VERSION = "sentei-sparse", "2"
LAYOUTS, BITS = ("dense", "bitmask", "block4"), ("mask", "nonzero")
MASKS = ("rows", "columns", "row gaps", "column gaps")
CODECS = {"1": ("none", "zstd"), "2": ("none", "zstd", "planes")}  # by version
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U8": 1}
ACTIVATIONS = ("in_scale", "in_zp", "out_scale", "out_zp")
_KEYS = {"1": {"layout", "dtype", "shape", "nnz", "bits", "codec", "crc32", "scale"}}
_KEYS["2"] = _KEYS["1"] | {"mask", "gaps"}
MANIFEST, SCALES = "::manifest", "::scales"
_HEADER = 100_000_000  # bytes; safetensors' own limit
DENSER = 64  # times that a manifest may be larger than its frame


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
    mask: str = "rows"
    gaps: int = 0  # bytes of a mask of gaps

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def width(self) -> int:
        """Flags of a row of the mask."""
        return self.columns // (4 if self.layout == "block4" else 1)

    @property
    def scales(self) -> int:
        return {"row": self.rows, "tensor": 1, None: 0}[self.scale]

    @property
    def bytes(self) -> int:
        """Of the dense tensor as it is given to a model: codes become fp32. With its scales."""
        return math.prod(self.shape) * (4 if self.dtype == "I8" else _SIZES[self.dtype]) + 4 * self.scales

    def parts(self, name: str) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Part -> (stored name, dtype, shape) as they are before compression."""
        if self.layout == "dense":
            return {"vals": (name, self.dtype, self.shape)}
        values = (self.nnz // 4, 4) if self.layout == "block4" else (self.nnz,)
        lines, length = (self.width, self.rows) if self.mask == "columns" else (self.rows, self.width)
        flags = (self.gaps,) if self.mask.endswith("gaps") else (lines, -(-length // 8))
        return {"bits": (f"{name}::bits", "U8", flags), "vals": (f"{name}::vals", self.dtype, values)}


@dataclass(frozen=True)
class Contents:
    """What a container says of itself; `scales` is the codec of theirs (version 2)."""

    version: str
    entries: dict[str, Entry]
    scales: str
    activations: dict[str, dict[str, float]]


def inspect(path: str | Path, *, max_bytes: int | None = None) -> dict[str, Entry]:
    """The tensors of a container, every claim checked that can be without reading a tensor.

    Args:
        max_bytes: of all dense tensors together; default a gigabyte, or 64 times the file where that is more.
    Raises:
        ValueError: what is wrong with the file.
    """
    return contents_of(Path(path), max_bytes).entries


def limit(path: Path) -> int:
    """Bytes that all dense tensors of a container may take together, unless its reader says otherwise."""
    return max(1 << 30, 64 * path.stat().st_size)


def contents_of(path: Path, max_bytes: int | None = None) -> Contents:
    header, metadata = _header(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a sparse container of sentei (format {metadata.get('format')!r})")
    version = metadata.get("version")
    if version not in CODECS:
        raise ValueError(f"{path} has version {version!r}, known are {', '.join(CODECS)}: use a newer sentei")
    lines, codec, activations = _manifest(path, version, header, metadata)
    left = limit(path) if max_bytes is None else max_bytes
    entries, expected = {}, {}
    for name, line in lines.items():
        entry = entries[name] = _entry(path, version, name, line)
        parts = {
            stored: (dtype, shape, entry.codec[part]) for part, (stored, dtype, shape) in entry.parts(name).items()
        }
        if version == "1" and entry.scale is not None:
            parts[f"{name}::scale"] = ("F32", () if entry.scale == "tensor" else (entry.rows,), "none")
        if both := expected.keys() & parts:
            raise ValueError(f"{path}: tensor {sorted(both)[0]} is named twice")
        expected |= parts
        left -= entry.bytes
        if left < 0:
            raise ValueError(f"{path} would unpack to more than is allowed (max_bytes); {name} is {list(entry.shape)}")
    if version == "2":
        expected[SCALES] = ("F32", (sum(entry.scales for entry in entries.values()),), codec)
    for stored, (dtype, shape, codec_of) in expected.items():
        if stored not in header:
            raise ValueError(f"{path}: tensor {stored} is missing")
        found = header[stored]
        if codec_of != "none":
            if found[0] != "U8" or len(found[1]) != 1:
                raise ValueError(f"{path}: {stored} is no zstd frame")
        elif found != (dtype, shape):
            raise ValueError(
                f"{path}: {stored} is {found[0]} {list(found[1])}, its manifest says {dtype} {list(shape)}"
            )
    for stored in set(header) - set(expected) - {MANIFEST}:
        module, _, key = stored.removeprefix("act/").partition("::")
        old = version == "1" and stored.startswith("act/") and header[stored] == ("F32", ())
        if not old or not module or key not in ACTIVATIONS:
            raise ValueError(f"{path}: tensor {stored} is not in the manifest")
    return Contents(version, entries, codec, activations)


def _manifest(
    path: Path, version: str, header: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[dict[str, Any], str, dict[str, dict[str, float]]]:
    """Lines of the tensors, not yet checked, the codec of the scales, and the ranges of activations."""
    try:
        if version == "1":
            lines, codec, ranges = json.loads(metadata["manifest"]), "none", {}
            _require(MANIFEST not in header)
        else:
            about = json.loads(metadata["manifest"])
            _require(set(about) == {"codec", "bytes", "crc32"} and about["codec"] in ("none", "zstd"))
            kind, (length,) = header[MANIFEST]
            _require(kind == "U8" and type(about["bytes"]) is int)
            raw_size = about["bytes"]
            _require(0 < raw_size <= DENSER * length if about["codec"] == "zstd" else raw_size == length)
            with opened(path) as file:
                part = file.get_tensor(MANIFEST)
            raw = expand(path, MANIFEST, part, about["codec"], "U8", (raw_size,))
            _require(crc(raw) == about["crc32"])
            manifest = json.loads(raw.numpy().tobytes())
            _require(set(manifest) == {"tensors", "scales", "activations"})
            lines, codec, ranges = manifest["tensors"], manifest["scales"], manifest["activations"]
            _require(codec in CODECS[version] and isinstance(ranges, dict))
            for of in ranges.values():
                _require(set(of) <= set(ACTIVATIONS) and all(type(x) in (int, float) for x in of.values()))
                _require(all(math.isfinite(x) for x in of.values()))
        _require(isinstance(lines, dict) and bool(lines))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        raise ValueError(f"{path} has no manifest that can be read; get it again") from None
    return lines, codec, ranges


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


def _entry(path: Path, version: str, name: str, line: Any) -> Entry:
    try:
        _require(isinstance(line, dict) and set(line) <= _KEYS[version] and "::" not in name)
        shape: tuple[int, ...] = tuple(line["shape"])
        layout, dtype, codec = line["layout"], line["dtype"], dict(line["codec"])
        _require(layout in LAYOUTS and dtype in DTYPES and line["bits"] in BITS)
        _require(all(type(n) is int and 0 <= n < 1 << 40 for n in (*shape, line["nnz"])) and len(shape) <= 8)
        _require(type(line["crc32"]) is int and set(codec.values()) <= set(CODECS[version]))
        scale = line.get("scale")
        _require((scale in ("tensor", "row")) == (dtype == "I8"))
        mask, gaps = line.get("mask", "rows"), line.get("gaps", 0)
        _require(mask in MASKS and type(gaps) is int)
        entry = Entry(layout, dtype, shape, line["nnz"], line["bits"], codec, line["crc32"], scale, mask, gaps)
        _require(entry.nnz <= math.prod(shape) and set(codec) == set(entry.parts(name)))
        _require(layout == "dense" or len(shape) >= 2)
        # A byte for each value or block, and one for each 255 of what is not kept: no more than the dense tensor has.
        _require(0 <= gaps <= entry.nnz + math.prod(shape) // 255)
        _require(layout != "block4" or (entry.columns % 4 == 0 and entry.nnz % 4 == 0))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: the manifest's line for {str(name)[:80]!r} makes no sense; get it again") from None
    return entry


def opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from None


def expand(path: Path, stored: str, frame: Tensor, codec: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A stored part as the tensor that the manifest describes; the size of a frame must be exactly that."""
    if codec == "none":
        return frame
    size = math.prod(shape) * _SIZES[dtype]
    try:
        raw = pyarrow.Codec("zstd").decompress(frame.numpy().tobytes(), decompressed_size=size, asbytes=True)
        _require(len(raw) == size)
    except (pyarrow.ArrowException, OSError, ValueError):
        raise ValueError(f"{path}: {stored} does not unpack to {size} bytes; get the file again") from None
    if codec == "planes":
        raw = np.frombuffer(raw, dtype=np.uint8).reshape(_SIZES[dtype], -1).T.tobytes()
    kind = torch.uint8 if dtype == "U8" else DTYPES[dtype]
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if size else torch.empty(shape, dtype=kind)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def crc(*tensors: Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(raw_bytes(tensor), value)
    return value
