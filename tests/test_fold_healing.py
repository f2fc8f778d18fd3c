"""Healing a folded model: what moves, what stays, and which weights are kept in the end."""

from __future__ import annotations

import math

import pytest
import torch
from test_fold_gpt import BLOCKS, logits, small
from torch import nn

from sentei import folding, structure
from sentei.distill import HiddenDistillation
from sentei.methods.fold_gpt import healing
from sentei.train import Settings


def test_tail():
    assert healing.tail_pairs([0, 1, 4, 7], 9, 2) == ((2, 4), (3, 8))
    assert healing.tail_pairs([0, 1], 2, 0) == ()


def folded_pair(dtype=torch.float32, remove=()):
    """(a model whose layers 1 and 2 share weights, the dense one it comes from)"""
    model = small(5 + len(remove)).to(dtype)
    dense = healing.aliased(model)
    units = structure.units(model, "layers")
    structure.remove(model, units, torch.tensor([number not in remove for number in range(len(units))]))
    folding.fold(model, [1, 2], 1, rank=2, scale=True)
    made = structure.layers(model)[2]
    for linear in folding.linears(made).values():
        nn.init.normal_(linear.A, std=0.1)
    return model, dense


@pytest.mark.parametrize("rank", [0, 2])
def test_only_small_parameters_move(rank):
    model, dense = folded_pair()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense_before = logits(dense)
    loss = HiddenDistillation(dense, pairs=healing.tail_pairs(list(range(5)), 5, 2))
    settings = Settings(lr=1e-2, vector_lr=1e-2, steps=3, precision="fp32")
    record = healing.heal(model, dense, BLOCKS, BLOCKS, loss, settings, batch_size=2, lora_rank=rank)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    own = {name for name, _ in model.named_parameters() if ".layers.2." in name}
    owners = {name for name in before if ".layers." in name and name.endswith("proj.weight")}
    assert moved - owners == own and bool(moved & owners) == bool(rank)
    assert torch.equal(logits(dense), dense_before)
    assert record["kl_after"] < record["kl_before"] and record["improved"]
    assert {"hidden", "ce", "kl"} <= set(record["history"][-1]["losses"])
    assert not any(m._forward_hooks for m in (*model.modules(), *dense.modules()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_with_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model, dense = folded_pair()
        loss = HiddenDistillation(dense, pairs=((3, 3), (4, 4)))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        targets = torch.cat([BLOCKS[:, 1:], torch.full((4, 1), -100)], 1)
        loss(model, {"input_ids": BLOCKS, "targets": targets})["loss"].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


def test_sharded_training_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model, dense = folded_pair()
    with pytest.raises(ValueError, match="FSDP"):
        healing.heal(model, dense, BLOCKS, BLOCKS, HiddenDistillation(dense), Settings(lr=1, steps=1),
                     batch_size=2, lora_rank=0)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_a_16_bit_pair_heals_in_fp32(rank):
    """All is cast there and back: norms of the teacher, blocks that only it has, matrices that a merge replaced."""
    model, dense = folded_pair(torch.bfloat16, remove=(5,))
    before = logits(dense)
    loss = HiddenDistillation(dense, pairs=((4, 5),))
    settings = Settings(lr=1e-2, vector_lr=1e-2, steps=2, precision="fp32")
    record = healing.heal(model, dense, BLOCKS, BLOCKS, loss, settings, batch_size=2, lora_rank=rank)
    assert math.isfinite(record["loss_after"]) and math.isfinite(record["kl_after"])
    assert {p.dtype for made in (model, dense) for p in made.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(dense), before)


@pytest.mark.parametrize(("losses", "best"), [((5, 4, 2, 3, 9), 2), ((5, 6, 6, 7, 6), 0)])
def test_the_best_weights_stay(losses, best, monkeypatch):
    model, dense = folded_pair()
    measured, told = [], [*losses, losses[best]]

    def measure(model, *_):
        measured.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"loss": float(told[len(measured) - 1])}

    monkeypatch.setattr(healing, "_measure", measure)
    settings = Settings(lr=1e-2, vector_lr=1e-2, steps=4, precision="fp32")
    record = healing.heal(model, dense, BLOCKS, BLOCKS, HiddenDistillation(dense), settings, batch_size=2, lora_rank=0)
    assert len(measured) == 6 and record["best_step"] == best and record["improved"] == (best > 0)
    assert all(torch.equal(p, measured[best][name]) for name, p in model.named_parameters())
    assert any(not torch.equal(p, measured[4][name]) for name, p in model.named_parameters())
