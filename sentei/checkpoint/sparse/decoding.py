"""A container to tensors, masks and ranges; what is in it is believed only as far as its checksums go.

Shape legend: R rows, C columns, W = C or, in blocks, C/4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentei.checkpoint.sparse.format import SCALES, Contents, Entry, contents_of, crc, expand, inspect, opened


def read(path: str | Path, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Name -> dense tensor, floats to the bit; codes come as fp32, code * scale.

    Raises:
        ValueError: as `inspect`, or contents that are not what the manifest says.
    """
    return {name: _value(codes, scale) for name, (codes, scale) in read_codes(path, max_bytes=max_bytes).items()}


def read_codes(path: str | Path, *, max_bytes: int | None = None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """As `read`, but int8 tensors stay codes: name -> (tensor, scale or None)."""
    path = Path(path)
    contents = contents_of(path, max_bytes)
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    with opened(path) as file:
        scales = _scales(path, file, contents)
        for name, entry in contents.entries.items():
            parts = {
                part: expand(path, stored, file.get_tensor(stored), entry.codec[part], dtype, shape)
                for part, (stored, dtype, shape) in entry.parts(name).items()
            }
            tensor, scale = _decode(path, name, entry, parts), scales.get(name)
            covered = [tensor] if scale is None or contents.version == "1" else [tensor, scale]
            if crc(*covered) != entry.crc32:
                raise ValueError(f"{path}: {name} is damaged (checksum); get the file again")
            if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError(f"{path}: the scale of {name} is not a positive number")
            found[name] = tensor, scale
    return found


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Name -> mask of the weights that are kept, of tensors that may keep a 0 (`bits: mask`)."""
    path = Path(path)
    found = {}
    with opened(path) as file:
        for name, entry in inspect(path).items():
            if entry.bits == "mask" and entry.layout != "dense":
                stored, dtype, shape = entry.parts(name)["bits"]
                bits = expand(path, stored, file.get_tensor(stored), entry.codec["bits"], dtype, shape)
                keep = torch.from_numpy(_flags(path, name, entry, bits.numpy()))
                found[name] = keep.repeat_interleave(entry.columns // entry.width, 1).reshape(entry.shape)
    return found


def read_activations(path: str | Path) -> dict[str, dict[str, float]]:
    """Module -> ranges of its inputs and outputs, where the container has them."""
    path = Path(path)
    contents = contents_of(path)
    found = dict(contents.activations)
    if contents.version == "1":
        with opened(path) as file:
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                if stored.startswith("act/"):
                    module, _, key = stored.removeprefix("act/").partition("::")
                    found.setdefault(module, {})[key] = float(file.get_tensor(stored))
    return found


def _scales(path: Path, file: Any, contents: Contents) -> dict[str, Tensor]:
    """Name of an int8 tensor -> its scale, [] or [R]."""
    wanted = {name: entry for name, entry in contents.entries.items() if entry.scale is not None}
    if contents.version == "1":
        return {name: file.get_tensor(f"{name}::scale") for name in wanted}
    counts = [entry.scales for entry in wanted.values()]
    every = expand(path, SCALES, file.get_tensor(SCALES), contents.scales, "F32", (sum(counts),))
    parts = dict(zip(wanted, every.split(counts), strict=True)) if wanted else {}
    return {name: part if wanted[name].scale == "row" else part.reshape(()) for name, part in parts.items()}


def _value(codes: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return codes
    return codes.float() * (scale if scale.ndim == 0 else scale.reshape(*codes.shape[:-1], 1))


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
