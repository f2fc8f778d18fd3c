"""A dry run: what a stage would do, and every refusal that would come later."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from sentei.methods import Progress
from sentei.recipe.stage import Job, check_positions, load_data, shadow, silent


def plan(
    model: str | Path,
    *,
    method: str,
    out: str | Path | None = None,
    data: str | Path | list[str] | dict[str, float] | None = None,
    text_field: str = "text",
    dtype: str = "auto",
    teacher: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    report: Progress | None = None,
    **fields: Any,
) -> dict[str, str]:
    """What `compress` with the same arguments would do: name -> what to print. Nothing is written.

    A twin of the model is cut by a stand-in for the method's choice (the last units of each layer go first), so sizes
    are those of the budget and everything that `compress` would refuse is refused here. Time and memory are of one
    measured forward of the method's own batch.

    Raises:
        ValueError, OSError: as `compress`.
    """
    say = report or silent
    job = Job.check(model, method, fields, out, force=force, teacher=teacher, trust_remote_code=trust_remote_code)
    text, head = load_data(job.method, data, text_field)
    import psutil
    import torch

    from sentei import checkpoint, structure
    from sentei import data as texts

    source = checkpoint.inspect(job.model, trust_remote_code=trust_remote_code)
    say({"message": f"loading {model}"})
    loaded, tokenizer = checkpoint.load(job.model, dtype=dtype, trust_remote_code=trust_remote_code, **head)
    total, layers = structure.total_parameters(loaded), structure.layer_parameters(loaded)
    of = "documents" if type(job.method).reads == "text" else "rows"
    lines = {
        "model": f"{job.model}: {type(loaded).__name__}, {len(structure.layers(loaded))} layers",
        "parameters": f"{total:,}, of them {layers:,} in the layers",
        "data": f"{text.name}: {len(text.train)} {of} to train on, {len(text.validation)} to validate, "
        f"{len(text.test)} held out",
    }
    check_positions(loaded, job.method)
    if job.method.structural:
        units = job.method.units_of(loaded)
        twin, form = shadow(job, loaded, units)
        kinds = {kind: int((units.kind_U == number).sum()) for number, kind in enumerate(structure.KINDS)}
        left, left_layers = structure.total_parameters(twin), structure.layer_parameters(twin)
        shares = f"{1 - left_layers / layers:.1%} of the layers, {1 - left / total:.1%} of the model"
        lines["units"] = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        lines["may go"] = f"{units.total:,} parameters ({units.total / layers:.1%} of the layers)"
        lines["will go"] = f"{total - left:,} parameters: {shares}"
        lines |= job.method.forecast(loaded)
        lines["saved as"] = f"{form.shape}, {form.model_type}, about {left * source.dtype.itemsize / 1e6:,.0f} MB"
    elif outline := getattr(job.method, "outline", None):  # methods that remove no unit, only weights
        lines |= outline(loaded)
    batch, seq_len = _batch(job.method)
    documents = text.train if type(job.method).reads == "text" else [str(row) for row in text.train]
    block_NT = texts.blocks(documents, tokenizer, seq_len, num=batch).to(next(loaded.parameters()).device)
    with torch.inference_mode():
        loaded(block_NT[:1])  # the first forward also fills caches
        started = time.monotonic()
        loaded(block_NT)
    seconds = time.monotonic() - started
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
    held = psutil.Process().memory_info().rss
    lines["time"] = f"{seconds:.2g} s for one forward of {batch} x {seq_len} tokens" + _estimate(job.method, seconds)
    lines["memory"] = f"{held / 1e6:,.0f} MB after one forward, {weights / 1e6:,.0f} MB of them the weights"
    if job.teacher is not None:
        lines["memory"] += "; the parent and the training come on top"
    if out is not None:
        lines["into"] = str(job.out)
    return lines


def _batch(method: Any) -> tuple[int, int]:
    """Sequences and tokens of the batch that a method computes with."""
    values = dataclasses.asdict(method)
    return values.get("batch_size") or 8, values.get("seq_len") or values["calibration_seq_len"]


def _estimate(method: Any, forward: float) -> str:
    values = dataclasses.asdict(method)
    if values.get("minutes"):
        return f"; about {values['minutes']:g} minutes, as asked"
    forwards = 2 * values.get("coarse_steps", 0)
    if values.get("steps"):
        # A training step is a forward and a backward (three forwards) and a forward of the parent.
        forwards += values["steps"] * (4 * values["accumulate"] if "accumulate" in values else values["samples"])
    return f"; {forwards:,} of them: about {forwards * forward / 60:.1f} minutes" if forwards else ""
