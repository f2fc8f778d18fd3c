"""A dry run: what a stage would do, and every refusal that would come later."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentei.methods import Progress
from sentei.recipe.stage import Job, check_device_map, check_positions, load_data, shadow, silent


def plan(
    model: str | Path,
    *,
    method: str,
    out: str | Path | None = None,
    data: str | Path | list[str] | dict[str, float] | None = None,
    text_field: str = "text",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    teacher: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    report: Progress | None = None,
    **fields: Any,
) -> dict[str, str]:
    """What `compress` with the same arguments would do: name -> what to print. Nothing is written.

    A twin of the model is cut by a stand-in for the method's choice (the last units of each layer go first), so sizes
    are those of the budget and everything that `compress` would refuse is refused here: the calibration and held-out
    text is packed, a reward is called once. Time and memory are those of one measured forward of the method's own
    batch, times the forwards that it will take.

    Raises:
        ValueError, OSError: as `compress`.
    """
    say = report or silent
    job = Job.check(model, method, fields, out, force=force, teacher=teacher, trust_remote_code=trust_remote_code)
    check_device_map(job, device_map)
    text, head = load_data(job.method, data, text_field)
    import psutil
    import torch

    from sentei import checkpoint, structure

    source = checkpoint.inspect(job.model, trust_remote_code=trust_remote_code)
    say({"message": f"loading {model}"})
    loaded, tokenizer = checkpoint.load(
        job.model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **head
    )
    total, layers = structure.total_parameters(loaded), structure.layer_parameters(loaded)
    of = "documents" if type(job.method).reads == "text" else "rows"
    lines = {
        "model": f"{job.model}: {type(loaded).__name__}, {len(structure.layers(loaded))} layers",
        "parameters": f"{total:,}, of them {layers:,} in the layers",
        "data": f"{text.name}: {len(text.train)} {of} to train on, {len(text.validation)} to validate, "
        f"{len(text.test)} held out",
    }
    check_positions(loaded, job.method)
    units = None
    if job.method.structural:
        units = job.method.units_of(loaded)
        twin, form = shadow(job, loaded, units)
        kinds = {kind: int((units.kind_U == number).sum()) for number, kind in enumerate(structure.KINDS)}
        left, left_layers = structure.total_parameters(twin), structure.layer_parameters(twin)
        shares = f"{1 - left_layers / layers:.1%} of the layers, {1 - left / total:.1%} of the model"
        lines["units"] = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        lines["may go"] = f"{units.total:,} parameters ({units.total / layers:.1%} of the layers)"
        lines["will go"] = f"{total - left:,} parameters: {shares}"
        if compensation := _compensation(job.method, loaded, units):
            lines["compensation"] = compensation
        lines |= job.method.forecast(loaded)
        lines["saved as"] = f"{form.shape}, {form.model_type}, about {left * source.dtype.itemsize / 1e6:,.0f} MB"
    elif outline := getattr(job.method, "outline", None):  # methods that remove no unit, only weights
        lines |= outline(loaded)
    block_NT = _blocks(job.method, loaded, tokenizer, text)
    reward = _reward(job.method, loaded, tokenizer, block_NT)
    with torch.inference_mode():
        loaded(block_NT[:1])  # the first forward also fills caches
        seconds = _seconds(lambda: loaded(block_NT))
        step = seconds if reward is None else _seconds(reward)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
    held = psutil.Process().memory_info().rss
    batch, seq_len = block_NT.shape
    lines["time"] = f"{seconds:.2g} s for one forward of {batch} x {seq_len} tokens"
    if reward is not None:
        lines["time"] += f", {step:.2g} s for one reward"
    rows = (text, tokenizer, job.teacher is not None)
    lines["time"] += _estimate(job.method, loaded, units, rows, seconds, step, block_NT.numel())
    lines["memory"] = f"{held / 1e6:,.0f} MB after one forward, {weights / 1e6:,.0f} MB of them the weights"
    lines["memory"] += _more_memory(job.method, loaded, units, job.teacher is not None)
    if out is not None:
        lines["into"] = str(job.out)
    return lines


# Passes over the calibration text, in forwards; a backward counts as two.
_PASSES = {"random": 0, "magnitude": 0, "wanda": 2, "flap": 1, "taylor": 3, "block_influence": 1}
_COMPENSATION = {"none": 0, "mean": 1, "least-squares": 3}
_TRAINING_STEP = 4  # forward, backward, and a forward of the parent


def _compensation(method: Any, model: Any, units: Any) -> str:
    """What stands in for what goes, and what a short calibration text makes of it."""
    from sentei import importance

    if not getattr(method, "compensates", False):
        return ""
    name = method.compensation(model, units)
    if method.compensate == "auto" and name == "mean":
        name += f"; least-squares from {importance.refit_tokens(model, units):,} calibration tokens on"
    return name


def _seconds(work: Callable[[], Any]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _blocks(method: Any, model: Any, tokenizer: Any, text: Any) -> Any:
    """[B, T] a batch such as the method computes with; refuses text that is too short for all that it will pack."""
    from sentei import data

    values = dataclasses.asdict(method)
    batch, seq_len = values.get("batch_size") or 8, values.get("seq_len") or values["calibration_seq_len"]
    if hasattr(method, "pace"):
        batch, _ = method.pace(len(text.train))
    is_text = type(method).reads == "text"
    if is_text and method.structural:
        run = method.start(model, tokenizer, text)
        if any(_passes(method, model, run.units).values()):
            calibration_NT = run.calibration
            batch = batch if "batch_size" in values else min(batch, len(calibration_NT))
        if "eval_samples" in values and not values.get("reward_data"):
            run.blocks(1, seq_len, "validation")
            run.blocks(2 * batch if "samples" in values else 1, seq_len)
    elif is_text:
        data.blocks(text.validation, tokenizer, seq_len, num=1)
    documents = text.train if is_text else [str(row) for row in text.train]
    device = next(model.parameters()).device
    try:
        return data.blocks(documents, tokenizer, seq_len, num=batch).to(device)
    except ValueError:  # one block is enough to train on
        return data.blocks(documents, tokenizer, seq_len)[:batch].to(device)


def _reward(method: Any, model: Any, tokenizer: Any, block_NT: Any) -> Callable[[], float] | None:
    """One call of the user's reward, on a batch as the search will give it; None where the loss is the reward."""
    values = dataclasses.asdict(method)
    if not (rewarded := values.get("reward")) or method.on_text:
        return None
    from sentei.methods.policy_gradient import reward

    function = reward.Reward(rewarded)
    if values["reward_data"] is None:
        return lambda: function(model, reward.Batch(tokenizer, block_NT.device, input_ids=block_NT))
    rows, _ = reward.examples(values["reward_data"])
    if len(rows) < values["batch_size"]:
        raise ValueError(f"reward_data has {len(rows)} rows to search on, a batch has more; lower batch_size")
    return lambda: function(model, reward.Batch(tokenizer, block_NT.device, examples=rows[: values["batch_size"]]))


