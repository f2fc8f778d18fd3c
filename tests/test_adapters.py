"""PEFT units: exact arithmetic of the bottleneck, counts, injection and its undoing, names, folders."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file
from torch import nn

from sentei import adapters, checkpoint, folding, structure
from sentei.adapters import Bottleneck, Unit

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "distilbert")


def space(model, **options):
    return adapters.units(model, **{"rank": 4, "width": 8, **options})


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def stir(model, units, seed=0):
    """Give every trained weight a value, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(model, units):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))


def test_post_norm_by_hand():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.dropout = nn.Identity(), nn.Identity()
            self.LayerNorm = nn.LayerNorm(2, eps=0, elementwise_affine=False)

        def forward(self, hidden, residual):
            return self.LayerNorm(self.dense(hidden) + residual)

    adapter = Bottleneck(Output(), 2, 1, 0.0, None, False)
    by_hand(adapter)
    out = adapter(torch.tensor([[[2.0, 0.0]]]), torch.zeros(1, 1, 2))
    assert out.flatten().tolist() == [1.0, -1.0]  # an adapter behind the layer's output would give (1, 0)


def test_pre_norm_by_hand():
    host = nn.Linear(2, 2, bias=False)
    nn.init.eye_(host.weight)
    norm = nn.Identity()
    adapter = Bottleneck(host, 2, 1, 0.0, None, True)
    by_hand(adapter)
    norm.register_forward_pre_hook(adapters.bottleneck.KeepResidual(adapter))
    x = torch.tensor([[[1.0, 1.0]]])
    norm(x)
    h = torch.tensor([[[2.0, 0.0]]])
    assert (x + adapter(h)).flatten().tolist() == [3.0, 4.0]  # reading h alone would give (3, 3)
    assert adapter._residual_BTH is None


def by_hand(adapter):
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 0.0]]))
        adapter.up.weight.copy_(torch.tensor([[0.0], [1.0]]))
        adapter.down.bias.zero_()
        adapter.up.bias.zero_()


