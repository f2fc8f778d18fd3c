"""Removal by measuring: the same choice as when every candidate runs the whole model, in half the time."""

import pytest
import torch
from conftest import tiny_model

from sentei import masks, structure
from sentei.distill import Distillation
from sentei.greedy import exchange, greedy
from sentei.train import causal_batch

BLOCKS = torch.randint(5, 128, (5, 12), generator=torch.Generator().manual_seed(3))


def loss(model, ids, number):
    return Distillation()(model, causal_batch(ids))["loss"]


@pytest.mark.parametrize("granularity", ["layers", "sublayers"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_as_the_plain_loop(family, granularity):
    model = tiny_model(family)
    units = structure.units(model, granularity)
    target = units.total // 2
    keep, order = greedy(model, units, BLOCKS, loss, target, batch_size=2)
    plain = torch.ones(len(units), dtype=torch.bool)
    while units.removed_parameters(plain) < target:
        losses = {}
        for unit in plain.nonzero().flatten().tolist():
            plain[unit] = False
            with masks.masked(model, units, plain), torch.no_grad():
                losses[unit] = sum(float(loss(model, ids, 0)) * len(ids) for ids in BLOCKS.split(2)) / len(BLOCKS)
            plain[unit] = True
        worst = min(losses, key=lambda unit: losses[unit])
        plain[worst] = False
        made = order[int((~plain).sum()) - 1]
        assert made["unit"] == worst and made["loss"] == losses[worst]  # to the bit
    assert torch.equal(keep, plain)


def test_layers_before_the_candidate_run_once():
    model = tiny_model("llama")
    units, count = structure.units(model, "layers"), 0

    def counted(module, args, output):
        nonlocal count
        count += 1

    hooks = [layer.self_attn.register_forward_hook(counted) for layer in structure.layers(model)]
    greedy(model, units, BLOCKS, loss, 1, batch_size=8)
    assert count == 4 + (3 + 2 + 1 + 0)  # one pass, then what follows each candidate
    for hook in hooks:
        hook.remove()
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def test_protected_blocks_stay():
    model = tiny_model("llama")
    units = structure.units(model, "layers")
    protected = torch.tensor([True, False, False, True])
    keep, _ = greedy(model, units, BLOCKS, loss, units.total // 2, protected_U=protected)
    assert keep.tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="protect fewer"):
        greedy(model, units, BLOCKS, loss, units.total * 3 // 4, protected_U=protected)


def plain_loss(model, units, keep):
    with masks.masked(model, units, keep), torch.no_grad():
        return sum(float(loss(model, ids, 0)) * len(ids) for ids in BLOCKS.split(2)) / len(BLOCKS)


@pytest.mark.parametrize("granularity", ["layers", "sublayers"])
def test_exchange_ends_where_no_swap_helps(granularity):
    model = tiny_model("llama")
    units = structure.units(model, granularity)
    target = units.total // 2
    scored = []
    for seed in range(6):
        start = masks.select(torch.rand(len(units), generator=torch.Generator().manual_seed(seed)), units, target)
        before = start.clone()
        keep, log = exchange(model, units, BLOCKS, loss, target, start, trials=30, batch_size=2)
        assert torch.equal(start, before) and units.removed_parameters(keep) >= target
        assert log[0]["loss"] == pytest.approx(plain_loss(model, units, start), abs=1e-6)
        kept = [entry["loss"] for entry in log if entry.get("kept", True)]
        assert kept == sorted(kept, reverse=True)
        assert kept[-1] == pytest.approx(plain_loss(model, units, keep), abs=1e-6)
        scored.append((log[0]["loss"], kept[-1]))
        for back in (~keep).nonzero().flatten().tolist():  # of equal size, so that a swap is one for one
            for out in keep.nonzero().flatten().tolist():
                if units.cost_U[back] == units.cost_U[out]:
                    other = keep.clone()
                    other[back], other[out] = True, False
                    assert plain_loss(model, units, other) > kept[-1] - 1e-6
    assert any(after < first for first, after in scored)


def test_what_need_not_have_gone_comes_back():
    model = tiny_model("llama")
    units = structure.units(model, "layers")
    start = torch.tensor([True, False, False, False])
    alone = {unit: start.clone().index_fill(0, torch.tensor(unit), True) for unit in (1, 2, 3)}
    losses = {unit: plain_loss(model, units, keep) for unit, keep in alone.items()}
    best = min(losses, key=lambda unit: losses[unit])
    keep, log = exchange(model, units, BLOCKS, loss, units.total // 2, start, trials=1, batch_size=2)
    assert log[1]["back"] == best and log[1]["dropped"] == [] and log[1]["loss"] == losses[best]
    assert log[1]["kept"] == (losses[best] < log[0]["loss"])
    assert torch.equal(keep, alone[best] if log[1]["kept"] else start)


def test_a_tick_for_every_candidate():
    model = tiny_model("llama")
    units, ticks = structure.units(model, "layers"), []
    greedy(model, units, BLOCKS, loss, 1, batch_size=8, tick=lambda *seen: ticks.append(seen))
    assert ticks == [("trying blocks", done, 1 + len(units)) for done in range(len(units))]


def test_exchange_keeps_what_is_protected_and_no_trial_is_no_change():
    model = tiny_model("llama")
    units = structure.units(model, "layers")
    start = torch.tensor([True, True, False, False])
    protected = torch.tensor([True, False, False, False])
    keep, _ = exchange(model, units, BLOCKS, loss, units.total // 2, start, trials=9, protected_U=protected)
    assert keep[0] and int((~keep).sum()) == 2
    keep, log = exchange(model, units, BLOCKS, loss, units.total // 2, start, trials=0)
    assert torch.equal(keep, start) and len(log) == 1
