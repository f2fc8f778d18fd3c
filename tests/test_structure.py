"""Masked equals removed for every family and granularity, exactly; units, budgets and selection."""

import pytest
import torch
from conftest import DECODERS, ENCODERS, tiny_model

from sentei import masks, structure
from sentei.methods.one_shot import OneShot

GRANULARITIES = ("heads", "channels", "heads+channels", "sublayers", "layers")


def random_keep(units, seed=0, share=0.6):
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < share
    if "layers" in units.granularity:
        keep[0] = True
    return keep


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_masked_equals_removed(family, granularity, attention, tokens):
    model = tiny_model(family).double()
    if family != "gemma2":  # softcapping: transformers has it in eager attention only
        model.set_attn_implementation(attention)
    units = structure.units(model, granularity)
    keep = random_keep(units)
    dense = logits(model, tokens)
    with masks.masked(model, units, keep):
        expected = logits(model, tokens)
    assert torch.equal(logits(model, tokens), dense), "a hook was left behind"
    before = structure.total_parameters(model)
    structure.remove(model, units, keep)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-9, rtol=0)
    assert (expected - dense).abs().max() > 1e-3
    extra = before - structure.total_parameters(model) - units.removed_parameters(keep)
    if granularity in ("sublayers", "layers") or family in ENCODERS:
        assert extra == 0
    else:  # a sub-layer that lost every unit takes its norms along
        emptied = sum(len(size.skip) for size in structure.sizes(model))
        assert (extra == 0) if not emptied else extra > 0