def test_counts_by_hand():
    large = [Unit(f"lora.L{i}", "lora", i, ("q", "v"), ((1024, 1024),) * 2, 32) for i in range(24)]
    large += [Unit(f"adapter.L{i}", "adapter", i, ("m",), ((1024, 1024),), 128) for i in range(24)]
    assert large[0].parameters == 131_072 and large[-1].parameters == 263_296
    assert sum(unit.parameters for unit in large) == 9_464_832
    model = tiny_model("llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    units = space(model)
    assert {unit.parameters for unit in units if unit.is_lora} == {448}
    assert {unit.parameters for unit in units if not unit.is_lora} == {552}
    adapters.inject(model, units)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(unit.parameters for unit in units) == 4 * 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_injection_and_its_undoing(family, tokens):
    model = tiny_model(family)
    before, names = logits(model, tokens), [name for name, _ in model.named_modules()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    units = space(model, targets=("q", "v", "down"))  # LoRA inside the host of a bottleneck
    adapters.inject(model, units, seed=1)
    assert torch.equal(logits(model, tokens), before)  # an exact no-op at first
    stir(model, units)
    changed = logits(model, tokens)
    assert not torch.equal(changed, before)
    adapters.set_enabled(model, False)
    assert torch.equal(logits(model, tokens), before)
    adapters.set_enabled(model, True)
    assert torch.equal(logits(copy.deepcopy(model), tokens), changed)
    assert torch.equal(logits(model, tokens), changed)
    adapters.unload(model)
    assert torch.equal(logits(model, tokens), before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    # unload and inject equals a fresh load, and a unit's start does not depend on which others live
    fresh = tiny_model(family)
    adapters.inject(model, units[2:], seed=5, init="hub")
    adapters.inject(fresh, units, seed=5, init="hub")
    for unit in units[2:]:
        for (_, one), (_, two) in zip(adapters.matrices(model, unit), adapters.matrices(fresh, unit), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_under_checkpointing_and_cached_generation(family, tokens):
    model = tiny_model(family)
    units = space(model)
    adapters.inject(model, units)
    stir(model, units)

    def gradients():
        model.train()
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in adapters.parameters(model, units)]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, gradients(), strict=True))
    assert all(g.abs().sum() > 0 for g in plain)
    model.gradient_checkpointing_disable()
    if family == "llama":
        model.eval()
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


def test_merging():
    model = tiny_model("llama")
    tokens = torch.arange(5, 15)[None]
    units = space(model, kinds=("lora",))
    adapters.inject(model, units)
    stir(model, units)
    before = logits(model, tokens)
    adapters.merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), before, atol=1e-4, rtol=1e-4)
    assert not hasattr(model, "peft_config")
    adapters.inject(model, units := space(model))
    with pytest.raises(ValueError, match="cannot be merged into the weights; use kinds=lora"):
        adapters.merge_lora(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expression_hits_what_it_should(family):
    model = tiny_model(family, **{"n_layers" if family == "distilbert" else "num_hidden_layers": 12})
    units = space(model)
    some = [unit for unit in units if unit.layer in (1, 11) or (unit.layer == 2 and unit.is_lora)]
    expression = adapters.pattern(some)
    found = adapters.check_pattern(expression, model, some)
    assert found["others"] == 0 and found["matched"] == found["expected"] == sum(len(u.modules) for u in some)
    with pytest.raises(ValueError, match="matches"):
        adapters.check_pattern(expression, model, some[1:])
    base = structure.base_model(model)  # bare and headed
    prefix = model.base_model_prefix + "."
    hits = {name for name, _ in base.named_modules() if re.fullmatch(expression, name)}
    assert {prefix + name for name in hits} == {name for unit in some for name in unit.modules}


def test_heterogeneous_base(tokens):
    model = tiny_model("llama", attention_bias=False, mlp_bias=False)
    units = structure.units(model, "heads+channels")
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[units.of(1, "heads")] = False  # a layer without attention
    keep[units.of(2, "channels")] = False  # one without feed-forward
    keep[units.of(0, "channels")[:7]] = False
    structure.remove(model, units, keep)
    found = space(model)
    assert {unit.id for unit in found} == {
        "lora.L0", "lora.L2", "lora.L3", "adapter.L0", "adapter.L1", "adapter.L3",
    }  # fmt: skip
    before = logits(model, tokens)
    adapters.inject(model, found)
    assert torch.equal(logits(model, tokens), before)
    stir(model, found)
    assert not torch.equal(logits(model, tokens), before)


def test_folded_base_in_memory(tokens):
    """Layer 2 runs with layer 1's weights: it finds them inside the bottleneck and the LoRA that layer 1 gets."""
    model = tiny_model("llama")
    folding.fold(model, (1, 2), 1, rank=2, scale=True)
    before = logits(model, tokens)
    found = space(model, targets=("q", "v", "down"))
    assert [unit.id for unit in found if unit.layer in (1, 2)] == ["lora.L1", "adapter.L1", "adapter.L2"]
    assert adapters.remarks(model, found) == [
        "no lora unit in layers 2: what it would extend is pruned away, or another layer's",
        "lora.L1 acts in layers 2 too, which run with its weights",
    ]
    assert adapters.remarks(tiny_model("llama"), space(tiny_model("llama"))) == []
    adapters.inject(model, found)
    assert torch.equal(logits(model, tokens), before)
    (lora,) = [unit for unit in found if unit.id == "lora.L1"]
    stir(model, [lora])
    changed = logits(model, tokens)
    assert not torch.equal(changed, before) and torch.equal(logits(copy.deepcopy(model), tokens), changed)
    adapters.unload(model)
    assert torch.equal(logits(model, tokens), before)
    folding.unfold(model)
    torch.testing.assert_close(logits(model, tokens), before, atol=1e-4, rtol=1e-4)


def test_a_host_keeps_its_childrens_paths():
    """A child is found, and replaced, by the path that it has without the bottleneck."""
    model = tiny_model("bert")
    units = space(model, kinds=("adapter",))
    adapters.inject(model, units)
    (adapter,) = adapters.modules(model, units[0])
    dense = adapter.base_layer.dense
    assert model.get_submodule(f"{units[0].modules[0]}.dense") is dense
    other = nn.Linear(dense.in_features, dense.out_features)
    model.set_submodule(f"{units[0].modules[0]}.dense", other)
    assert adapter.base_layer.dense is other and "dense" not in adapter._modules
    assert adapter.dropout is not adapter.base_layer.dropout  # its own come first
    with pytest.raises(AttributeError, match="nothing"):
        adapter.nothing  # noqa: B018


def test_arithmetic_is_fp32_under_autocast():
    adapter = Bottleneck(nn.Identity(), 4, 2, 0.0, None, False)
    read = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapter.change(read, read)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(adapter.change(read, read), expected)


def test_other_ranks_are_written_as_patterns():
    model = tiny_model("bert")
    units = space(model, kinds=("lora",))
    assert adapters.lora_config(units, 2.0, 0.0).rank_pattern == {}
    from dataclasses import replace

    mixed = [replace(units[0], rank=2), *units[1:]]
    config = adapters.lora_config(mixed, 2.0, 0.0)
    assert (config.r, config.lora_alpha) == (4, 8) and set(config.rank_pattern.values()) == {2}
    adapters.inject(model, mixed, alpha_per_rank=2.0)
    assert [m.r["default"] for m in adapters.modules(model, mixed[0])] == [2, 2]
    assert [m.scaling["default"] for m in adapters.modules(model, mixed[0])] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"kinds": ("prefix",)}, "prefixes are not searched"),
        ("llama", {"targets": ("w",)}, "LoRA target 'w' is not known"),
        ("llama", {"targets": ()}, "name at least one of each"),
        ("bert", {"targets": ("gate",)}, "has no gate"),
        ("phi3", {}, "no adapter host found in Phi3ForCausalLM; supported families: bert"),
        ("phi3", {"kinds": ("lora",)}, "projections are fused"),
        ("gemma2", {}, "no adapter host found in Gemma2"),
    ],
)
def test_refusals(family, options, message):
    with pytest.raises(ValueError, match=message):
        space(tiny_model(family), **options)


