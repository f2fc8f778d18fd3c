"""What a checkpoint says of itself, checked: its configuration and the headers of its weights, no weight loaded."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sentei import structure
from sentei.checkpoint import sparse

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
MOST_LABELS = 1_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_LAYER = re.compile(r"(^|\.)(layers?|blk)\.\d+\.")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_GGUF_DTYPES = {0: torch.float32, 1: torch.float16}  # every other type is dequantised, or is bfloat16


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk that has passed every check short of loading it.

    Attributes:
        path: the folder, or the .gguf file.
        config: config.json as written; for a GGUF file only {"model_type": ...}.
        tensors: name -> (dtype to load it in, shape).
        files: the weight files.
        license: as the model card or the GGUF metadata states it.
        split: of a GGUF file, how its tokenizer splits text.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
    files: tuple[Path, ...]
    license: str | None = None
    split: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @property
    def is_sparse(self) -> bool:
        return [file.name for file in self.files] == [sparse.FILE]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        count: dict[torch.dtype, int] = {}
        for dtype, shape in self.tensors.values():
            if dtype is not None:
                count[dtype] = count.get(dtype, 0) + math.prod(shape)
        return max(count, key=lambda dtype: count[dtype], default=torch.float32)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for dtype, shape in self.tensors.values() if dtype is not None)

    @property
    def layer_parameters(self) -> int:
        return sum(math.prod(shape) for name, (dtype, shape) in self.tensors.items() if dtype and _LAYER.search(name))

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """Of the weight file; of several, the digest of their digests in order of name."""
        digests = []
        for file in sorted(self.files):
            with file.open("rb") as stream:
                digests.append(_file_digest(stream))
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def inspect(path: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Check a checkpoint without loading it. Nothing of it is run or unpickled.

    Raises:
        ValueError: not found; unknown architecture; remote code without consent; quantised; weights as pickle,
            missing, corrupt or truncated; no tokenizer.
    """
    local = Path(path)
    if local.is_file():
        if local.suffix == ".gguf":
            return _inspect_gguf(local)
        if local.suffix in PICKLES:
            raise ValueError(_pickle_refusal(local))
        raise ValueError(f"{path} is a file; expected a checkpoint folder, a .gguf file or a Hugging Face hub id")
    if not local.is_dir():
        local = _download(str(path), trust_remote_code)
    config = _read_config(local, trust_remote_code)
    files = _weight_files(local)
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for file in files:
        tensors |= _read_sparse(file) if file.name == sparse.FILE else _read_safetensors(file)
    index = local / "model.safetensors.index.json"
    if index.is_file() and len(files) > 1:
        lost = sorted(set(json.loads(index.read_text())["weight_map"]) - set(tensors))
        if lost:
            raise ValueError(f"{local}: {lost[0]} and {len(lost) - 1} more tensors of {index.name} are in no file")
    if not any((local / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{local} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy the tokenizer files of the "
            "original model into the folder"
        )
    return Source(local, config, tensors, files, _license(local))


def is_ours(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("sentei_")


def _download(name: str, trust_remote_code: bool) -> Path:
    """A hub model's folder in the local cache; its config is checked before the weights come."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = Path(huggingface_hub.hf_hub_download(name, "config.json"))
        _read_config(config.parent, trust_remote_code)
        code = ["*.py"] if trust_remote_code else []
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", *code]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name!r} is no folder or .gguf file here, and the Hugging Face hub did not give it: {first_line(error)}"
        ) from error


def _read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        adapter = " (it holds a PEFT adapter: merge it into its base model first)"
        hint = adapter if (folder / "adapter_config.json").is_file() else ""
        raise ValueError(f"{folder} has no config.json{hint}; expected a Hugging Face checkpoint folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} names no model_type; expected the config.json of a transformers model")
    structure.family(config["model_type"])
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has architectures {names!r}; expected a list of class names")
    labels = config.get("num_labels", 2)
    if not isinstance(labels, int) or not 0 < labels <= MOST_LABELS:  # transformers makes a name for each at once
        raise ValueError(f"{path} has num_labels {labels!r}; expected a number from 1 to {MOST_LABELS:,}")
    if config.get("auto_map") and not is_ours(config) and not trust_remote_code:
        raise ValueError(
            f"{folder} brings its own Python code (auto_map in config.json), which is not run without your consent: "
            "read it and pass --trust-remote-code (trust_remote_code=True), or delete auto_map and use the stock class"
        )
    quantization = config.get("quantization_config")
    if quantization:
        how = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"{folder} is quantised ({how or 'unknown method'}); prune the original "
            "float checkpoint and quantise the result"
        )
    return config


def _weight_files(folder: Path) -> tuple[Path, ...]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if (folder / sparse.FILE).is_file():
        return (folder / sparse.FILE,)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            assert names and all(Path(name).name == name for name in names)  # plain file names in this folder
        except (ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
            raise ValueError(f"{index} is damaged; get the checkpoint again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks the weight file {missing[0]} ({len(missing)} of {len(names)} missing)")
        return tuple(folder / name for name in names)
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(_pickle_refusal(pickles[0]))
    raise ValueError(
        f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json (pickled weights, .bin "
        "or .pt, are not used: convert to safetensors)"
    )


def _read_sparse(file: Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """As `_read_safetensors`, of a sparse container; codes count as the fp32 that they are loaded as."""
    return {
        name: (torch.float32 if entry.dtype == "I8" else _DTYPES.get(entry.dtype), entry.shape)
        for name, entry in sparse.inspect(file).items()
    }


def _pickle_refusal(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run any code when opened: refused, convert to safetensors "
        "(load it in a sandbox with transformers, then save_pretrained writes model.safetensors)"
    )


def _read_safetensors(file: Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Names, dtypes and shapes from a safetensors header, every size checked against the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            raise ValueError(f"{file} is not a safetensors file, or is cut short; get it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors, end = {}, 0
            for name, entry in header.items():
                dtype, shape = str(entry["dtype"]), tuple(int(number) for number in entry["shape"])
                first, last = (int(number) for number in entry["data_offsets"])
                if last - first != math.prod(shape) * _BYTES.get(dtype, 1) or min(shape, default=0) < 0 or first < 0:
                    raise ValueError(f"tensor {name} does not fit its bytes")
                tensors[name] = (_DTYPES.get(dtype), shape)
                end = max(end, last)
                if dtype not in _DTYPES and name.endswith("weight"):
                    raise TypeError(name, dtype)
        except TypeError as error:
            if len(error.args) == 2:
                name, dtype = error.args
                raise ValueError(f"{file}: weight {name} is {dtype}: quantised weights cannot be pruned") from error
            raise ValueError(f"{file} has a damaged header; get it again") from error
        except (ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{file} has a damaged header ({first_line(error)}); get it again") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{file} is truncated: its header describes {8 + length + end} bytes, it has {size}; get it again"
        )
    return tensors


def _inspect_gguf(file: Path) -> Source:
    """Architecture, tensor shapes and bounds of a GGUF file, from its header only."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    size = file.stat().st_size
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF" or _number(stream, "<I") not in (2, 3):
                raise ValueError("it does not start with GGUF version 2 or 3")
            num_tensors, num_fields = _number(stream, "<Q"), _number(stream, "<Q")
            fields = {}
            for _ in range(num_fields):
                key = _text(stream, size)
                fields[key] = _value(stream, _number(stream, "<I"), size)
            end = 0
            for _ in range(num_tensors):
                name = _text(stream, size)
                shape = tuple(_number(stream, "<Q") for _ in range(_number(stream, "<I")))
                kind, offset = _number(stream, "<I"), _number(stream, "<Q")
                per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                end = max(end, offset + math.prod(shape) // per_block * block_bytes)
                tensors[name] = (_GGUF_DTYPES.get(kind, torch.bfloat16), shape)
            align = int(fields.get("general.alignment") or 32)
            start = -(-stream.tell() // align) * align
    except (ValueError, KeyError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{file} is not a GGUF file, or is damaged: {first_line(error)}") from error
    if start + end > size:
        raise ValueError(f"{file} is truncated: {size} bytes, its header describes {start + end}; get it again")
    architecture = str(fields.get("general.architecture"))
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and fields.get(f"{architecture}.rope.scaling.factor", 1.0) != 1.0:
        raise ValueError(
            f"{file} asks for rotary scaling ({scaling}), which transformers does not read from .gguf files: the model "
            "would compute something else. Give the folder that the file was made from"
        )
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    structure.family(model_type)
    split = fields.get("tokenizer.ggml.pre")
    return Source(file, {"model_type": model_type}, tensors, (file,), fields.get("general.license"), split)


def _number(stream: BinaryIO, code: str) -> Any:
    return struct.unpack(code, stream.read(struct.calcsize(code)))[0]


def _text(stream: BinaryIO, size: int) -> str:
    length = _number(stream, "<Q")
    if length > size:
        raise ValueError("a text is longer than the file")
    return stream.read(length).decode("utf-8", "replace")


def _value(stream: BinaryIO, kind: int, size: int) -> Any:
    """One metadata value; arrays are skipped."""
    codes = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?")
    if kind < 8:
        return _number(stream, codes[kind])
    if kind == 8:
        return _text(stream, size)
    if kind == 9:
        kind, length = _number(stream, "<I"), _number(stream, "<Q")
        if length > size:
            raise ValueError("an array is longer than the file")
        for _ in range(length):
            _value(stream, kind, size)
        return None
    return _number(stream, {10: "<Q", 11: "<q", 12: "<d"}[kind])


def _license(folder: Path) -> str | None:
    """What the front matter of a model card states."""
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines() if readme.is_file() else []
    if lines[:1] != ["---"]:
        return None
    front = lines[1 : lines.index("---", 1)] if "---" in lines[1:] else []
    stated = (line.removeprefix("license:").strip() for line in front if line.startswith("license:"))
    return next(stated, None) or None


def _file_digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
