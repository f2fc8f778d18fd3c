"""FoldGPT-style removal, folding and healing: the maths by hand, and what must hold on any model."""

from __future__ import annotations

import copy
import os
import statistics
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from sentei import data, distill, folding, head_dims, masks, structure
from sentei.folding import ChildLinear
from sentei.importance import block_influence
from sentei.methods.fold_gpt import FoldGPT, check, gates, healing, judge, plan
from sentei.methods.fold_gpt.fit import fit, reduced_rank
from sentei.methods.fold_gpt.folder import Folder
from sentei.methods.fold_gpt.judge import Judge

PHRASE = "so it goes, and goes again, until the end of all the words that anyone has ever said; "
IDS = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))
BLOCKS = torch.randint(5, 128, (4, 12), generator=torch.Generator().manual_seed(1))
FEW = {
    "calibration_samples": 4, "calibration_seq_len": 16, "gate_steps": 4, "gate_batch": 2, "fold_samples": 4,
    "heal_steps": 2, "batch_size": 2, "eval_samples": 2, "lora_rank": 2, "save_every": 1, "exchange": 0,
}  # fmt: skip
TEXT = data.Text([PHRASE * 12, PHRASE[::-1] * 12], [PHRASE * 4], [PHRASE], "phrases", "0" * 64)


@pytest.fixture
def text():
    return TEXT


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def small(layers=5, family="llama", **overrides):
    return tiny_model(family, num_hidden_layers=layers, **overrides)


# --- gates ----------------------------------------------------------------------------------------------------------


def test_gate():
    def g(a, eps):
        return float(gates.gate(torch.tensor(a, dtype=torch.double), eps))

    assert g(1, 1) == 0.5 and g(0, 0.3) == 0
    assert g(2, 0.1) == pytest.approx(0.975610, abs=1e-6)
    assert g(3, 0.5) == pytest.approx(0.947368, abs=1e-6)
    both = 2 * torch.tensor(3.0, dtype=torch.double).log() - torch.tensor(0.5, dtype=torch.double).log()
    assert g(3, 0.5) == pytest.approx(float(both.sigmoid()))
    a = torch.tensor(1.0, dtype=torch.double, requires_grad=True)
    assert float(torch.autograd.grad(gates.gate(a, 1.0), a)[0]) == 0.5
    assert gates.start(0.98, 0.02) == pytest.approx(0.989949, abs=1e-6)


def test_penalty():
    g = torch.tensor([1, 0.5, 0.25], dtype=torch.double, requires_grad=True)
    kept = (torch.tensor([1, 1, 2], dtype=torch.double) * g).sum() / 4
    term = gates.penalty(kept, 0.75, 0.0, 1.0, 3)
    assert kept.item() == 0.5 and term.item() == 0.1875
    assert float(torch.autograd.grad(term, g)[0][2]) == -0.75


def test_schedule():
    schedule = gates.Schedule(steps=100, eps=0.02, eps_end=0.0005)
    assert schedule.kappa_at(24, 0.2) == pytest.approx(0.9) and schedule.kappa_at(49, 0.2) == pytest.approx(0.8)
    assert schedule.kappa_at(99, 0.2) == pytest.approx(0.8)
    assert schedule.eps_at(0) == schedule.eps_at(49) == 0.02
    assert schedule.eps_at(99) == pytest.approx(0.0005) and schedule.eps_at(74) == pytest.approx((0.02 * 0.0005) ** 0.5)


