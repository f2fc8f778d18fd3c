"""The maths of ATP, by hand: keep-probabilities, budget, costs, lasso, proximal step, the exact final mask."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sentei import head_dims, structure
from sentei.methods.atp import ATP, health, ranks, selection, wiring
from sentei.methods.atp.generator import (
    Generator,
    binarise,
    budget_loss,
    gumbel,
    keep_probability,
    start_alike,
    start_logits,
    start_near,
)
from sentei.structure import KINDS, Units


def units_of(table, granularity=("heads", "channels")):
    """Units from rows (kind, layer, index, cost)."""
    kind, layer, index, cost = torch.tensor([(KINDS.index(k), *rest) for k, *rest in table]).T
    return Units(granularity, kind, layer, index, cost, int(layer.max()) + 1, int(cost.sum()))


def toy_units(layers=2, groups=2, channels=4, group_cost=40, channel_cost=6):
    table = []
    for layer in range(layers):
        table += [("heads", layer, i, group_cost) for i in range(groups)]
        table += [("channels", layer, i, channel_cost) for i in range(channels)]
    return units_of(table)


def floors(units, **least):
    return selection.Floors(
        {kind: least.get(kind, 1) for kind in units.granularity}, dict.fromkeys(units.granularity, 1)
    )


# --- the generator ------------------------------------------------------------------------------------------------


def test_keep_probability():
    logits = torch.tensor([-1.0, -3.0, -3.366513, -8.0])
    expected = [0.999382, 0.632121, 0.5, 0.006715]
    assert keep_probability(logits, 3.0).tolist() == pytest.approx(expected, abs=1e-6)
    assert 1 - float(keep_probability(torch.zeros(1), 3.0)) == pytest.approx(1.9e-9, rel=0.02)
    for logit, p in zip(logits.tolist(), expected, strict=True):
        count = 100_000
        _, hard = binarise(torch.full((count,), logit), gumbel(count, "test", logit), 0.4, 3.0)
        assert abs(float(hard.detach().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_a_start_near_the_budget(sparsity):
    units = structure.units(tiny_model("llama"))
    score_U = torch.rand(len(units), generator=torch.Generator().manual_seed(0))
    p_U = keep_probability(start_logits(score_U, units, sparsity, 3.0), 3.0)
    for kind in (0, 1):
        of = (units.kind_U == kind).nonzero().flatten()
        by_score = p_U[of[score_U[of].argsort()]]
        assert bool((by_score.diff() >= 0).all())
        border = by_score[round(sparsity * len(of)) - 1 : round(sparsity * len(of)) + 1]
        assert border[0] <= 0.5 + 1e-6 and border[1] >= 0.5 - 1e-6
        assert float(p_U[of].mean()) == pytest.approx(1 - sparsity, abs=0.06)
    assert float(p_U.min()) == pytest.approx(0.7 * math.exp(-8 * sparsity), rel=0.2)


@pytest.mark.parametrize(("sparsity", "heads", "channels"), [(0.4, 0.2, 0.52), (0.8, 0.62, 0.9)])
def test_a_start_with_layers_alike(sparsity, heads, channels):
    """Heads are 0.375 of these parameters; they go half as often until channels reach 0.9."""
    units = toy_units(layers=3, groups=40, channels=100, group_cost=9, channel_cost=6)
    score_U = torch.arange(len(units)).float().sin()
    logits_U = start_alike(score_U, units, sparsity, 3.0)
    stays_U = keep_probability(logits_U, 3.0) > 0.5
    for kind, share in (("heads", heads), ("channels", channels)):
        for layer in range(3):
            of = units.of(layer, kind)
            assert float((~stays_U[of]).float().mean()) == pytest.approx(share, abs=0.03)
            assert bool((logits_U[of][score_U[of].argsort()].diff() > 0).all())
    gone = float(units.cost_U[~stays_U].sum()) / units.total
    assert gone == pytest.approx(sparsity, abs=0.02)


def test_a_start_near_the_budget_where_every_layer_has_one_group():
    """It cannot go, so channels, 0.75 of the parameters, make good for all of the budget."""
    units = toy_units(layers=3, groups=1, channels=100, group_cost=200, channel_cost=6)
    logits_U = start_alike(torch.arange(len(units)).float().sin(), units, 0.4, 3.0)
    stays_U = keep_probability(logits_U, 3.0) > 0.5
    assert bool(stays_U[units.of(0, "heads")].all())
    assert float(units.cost_U[~stays_U].sum()) / units.total == pytest.approx(0.4, abs=0.01)


def test_a_start_near_a_mask():
    """Every layer keeps as much of a kind as the mask, what it keeps first, and both parts by the scores."""
    units = toy_units(layers=3, groups=4, channels=100, group_cost=9, channel_cost=6)
    random = torch.Generator().manual_seed(0)
    keep_U = torch.rand(len(units), generator=random) < torch.tensor([0.9, 0.5, 0.2])[units.layer_U]
    score_U = torch.rand(len(units), generator=random)
    logits_U = start_near(score_U, keep_U, units, 3.0)
    assert torch.equal(keep_probability(logits_U, 3.0) > 0.5, keep_U)
    for layer in range(3):
        of = units.of(layer, "channels")
        for part in (of[keep_U[of]], of[~keep_U[of]]):
            assert bool((logits_U[part][score_U[part].argsort()].diff() > 0).all())


def test_binarise_and_its_gradient():
    u = math.exp(-1)
    noise = -math.log(-math.log(u + 1e-10) + 1e-10)
    assert noise == pytest.approx(0.0, abs=1e-8)
    logit = torch.tensor([-3.2], requires_grad=True)
    soft, hard = binarise(logit, torch.zeros(1), 0.4, 3.0)
    assert soft.item() == pytest.approx(0.377541, abs=1e-6) and hard.item() == 0.0
    (slope,) = torch.autograd.grad(hard.sum(), logit)
    assert float(slope) == pytest.approx(0.587509, abs=1e-6)


@pytest.mark.parametrize(("kept", "wanted", "loss"), [(1.0, 0.5, 0.693147), (0.4, 0.5, 0.223144), (0.5, 0.5, 0.0)])
def test_budget_loss(kept, wanted, loss):
    assert float(budget_loss(torch.tensor(kept), wanted)) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("kept", "slope"), [(0.8, 1.25), (0.4, -2.5)])
def test_budget_gradient(kept, slope):
    r = torch.tensor(kept, requires_grad=True)
    assert float(torch.autograd.grad(budget_loss(r, 0.5), r)[0]) == pytest.approx(slope, rel=1e-5)


def test_generator_repeats_and_is_reproducible():
    units = toy_units()
    first, again, other = Generator(units, seed=1), Generator(units, seed=1), Generator(units, seed=2)
    first.train()
    assert torch.equal(first.logits(), first.logits()) and first.training
    assert torch.equal(first.logits(), again.logits()) and not torch.equal(first.logits(), other.logits())
    assert not torch.equal(first(), first())  # dropout in the generator's own step
    eye = first.table_LE @ first.table_LE.T
    torch.testing.assert_close(eye, torch.eye(2), atol=1e-5, rtol=0)
    assert not torch.equal(first.encoder.layers[0].linear1.weight, first.encoder.layers[1].linear1.weight)


def repeated(layers, per_kind):
    kinds = list(per_kind)
    count = sum(per_kind.values())
    kind = torch.cat([torch.full((n,), KINDS.index(k)) for k, n in per_kind.items()]).repeat(layers)
    layer = torch.arange(layers).repeat_interleave(count)
    index = torch.cat([torch.arange(n) for n in per_kind.values()]).repeat(layers)
    return Units(tuple(kinds), kind, layer, index, torch.ones_like(kind), layers, len(kind))


@pytest.mark.parametrize(
    ("layers", "per_kind", "size"),
    [
        (30, {"heads": 3, "channels": 1536}, 3_054_976),
        (30, {"qk_pairs": 32, "v_dims": 64, "channels": 1536}, 3_233_536),
        (32, {"qk_pairs": 128, "v_dims": 128, "channels": 11008}, 23_168_768),
    ],
)
def test_generator_size(layers, per_kind, size):
    made = Generator(repeated(layers, per_kind))
    assert sum(p.numel() for p in made.parameters()) == size


# --- costs --------------------------------------------------------------------------------------------------------

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
LLAMA3_8B = LLAMA2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


def weightless(sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))


def costs(units):
    return {kind: int(units.cost_U[units.of(0, kind)[0]]) for kind in units.granularity}


@pytest.mark.parametrize(
    ("sizes", "prunable", "expected"),
    [
        (SMOLLM2, 106_168_320, {"heads": 294_912, "channels": 1_728, "qk_pairs": 13_824, "v_dims": 6_912}),
        (LLAMA2_7B, 6_476_005_376, {}),
        (LLAMA3_8B, 6_979_321_856, {"heads": 5_242_880, "qk_pairs": 327_680, "v_dims": 163_840}),
    ],
)
def test_costs(sizes, prunable, expected):
    model = weightless(sizes)
    if sizes is SMOLLM2:
        assert structure.total_parameters(model) == 134_515_008
    found = {}
    for space in wiring.SPACES:
        units = wiring.units_of(model, space)
        assert units.total == prunable
        found |= costs(units)
    assert {kind: found[kind] for kind in expected} == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("space", wiring.SPACES)
def test_costs_are_what_the_cut_removes(family, space):
    """Biases and the norms of queries and keys included."""
    model = tiny_model(family, head_dim=16) if family != "qwen2" else tiny_model(family)
    units = wiring.units_of(model, space)
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < 0.6
    keep = selection.revive(keep, torch.zeros(len(units)), units, floors(units))
    before = structure.total_parameters(model)
    wiring.remove(model, units, keep)
    assert before - structure.total_parameters(model) == units.removed_parameters(keep)


# --- lasso, proximal step -----------------------------------------------------------------------------------------


class Handmade(wiring.Adapters):
    """One factor whose rows belong to the units 0, 1, ..."""

    def __init__(self, factor, dimension=0, num_layers=1):
        self.rows = [(factor, dimension, torch.arange(factor.shape[dimension]))]
        self.num_layers, self._locked, self._handles = num_layers, {}, []


def test_lasso_on_hand_numbers():
    factor = nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    adapters, mask = Handmade(factor), torch.tensor([0.0, 1.0])
    expected = {"lasso": 4.9999 / 3, "lasso_a": 0.0, "lasso_b": 4.9999 / 3}
    assert adapters.levels(mask) == pytest.approx(expected, abs=1e-6)
    loss = 3 * adapters.lasso(mask)
    (slope,) = torch.autograd.grad(loss, factor)
    torch.testing.assert_close(slope, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert float(Handmade(factor, num_layers=2).lasso(mask).detach()) == pytest.approx(5 / 6, abs=1e-6)
    columns = nn.Parameter(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    assert Handmade(columns, dimension=1).levels(mask)["lasso_a"] == pytest.approx(4.9999 / 3, abs=1e-6)


def test_untrained_adapters_are_those_of_the_cut_linear():
    adapters = wiring.Adapters.__new__(wiring.Adapters)
    down, up, unit_R = torch.ones(2, 8), torch.ones(8, 2), torch.arange(8)
    adapters.rows = [(down, 1, unit_R), (up, 0, unit_R)]
    adapters.widen(torch.arange(8) < 2)
    assert torch.equal(down, torch.full((2, 8), 2.0)) and torch.equal(up, torch.ones(8, 2))


@pytest.mark.parametrize(("threshold", "expected"), [(1.0, [2.4, 3.2]), (6.0, [0.0, 0.0])])
def test_proximal_step(threshold, expected):
    factor = nn.Parameter(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    Handmade(factor).shrink(torch.tensor([False, True]), threshold / math.sqrt(2))
    torch.testing.assert_close(factor.detach(), torch.tensor([expected, [3.0, 4.0]]))


def test_a_locked_row_stays_zero():
    factor = nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    adapters, keep = Handmade(factor), torch.tensor([False, True, False])
    adapters.lock(keep)
    factor.sum().backward()
    assert factor.grad.tolist() == [[0, 0], [1, 1], [1, 1]]
    with torch.no_grad():
        factor += 1.0  # what momentum may do
    adapters.shrink(keep, 0.0)
    assert factor.tolist() == [[0, 0], [1, 1], [2, 1]]


# --- the final mask -----------------------------------------------------------------------------------------------


def worked_example():
    logits = torch.tensor([2.0, -1, 3, 1, -2, -4, 0.5, 0.4, 1.5, 0, -0.5, -3])
    return toy_units(), logits


def test_top_k_on_hand_numbers():
    units, logits = worked_example()
    assert units.total == 208 and selection.budget_of(units, 0.4) == pytest.approx(124.8)
    keep = selection.top_k(logits, units, 0.4, floors(units))
    assert keep[units.of(0, "heads")].tolist() == [True, False]
    assert keep[units.of(1, "heads")].tolist() == [True, False]  # the group at 0.4 does not fit
    assert keep[units.of(0, "channels")].tolist() == [True, True, True, False]
    assert keep[units.of(1, "channels")].tolist() == [True] * 4
    assert int(units.cost_U[keep].sum()) == 122


def test_by_kind_every_kind_loses_its_share():
    """Groups: 2 of 4 fit into 96; the 16 that are left go to the channels, 7 of 8 instead of 4."""
    units, logits = worked_example()
    keep = selection.top_k(logits, units, 0.4, floors(units), by_kind=True)
    assert selection.counts(units, keep) == {"heads": [1, 1], "channels": [3, 4]}
    assert int(units.cost_U[keep].sum()) == 122


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.4, 0.5, 0.6])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_top_k_fills_the_budget(sparsity, step):
    units = toy_units(layers=3, channels=20)
    made = selection.Floors({"heads": 1, "channels": 2}, {"heads": 1, "channels": step})
    for seed in range(5):
        logits = torch.randn(len(units), generator=torch.Generator().manual_seed(seed))
        keep = selection.top_k(logits, units, sparsity, made)
        left = selection.budget_of(units, sparsity) - int(units.cost_U[keep].sum())
        assert left >= -1e-6 and (left < 6 * step or bool(keep.all()))
        assert all(count >= 1 for count in selection.counts(units, keep)["heads"])


def test_uniform_has_one_count_for_all_layers():
    units, logits = worked_example()
    keep = selection.uniform(logits, units, 0.4, floors(units))
    assert selection.counts(units, keep) == {"heads": [1, 1], "channels": [3, 3]}
    assert keep[units.of(1, "channels")].tolist() == [True, True, True, False]
    assert int(units.cost_U[keep].sum()) <= 124.8


def test_uniform_gives_up_groups_for_the_floor_of_the_channels():
    """The free choice keeps 2 and 1 of 3 groups, 1.5 on average; two in each layer would leave 2 channels of 3."""
    units = toy_units(groups=3)
    score = torch.zeros(len(units))
    score[units.of(0, "heads")[:2]] = 1.0
    made = floors(units, channels=3)
    assert selection.counts(units, selection.top_k(score, units, 0.35, made))["heads"] == [2, 1]
    keep = selection.uniform(score, units, 0.35, made)
    assert selection.counts(units, keep) == {"heads": [1, 1], "channels": [4, 4]}
    with pytest.raises(ValueError, match=r"sparsity 0\.70 cannot be reached"):
        selection.uniform(score, units, 0.7, made)


def test_uniform_keeps_everything_at_no_sparsity():
    """Also where the width is no multiple of the step."""
    units = toy_units(channels=5)
    made = selection.Floors({"heads": 1, "channels": 2}, {"heads": 1, "channels": 2})
    assert bool(selection.uniform(torch.zeros(len(units)), units, 0.0, made).all())


def test_a_structure_below_its_floor_is_revived():
    units, logits = worked_example()
    keep = selection.revive(torch.zeros(len(units), dtype=torch.bool), logits, units, floors(units, channels=2))
    assert selection.counts(units, keep) == {"heads": [1, 1], "channels": [2, 2]}
    assert keep[units.of(0, "heads")].tolist() == [True, False]


def test_floors_hold_and_name_the_highest_sparsity():
    units = wiring.units_of(weightless(SMOLLM2), "groups+channels")
    made = selection.Floors.of(units, 32, 4, 8)
    assert made.least["channels"] == 96
    keep = ATP(sparsity=0.85).select(torch.randn(len(units)), units)
    counts = selection.counts(units, keep)
    assert min(counts["heads"]) >= 1 and min(counts["channels"]) >= 96
    held = 30 * (294_912 + 96 * 1728) / 106_168_320
    with pytest.raises(
        ValueError, match=r"sparsity 0\.90 cannot be reached.*1 KV group, 96 channels per layer.*13\.0%.*0\.869\."
    ):
        ATP(sparsity=0.9).select(torch.zeros(len(units)), units)
    assert f"{held:.1%}" == "13.0%"


# --- health, processes --------------------------------------------------------------------------------------------


def alarms_of(prices, steps=300, from_dense=True, **changes):
    freeze = {"kept_before": 0.6, "wanted": 0.6, "flips_fall": True, "undecided": 0.0, "misses_budget_by": 0.0,
              "lasso": 1.0, "lasso_a": 1.0, "lasso_b": 0.0}  # fmt: skip
    return health.alarms({"freeze": freeze | changes, "budget": prices, "peak_lasso": 1.0}, steps, "topk", from_dense)


@pytest.mark.parametrize(
    ("prices", "word"),
    [
        ([0.5] * 30 + [0.005] * 70, ""),
        ([0.5] * 30 + [0.005, 0.02] * 10 + [0.001] * 50, ""),  # one flip too many now and then
        ([0.5] * 50 + [0.005] * 50, "not met within 40 %"),
        ([0.5] * 100, "not met within 40 %"),
        ([0.5] * 30 + [0.005] * 10 + [0.1] * 60, "met at decision 31 of 100 but not held"),
    ],
)
def test_the_budget_is_met_early_and_held(prices, word):
    found = alarms_of(prices)
    assert [word in line for line in found] == [True] * bool(word)


def test_a_start_near_the_budget_needs_fewer_steps():
    met = [0.0] * 10
    assert alarms_of(met, 100, False) == [] and "100 control steps are few" in alarms_of(met, 100)[0]
    assert "40 control steps are few; give more" in alarms_of(met, 40, False)[0]


def test_a_start_near_the_budget_holds_it_less_closely():
    swings = [0.0] * 10 + [0.02] * 90
    assert alarms_of(swings, from_dense=False) == [] and "not held" in alarms_of(swings)[0]
    assert "not held" in alarms_of([0.0] * 10 + [0.04] * 90, from_dense=False)[0]


def test_a_start_by_scores_leaves_more_undecided():
    met = [0.0] * 10
    assert alarms_of(met, undecided=0.3, from_dense=False) == [] and "undecided" in alarms_of(met, undecided=0.3)[0]
    assert "undecided" in alarms_of(met, undecided=0.45, from_dense=False)[0]


def test_only_b_can_still_work():
    met = [0.0] * 10
    assert alarms_of(met, lasso_a=0.9) == []
    (line,) = alarms_of(met, lasso_b=0.2)
    assert "lasso on B ended the control phase at 20%" in line


def test_masks_that_differ_between_processes_stop_the_run(monkeypatch):
    mask = torch.tensor([True, False, True])
    ranks.check_same(mask)  # one process has nobody to differ from
    monkeypatch.setattr(ranks, "processes", lambda: SimpleNamespace(num_processes=3, device="cpu"))
    monkeypatch.setattr(ranks, "gather", lambda own: own.repeat(3))
    ranks.check_same(mask)
    monkeypatch.setattr(ranks, "gather", lambda own: torch.cat([own, own + 1, own]))
    with pytest.raises(ValueError, match=r"the masks of the processes \[1\] differ from that of process 0"):
        ranks.check_same(mask)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.0}, "sparsity is the part"),
        ({"units": "neurons"}, "units is one of"),
        ({"preset": "mine"}, "preset is one of ours, paper"),
        ({"shape": "padded"}, "shape is one of"),
        ({"units": "head-dims+channels", "shape": "uniform"}, "RoPE frequencies and attention scale"),
        ({"shape": "uniform", "final_mask": "threshold"}, "shape=uniform counts units by rank"),
        ({"mask": "none", "heal_steps": 5}, "nothing to heal"),
        ({"mask": "wanda"}, "mask is one of"),
        ({"zeroing": "never"}, "zeroing is one of"),
        ({"control_fraction": 1.0}, "needs steps of both phases"),
        ({"lora_rank": 0}, "lora_rank must be above 0"),
        ({"seq_len": 2}, "seq_len"),
        ({"alpha": -1.0}, "alpha must not be below 0"),
        ({"lora_dropout": 2.0}, "lora_dropout is a fraction"),
        ({"loss_on": "response", "prompt_loss_weight": 2.0}, "prompt_loss_weight is a fraction"),
        ({"prompt_loss_weight": 0.1}, "prompt_loss_weight goes with loss_on=response"),
        ({"compensate": "mean"}, "compensate is one of"),
        ({"compensate": "least-squares", "units": "head-dims+channels"}, "use units groups"),
        ({"compensate": "least-squares", "zeroing": "beta"}, "dropped rows at zero"),
    ],
)
def test_wrong_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        ATP(**fields).check()


@pytest.mark.parametrize(("family", "words"), [("phi3", "fused qkv_proj"), ("bert", "an encoder")])
def test_models_it_cannot_prune(family, words):
    with pytest.raises(ValueError, match=f"separate q/k/v/o and gated MLP projections; this model has {words}"):
        wiring.units_of(tiny_model(family), "groups+channels")


def test_models_whose_heads_cannot_be_cut_inside():
    with pytest.raises(ValueError, match="use groups\\+channels"):
        wiring.units_of(tiny_model("gemma2"), "head-dims+channels")
    model = tiny_model("llama", head_dim=16)
    units = head_dims.units(model)
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[units.of(1, "v_dims")[:3]] = False
    head_dims.remove(model, units, keep)
    with pytest.raises(ValueError, match="cut inside before"):
        wiring.units_of(model, "head-dims+channels")
    with pytest.raises(ValueError, match="cannot be removed as wholes"):
        wiring.units_of(model, "groups+channels")


def test_a_base_with_adapters_or_packed_weights_is_refused():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match="carries adapters already"):
        wiring.units_of(model, "groups+channels")
    model = tiny_model("llama")
    packed = model.model.layers[0].mlp.up_proj
    packed.weight = nn.Parameter(packed.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="load the base in bf16 or fp32 \\(found 4-bit"):
        wiring.units_of(model, "groups+channels")
