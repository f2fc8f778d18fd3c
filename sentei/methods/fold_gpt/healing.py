"""Train the few numbers that are a layer's own: cross-entropy, KL to the dense model, and its last hidden states.

    L = w_ce CE + alpha t^2 KL(dense^t || model^t) + beta mean over tail layers and tokens of |h_s - h_t|^2 / |h_t|^2

What trains is small: norms, scales and low-rank terms of the corrected layers, and adapters on the owners' linears
where asked for, which act in every layer that uses the owner and are merged at the end. The dense model and the folded
one hold the frozen tensors together, so the teacher costs activations and no second set of weights.

Shape legend: B batch, T tokens, H hidden width.
"""

from __future__ import annotations

import copy
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import folding, lora, structure
from sentei.distill import Distillation, HiddenDistillation, Pairs, held_out
from sentei.methods import Progress
from sentei.train import Batch, Settings, causal_batch, processes, resolve_precision, shuffled, train

SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def aliased(model: nn.Module) -> nn.Module:
    """A copy of the model that holds the same matrices; norms and biases, which may change in the copy, are its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if p.ndim >= 2})


def tail_pairs(origin: list[int], num_dense: int, tail: int) -> Pairs:
    """The last `tail` layers with the dense layers that they were; the very last with the dense model's very last."""
    pairs = [(number, origin[number]) for number in range(max(0, len(origin) - tail), len(origin))]
    return (*pairs[:-1], (len(origin) - 1, num_dense - 1)) if pairs else ()


def heal(
    model: nn.Module,
    dense: nn.Module,
    train_NT: Tensor,
    held_NT: Tensor,
    loss: HiddenDistillation,
    settings: Settings,
    *,
    batch_size: int,
    lora_rank: int,
    folder: Path | None = None,
    report: Progress | None = None,
) -> dict[str, Any]:
    """Train in place. Frozen tensors keep their dtype; the small ones are fp32 meanwhile and cast back at the end.

    The weights that are best on `held_NT` stay, those at the start among them.

    Args:
        lora_rank: of temporary adapters on every linear of the blocks (of owners, in a folded model); 0: none.
    Returns:
        "loss_before", "loss_after" (validation, nats per token; after the cast), "kl_before", "kl_after", "steps",
        "best_step", "tokens", "trained_parameters", "history".
    """
    if any(os.environ.get(name, "").lower() in ("true", "1") for name in SHARDED):
        raise ValueError(
            "healing runs on one device or with plain data parallelism; under FSDP or DeepSpeed a folded layer would "
            "call into another layer's shard. Unset " + " and ".join(SHARDED)
        )
    if processes().num_processes > 1:  # where training will move the model; the teacher's own tensors must be there too
        model.to(processes().device)
        dense.to(processes().device)
    device = next(model.parameters()).device
    precision = resolve_precision(settings.precision, device)
    before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    dense_before = [(p, p.dtype) for p in dense.parameters()]
    was_training = model.training
    if precision == "fp32":  # a 16-bit product is slow on such a device, and these casts are exact both ways
        for p in (*model.parameters(), *dense.parameters()):
            p.data = p.data.float()
    model.requires_grad_(False)
    own = own_parameters(model)
    for p in own:
        p.requires_grad_(True)
        p.data = p.data.float()
    adapters: list[str] = []
    if lora_rank:
        adapters = lora.linears(model)
        lora.attach(model, adapters, rank=lora_rank, alpha=2 * lora_rank, seed=settings.seed)
        for p in own:
            p.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = [causal_batch(rows) for rows in held_NT.to(device).split(batch_size)]
    history = [{"step": 0} | _measure(model, loss, held, precision)]
    state: dict[str, Any] = {"history": history, "best": _copy(trained), "best_step": 0}
    terms = (loss.ce_weight, loss.kl_weight, loss.hidden_weight, loss.temperature, loss.pairs)
    run = train(
        model,
        shuffled(train_NT.to(device), batch_size, seed=settings.seed),
        loss,
        settings,
        folder=folder,
        state=state,
        fingerprint=repr((terms, batch_size, lora_rank, int(train_NT.sum()))),
    )
    tokens = 0
    try:
        with closing(run):
            for step in run:
                tokens = step.tokens
                if step.progress >= 1 or int(4 * step.progress) > int(4 * state["history"][-1].get("progress", 0.0)):
                    measured = asdict(step) | _measure(model, loss, held, precision)
                    if measured["loss"] < min(entry["loss"] for entry in state["history"]):
                        state |= {"best": _copy(trained), "best_step": step.step}
                    state["history"].append(measured)
                if report is not None:
                    shown = f"healing: loss {step.losses['loss']:.3f}, held out {state['history'][-1]['loss']:.3f}"
                    report({"step": step.step, "of": settings.steps, "message": shown, **step.losses})
        history = state["history"]
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["best"][name])
    finally:
        lora.detach(model, adapters)
        for name, p in model.named_parameters():
            dtype, requires_grad = before[name]
            p.data = p.data.to(dtype)
            p.requires_grad_(requires_grad)
        for p, dtype in dense_before:  # its norms, the blocks that are gone, and matrices that a merge has replaced
            p.data = p.data.to(dtype)
        model.train(was_training)
    after = _measure(model, loss, held, precision)
    return {
        "loss_before": history[0]["loss"],
        "loss_after": after["loss"],
        "kl_before": history[0].get("kl"),
        "kl_after": after.get("kl"),
        "steps": history[-1]["step"],
        "tokens": history[-1].get("tokens", tokens),
        "best_step": state["best_step"],
        "improved": state["best_step"] > 0,
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "history": [
            {f"validation_{key}" if key in ("loss", "kl") else key: value for key, value in entry.items()}
            for entry in history
        ],
    }


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What corrected layers of a folded model have for themselves: norms, scales, A and B."""
    found: list[nn.Parameter] = []
    for layer in structure.layers(model):
        children = [linear for linear in folding.linears(layer).values() if isinstance(linear, folding.ChildLinear)]
        shared = {id(p) for child in children if child.base is not None for p in child.base.parameters()}
        if children:
            found += [p for p in layer.parameters() if id(p) not in shared]
    return found


def _copy(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}


def _measure(model: nn.Module, loss: HiddenDistillation, held: list[Batch], precision: str) -> dict[str, float]:
    found = held_out(model, held, precision, Distillation(loss.teacher))
    return {"loss": found["ce"], "kl": found["kl"]}