@pytest.mark.parametrize("family", DECODERS)
def test_whole_sublayers_gone_and_cached_generation(family, tokens):
    model = tiny_model(family)
    units = structure.units(model, "heads+channels")
    keep = random_keep(units)
    keep[units.of(1, "heads")] = False
    keep[units.of(2, "channels")] = False
    structure.remove(model, units, keep)
    if family != "llama":  # its output biases stay
        assert [size.skip for size in structure.sizes(model)] == [(), ("attention",), ("mlp",), ()]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_cache_counts_tokens_without_heads_in_layer_0(family, tokens):
    """A cache counts the tokens it has seen in its first layer; padded and continued prompts need the right count."""
    model = tiny_model(family)
    units = structure.units(model, "heads")
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[units.of(0, "heads")] = False
    structure.remove(model, units, keep)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :7], use_cache=True)
        rest = model(input_ids=tokens[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 7:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropped", [0, 1])
def test_dropped_blocks_generate(dropped, tokens):
    model = tiny_model("gemma3_text")
    units = structure.units(model, "layers")
    keep = torch.arange(len(units)) != dropped
    structure.remove(model, units, keep)
    assert len(model.config.layer_types) == model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in structure.layers(model)] == [0, 1, 2]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


def test_pruned_again_equals_pruned_once(tokens):
    once, twice = tiny_model("phi3").double(), tiny_model("phi3").double()
    units = structure.units(once)
    first, second = random_keep(units, 1, 0.8), random_keep(units, 2, 0.8)
    structure.remove(once, units, first & second)
    structure.remove(twice, units, first)
    structure.remove(twice, structure.units(twice), second[first])
    torch.testing.assert_close(logits(once, tokens), logits(twice, tokens), atol=1e-9, rtol=0)


def test_fill_becomes_a_bias(any_model, tokens):
    model = any_model.double()
    units = structure.units(model)
    keep = random_keep(units)
    row = structure.family(model)
    fill, bias = {}, {}
    for number, layer in enumerate(structure.layers(model)):
        for kind in units.granularity:
            linear = structure.reader(layer, row, kind)
            mean = torch.randn(linear.in_features, dtype=torch.double)
            gone = units.index_U[units.of(number, kind)][~keep[units.of(number, kind)]]
            columns = structure.columns(structure.sizes_of(layer, row), kind, gone)
            fill[number, kind] = mean
            bias[number, kind] = (linear.weight[:, columns] @ mean[columns]).detach()
    with masks.masked(model, units, keep, fill):
        expected = logits(model, tokens)
    structure.remove(model, units, keep, bias)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sliced_equals_masked(any_model, granularity, tokens, dtype, tolerance):
    model = any_model.to(dtype)
    units = structure.units(model, granularity)
    keep = random_keep(units)
    if granularity == "layers":
        keep[:2] = torch.tensor([False, True])
    for kind in ("heads", "channels"):
        keep[units.of(1, kind)] = False
    fill = {
        (number, kind): torch.randn(structure.reader(layer, structure.family(model), kind).in_features)
        for number, layer in enumerate(structure.layers(model))
        for kind in ("heads", "channels")
    }
    for filled in (None, fill):
        with masks.masked(model, units, keep, filled):
            expected = logits(model, tokens)
        with masks.sliced(model, units, keep, filled):
            torch.testing.assert_close(logits(model, tokens), expected, atol=tolerance, rtol=0)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_generation_under_a_mask(family, granularity, tokens):
    """A reward may generate: with a cache as without one, the first layer's units gone too."""
    model = tiny_model(family)
    units = structure.units(model, granularity)
    keep = random_keep(units)
    keep[units.layer_U == 0] = False
    keep[units.layer_U == 1] = True
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with masks.masked(model, units, keep):
        cached = model.generate(tokens, use_cache=True, **options)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert not torch.equal(cached, model.generate(tokens, **options))


def test_column_major_changes_the_layout_and_nothing_else(any_model, tokens):
    model = any_model.double()
    units, row = structure.units(model), structure.family(model)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    readers = [structure.reader(layer, row, kind) for layer in structure.layers(model) for kind in units.granularity]
    keep = random_keep(units)
    with masks.masked(model, units, keep):
        expected = logits(model, tokens)
    with pytest.raises(InterruptedError), masks.column_major(model, units):
        assert all(linear.weight.stride() == (1, linear.out_features) for linear in readers)
        with torch.inference_mode(), masks.sliced(model, units, keep):
            torch.testing.assert_close(logits(model, tokens), expected, atol=1e-9, rtol=0)
        raise InterruptedError
    for name, p in model.named_parameters():
        assert p is before[name][0] and p.is_contiguous() and torch.equal(p, before[name][1])
    model(input_ids=tokens)[0].sum().backward()  # nothing is left of inference mode


def test_costs_on_hand_numbers():
    model = tiny_model("llama", attention_bias=False, mlp_bias=False)
    units = structure.units(model)
    assert set(units.cost_U[units.of(0, "heads")].tolist()) == {(2 * 2 + 2) * 8 * 24}
    assert set(units.cost_U[units.of(0, "channels")].tolist()) == {3 * 24}
    assert units.total == 4 * (3 * 1152 + 40 * 72)
    assert units.layer_parameters == units.total + 4 * 2 * 24
    assert structure.units(model, "layers").total == units.layer_parameters


def test_unknown_architecture_and_granularity():
    with pytest.raises(ValueError, match=r"known: llama.*Add an architecture"):
        structure.family("mamba")
    for wrong in ("neurons", "heads+layers", "heads+heads"):
        with pytest.raises(ValueError, match="granularity"):
            structure.units(tiny_model("llama"), wrong)


def units_of(costs, kinds=None, layers=None):
    n = len(costs)
    return structure.Units(
        ("heads", "channels"),
        torch.tensor(kinds or [1] * n),
        torch.tensor(layers or [0] * n),
        torch.arange(n),
        torch.tensor(costs),
        max(layers or [0]) + 1,
        sum(costs),
    )


def test_select_on_hand_numbers():
    units = units_of([1] * 10)
    score = torch.tensor([0.9, 0.8, 0.7] + [0.0] * 7)
    assert masks.select(score, units, 5).sum() == 5  # ties at zero do not keep everything
    assert masks.select(score, units, 1).sum() == 9
    units = units_of([4, 1, 1, 2])
    score = torch.tensor([0.9, 0.8, 0.3, 0.85])
    for budget, expected in ((4, [0]), (5, [0, 1]), (3, [1, 3])):
        assert masks.select(score, units, 8 - budget).nonzero().flatten().tolist() == expected
    tie = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert masks.select(torch.zeros(4), units_of([1] * 4), 2, tie_break_U=tie).nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("scope", ["global", "family", "layer"])
@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.3, 0.55])
def test_budget_is_met_to_within_one_unit(scope, sparsity):
    units = structure.units(tiny_model("qwen3"))
    target = masks.removal_target(units, sparsity)
    score = torch.rand(len(units), generator=torch.Generator().manual_seed(3))
    removed = units.removed_parameters(masks.select(score, units, target, scope))
    assert target <= removed < target + int(units.cost_U.max())


def test_layer_scope_spreads_evenly():
    units = structure.units(tiny_model("llama"), "channels")
    score = torch.arange(len(units)).float()  # later layers look better; each must still lose its share
    keep = masks.select(score, units, masks.removal_target(units, 0.2), "layer")
    kept = [int(keep[units.of(layer, "channels")].sum()) for layer in range(4)]
    assert max(kept) - min(kept) <= 1


