"""A start near a good mask: what policy gradient finds for the untuned model on the training rows (arXiv 2406.10576).

Not in the paper, whose masks start dense and have a hundred steps and more to come down to the budget. Where there are
fewer, the generator can do no better than to improve a mask that is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sentei import data
from sentei.data import prompts
from sentei.methods import Progress
from sentei.methods.policy_gradient import PolicyGradient
from sentei.structure import Units

if TYPE_CHECKING:
    from sentei.methods.atp import ATP

BLOCK = 128  # tokens
HELD = 10  # of so many rows one is for the search's own choice of its best mask


def searched(
    method: ATP,
    model: Any,
    tokenizer: Any,
    units: Units,
    rows: Sequence[prompts.Row],
    workdir: Path | None,
    report: Progress | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The mask, [U] bool, within the budget, and how it was found. The model is not changed.

    Raises:
        ValueError: too little text in the rows.
    """
    texts = prompts.rows_as_text(rows, prompts.Template(tokenizer, method.template))
    held = max(1, len(texts) // HELD)
    text = data.Text(texts[held:], texts[:held], [], "rows", "")
    length = min(BLOCK, method.seq_len)
    blocks = len(data.blocks(text.train, tokenizer, length))
    search = PolicyGradient(
        sparsity=method.sparsity * units.total / units.layer_parameters,
        coarse_steps=method.start_steps,
        batch_size=max(1, min(8, blocks // 2)),
        seq_len=length,
        calibration_samples=max(1, min(method.refit_tokens // length, blocks)),
        calibration_seq_len=length,
        seed=method.seed,
    )
    folder = workdir / "start" if workdir else None
    run = search.start(model, tokenizer, text, workdir=folder, report=report)
    keep_U, account = search.choose(run)
    names = ("forwards", "evaluations", "start_loss", "best_loss", "init")
    return keep_U, {name: account[name] for name in names}
