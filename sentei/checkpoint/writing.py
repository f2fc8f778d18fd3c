"""Write a checkpoint: into a temporary folder, reloaded in a fresh process, compared, and only then renamed."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import sentei
from sentei import remote, structure
from sentei.atomic import replacing_folder
from sentei.checkpoint import card, folded, forms, reading, zeros
from sentei.checkpoint.source import Source, inspect
from sentei.remote import reload
from sentei.train import evaluating

TOLERANCE = 1e-5  # of the largest output, float32
PROMPT = "The art of pruning: cut what the tree can spare, and keep its shape. 2 + 2 = 4"


def save(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    parent: str | Path,
    record: dict[str, Any],
    shape: str = "heterogeneous",
    dtype: torch.dtype | None = None,
    force: bool = False,
    verify: bool = True,
    masks: dict[str, Tensor] | None = None,
    scales: dict[str, Tensor] | None = None,
    activations: dict[str, dict[str, float]] | None = None,
    zstd: bool = True,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Write a pruned model, its tokenizer, compression.json and model card; all of it or nothing.

    Args:
        model: as `structure.remove` left it; its layers may differ in width. Not changed.
        out: folder to make. While it is being written it lies beside its final place under a hidden name.
        parent: the checkpoint that was compressed: folder, .gguf file or hub id.
        record: the stage that made the model: {"method", "fields", "seed", "data", "record"}, and optionally "kept"
            (`structure.kept`) and "evaluation" (rows {"metric", "before", "after"} for the model card).
        shape: one of `forms.SHAPES`, or of `zeros.SHAPES` for a model of stock shape with many zeros.
        dtype: of the weights on disk; None is the parent's.
        force: replace an existing checkpoint.
        verify: reload in a fresh process that does not import sentei, and compare outputs and tokens. A sparse
            container is read back and compared to the bit instead.
        masks, scales, activations, zstd: of a sparse container, see `sparse.write`; a weight with a scale is written as
            int8 codes, and its value must be code * scale.
        files: name in the folder -> file or folder that goes along.
    Returns:
        the folder.
    Raises:
        ValueError: `out` exists, the shape cannot hold the model, the disk is full, or the reloaded model differs.
    """
    out = check_output(out, parent=parent, force=force)
    source = inspect(parent, trust_remote_code=True)  # its code is not run here
    dtype = dtype or source.dtype
    stock = shape in zeros.SHAPES
    if stock:
        written = forms.Form(shape, model.config, type(model), tuple(structure.sizes(model)))
        state = {}
    else:
        written = forms.form(model, shape)
        state = {name: tensor.detach().cpu().to(dtype) for name, tensor in forms.tensors(model, written).items()}
    _check_space(out, state or model.state_dict())
    try:
        with replacing_folder(out) as partial:
            saved = model
            if stock:
                zeros.write(partial, model, shape, dtype, masks, scales, activations, zstd)
                tokenizer.save_pretrained(partial)
            else:
                saved = _write_model(partial, model, tokenizer, written, state, dtype)
                if written.shape == "folded":
                    folded.check_bytes(partial, saved)
            for name, place in (files or {}).items():
                shutil.copytree(place, partial / name) if place.is_dir() else shutil.copyfile(place, partial / name)
            account = _account(model, source, parent, record, written, saved, partial)
            if verify and shape == "sparse":
                account["result"]["largest_difference"] = zeros.check(partial, model, dtype, scales)
            elif verify:
                account["result"]["largest_difference"] = _verify(partial, model, tokenizer, dtype)
            account["result"]["verified"] = verify
            _write_json(partial / "compression.json", account)
            (partial / "README.md").write_text(card.text(account, out.name), encoding="utf-8")
    except Exception as error:
        if _is_full_disk(error):
            raise ValueError(f"the disk of {out.parent} is full; nothing was written. Free some space") from error
        raise
    return out