def test_a_model_with_adapters_is_refused():
    model = tiny_model("bert")
    adapters.inject(model, space(model))
    with pytest.raises(ValueError, match="has PEFT modules already"):
        space(model)


# --- folders ------------------------------------------------------------------------------------


HEAD = {"task": "SequenceClassification", "labels": ["no", "yes"]}


def saved(family, words, folder, kinds, head=HEAD):
    """A base on disk, and a stirred adapter of it, saved."""
    tiny_model(family).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    return saved_over(folder / "base", folder / "out", kinds, head)


def saved_over(base, out, kinds, head=HEAD, dtype="float32"):
    """A stirred adapter of a base, saved; its head is random and in the base's dtype, as a search leaves it."""
    torch.manual_seed(0)
    model, tokenizer = checkpoint.load(base, dtype=dtype, trust_remote_code=True, **head)
    units = space(model, kinds=kinds)[1:]
    fingerprint = adapters.fingerprint(model)
    adapters.inject(model, units, alpha_per_rank=2.0, dropout=0.1)
    stir(model, units)
    with torch.no_grad():
        for name in adapters.head(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.normal_()
    what = {
        "units": [vars(unit) for unit in units], "alpha_per_rank": 2.0, "dropout": 0.1, "head": head,
        "fingerprint": fingerprint,
    }  # fmt: skip
    checkpoint.adapters.save(
        model, tokenizer, out, parent=str(base), record={"record": {"adapter": what}},
        pages={"README.md": "more\n"},
    )  # fmt: skip
    return model, units


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_stock_peft_loads_a_lora_without_sentei(family, words, tokens, tmp_path):
    model, _ = saved(family, words, tmp_path, ("lora",))
    torch.save(logits(model, tokens), tmp_path / "logits.pt")
    code = f"""
import sys, torch, transformers
sys.modules["sentei"] = None  # an import would fail
from peft import PeftModel
base = transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r}, num_labels=2)
base.config.pad_token_id = 0
model = PeftModel.from_pretrained(base, {str(tmp_path / "out")!r}).eval()
ids = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    difference = (model(input_ids=ids).logits - torch.load({str(tmp_path / "logits.pt")!r})).abs().max()
assert difference <= 1e-6, difference
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {} and config["task_type"] == "SEQ_CLS"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A plain LoRA" in card and "pad_token_id" not in card and "trust_remote_code" not in card
    assert "num_labels=2, dtype=torch.float32)" in card and "of the base in float32." in card and "gguf" not in card


def test_a_base_that_stock_classes_need_help_with(words, tmp_path, monkeypatch):
    """Modelling code of its own, no padding token, and a path that holds in one folder only."""
    model = tiny_model("llama")
    units = structure.units(model, "channels")
    structure.remove(model, units, (units.layer_U > 0) | (units.index_U > 6))
    model.config.pad_token_id = None
    stage = {"method": "by_hand", "fields": {}, "seed": 0, "data": {"name": "none", "sha256": "0"}, "record": {}}
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    checkpoint.save(model, words, tmp_path / "base", parent=tmp_path / "parent", record=stage)
    monkeypatch.chdir(tmp_path)
    saved_over("base", tmp_path / "out", ("lora",))
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "num_labels=2, dtype=torch.float32, trust_remote_code=True)" in card
        and "base.config.pad_token_id = tokenizer.pad" in card
    )
    monkeypatch.chdir("/")
    checkpoint.load(tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("family", ["qwen3", "roberta", "distilbert"])
def test_sentei_loads_a_mix_and_plain_peft_stops(family, words, tokens, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    model, units = saved(family, words, tmp_path, ("lora", "adapter"))
    loaded, _ = checkpoint.load(tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), atol=1e-6, rtol=1e-6)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    heads = sum(p.numel() for name in adapters.head(model) for p in model.get_submodule(name).parameters())
    assert sum(t.numel() for t in tensors.values()) == heads + sum(unit.parameters for unit in units)
    base, _ = checkpoint.load(tmp_path / "base", dtype="float32", **HEAD)
    with pytest.raises(ValueError, match="is not supported"):
        PeftModel.from_pretrained(base, tmp_path / "out")
    assert "Plain peft cannot load this folder" in (tmp_path / "out" / "README.md").read_text()


def test_a_language_model_has_no_head(words, tokens, tmp_path):
    model, _ = saved("llama", words, tmp_path, ("lora", "adapter"), head={})
    loaded, _ = checkpoint.load(tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), atol=1e-6, rtol=1e-6)


ORACLE = """
import re, sys, adapters, torch, transformers
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
adapters.init(model)
model.add_adapter("one", config=adapters.SeqBnConfig(reduction_factor=3, non_linearity="relu"))
model.set_active_adapters("one")
given, count = load_file(folder + "/units.safetensors"), 0
with torch.no_grad():
    for name, p in model.named_parameters():
        if ".adapters.one." in name:
            layer, part, kind = re.search(r"\\.(\\d+)\\..*adapter_(down|up)\\.(?:0\\.)?(weight|bias)$", name).groups()
            p.copy_(given.pop(f"{layer}.{part}.{kind}"))
            count += p.numel()
    assert not given and count
    ids = torch.arange(5, 29).reshape(2, 12)
    logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
save_file({"logits": logits.contiguous(), "count": torch.tensor(count)}, folder + "/oracle.safetensors")
"""


@pytest.mark.skipif("SENTEI_ADAPTERS_PYTHON" not in os.environ, reason="names a Python that has the adapters package")
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_the_adapters_package_computes_the_same(family, words, tmp_path):
    """Its Pfeiffer adapter with our weights: equal logits and counts. It pins another transformers: hence a process."""
    from safetensors.torch import load_file, save_file

    tiny_model(family).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    model, _ = checkpoint.load(tmp_path / "base", dtype="float32", **HEAD)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path / "headed")
    units = space(model, kinds=("adapter",))
    adapters.inject(model, units)
    stir(model, units)
    given = {}
    for unit in units:
        (module,) = adapters.modules(model, unit)
        parts = {"down": module.down, "up": module.up}
        given |= {f"{unit.layer}.{n}.{k}": p.detach() for n, part in parts.items() for k, p in part.named_parameters()}
    save_file(given, tmp_path / "headed" / "units.safetensors")
    command = [os.environ["SENTEI_ADAPTERS_PYTHON"], "-c", ORACLE, str(tmp_path / "headed")]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=quiet)
    found = load_file(tmp_path / "headed" / "oracle.safetensors")
    ours = logits(model, torch.arange(5, 29).reshape(2, 12))
    assert (ours - found["logits"]).abs().max() <= 1e-6 * max(1.0, float(ours.abs().max()))
    assert int(found["count"]) == sum(unit.parameters for unit in units)


def test_a_folded_base_saves_and_loads(words, tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    model, tokenizer = checkpoint.load(tmp_path / "parent", dtype="float32")
    folding.fold(model, (1, 2), 1, rank=2, scale=True)
    stage = {"method": "by_hand", "fields": {}, "seed": 0, "data": {"name": "none", "sha256": "0"}, "record": {}}
    checkpoint.save(model, tokenizer, tmp_path / "base", parent=tmp_path / "parent", record=stage)
    model, units = saved_over(tmp_path / "base", tmp_path / "out", ("lora", "adapter"))
    assert {"adapter.L1", "adapter.L2", "lora.L1"} <= {unit.id for unit in units}
    loaded, _ = checkpoint.load(tmp_path / "out", dtype="float32", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), atol=1e-6, rtol=1e-6)


def test_bad_folders(words, tmp_path):
    saved("bert", words, tmp_path, ("lora", "adapter"))
    tiny_model("bert", num_hidden_layers=4).save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained on a base of fingerprint [0-9a-f]{16}, .* has [0-9a-f]{16}"):
        checkpoint.adapters.load(tmp_path / "out", base=tmp_path / "other")
    with pytest.raises(ValueError, match="exists"):
        checkpoint.adapters.check_output(tmp_path / "out")
    assert checkpoint.adapters.check_output(tmp_path / "out", force=True)
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks adapter_model"):
        checkpoint.load(tmp_path / "out")
    (tmp_path / "out" / "sentei_adapter.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path / "out")


def test_a_ladder_of_ranks(tmp_path, tokens):
    """Slices of one LoRA: counted apart, trained and saved as one, loaded by peft alone."""
    from peft import PeftModel

    model = tiny_model("llama")
    base = tiny_model("llama")
    units = space(model, kinds=("lora",), rank=(2, 4, 8))
    assert [unit.id for unit in units[:3]] == ["lora.L0.r0-2", "lora.L0.r2-4", "lora.L0.r4-8"]
    whole = space(model, kinds=("lora",), rank=8)
    assert sum(unit.parameters for unit in units) == sum(unit.parameters for unit in whole)
    assert units[2].parameters == 2 * units[1].parameters == 2 * units[0].parameters
    assert units[1].stands_on(units[0]) and not units[0].stands_on(units[1]) and not units[2].stands_on(units[0])
    assert not units[4].stands_on(units[0])  # another layer's

    living = [unit for unit in units if unit.id not in ("lora.L0.r4-8", "lora.L1.r2-4", "lora.L1.r4-8")]
    adapters.inject(model, living, alpha_per_rank=2.0)
    trained = adapters.parameters(model, living)
    assert len({id(p) for p in trained}) == len(trained)
    assert sum(p.numel() for p in trained) == sum(unit.parameters for unit in living)
    query = adapters.modules(model, units[0])[0]
    assert query.r["default"] == 4 and query.scaling["default"] == 2.0
    assert adapters.modules(model, units[3])[0].r["default"] == 2
    # a slice begins alike whichever others live
    fresh = tiny_model("llama")
    adapters.inject(fresh, units, alpha_per_rank=2.0)
    for unit in living:
        for (role, one), (_, two) in zip(adapters.matrices(model, unit), adapters.matrices(fresh, unit), strict=True):
            assert torch.equal(unit.own(role, one), unit.own(role, two)) and unit.own(role, one).numel()
    stir(model, living)
    changed = logits(model, tokens)
    config = adapters.lora_config(living, 2.0, 0.0)
    (tmp_path / "out").mkdir()
    config.save_pretrained(tmp_path / "out")
    save_file(adapters.state(model, living), tmp_path / "out" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert torch.equal(logits(loaded, tokens), changed)

    for rank in ((), (4, 2), (2, 2), (0, 2)):
        with pytest.raises(ValueError, match="ranks to choose from must rise and be at least 1"):
            space(tiny_model("llama"), rank=rank)