def surrogate(seed):
    """Costs of closing 30 gates alone and in neighbouring pairs: (kept, polarised, chosen's cost, one-shot's)."""
    random = torch.Generator().manual_seed(seed)
    single = torch.rand(30, generator=random, dtype=torch.double) * 0.33 + 0.05
    vital = torch.randperm(30, generator=random)[:3]
    single[vital] = torch.rand(3, generator=random, dtype=torch.double) * 3.3 + 2.7
    pair = torch.rand(29, generator=random, dtype=torch.double) * 0.1

    def cost(x):
        return (single * x).sum() + (pair * x[:-1] * x[1:]).sum()

    def loss(g, step):
        noise = single.clamp(max=0.3) * torch.randn(30, generator=random, dtype=torch.double)
        return cost(1 - g) + (g * noise).sum()

    def chosen(score):
        x = torch.zeros(30, dtype=torch.double)
        x[score.argsort()[:6]] = 1
        return float(cost(x))

    trained = gates.Gates(torch.full((30,), 1 / 30), 0.2, gates.Schedule(), loss)
    score = trained.run()
    last = gates.gate(trained.a_U.detach(), gates.Schedule().eps_end)
    return float(last.mean()), gates.polarised(last), chosen(score), chosen(single)


def test_gates_on_a_surrogate():
    kept, decided, found, one_shot = (statistics.mean(column) for column in zip(*map(surrogate, range(8)), strict=True))
    assert abs(kept - 0.8) < 0.01 and decided >= 0.9 and found <= one_shot


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("granularity", ["layers", "sublayers"])
def test_open_and_closed_gates(family, granularity):
    model = tiny_model(family)
    units = structure.units(model, granularity)
    g = torch.ones(len(units), dtype=torch.double)
    dense = logits(model)
    with gates.gated(model, units, lambda: g):
        assert torch.equal(logits(model), dense)
        g[1] = 0
        closed = logits(model)
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[1] = False
    structure.remove(model, units, keep)
    assert torch.equal(logits(model), closed)


def test_gates_leave_no_trace(words, text):
    model = small()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = FoldGPT(sparsity=0.2, **FEW).start(model, words, text)
    keep, account = run.method.choose(run)
    assert len(account["gates"]) == 4 and int((~keep).sum()) == 1 and keep[0] and keep[-1]
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_useless_block_goes_first(words, text):
    model = small(attention_bias=False, mlp_bias=False)
    nn.init.zeros_(structure.layers(model)[2].self_attn.o_proj.weight)
    nn.init.zeros_(structure.layers(model)[2].mlp.down_proj.weight)
    scores = ("gates", "block_influence", "greedy", "taylor")
    run = FoldGPT(sparsity=0.2, score=scores, **FEW | {"gate_steps": 40}).start(model, words, text)
    _, account = run.method.choose(run)
    rows = {row["score"]: row for row in account["scores"]}
    for name in ("gates", "block_influence"):
        assert rows[name]["dropped"] == "2", name
        assert rows[name]["held_loss"] == pytest.approx(rows[name]["held_loss_dense"], abs=1e-6)
    assert rows["gates"]["rank_correlation"] == pytest.approx(1) and rows["gates"]["overlap"] == 1
    # random blocks may do harm, so greedy may find a better one; the useless one costs nothing
    assert account["greedy"][0]["loss"] <= run.mean_loss(run.calibration) + 1e-6
    assert abs(rows["taylor"]["values"][2]) < 1e-6


def test_what_the_first_score_drops_is_exchanged(words, text):
    model, fields = small(), FEW | {"score": ("random", "taylor"), "exchange": 4}
    swapped = 0
    for seed in range(3):
        run = FoldGPT(sparsity=0.2, **fields, seed=seed).start(model, words, text)
        keep, account = run.method.choose(run)
        first, start, other = account["scores"]
        assert [first["score"], start["score"], other["score"]] == ["random, exchanged", "random", "taylor"]
        assert first["dropped"] == str(int((~keep).nonzero())) and first["overlap"] == 1
        assert first["tokens"] > 0 == start["tokens"] and first["seconds"] > start["seconds"]
        with masks.masked(model, run.units, keep):
            found = run.mean_loss(run.calibration)
        losses = [entry["loss"] for entry in account["exchange"] if entry.get("kept", True)]
        assert found == pytest.approx(losses[-1], abs=1e-6) and losses == sorted(losses, reverse=True)
        swapped += first["dropped"] != start["dropped"]
    assert swapped


