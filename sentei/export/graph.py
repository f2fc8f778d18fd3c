"""Graphs for ONNX Runtime and OpenVINO, made by transformers' own exporters and run before they are handed out.

A decoder becomes one graph that takes tokens, their positions and the key-value cache, and gives logits and the longer
cache: with an empty cache it reads a whole prompt, with a full one the next tokens. An encoder becomes one graph of its
inputs. Batch and lengths are free, weights are float32. `transformers.exporters.ExportedModel.from_pretrained` loads
the folder; the graph in it runs without transformers too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import checkpoint, folding, structure
from sentei.atomic import replacing_folder
from sentei.export.gguf import PROMPT

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
NEW_TOKENS = 8
# Largest difference of a logit, over the largest logit. SmolLM2-135M shows 2e-6.
TOLERANCE = 1e-4


def write(
    folder: str | Path, out: str | Path, *, to: str = "onnx", force: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a checkpoint as a folder with a graph and its tokenizer.

    Args:
        folder: a checkpoint that `sentei.load` takes. Layers that share weights share them in an ONNX file too.
        out: the new folder.
        to: "onnx" or "openvino".
        trust_remote_code: run the Python code that a foreign checkpoint brings along.
    Returns:
        "folder", "bytes" (of all files), "difference" (the largest of a logit between the runtime and torch, over the
        largest logit).
    Raises:
        ValueError: `to` is another word, a package is missing, the model has no such graph, the folder was there
            already, or what the runtime computes is something else. Nothing is written then.
    """
    if to not in PACKAGES:
        raise ValueError(f"to={to!r}: give one of {', '.join(PACKAGES)}")
    missing = [name for name in PACKAGES[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to {to} needs: pip install 'sentei[{to}]' (not found: {', '.join(missing)})")
    try:
        from transformers.exporters import ExportedModel  # noqa: F401
    except ImportError:
        raise ValueError(f"--to {to} needs a transformers whose exporters run what they write, 5.23 or later") from None
    out = checkpoint.check_output(out, parent=folder, force=force)
    if (Path(folder) / "sentei_adapter.json").is_file():
        raise ValueError(f"{folder} holds adapters, which a graph of the model would leave out; export their base")
    model, tokenizer = checkpoint.load(folder, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    with replacing_folder(out) as partial:
        try:
            with _quiet():
                export(model.eval(), to).save_pretrained(partial)
        except Exception as error:  # of torch.export, of the converters: anything
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"transformers' exporter to {to} cannot write this model: {said}") from error
        tokenizer.save_pretrained(partial)
        ids_1T = torch.tensor([tokenizer(PROMPT)["input_ids"]])
        difference = compare(model, load(partial, to), ids_1T)
        if not difference <= TOLERANCE:
            raise ValueError(f"{to} computes other logits than torch (by {difference:.2g} of the largest): not written")
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return {"folder": out, "bytes": size, "difference": difference}


def export(model: Any, to: str) -> Any:
    """The graph of a model, as transformers' `ExportedModel`.

    The example has two rows, one of them padded: what is 1, or not there, in the example is fixed in the graph.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter
    from transformers.exporters.utils import decompose_for_generation

    ids_BT = torch.arange(3, 15).view(2, 6)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :2] = 0
    inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if structure.is_causal(model):
        # Two steps of decoding as one: a graph made of one step alone would take one token at a time.
        _, inputs = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    if to == "onnx":
        from onnx_ir.passes.common import DeduplicateInitializersPass  # pyright: ignore[reportMissingImports]

        made = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
        if folding.is_folded(model):
            DeduplicateInitializersPass(size_limit=2**63)(made.program)
        return made
    # A cache that stays inside the graph, OpenVINO's other form, belongs to one sequence until it is reset.
    return OpenVINOExporter().export(model, inputs, OpenVINOConfig(dynamic=True, stateful=False))


def load(folder: str | Path, to: str) -> Any:
    """The graph in its runtime; float32 in OpenVINO too, which computes in bf16 where a machine has it."""
    from transformers.exporters import ExportedModel

    options: dict[str, Any] = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if to == "openvino" else {}
    with _quiet():
        return ExportedModel.from_pretrained(folder, local_files_only=True, **options)


@torch.no_grad()
def compare(model: nn.Module, graph: Any, ids_1T: Tensor) -> float:
    """Largest difference of the logits over the largest logit: of a text, then of greedy tokens with the cache."""
    inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    if not structure.is_causal(model):
        expected, found = model(**inputs), graph(**inputs)
        return max(_difference(found[name], value) for name, value in expected.items())
    cache, start, worst = empty_cache(model), 0, 0.0
    for _ in range(1 + NEW_TOKENS):
        length = ids_1T.shape[1]
        found = graph(
            input_ids=ids_1T[:, start:],
            position_ids=torch.arange(start, length)[None],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            past_key_values=cache,
        )
        expected_1TV = model(input_ids=ids_1T, use_cache=False).logits[:, start:]
        worst = max(worst, _difference(found["logits"], expected_1TV))
        cache, start = found["past_key_values"], length
        ids_1T = torch.cat([ids_1T, expected_1TV[:, -1:].argmax(-1)], 1)
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def empty_cache(model: nn.Module) -> Any:
    """What the graph of a decoder takes with the first tokens of a text: keys and values of length 0."""
    cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    return cache


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of their progress and of every operator they know, in prints, logs and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