def _estimate(
    method: Any, model: Any, units: Any, rows: tuple[Any, Any, bool], forward: float, step: float, tokens: int
) -> str:
    """How long all forwards will take.

    Args:
        rows: what is read, the tokenizer, is there a teacher.
        forward: seconds of one of so many `tokens`.
        step: seconds of one in a search, which a reward may make longer.
    """
    values, learns = dataclasses.asdict(method), hasattr(method, "forwards")
    if values.get("minutes"):
        return f"; about {values['minutes']:g} minutes, as asked"
    if learns:
        forwards, searched = _learning(method, model, units, rows, tokens), 0.0
    else:
        forwards, searched = _forwards(method, model, units, tokens)
    if not forwards + searched:
        return "; the method needs none" if "calibration_samples" in values else ""
    minutes = (forwards * forward + searched * step) / 60
    full = ", less where rows are shorter" if learns else ""
    return f"; {forwards + searched:,.0f} of them: about {minutes:.1f} minutes{full}"


def _learning(method: Any, model: Any, units: Any, rows: tuple[Any, Any, bool], tokens: int) -> float:
    """Forwards of so many `tokens` that learning rows takes, and the search for a start of masks."""
    text, tokenizer, teacher = rows
    forwards = method.forwards(text, tokenizer, teacher=teacher)
    if not method.structural or method.mask != "learned" or method.first_mask != "slopes":
        return forwards
    start = method.search(units)
    own = start.batch_size * start.seq_len
    return forwards + sum(_forwards(start, model, units, own)) * own / tokens


