"""The sparse container: `model.sparse.safetensors`, bit-exact, read without trust in what it says.

A plain safetensors file. Its metadata hold `format`, `version` and `manifest` (JSON: codec, bytes and crc32 of the
tensor `::manifest`). That tensor is JSON: "tensors", name -> layout, dtype, shape, nnz, bits, codecs, crc32; "scales",
their codec; "activations", module -> ranges of its inputs and outputs. A tensor N of shape S, with R = prod(S[:-1])
rows of C = S[-1], is stored in one layout:

dense     N
bitmask   N::bits, which of [R, C] are kept; N::vals [nnz], row by row
block4    N::bits, which of [R, C/4] blocks are kept, W = C/4 a row; N::vals [blocks, 4]

and the mask [R, W] in one form:

rows, columns           uint8 [R, ceil(W/8)], bit j of byte b is column 8b+j, padding 0; or the same of its transpose
row gaps, column gaps   uint8 [n], for each kept one how many in a row before it are not; 255: so many, and go on

An int8 tensor holds codes; its value is code * scale, with fp32 scales [] or [R]: those of all tensors, in order, are
the tensor `::scales`. crc32 is of the dense bytes, then those of the scale. Each part may be one zstd frame (uint8,
one-dimensional), with codec "planes" of the first bytes of all numbers, then the second ones and so on. The sizes of
parts are known from the shapes.

Version 1, still read: the manifest is metadata itself, masks are by rows, no planes, N::scale fp32 is beside its tensor
and outside its crc32, and ranges are tensors `act/<module>::name`.

The name is not model.safetensors, so that transformers says there are no weights rather than filling in random ones.

Shape legend: R rows, C columns, W = C or, in blocks, C/4.
"""

from __future__ import annotations

import json
import math
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

from sentei.atomic import replacing

