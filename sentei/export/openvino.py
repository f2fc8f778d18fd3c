"""OpenVINO: convert a torch model, write its IR, run it on a CPU. Needs the extra `sentei[openvino]`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor, nn

MISSING = "needs: pip install 'sentei[openvino]'"
MODEL = "openvino_model.xml"


def check(what: str) -> None:
    """Refuse before any work is done.

    Raises:
        ValueError: NNCF or OpenVINO is not installed.
    """
    missing = [name for name in ("nncf", "openvino") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} {MISSING} (not found: {', '.join(missing)})")
    # Both libraries send statistics home unless they are told not to; NNCF takes this variable as an opt-out.
    os.environ.setdefault("NNCF_CI", "1")


class _Plain(nn.Module):
    """Logits by position, inputs by order: what the converter traces. No cache, no dictionary."""

    def __init__(self, model: nn.Module, names: Sequence[str], causal: bool):
        super().__init__()
        self.model, self.names, self.causal = model, list(names), causal

    def forward(self, *inputs: Tensor) -> Any:
        more = {"use_cache": False} if self.causal else {}
        output = self.model(**dict(zip(self.names, inputs, strict=True)), **more)
        return (output.start_logits, output.end_logits) if "start_logits" in output else output.logits


def convert(model: nn.Module, example: dict[str, Tensor], *, causal: bool = False) -> Any:
    """The IR of a torch model (NNCF's quantisers included), batch and length free; inputs keep their names.

    Args:
        example: one batch of model inputs, at least two rows.
    """
    import openvino

    names = list(example)
    traced = _Plain(model.eval(), names, causal)
    shapes = [openvino.PartialShape([-1, -1])] * len(names)
    with torch.no_grad():
        made = openvino.convert_model(traced, example_input=tuple(example.values()), input=shapes)
    for port, name in zip(made.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    return made


def save(made: Any, folder: Path) -> dict[str, int]:
    """Write the IR, and for transport its weights once more as .zst: zeros are not left out of .bin. Bytes by file."""
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(made, folder / MODEL, compress_to_fp16=False)
    weights = (folder / MODEL).with_suffix(".bin")
    frame = pyarrow.Codec("zstd", compression_level=19).compress(weights.read_bytes(), asbytes=True)
    weights.with_suffix(".bin.zst").write_bytes(frame)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def runner(
    model: Any, *, precision: str | None = None, threads: int | None = None, options: dict[str, Any] | None = None
) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Model inputs -> logits, computed by OpenVINO on the CPU.

    Args:
        model: what `convert` gave, or the path of an .xml.
        precision: "f32" or "bf16"; None is the runtime's choice (bf16 in parts on machines with AMX).
        threads: None is the runtime's choice.
        options: further properties of the CPU plugin.
    """
    import openvino

    settings: dict[str, Any] = dict(options or {})
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        found = request.infer({name: batch[name].numpy() for name in names}, share_inputs=True)
        return [torch.from_numpy(np.array(found[port])) for port in compiled.outputs]

    return run


def int8_constants(made: Any) -> list[np.ndarray]:
    """The int8 weights of an IR that are used as they are, without a zero point subtracted."""
    found = []
    for op in made.get_ops():
        if op.get_type_name() != "Constant" or op.get_element_type().get_type_name() != "i8":
            continue
        users = [target.get_node() for target in op.output(0).get_target_inputs()]
        after = [target.get_node() for user in users for target in user.output(0).get_target_inputs()]
        if not any(node.get_type_name() == "Subtract" for node in [*users, *after]):
            found.append(np.array(op.get_data()))
    return found