def test_pairs_that_only_hurt_together():
    """Blocks 1 and 2 do the same work: either may go, not both. Scores that see blocks singly take both."""
    single = torch.tensor([5.0, 0.1, 0.1, 0.3, 5.0], dtype=torch.double)

    def cost(x):
        return (single * x).sum() + 3 * x[1] * x[2]

    trained = gates.Gates(torch.full((5,), 0.2), 0.4, gates.Schedule(), lambda g, step: cost(1 - g))
    trained.a_U.data[1] *= 0.999  # a tie must be broken somehow
    gone = set(trained.run().argsort()[:2].tolist())
    assert set(single.argsort()[:2].tolist()) == {1, 2} and gone in ({1, 3}, {2, 3})


def test_block_influence_by_hand():
    before, after = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 1], [0, 2]])
    cosine = nn.functional.cosine_similarity(before, after, dim=-1)
    assert float(1 - cosine.mean()) == pytest.approx(0.146447, abs=1e-6)
    model = small()
    units = structure.units(model, "layers")
    alike = check.similarity(model, BLOCKS, lambda ids: model(input_ids=ids, use_cache=False))
    influence = block_influence(model, units, BLOCKS)
    # the output of block l is the input of block l + 1
    for layer in range(1, 5):
        assert alike["outputs"][layer - 1][layer] == pytest.approx(1 - float(influence[layer]), abs=1e-3)
    assert all(alike[name][i][i] == pytest.approx(1, abs=1e-3) for name in alike for i in range(5))
    assert alike["updates"][0][3] == alike["updates"][3][0]


# --- folding --------------------------------------------------------------------------------------------------------


def test_output_scale():
    uv, vv = torch.tensor([1 * 2 + 2 * 4.0]), torch.tensor([1 + 4.0])
    assert float(judge.output_scale(uv, vv, 0.0)) == 2 and float(judge.output_scale(uv, vv, 1.0)) == 1.5
    assert float(judge.output_scale(torch.zeros(1), torch.zeros(1))) == 1


def test_low_rank():
    delta, rms = torch.randn(5, 7), torch.rand(7) + 0.1
    a, b = judge.low_rank(delta, rms, 7)
    torch.testing.assert_close(b @ a, delta)
    a, b = judge.low_rank(delta, rms, 2)
    best = sum(torch.linalg.svdvals(delta * rms)[2:].square()).sqrt()
    torch.testing.assert_close(((b @ a - delta) * rms).norm(), best)


