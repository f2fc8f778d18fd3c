"""What a state in the work folder belongs to: the numbers it was made from, and no field that cannot change it.

So another target takes over trained gates and measured windows, and other settings of the healing take over both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sentei.methods.fold_gpt.folder import FACTORS
from sentei.train import weights_digest

if TYPE_CHECKING:
    from sentei.methods.fold_gpt import FoldRun

GATES = ("sparsity", "granularity", "protect_first", "protect_last", "calibration_seq_len", "seed")
PLAN = ("parent", "lora_rank", "align", "group_size", "batch_size")


def of_gates(run: FoldRun) -> dict[str, Any]:
    """The model, the text of the gates and the fields that their training reads."""
    method = run.method
    fields = {name: getattr(method, name) for name in vars(method) if name.startswith("gate_") or name in GATES}
    return fields | {"text": text(run.texts["gates"]), "weights": weights_digest(run.model)}


def of_plan(run: FoldRun, dense: nn.Module, origin: Sequence[int], scale: bool) -> dict[str, Any]:
    """The models, the text that KL is measured on and the fields that a measurement depends on; not the target."""
    fields = {name: getattr(run.method, name) for name in PLAN}
    models = {"weights": weights_digest(run.model), "dense": weights_digest(dense)}
    more = {"text": text(run.texts["fold"]), "origin": list(origin), "scale": scale, "factors": FACTORS}
    return fields | models | more


def text(blocks_NT: Tensor) -> str:
    return hashlib.sha256(blocks_NT.cpu().numpy().tobytes()).hexdigest()