def _forwards(method: Any, model: Any, units: Any, tokens: int) -> tuple[float, float]:
    """How many of so many `tokens`: of the model alone, and of a search with its reward."""
    from sentei.methods.policy_gradient.levels import FAR

    values = dataclasses.asdict(method)
    forwards, searched = 0.0, 0.0
    if units is not None and "calibration_samples" in values:
        whole = values["calibration_samples"] * values["calibration_seq_len"] / tokens
        forwards += whole * sum(_passes(method, model, units).values())
    if units is not None and "coarse_steps" in values:
        widths = not method.whole and method.shape != "uniform"  # which those levels search over
        sweeps, steps = values["slope_sweeps"] * widths, values["coarse_steps"] * widths + values["steps"]
        searched += 2 * values["coarse_steps"] * widths + values["samples"] * values["steps"]
        each = 0.5 if method.on_text else 1.0  # from the layer that changes on, if nothing else runs
        searched += (2 * sweeps + steps) * (values["reward"] == "kl")  # the dense model on the same text
        kinds = len(units.granularity)
        searched += sweeps * (2 + kinds * (each * units.num_layers + len(FAR)))
        searched += (1 + sweeps + steps / values["eval_every"]) * values["eval_samples"] / values["batch_size"]
    elif values.get("steps"):
        forwards += _TRAINING_STEP * values["steps"] * values.get("accumulate", 1)
    return forwards + _TRAINING_STEP * (values.get("heal_steps") or 0) * values.get("accumulate", 1), searched


def _passes(method: Any, model: Any, units: Any) -> dict[str, float]:
    """What a method reads its calibration text for -> passes over it."""
    values = dataclasses.asdict(method)
    compensation = method.compensation(model, units)
    found: dict[str, float] = {compensation: _COMPENSATION[compensation]}
    if compensation == "least-squares" and method.correction:
        found["correction"] = 1.5  # the dense layers once, the cut ones half as often again
    if "coarse_steps" in values and method.compensates:
        found["mean"] = 1  # for the search
    for score in _scores(method):
        if score == "gates":  # forward and backward, on text of its own
            found[score] = 3 * values["gate_steps"] * values["gate_batch"] / values["calibration_samples"]
        elif score == "greedy":
            # A round runs every block that is left, from its own layer on: half the model on average.
            cost = float(units.cost_U.double().mean())
            rounds = min(len(units), math.ceil(method.sparsity * units.layer_parameters / cost))
            found[score] = sum((len(units) - done) / 2 + 1 for done in range(rounds))
        elif score != "flap" or "mean" not in found:  # both need the same moments
            found[score] = _PASSES[score]
    return found


def _scores(method: Any) -> list[str]:
    """The scores that a method reads its calibration text for."""
    values = dataclasses.asdict(method)
    return [*(values.get("score") or ([values["criterion"]] if "criterion" in values else method.inits))]


def _more_memory(method: Any, model: Any, units: Any, teacher: bool) -> str:
    """What comes on top of the weights and a forward."""
    from sentei import structure

    values = dataclasses.asdict(method)
    if not method.structural or "calibration_samples" not in values:
        return f"; {'the parent and ' if teacher else ''}the training come{'' if teacher else 's'} on top"
    scores = set(_scores(method))
    refits = method.compensation(model, units) == "least-squares"
    more = 0
    if refits or "wanda" in scores:  # hidden states before and after a layer; to correct it, the dense ones too
        tokens = values["calibration_samples"] * values["calibration_seq_len"]
        more += (6 if refits and method.correction else 2) * tokens * model.config.hidden_size * model.dtype.itemsize
    if refits:  # products of inputs in float64: as gathered, as solved, and a copy
        widths = [max(size.intermediate_size, size.num_heads * size.head_dim) for size in structure.sizes(model)]
        more += 3 * 8 * max(widths) ** 2
    text = f"; calibration needs about {max(1, more / 1e6):,.0f} MB more" if more else ""
    return text + ("; a backward pass comes on top" if scores & {"taylor", "gates"} else "")