def test_reduced_rank():
    """No other matrix of that rank is nearer: held against the whitened problem, whose best answer is a plain SVD."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(50, 6, generator=generator, dtype=torch.double) * torch.tensor([5, 1, 1, 1, 0.2, 0.1])
    t_TO = torch.randn(50, 4, generator=generator, dtype=torch.double) + x_TI[:, :4]
    square_II, wanted_OI = x_TI.T @ x_TI / 50, t_TO.T @ x_TI / 50
    for rank in (1, 2, 4, 9):
        a_RI, b_OR = reduced_rank(torch.linalg.solve(square_II, wanted_OI.T).T, wanted_OI, rank)
        assert a_RI.shape == (min(rank, 4), 6) and b_OR.shape == (4, min(rank, 4))
        torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0))
        q_TI, r_II = torch.linalg.qr(x_TI)
        u, s, v = torch.linalg.svd(q_TI.T @ t_TO, full_matrices=False)
        best_IO = torch.linalg.solve(r_II, (u[:, :rank] * s[:rank]) @ v[:rank])
        torch.testing.assert_close((b_OR @ a_RI).T, best_IO)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("bias", [False, True])
def test_fit_finds_what_can_be_found(family, bias):
    """Two blocks that differ by scales and a low-rank term in what their sub-layers put out: folding costs little."""
    overrides = (
        {"attention_bias": bias, "mlp_bias": bias} if family == "llama" else {"layer_types": ["full_attention"] * 5}
    )
    model = small(family=family, **overrides)
    layers = structure.layers(model)
    layers[3].load_state_dict(layers[2].state_dict())
    gemma = family == "gemma3_text"
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        linear = layers[3].get_submodule(path)
        scale_O = torch.ones(linear.out_features) if gemma else torch.rand(linear.out_features) + 0.5
        low_OI = 0.1 * torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features)
        with torch.no_grad():
            linear.weight.copy_(scale_O[:, None] * linear.weight + low_OI)
            if linear.bias is not None:
                torch.nn.init.normal_(layers[2].get_submodule(path).bias)
                linear.bias.copy_(scale_O * layers[2].get_submodule(path).bias)
    dense = healing.aliased(model)
    expected = logits(dense)
    made = folder(model, scale=not gemma, align=False)
    as_it_is = {"norms": "own", "low_rank": False, "scale": False, "factor": 1.0}
    made.apply({"members": [2, 3], "owner": 2, "starts": {"3": as_it_is}})
    blocks_NT = torch.randint(5, 128, (32, 12), generator=torch.Generator().manual_seed(2))
    before = float((logits(model) - expected).abs().max())
    fit(made, dense, range(5), blocks_NT, ridge=1e-9, correction=0.3, tick=lambda *_: None)
    after = float((logits(model) - expected).abs().max())
    assert after < (1e-4 if gemma else 0.25) * before, (before, after)
    assert torch.equal(logits(dense), expected)


def test_planner():
    costs = [([i, i + 1], cost, 1) for i, cost in enumerate((5, 1, 4, 1))]
    assert plan.cheapest(costs, 2) == [[1, 2], [3, 4]]
    costs = [([i, i + 1], cost, 1) for i, cost in enumerate((2, 1, 2, 9))]
    assert plan.cheapest(costs, 2) == [[0, 1], [2, 3]]  # taking the cheapest first would cost 10
    assert plan.cheapest([([0, 1], 3.0, 5), ([1, 2], 1.0, 1), ([3, 4], 1.0, 4)], 5) == [[1, 2], [3, 4]]


def test_kl_by_hand():
    student, teacher = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(distill.kl(student, teacher)) == pytest.approx(0.143841, abs=1e-6)


def folder(model, dense=None, **options):
    kl = Judge(dense or healing.aliased(model), BLOCKS, 2)
    settings = {"free": [True] * len(structure.layers(model)), "size": 2, "parent": "best", "rank": 2, "scale": True}
    return Folder(model, kl, **settings | {"align": True} | options)


def test_judge():
    model, other = small(), tiny_model("llama", seed=1, num_hidden_layers=5)
    made = Judge(other, BLOCKS, 2)
    assert made.kl(other) == pytest.approx(0, abs=1e-6)
    by_hand = float(distill.kl(logits(model, BLOCKS), logits(other, BLOCKS)))
    assert Judge(other, BLOCKS, 2).kl(model) != by_hand  # its own head, not the other's
    model.lm_head.weight.data = other.lm_head.weight.data
    assert made.kl(model) == pytest.approx(float(distill.kl(logits(model, BLOCKS), logits(other, BLOCKS))), rel=1e-4)


def test_a_planted_copy_costs_nothing():
    model = small()
    layers = structure.layers(model)
    layers[3].load_state_dict(layers[2].state_dict())
    made = folder(model)
    groups = {tuple(group["members"]): group["kl"] for group in made.single()}
    assert groups[2, 3] == pytest.approx(0, abs=1e-6) and min(groups.values()) == groups[2, 3]
    held, added = folding.saving(layers[1], 2, True)
    assert plan.choose(made, "auto", held - added)[0]["members"] == [2, 3]
    assert folding.layout(model)["owner"] == [0, 1, 2, 2, 4]


def test_sharing_is_never_worse_than_removal():
    """With output scales of 0 a member does nothing; where that is best it is found, and folded again the same way."""
    model = small(6, attention_bias=False, mlp_bias=False)
    for module in (structure.layers(model)[3].self_attn.o_proj, structure.layers(model)[3].mlp.down_proj):
        nn.init.zeros_(module.weight)  # a block that does nothing: to run its neighbour's weights there can only hurt
    units = structure.units(model, "layers")
    made = folder(model, parent="first")
    quiet = []
    for number in range(1, 5):
        keep = torch.arange(len(units)) != number + 1
        with masks.masked(model, units, keep):
            removed = made.judge.kl(model)
        group = made.fold([number, number + 1])
        folded = logits(model, BLOCKS)
        assert group["kl"] <= removed + 1e-6
        made.undo([number, number + 1])
        made.apply(group)
        assert torch.equal(logits(model, BLOCKS), folded)
        made.undo([number, number + 1])
        if group["starts"][str(number + 1)]["factor"] == 0:
            quiet.append(number)
            assert group["kl"] == pytest.approx(removed, abs=1e-6)
    assert 2 in quiet


@pytest.mark.parametrize("parent", ["first", "best", "average"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_starts(parent, family):
    """No start is worse than the plain one, what was measured is what is there, and taking back leaves no trace."""
    types = {"layer_types": ["full_attention"] * 5} if family.startswith("gemma") else {}
    model = small(family=family, **types)
    dense = healing.aliased(model)
    before = logits(model)
    made = folder(model, parent=parent, scale=not types)
    group = made.fold([1, 2])
    found = made.judge.kl(model)
    assert found == group["kl"]
    made.undo([1, 2])
    assert torch.equal(logits(model), before) and torch.equal(logits(dense), before)
    made._share([1, 2], group["owner"])
    assert found <= made.judge.kl(model)  # own norms, no corrections
    made.undo([1, 2])
    made.apply(group)
    assert made.judge.kl(model) == found
    assert torch.equal(logits(dense), before)  # the teacher shares tensors and must not notice


def test_all_layers_may_save_too_little():
    made = folder(small())
    saving = made.saving([1, 2])
    with pytest.raises(ValueError, match=f"saves {2 * saving:,} parameters, {2 * saving + 1:,} are to go"):
        plan.choose(made, "all", 2 * saving + 1)
    assert not folding.is_folded(made.model)
    plan.choose(made, "all", 2 * saving)


def test_two_processes_do_not_write_one_file(tmp_path, monkeypatch):
    made = folder(small(), file=tmp_path / "plan.json")
    written = []
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: written.append(path.name) or path.touch())
    for pid in (7, 8):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        made._remember("1-2", {})
    assert len(set(written)) == 2 and [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_terms_without_a_start_can_learn():
    model = small()
    made = folder(model)
    made._share([1, 2], 1)
    before = logits(model)
    made.free_terms(0)
    assert torch.equal(logits(model), before)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    children = [m for m in model.modules() if isinstance(m, ChildLinear)]
    assert children and all(bool(child.A.any()) and bool(child.B.grad.any()) for child in children)


def test_full_rank_is_the_dense_model():
    model = small(attention_bias=False, mlp_bias=False)
    before = logits(model)
    made = folder(model, rank=48, parent="first", scale=False)
    made._share([1, 2], 1)
    made._put_low_rank(2, 1, {"norms": "own"}, [1, 2], None)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    made.undo([1, 2])
    made._share([1, 2], 1)
    made._set_norms(2, 1)  # the parent's norms: their ratio goes into A and B
    made._put_low_rank(2, 1, {"norms": "parent"}, [1, 2], None)
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)


def test_per_layer_lists_follow_a_removal():
    model = tiny_model("gemma3_text")
    units = structure.units(model, "layers")
    structure.remove(model, units, torch.tensor([True, False, True, True]))
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    model = tiny_model("qwen2", max_window_layers=3, layer_types=["full_attention"] * 4)
    units = structure.units(model, "layers")
    structure.remove(model, units, torch.tensor([True, False, True, False]))
    assert model.config.max_window_layers == 2 and len(model.config.layer_types) == 2
    assert [layer.self_attn.layer_idx for layer in structure.layers(model)] == [0, 1]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": ("gate",)}, "score is a list of"),
        ({"score": ()}, "score is a list of"),
        ({"plan": "best"}, "plan is one of"),
        ({"parent": "last"}, "parent is one of"),
        ({"granularity": "channels"}, "granularity is one of"),
        ({"gate_cost": "time"}, "gate_cost is one of"),
        ({"target_blocks": 0.5, "target_bytes": 9}, "one target is enough"),
        ({"target_blocks": 1.2}, "target_blocks is the fraction that stays"),
        ({"group_size": 1}, "group_size is at least 2"),
        ({"target_blocks": 0.8, "shape": "uniform"}, "sentei unfold"),
        ({"gate_init": 1.0}, "gate_init"),
        ({"heal_lr": 0}, "heal_lr"),
        ({"protect_first": -1}, "protect_first"),
        ({"exchange": -1}, "exchange"),
        ({"sparsity": 0.9}, "protect_first=1 and protect_last=1"),
        ({"sparsity": 0.0, "target_blocks": 0.4}, r"is below what group_size=2 reaches \(0.8"),
        ({"sparsity": 0.0, "target_blocks": 0.8, "lora_rank": 40}, "Use lora_rank <= "),
        ({"calibration_seq_len": 999}, "give more text"),
        ({"sparsity": 0.2, "heal_lora_rank": 0}, "nothing to train"),
    ],
)
def test_bad_fields(fields, message, words, text):
    model = small()
    with pytest.raises(ValueError, match=message):
        FoldGPT(**{**FEW, **fields}).compress(model, words, text)
    if "nothing to train" not in message:
        assert structure.total_parameters(model) == structure.total_parameters(small())


def test_bad_models(words, text):
    method = FoldGPT(sparsity=0, target_blocks=0.8, **FEW)

    def refused(model, message):
        with pytest.raises(ValueError, match=message):
            method.compress(model, words, text)

    refused(tiny_model("bert"), "is an encoder")
    model = small()
    structure.layers(model)[3].mlp = nn.Sequential(structure.layers(model)[3].mlp)
    with pytest.raises(ValueError, match=r"identical blocks: block 0 has mlp \(LlamaMLP\), block 3 has not"):
        check.check(model, fold=True)
    model = small()
    folding.fold(model, [1, 2], 1, rank=0, scale=False)
    refused(model, "Prune first|folded already")
    with pytest.raises(ValueError, match="merge or unload"):
        check.check(get_peft_model(small(), LoraConfig(target_modules=["q_proj"])).base_model.model, fold=True)
    model = small()
    model.config.quantization_config = {"quant_method": "x"}
    refused(model, "quantised")
    refused(tiny_model("gemma3_text"), "cannot fold blocks 0 and 1: sliding_attention and full_attention")
    model = small()
    units = structure.units(model, "channels")
    structure.remove(model, units, units.index_U < 30 + units.layer_U)
    refused(model, "no 2 adjacent blocks of equal shape")
    model = AutoModelForSequenceClassification.from_config(small().config)
    refused(model, "predicts no tokens")
    model = small()
    units = head_dims.units(model)
    head_dims.remove(model, units, (units.kind_U != 4) | (units.index_U != units.layer_U % 2))  # all of one width
    refused(model, "heads of this model were cut inside")
    model = small()
    structure.layers(model)[2].to(torch.bfloat16)
    refused(model, "several dtypes")
    assert not any(isinstance(module, ChildLinear) for module in model.modules())


def test_masked_is_removed(words, text):
    model, dense = small(), small()
    record = FoldGPT(sparsity=0.2, **FEW | {"heal_steps": 0}).compress(model, words, text)
    units = structure.units(dense, "layers")
    keep = torch.ones(5, dtype=torch.bool)
    keep[[int(number) for number in record["scores"][0]["dropped"].split(", ")]] = False
    with masks.masked(dense, units, keep):
        assert torch.equal(logits(model), logits(dense))
    assert copy.deepcopy(record)["kept"]["layers"]