FILE = "model.sparse.safetensors"
FORMAT, VERSION = "sentei-sparse", "2"
LAYOUTS, BITS = ("dense", "bitmask", "block4"), ("mask", "nonzero")
MASKS = ("rows", "columns", "row gaps", "column gaps")
CODECS = {"1": ("none", "zstd"), "2": ("none", "zstd", "planes")}  # by version
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U8": 1}
# zstd level: codes are few and released once, so that 3 % smaller is worth the time. A frame must be 5 % smaller.
LEVEL, CODES_LEVEL, WORTH_IT = 3, 19, 0.95
ACTIVATIONS = ("in_scale", "in_zp", "out_scale", "out_zp")
_KEYS = {"1": {"layout", "dtype", "shape", "nnz", "bits", "codec", "crc32", "scale"}}
_KEYS["2"] = _KEYS["1"] | {"mask", "gaps"}
_MANIFEST, _SCALES = "::manifest", "::scales"
_HEADER = 100_000_000  # bytes; safetensors' own limit
_DENSER = 64  # times that a manifest may be larger than its frame


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
class _Contents:
    """What a container says of itself; `scales` is the codec of theirs (version 2)."""

    version: str
    entries: dict[str, Entry]
    scales: str
    activations: dict[str, dict[str, float]]


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
        if "::" in name or name.startswith("act/") or tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name} ({tensor.dtype}) has no place in a sparse container")
        scale = scales[name].detach().cpu().float() if tensor.dtype == torch.int8 else None
        made, lines[name] = _encode(name, tensor.detach().cpu().contiguous(), masks.get(name), scale, zstd)
        parts |= made
        if scale is not None:
            lines[name]["scale"] = "tensor" if scale.numel() == 1 else "row"
            steps.append(scale.flatten())
    parts[_SCALES], codec = _compress(torch.cat(steps), CODES_LEVEL, zstd)
    manifest = {"tensors": lines, "scales": codec, "activations": activations or {}}
    raw = torch.frombuffer(bytearray(json.dumps(manifest, separators=(",", ":")).encode()), dtype=torch.uint8)
    parts[_MANIFEST], codec = _compress(raw, CODES_LEVEL, zstd)
    if len(raw) > _DENSER * len(parts[_MANIFEST]):
        parts[_MANIFEST], codec = raw, "none"
    about = {"codec": codec, "bytes": len(raw), "crc32": _crc(raw)}
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
        "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "bits": "nonzero" if mask is None else "mask",
        "crc32": _crc(clean) if scale is None else _crc(clean, scale),
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


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _crc(*tensors: Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(_raw(tensor), value)
    return value


def _compress(tensor: Tensor, level: int, zstd: bool) -> tuple[Tensor, str]:
    """The tensor as the smallest frame, and its codec; the tensor itself where no frame is worth it."""
    raw = _raw(tensor)
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


# --- read -----------------------------------------------------------------------------------------------------------


def inspect(path: str | Path, *, max_bytes: int | None = None) -> dict[str, Entry]:
    """The tensors of a container, every claim checked that can be without reading a tensor.

    Args:
        max_bytes: of all dense tensors together; default a gigabyte, or 64 times the file where that is more.
    Raises:
        ValueError: what is wrong with the file.
    """
    return _contents(Path(path), max_bytes).entries


def limit(path: Path) -> int:
    """Bytes that all dense tensors of a container may take together, unless its reader says otherwise."""
    return max(1 << 30, 64 * path.stat().st_size)


def _contents(path: Path, max_bytes: int | None = None) -> _Contents:
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
        expected[_SCALES] = ("F32", (sum(entry.scales for entry in entries.values()),), codec)
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
    for stored in set(header) - set(expected) - {_MANIFEST}:
        module, _, key = stored.removeprefix("act/").partition("::")
        old = version == "1" and stored.startswith("act/") and header[stored] == ("F32", ())
        if not old or not module or key not in ACTIVATIONS:
            raise ValueError(f"{path}: tensor {stored} is not in the manifest")
    return _Contents(version, entries, codec, activations)


def _manifest(
    path: Path, version: str, header: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[dict[str, Any], str, dict[str, dict[str, float]]]:
    """Lines of the tensors, not yet checked, the codec of the scales, and the ranges of activations."""
    try:
        if version == "1":
            lines, codec, ranges = json.loads(metadata["manifest"]), "none", {}
            _require(_MANIFEST not in header)
        else:
            about = json.loads(metadata["manifest"])
            _require(set(about) == {"codec", "bytes", "crc32"} and about["codec"] in ("none", "zstd"))
            kind, (length,) = header[_MANIFEST]
            _require(kind == "U8" and type(about["bytes"]) is int)
            raw_size = about["bytes"]
            _require(0 < raw_size <= _DENSER * length if about["codec"] == "zstd" else raw_size == length)
            with _opened(path) as file:
                part = file.get_tensor(_MANIFEST)
            raw = _expand(path, _MANIFEST, part, about["codec"], "U8", (raw_size,))
            _require(_crc(raw) == about["crc32"])
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


def read(path: str | Path, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Name -> dense tensor, floats to the bit; codes come as fp32, code * scale.

    Raises:
        ValueError: as `inspect`, or contents that are not what the manifest says.
    """
    return {name: _value(codes, scale) for name, (codes, scale) in read_codes(path, max_bytes=max_bytes).items()}


def read_codes(path: str | Path, *, max_bytes: int | None = None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """As `read`, but int8 tensors stay codes: name -> (tensor, scale or None)."""
    path = Path(path)
    contents = _contents(path, max_bytes)
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    with _opened(path) as file:
        scales = _scales(path, file, contents)
        for name, entry in contents.entries.items():
            parts = {
                part: _expand(path, stored, file.get_tensor(stored), entry.codec[part], dtype, shape)
                for part, (stored, dtype, shape) in entry.parts(name).items()
            }
            tensor, scale = _decode(path, name, entry, parts), scales.get(name)
            covered = [tensor] if scale is None or contents.version == "1" else [tensor, scale]
            if _crc(*covered) != entry.crc32:
                raise ValueError(f"{path}: {name} is damaged (checksum); get the file again")
            if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError(f"{path}: the scale of {name} is not a positive number")
            found[name] = tensor, scale
    return found


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Name -> mask of the weights that are kept, of tensors that may keep a 0 (`bits: mask`)."""
    path = Path(path)
    found = {}
    with _opened(path) as file:
        for name, entry in inspect(path).items():
            if entry.bits == "mask" and entry.layout != "dense":
                stored, dtype, shape = entry.parts(name)["bits"]
                bits = _expand(path, stored, file.get_tensor(stored), entry.codec["bits"], dtype, shape)
                keep = torch.from_numpy(_flags(path, name, entry, bits.numpy()))
                found[name] = keep.repeat_interleave(entry.columns // entry.width, 1).reshape(entry.shape)
    return found


def read_activations(path: str | Path) -> dict[str, dict[str, float]]:
    """Module -> ranges of its inputs and outputs, where the container has them."""
    path = Path(path)
    contents = _contents(path)
    found = dict(contents.activations)
    if contents.version == "1":
        with _opened(path) as file:
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                if stored.startswith("act/"):
                    module, _, key = stored.removeprefix("act/").partition("::")
                    found.setdefault(module, {})[key] = float(file.get_tensor(stored))
    return found


def _scales(path: Path, file: Any, contents: _Contents) -> dict[str, Tensor]:
    """Name of an int8 tensor -> its scale, [] or [R]."""
    wanted = {name: entry for name, entry in contents.entries.items() if entry.scale is not None}
    if contents.version == "1":
        return {name: file.get_tensor(f"{name}::scale") for name in wanted}
    counts = [entry.scales for entry in wanted.values()]
    every = _expand(path, _SCALES, file.get_tensor(_SCALES), contents.scales, "F32", (sum(counts),))
    parts = dict(zip(wanted, every.split(counts), strict=True)) if wanted else {}
    return {name: part if wanted[name].scale == "row" else part.reshape(()) for name, part in parts.items()}


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


def _expand(path: Path, stored: str, frame: Tensor, codec: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
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


def _decode(path: Path, name: str, entry: Entry, parts: dict[str, Tensor]) -> Tensor:
    values = parts["vals"]
    if entry.layout == "dense":
        return values
    step = 4 if entry.layout == "block4" else 1
    keep = _flags(path, name, entry, parts["bits"].numpy())
    count = int(np.count_nonzero(keep)) * step
    if count != entry.nnz:
        raise ValueError(f"{path}: {name} has {count} weights by its bits, {entry.nnz} by its manifest")
    dense = torch.zeros(entry.rows, entry.width, step, dtype=values.dtype)
    dense[torch.from_numpy(keep)] = values.reshape(-1, step)
    return dense.reshape(entry.shape)


def _flags(path: Path, name: str, entry: Entry, bits: np.ndarray) -> np.ndarray:
    """Which weights or blocks are kept, bool [R, W]."""
    by_columns = entry.mask.startswith("column")
    length = entry.rows if by_columns else entry.width  # of a line of the mask
    if entry.mask.endswith("gaps"):
        flags = _unpack_gaps(path, name, bits, entry.rows * entry.width)
    else:
        flags = np.unpackbits(bits, axis=1, bitorder="little")
        if flags[:, length:].any():
            raise ValueError(f"{path}: {name} has bits set beyond its last column")
        flags = flags[:, :length].astype(bool)
    flags = flags.reshape(entry.width, entry.rows).T if by_columns else flags.reshape(entry.rows, entry.width)
    return np.ascontiguousarray(flags)


def _unpack_gaps(path: Path, name: str, gaps: np.ndarray, count: int) -> np.ndarray:
    """Flags [count] of what `_gaps` made."""
    ends = gaps != 255
    places = np.cumsum(np.where(ends, gaps.astype(np.int64) + 1, 255))[ends] - 1
    if len(gaps) and (not ends[-1] or places[-1] >= count):
        raise ValueError(f"{path}: {name} has bits set beyond its last column")
    flags = np.zeros(count, dtype=bool)
    flags[places] = True
    return flags


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