def unpack(gguf: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """A .gguf file as a Hugging Face folder: tokenizer, and weights dequantised to bfloat16 if they were packed.

    Reading a GGUF takes half a minute each time, and sizes compare like with like beside a parent in the child's dtype.

    Raises:
        ValueError: not a readable GGUF of a known architecture, or `out` exists.
    """
    out = check_output(out, parent=gguf, force=force)
    source = inspect(gguf)
    model, tokenizer = reading.load(gguf, dtype=source.dtype, device="cpu")
    with replacing_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(
            f"Unpacked by sentei from {Path(gguf).name} (sha256 {source.sha256()}), stored here as {source.dtype}.\n",
            encoding="utf-8",
        )
    return out


def check_output(out: str | Path, *, parent: str | Path | None = None, force: bool = False) -> Path:
    """Refuse an output folder that must not be written, before the work is done.

    Raises:
        ValueError: it exists (without `force`), is no checkpoint (with `force`), or is the parent itself.
    """
    out = Path(out).absolute()
    if parent is not None and Path(parent).exists() and out.resolve() == Path(parent).resolve():
        raise ValueError(f"{out} is the parent itself; choose another output folder")
    if out.is_dir() and not any(out.iterdir()):
        return out
    if out.exists() or out.is_symlink():
        if not force:
            raise ValueError(f"{out} exists; choose another folder, or pass --force (force=True) to replace it")
        if not (out / "config.json").is_file():
            raise ValueError(f"{out} exists and is no checkpoint: not replaced, even with --force; remove it yourself")
    return out


def _write_model(
    folder: Path, model: Any, tokenizer: Any, written: forms.Form, state: dict[str, Tensor], dtype: torch.dtype
) -> Any:
    """Build the model that will be loaded again, around the tensors to write, and let transformers write it."""
    written.config.dtype = dtype
    with torch.device("meta"):
        saved = written.model_class(written.config)
    saved.load_state_dict(state, strict=True, assign=True)
    saved.tie_weights()
    if model.can_generate():
        saved.generation_config = model.generation_config
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers leaves out what equals the class default; other runtimes do not know those defaults
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for size in (
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "head_dim",
        "n_heads",
        "hidden_dim",
    ):
        if (value := written.config.__dict__.get(size)) is not None:
            config[size] = value
    if written.needs_modeling_file:
        for file in remote.modeling_files(written.model_type):
            shutil.copyfile(file, folder / file.name)
        config["auto_map"] = written.config.auto_map
    _write_json(path, config)
    return saved


def _account(
    model: Any,
    source: Source,
    parent: str | Path,
    record: dict[str, Any],
    written: forms.Form,
    saved: Any,
    folder: Path,
) -> dict[str, Any]:
    """compression.json: where the model comes from, what was done to it, and what it is now."""
    base, tied = structure.family(model), sum(parameter.numel() for parameter in saved.parameters())
    before = _read_json(source.path / "compression.json") if source.path.is_dir() else {}
    this = {
        "path": str(Path(parent).resolve()) if Path(parent).exists() else str(parent),  # a name is of the hub
        "sha256": source.sha256(),
        "parameters": source.parameters,
        "layer_parameters": source.layer_parameters,
        "bytes": source.bytes,
        "dtype": str(source.dtype).removeprefix("torch."),
        "license": source.license,
    }
    stage = {key: value for key, value in record.items() if key != "evaluation"}
    stages = [*before.get("stages", []), stage | {"parent": {key: this[key] for key in ("path", "sha256")}}]
    sizes = structure.sizes(model)
    return {
        "sentei": sentei.__version__,
        "stages": stages,
        "parent": before.get("parent", this),
        "result": {
            "parameters": tied,
            "layer_parameters": structure.layer_parameters(saved),
            "effective_parameters": structure.total_parameters(model),
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "shape": written.shape,
            "model_type": written.model_type,
            "dtype": str(written.config.dtype).removeprefix("torch."),
            "causal": base.pre_norm,
            "architecture": written.model_class.__name__,
            "layers": [
                {
                    "heads": size.num_heads,
                    "kv_heads": size.num_kv_heads,
                    "channels": size.intermediate_size,
                    "skip": list(size.skip),
                }
                | ({"qk_head_dim": 2 * len(size.qk_pairs), "v_head_dim": size.head_dim} if size.qk_pairs else {})
                for size in sizes
            ],
        }
        | ({"fold": written.config.fold} if written.shape == "folded" else {}),
        "kept": record.get("kept") or record.get("record", {}).get("kept") or before.get("kept"),
        "evaluation": record.get("evaluation", []),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _verify(folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> float:
    """Largest difference between the model in memory (weights rounded to `dtype`) and the folder in a new process."""
    length = min(24, model.config.max_position_embeddings - 4)
    ids = reload.prompt_ids(model.config.vocab_size, length).to(model.device)
    rounded = {name: tensor.to(dtype).float() for name, tensor in model.named_parameters()}
    # Gemma's factor on embeddings is rounded to the dtype of loading, and the new process loads in fp32.
    for name, module in model.named_modules():
        if hasattr(module, "scalar_embed_scale"):
            rounded[f"{name}.embed_scale"] = torch.tensor(module.scalar_embed_scale, device=model.device)
    with torch.no_grad(), evaluating(model):
        expected = torch.func.functional_call(model, rounded, (), {"input_ids": ids})[0].cpu()
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.safetensors"
        command = [sys.executable, str(Path(reload.__file__)), str(folder), str(answer), PROMPT]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}
        environment = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
            raise ValueError(f"the saved checkpoint does not load in a fresh process, so nothing was written: {reason}")
        answers = load_file(answer)
    difference = float((answers["output"] - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # catches NaN
        raise ValueError(
            f"the reloaded model differs from the one in memory by {difference:.2g} (allowed {allowed:.2g}), so "
            "nothing was written; please report this with the command"
        )
    if answers["tokens"].tolist() != list(tokenizer(PROMPT)["input_ids"]):
        raise ValueError(
            "the reloaded tokenizer splits text differently, so nothing was written; check the tokenizer files"
        )
    return difference


def _check_space(out: Path, state: dict[str, Tensor]) -> None:
    existing = next(folder for folder in out.parents if folder.is_dir())
    need = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    free = shutil.disk_usage(existing).free
    if free < need * 1.05:
        raise ValueError(
            f"the disk of {existing} has {free / 1e6:.0f} MB free, the checkpoint needs {need / 1e6:.0f} MB"
        )


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, SafetensorError) and ("os error 28" in str(error) or "No space" in str(error))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