def test_uniform_and_rounded():
    units = structure.units(tiny_model("llama"))
    score = torch.rand(len(units), generator=torch.Generator().manual_seed(3))
    keep = masks.select(score, units, masks.removal_target(units, 0.4), uniform=True, round_to=4)
    kept = {(int(keep[units.of(i, "heads")].sum()), int(keep[units.of(i, "channels")].sum())) for i in range(4)}
    assert len(kept) == 1 and next(iter(kept))[1] % 4 == 0
    keep = masks.select(score, units, masks.removal_target(units, 0.4), round_to=8)
    assert all(int(keep[units.of(i, "channels")].sum()) % 8 == 0 for i in range(4))
    assert units.removed_parameters(keep) >= masks.removal_target(units, 0.4)
    with pytest.raises(ValueError, match="round_to 64"):
        masks.select(score, units, 100, round_to=64)
    with pytest.raises(ValueError, match="no channels would be left"):
        masks.select(score, units, masks.removal_target(units, 0.9), uniform=True, round_to=32)


@pytest.mark.parametrize(("width", "given", "multiple"), [(1024, None, 32), (1023, None, 1), (1024, 8, 8), (64, 8, 8)])
def test_wide_layers_are_rounded(width, given, multiple):
    units = structure.units(tiny_model("llama", intermediate_size=width), "channels")
    score = torch.rand(len(units), generator=torch.Generator().manual_seed(3))
    keep = OneShot(sparsity=0.4, round_to=given).select(score, units, "global")
    kept = [int(keep[units.of(i, "channels")].sum()) for i in range(4)]
    assert all(count % multiple == 0 for count in kept)
    assert multiple == 32 or any(count % (2 * multiple) for count in kept)


def test_uniform_heads_go_in_whole_steps():
    units = structure.units(tiny_model("llama"), "heads")  # a step is a KV group of every layer
    groups = len(units.of(0, "heads"))
    step = int(units.cost_U[0]) * units.num_layers
    score = torch.rand(len(units), generator=torch.Generator().manual_seed(3))
    keep = masks.select(score, units, step, uniform=True)
    assert {int(keep[units.of(layer, "heads")].sum()) for layer in range(4)} == {groups - 1}
    with pytest.raises(ValueError, match=rf"nearest possible: {step / units.layer_parameters:.3f}"):
        masks.select(score, units, step // 2, uniform=True)


def test_unreachable_budgets():
    units = structure.units(tiny_model("llama"), "heads")
    with pytest.raises(ValueError, match="all heads together hold"):
        masks.removal_target(units, 0.9)
    with pytest.raises(ValueError, match=r"got 1\.2"):
        masks.removal_target(units, 1.2)


def test_no_trace_after_an_exception(tokens):
    model = tiny_model("llama")
    units = structure.units(model, "layers")
    with pytest.raises(RuntimeError), masks.masked(model, units, torch.zeros(4, dtype=torch.bool)):
        raise RuntimeError
    assert all("forward" not in layer.__dict__ for layer in structure.layers(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_account_of_a_mask_gives_the_mask_back():
    units = structure.units(tiny_model("llama"), "heads+channels")
    for share in (0.0, 0.5, 1.0):
        keep_U = random_keep(units, share=share)
        assert torch.equal(structure.kept_mask(units, structure.kept(units, keep_U)), keep_U)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda account: account.pop("layers"), "expected an account of heads.channels in 4 layers"),
        (lambda account: account.update(granularity="heads"), "found heads"),
        (lambda account: account["layers"].pop(), "in 4 layers"),
        (lambda account: account["layers"][1]["channels"].update(of=7), "7 in the account"),
        (lambda account: account["layers"][1]["channels"].update(kept=1), "layer 1 has"),
        (lambda account: account["layers"][0]["channels"].update(units="0-99999999"), "names no units"),
        (lambda account: account["layers"][0]["channels"].update(units="5-2"), "names no units"),
        (lambda account: account["layers"][0]["heads"].update(units="-1"), "names no units"),
        (lambda account: account["layers"][0]["heads"].update(units=["attention"]), "names no units"),
        (lambda account: account["layers"][1].pop("heads"), "layer 1 tells nothing of heads"),
        (lambda account: account["layers"].insert(0, account["layers"].pop() and 3), "layer 0 tells nothing of heads"),
    ],
)
def test_accounts_of_something_else(change, message):
    units = structure.units(tiny_model("llama"), "heads+channels")
    account = structure.kept(units, random_keep(units))
    change(account)
    with pytest.raises(ValueError, match=message):
        structure.kept_mask(units, account)
