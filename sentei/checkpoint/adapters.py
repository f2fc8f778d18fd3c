"""Adapter folders: what a PEFT search found, its trained tensors, and how to load them.

    adapter_config.json, adapter_model.safetensors     peft's files; where only LoRA survived, stock peft loads them
    sentei_adapter.json                                units, base model, head, what the base must look like
    prunepeft.json, report.md, heat_map.svg            why each unit stayed or went

A folder appears whole or not at all, after it was loaded again and compared.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import sentei
from sentei import adapters, structure
from sentei.adapters import Unit
from sentei.atomic import replacing_folder
from sentei.checkpoint import reading, writing
from sentei.checkpoint.source import inspect
from sentei.train import evaluating

FORMAT = 1
FILE = "sentei_adapter.json"
_TASKS = {"SequenceClassification": "SEQ_CLS", "QuestionAnswering": "QUESTION_ANS", None: "CAUSAL_LM"}


def is_adapter(path: str | Path) -> bool:
    """Is this a folder that `save` wrote?"""
    return (Path(path) / FILE).is_file()


def save(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    parent: str | Path,
    record: dict[str, Any],
    pages: dict[str, str] | None = None,
    fallback: Path | None = None,
    force: bool = False,
    verify: bool = True,
) -> Path:
    """Write the units that are in a model, its head and its tokenizer.

    Args:
        parent: the base model; the folder names it and does not hold it.
        record: as for `checkpoint.save`; record["record"]["adapter"] says which units there are.
        pages: further text files, name -> content; "README.md" is put after the lines on how to load.
        fallback: tensors of record["record"]["fallback"], another set of units, written to a folder of that name.
        verify: load the folder again in this process and compare outputs.
    Raises:
        ValueError: `out` exists, or the reloaded model differs.
    """
    out = check_output(out, parent=parent, force=force)
    what = record["record"]["adapter"]
    living = units_of(what)
    tensors = adapters.state(model, living)
    with replacing_folder(out) as partial:
        source = inspect(parent, trust_remote_code=True)
        place = Path(parent).expanduser()
        # A relative path would mean another folder elsewhere; a hub id is no path.
        where = str(place.absolute()) if place.exists() else str(parent)
        base = {"path": where, "sha256": source.sha256(), "model_type": source.config["model_type"]}
        # What stock transformers must be told: `reading.load` sees to both.
        base["remote_code"] = "auto_map" in source.config
        base["needs_pad"] = structure.is_causal(model) and source.config.get("pad_token_id") is None
        # The search may have loaded the base in another dtype than its file has.
        base["dtype"] = str(next(model.parameters()).dtype)
        account = _write_adapter(partial, what, base, tensors, adapters.head(model), tokenizer)
        if fallback is not None:
            (partial / "fallback").mkdir()
            plain = record["record"]["fallback"]
            _write_adapter(partial / "fallback", plain, base, load_file(fallback), adapters.head(model), tokenizer)
        stage = {key: value for key, value in record.items() if key != "record"}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": _peft_version()}
        versions["transformers"] = transformers.__version__
        _write(
            partial / "prunepeft.json",
            json.dumps(stage | {"record": record["record"], "versions": versions}, indent=1) + "\n",
        )
        for name, text in (pages or {}).items():
            _write(partial / name, _card(account, out.name) + text if name == "README.md" else text)
        if verify:
            _verify(partial, model)
    return out


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The base model with the folder's units and head in it, in eval mode, and the tokenizer.

    Args:
        base: in place of the base that the folder names.
    Raises:
        ValueError: no such base, another architecture than the units were trained on, or damaged files.
    """
    path = Path(path)
    try:
        account = json.loads((path / FILE).read_text(encoding="utf-8"))
        living, version, named = units_of(account), account["format"], account["base"]["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / FILE} is damaged ({type(error).__name__}); get the folder again") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this sentei reads {FORMAT}")
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{path} lacks {weights.name}; get the folder again")
    where = str(base or named)
    try:
        model, _ = reading.load(
            where, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **account["head"]
        )
    except ValueError as error:
        raise ValueError(f"the base model of {path}, {where}, cannot be loaded: {error}") from error
    if (found := adapters.fingerprint(model)) != account["fingerprint"]:
        raise ValueError(
            f"{path} was trained on a base of fingerprint {account['fingerprint']}, {where} has {found}: other layers "
            "or widths. Give the base it was trained on"
        )
    adapters.inject(model, living, alpha_per_rank=account["alpha_per_rank"], dropout=account["dropout"])
    adapters.load_state(model, living, load_file(weights))
    model.requires_grad_(True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(str(path))


def units_of(account: dict[str, Any]) -> list[Unit]:
    """Units back from JSON."""
    return [
        Unit(**unit | {"modules": tuple(unit["modules"]), "sizes": tuple((a, b) for a, b in unit["sizes"])})
        for unit in account["units"]
    ]


def check_output(out: str | Path, *, parent: str | Path | None = None, force: bool = False) -> Path:
    """As `checkpoint.check_output`; with `force` an adapter folder may be replaced too."""
    out = Path(out).absolute()
    if force and is_adapter(out):
        return out
    return writing.check_output(out, parent=parent, force=force)


def _write_adapter(
    folder: Path, what: dict[str, Any], base: dict[str, Any], tensors: Any, head: list[str], tokenizer: Any
) -> dict[str, Any]:
    """peft's two files, ours, and the tokenizer's; what sentei_adapter.json holds."""
    _config(units_of(what), what, base["path"], head).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    account = {
        "format": FORMAT,
        "sentei": sentei.__version__,
        "base": base,
        "units": what["units"],
        "placement": "serial, behind the feed-forward; reads the residual stream",
        "activation": "relu",
        "alpha_per_rank": what["alpha_per_rank"],
        "dropout": what["dropout"],
        "head": what["head"],
        "fingerprint": what["fingerprint"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    _write(folder / FILE, json.dumps(account, indent=1) + "\n")
    return account


def _config(living: Sequence[Unit], what: dict[str, Any], parent: str, head: list[str]) -> Any:
    """adapter_config.json; it names the hosts of bottlenecks too: plain peft stops, and does not drop them."""
    return adapters.lora_config(
        living,
        what["alpha_per_rank"],
        what["dropout"],
        task_type=_TASKS[what["head"].get("task")],
        modules_to_save=[name.rpartition(".")[2] for name in head] or None,
        base_model_name_or_path=parent,
        inference_mode=True,
    )


def _card(account: dict[str, Any], name: str) -> str:
    base, labels = account["base"]["path"], account["head"].get("labels")
    auto = f"AutoModelFor{account['head'].get('task', 'CausalLM')}"
    options = f", num_labels={len(labels)}" if labels else ""
    options += f", dtype={account['base']['dtype']}"
    gguf = Path(base) if base.endswith(".gguf") else None
    where = f'"{gguf.parent}", gguf_file="{gguf.name}"' if gguf else f'"{base}"'
    remote = ", trust_remote_code=True" if account["base"]["remote_code"] else ""
    pad = "base.config.pad_token_id = tokenizer.pad_token_id  # without it batches of one row only\n"
    pad = pad if labels and account["base"]["needs_pad"] else ""
    lines = ["---", *([f"base_model: {base}"] if _is_hub_id(base) else []), "library_name: peft"]
    lines += ["tags:", "- sentei", "- lora", "---", "", f"# {name}", ""]
    if any(unit["kind"] == "adapter" for unit in account["units"]):
        lines += [
            "**Plain peft cannot load this folder**: it holds serial adapters, which peft does not have, and stops",
            'with "Target module ... is not supported". Load it with sentei:',
            "",
            f'```python\nmodel, tokenizer = sentei.load("{name}")\n```',
        ]
    else:
        lines += [
            "A plain LoRA: stock peft loads it, and sentei is not needed.",
            "",
            f'```python\ntokenizer = transformers.AutoTokenizer.from_pretrained("{name}")\n'
            f"base = transformers.{auto}.from_pretrained({where}{options}{remote})\n{pad}"
            f'model = peft.PeftModel.from_pretrained(base, "{name}")\n```',
        ]
        if gguf:
            lines += [
                "",
                "The base is a `.gguf` file, which transformers unpacks at each start. "
                f'`sentei.checkpoint.unpack("{base}", "FOLDER")` makes a folder of it once, to be named in its place.',
            ]
        if remote:
            lines += ["", "The base brings modelling code, which `trust_remote_code=True` runs: read it first."]
    lines += ["", f"All figures are of the base in {account['base']['dtype'].removeprefix('torch.')}."]
    if labels:
        lines += ["", f"Labels, in the order of the outputs: {', '.join(labels)}."]
    return "\n".join(lines) + "\n\n"


def _is_hub_id(path: str) -> bool:
    return path.count("/") <= 1 and not Path(path).exists() and not path.startswith((".", "/", "~"))


@torch.no_grad()
def _verify(folder: Path, model: Any) -> None:
    """The folder, loaded again, computes what the model in memory does."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    again, _ = load(folder, dtype=dtype, device=device, trust_remote_code=True)
    length = min(24, model.config.max_position_embeddings - 4)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (2, length), generator=random).to(device)
    ids[ids == model.config.pad_token_id] += 1
    with evaluating(model):
        expected, found = model(input_ids=ids)[0], again(input_ids=ids)[0]
    allowed = (1e-6 if dtype == torch.float32 else 2e-2) * max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max())
    if not difference <= allowed:
        raise ValueError(
            f"the reloaded adapter differs from the model in memory by {difference:.2g} (allowed {allowed:.2g}), so "
            "nothing was written; please report this with the command"
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _peft_version() -> str:
    import peft

    return peft.__version__
