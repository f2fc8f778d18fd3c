"""Masks, cuts and gradients of ATP on toys: what is masked, what is cut, and who learns from what."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from torch import nn

from sentei import checkpoint, head_dims, importance, lora, masks, structure
from sentei.distill import Distillation
from sentei.methods.atp import selection, wiring
from sentei.methods.atp.gradients import mask_gradient
from sentei.methods.atp.wiring import Adapters, MaskBook
from sentei.train import causal_batch

TOYS = {
    "llama": {"attention_bias": False, "mlp_bias": False, "head_dim": 16},
    "llama-mha": {"attention_bias": False, "mlp_bias": False, "head_dim": 16, "num_key_value_heads": 6},
    "llama-biases": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"head_dim": 16},  # biases of q, k and v, tied
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},  # norms of queries and keys
}
SPACES = wiring.SPACES
IDS = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def toy(name):
    return tiny_model(name.partition("-")[0], num_hidden_layers=2, **TOYS[name])


def floors(units):
    return selection.Floors(dict.fromkeys(units.granularity, 1), dict.fromkeys(units.granularity, 1))


def random_keep(units, seed=0, share=0.6):
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < share
    return selection.revive(keep, torch.zeros(len(units)), units, floors(units))


class Adapted:
    """A toy with adapters whose B is not zero, its book and its units."""

    def __init__(self, name, space, dropout=0.0, live=True):
        self.model = toy(name)
        self.units = wiring.units_of(self.model, space)
        self.rows = wiring.wire(self.model, self.units)
        lora.attach(self.model, [row.name for row in self.rows], rank=4, alpha=4, dropout=dropout, seed=0)
        self.book = MaskBook(self.model, self.units, self.rows)
        self.adapters = Adapters(self.model, self.units, self.rows)
        if live:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter_name, parameter in self.model.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.normal_(std=0.4)

    def logits(self, mode, keep=None):
        with torch.no_grad(), self.book.using(mode, None if keep is None else keep.float()):
            return self.model(input_ids=IDS, use_cache=False).logits

    def cut(self, keep):
        self.book.remove()
        lora.detach(self.model, [row.name for row in self.rows])
        wiring.remove(self.model, self.units, keep)
        return self.model

    def loss(self, mode, mask, ids=IDS):
        with self.book.using(mode, mask):
            return Distillation()(self.model, causal_batch(ids))["loss"]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", TOYS)
def test_masked_is_cut_and_both_forwards_meet_after_zeroing(name, space):
    made = Adapted(name, space)
    keep = random_keep(made.units)
    gap = (made.logits("base", keep) - made.logits("full", keep)).abs().max()
    assert gap > 0.1  # live adapters of dropped rows; a dead hook would show as 0
    assert (made.logits("full", keep) - made.logits("off")).abs().max() > 0.1
    made.adapters.zero(keep)
    masked = made.logits("full", keep)
    assert (made.logits("base", keep) - masked).abs().max() <= 1e-5
    cut = made.cut(keep)
    with torch.no_grad():
        assert (cut(input_ids=IDS).logits - masked).abs().max() <= 1e-4
    for layer, module in enumerate(structure.layers(cut)):
        kept = {kind: int(keep[made.units.of(layer, kind)].sum()) for kind in made.units.granularity}
        size = structure.sizes(cut)[layer]
        assert size.intermediate_size == kept["channels"]
        if space == "groups+channels":
            assert size.num_kv_heads == kept["heads"]
        else:
            assert len(size.qk_pairs) == kept["qk_pairs"] and size.head_dim == kept["v_dims"]
            assert module.self_attn.k_proj.out_features == 2 * kept["qk_pairs"] * size.num_kv_heads
            assert module.self_attn.v_proj.out_features == kept["v_dims"] * size.num_kv_heads
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(cut.generate(IDS, **options), cut.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3"])
def test_means_stand_in_for_what_is_masked(name):
    """As the other structural methods do it; for the forwards of the block alone."""
    made = Adapted(name, SPACES[0])
    keep = random_keep(made.units)
    seen = importance.moments(made.model, IDS, made.units.granularity)
    fill = importance.mean_fill(seen)
    with masks.masked(made.model, made.units, keep, fill), torch.no_grad():
        expected = made.model(input_ids=IDS, use_cache=False).logits
    with torch.no_grad(), made.book.using("full", keep.float(), fill):
        found = made.model(input_ids=IDS, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5
    assert (made.logits("full", keep) - expected).abs().max() > 0.1 and not made.book.fill
    with made.book.using("full", keep.float(), fill), made.book.using("off"):
        assert torch.equal(made.logits("off"), made.model(input_ids=IDS, use_cache=False).logits.detach())


def test_the_whole_mask_changes_nothing():
    made = Adapted("llama", "groups+channels")
    everything = torch.ones(len(made.units), dtype=torch.bool)
    for mode in ("base", "full"):
        assert torch.equal(made.logits(mode, everything), made.logits("off"))


def test_gating_outputs_is_gating_where_they_are_read():
    """Hard masks of KV groups: q, k and v zeroed by hand give what the hook on o_proj gives."""
    made = Adapted("llama", "groups+channels")
    keep = random_keep(made.units)
    keep[made.units.of(0, "channels")] = keep[made.units.of(1, "channels")] = True
    expected = made.logits("full", keep)
    with torch.no_grad():
        for row in made.rows:
            if row.side == "out" and "self_attn" in row.name:
                wrapped = wiring.adapter(made.model, row)
                gone = ~keep[row.unit_R]
                wrapped.base_layer.weight[gone] = 0
                wrapped.lora_B["default"].weight[gone] = 0
    torch.testing.assert_close(made.logits("off"), expected, atol=1e-5, rtol=1e-5)


def test_a_single_query_key_coordinate_cannot_be_cut():
    """A zeroed coordinate with a kept partner is not zero after rotation: the reason for pairs."""
    model = toy("llama")
    attention = structure.layers(model)[0].self_attn
    with torch.no_grad():
        rows = torch.arange(attention.q_proj.out_features) % 16 == 3
        attention.q_proj.weight[rows] = 0
        attention.k_proj.weight[rows[: attention.k_proj.out_features]] = 0
        expected = model(input_ids=IDS).logits
    for dropped, equal in (([3], False), ([3, 11], True)):
        pair_zeroed = copy.deepcopy(model)
        inner = structure.layers(pair_zeroed)[0].self_attn
        if equal:
            with torch.no_grad():
                partner = torch.arange(inner.q_proj.out_features) % 16 == 11
                inner.q_proj.weight[partner] = 0
                inner.k_proj.weight[partner[: inner.k_proj.out_features]] = 0
                expected = pair_zeroed(input_ids=IDS).logits
        units = head_dims.units(pair_zeroed)
        keep = torch.ones(len(units), dtype=torch.bool)
        keep[units.of(0, "qk_pairs")[3]] = False
        head_dims.remove(pair_zeroed, units, keep)
        with torch.no_grad():
            gap = float((pair_zeroed(input_ids=IDS).logits - expected).abs().max())
        assert (gap <= 1e-5) is equal, (dropped, gap)


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_leaf_gradient_is_the_joint_gradient(space):
    """d CE / d logit through a detached mask and back equals one backward through both."""
    made = Adapted("qwen3", space)
    start = torch.randn(len(made.units), generator=torch.Generator().manual_seed(2))
    joint = start.clone().requires_grad_()
    made.loss("full", torch.sigmoid(joint)).backward()
    split = start.clone().requires_grad_()
    soft = torch.sigmoid(split)
    leaf = soft.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(made.loss("full", leaf), leaf)
    (soft * gradient).sum().backward()
    torch.testing.assert_close(split.grad, joint.grad, atol=1e-6, rtol=1e-5)
    assert float(joint.grad.abs().max()) > 0


def test_gradient_of_the_divergence_from_the_untuned_model():
    """Against the same divergence written out; the untuned model has no part in what the adapters learned since."""
    made, model = Adapted("llama", "groups+channels"), toy("llama")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    mask = torch.rand(len(made.units), generator=torch.Generator().manual_seed(3)).requires_grad_()
    with made.book.using("full", mask):
        said = made.model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
    divergence = (expected.exp() * (expected - said)).sum(-1).mean()
    divergence.backward()
    trained = [p.requires_grad for p in made.model.parameters()]
    before = made.logits("off")
    loss = Distillation(wiring.Teacher(made.model, made.book, None), ce_weight=0.0)
    losses, gradient, _ = mask_gradient(made.model, made.book, mask, [causal_batch(IDS)], "fp32", loss=loss)
    assert losses["loss"] == losses["kl"] == pytest.approx(divergence.item(), rel=1e-4) and losses["ce"] > 1
    torch.testing.assert_close(gradient, mask.grad, atol=1e-6, rtol=1e-3)
    assert trained == [p.requires_grad for p in made.model.parameters()]
    assert torch.equal(before, made.logits("off"))  # the adapters work again
    fresh = Adapted("llama", "groups+channels", live=False)
    loss = Distillation(wiring.Teacher(fresh.model, fresh.book, None), ce_weight=0.0)
    losses, gradient, _ = mask_gradient(
        fresh.model, fresh.book, torch.ones(len(fresh.units)), [causal_batch(IDS)], "fp32", loss=loss
    )
    assert losses["kl"] == pytest.approx(0, abs=1e-6) and float(gradient.abs().max()) < 1e-6


def test_checkpointing_changes_no_loss_and_no_gradient():
    made = Adapted("llama", "groups+channels")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for layer in structure.layers(made.model):
                layer.training = True
        leaf = torch.full((len(made.units),), 0.7, requires_grad=True)
        with made.book.using("full", leaf):
            loss = Distillation()(made.model, causal_batch(IDS))["loss"]
            (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((loss.item(), gradient))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert all(p.grad is None for p in made.model.parameters())


def test_the_mode_is_not_the_training_flag():
    made = Adapted("llama", "groups+channels", dropout=0.5)
    keep = random_keep(made.units)
    quiet = made.logits("full", keep)
    made.model.train()
    noisy = made.logits("full", keep)
    made.model.eval()
    assert torch.equal(made.logits("full", keep), quiet) and not torch.equal(noisy, quiet)


# --- the probe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_probe_passes_and_leaves_no_trace(space):
    made = Adapted("qwen3", space, live=False)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    wiring.probe(made.model, made.units, made.rows, made.book, IDS)
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())


def test_probe_finds_a_fused_kernel():
    made = Adapted("llama", "groups+channels", live=False)
    mlp = structure.layers(made.model)[1].mlp

    def fused(x):
        weights = [linear.base_layer.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        return (nn.functional.silu(x @ weights[0].T) * (x @ weights[1].T)) @ weights[2].T

    mlp.forward = fused
    with pytest.raises(ValueError, match="channels of layer 1 had no effect"):
        wiring.probe(made.model, made.units, made.rows, made.book, IDS)


# --- merge, save --------------------------------------------------------------------------------------------------


def test_merging_takes_nothing_from_what_is_cut():
    made = Adapted("llama", "groups+channels")
    keep = random_keep(made.units)
    assert made.adapters.zero(keep) > 0
    expected = made.logits("base", keep)
    plain = made.cut(keep)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3"])
def test_heads_cut_inside_are_saved_and_loaded(name, words, tmp_path):
    model = toy(name)
    model.save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    units = head_dims.units(model)
    head_dims.remove(model, units, random_keep(units))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    stage = {"method": "m", "fields": {}, "seed": 0, "data": {"name": "t", "sha256": "0"}, "record": {}}
    checkpoint.save(model, words, tmp_path / "small", parent=str(tmp_path / "parent"), record=stage)
    loaded, _ = checkpoint.load(tmp_path / "small", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-6, rtol=1e-6)
        loaded.set_attn_implementation("eager")
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["head_dim"] == 16
    with pytest.raises(ValueError, match="dynamic"):
        loaded.generate(IDS, max_new_tokens=4, cache_implementation="static")
    loaded.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa"):
        loaded(input_ids=IDS)
    with pytest.raises(ValueError, match="shape heterogeneous"):
        checkpoint.form(model, "uniform")


def test_layer_size_knows_narrow_heads():
    model = toy("llama")
    units = head_dims.units(model)
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[units.of(1, "qk_pairs")[2:]] = False
    keep[units.of(1, "v_dims")[5:]] = False
    head_dims.remove(model, units, keep)
    first, second = structure.sizes(model)
    assert second == replace(first, head_dim=5, qk_pairs=(0, 1))
