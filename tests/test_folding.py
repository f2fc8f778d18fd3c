"""Layers that share weights: computed, saved, loaded, refused by stock classes, and made independent again."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import DECODERS, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_evaluate import lm_eval, task_folder  # noqa: F401
from torch import nn

from sentei import checkpoint, evaluate, folding, structure
from sentei.cli import main
from sentei.folding import ChildLinear

STAGE = {"method": "by_hand", "fields": {}, "seed": 0, "data": {"name": "none", "sha256": "0"}}
IDS = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))
PAIRED = {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}
ALIKE = {"gemma2": PAIRED, "gemma3_text": PAIRED}


def alike(family="llama", **overrides):
    return tiny_model(family, **{**ALIKE.get(family, {}), **overrides})


def folded(family="llama", *, rank=3, scale=True, average=False, members=(1, 2), owner=1, **overrides):
    """A model with one group and random corrections."""
    model = alike(family, **overrides)
    folding.fold(model, members, owner, rank=rank, scale=scale, average=average)
    for module in model.modules():
        if isinstance(module, ChildLinear):
            for parameter in (module.A, module.B, module.scale):
                if parameter is not None:
                    nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def children(model):
    return [module for module in model.modules() if isinstance(module, ChildLinear)]


@pytest.fixture
def saved(tmp_path, words):
    def write(model, parent=None, name="small", **options):
        if not (tmp_path / "parent").exists():
            (parent or alike()).save_pretrained(tmp_path / "parent")
            words.save_pretrained(tmp_path / "parent")
        options = {"verify": False} | options
        return checkpoint.save(model, words, tmp_path / name, parent=tmp_path / "parent", record=STAGE, **options)

    return write


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_a_bare_child_is_the_owner_run_twice(family):
    model = alike(family)
    expected = copy.deepcopy(model)
    layers = structure.layers(expected)
    layers[2].load_state_dict(layers[1].state_dict())
    folding.fold(model, (1, 2), 1, rank=0, scale=False)
    norms = {name: p for name, p in structure.layers(model)[1].named_parameters() if "norm" in name}
    structure.layers(model)[2].load_state_dict(norms, strict=False)
    assert torch.equal(logits(model), logits(expected))


def test_a_child_computes_its_equation():
    model = folded()
    child = structure.layers(model)[2].self_attn.o_proj
    shared = structure.layers(model)[1].self_attn.o_proj
    x = torch.randn(5, child.in_features)
    by_hand = child.scale * (x @ shared.weight.T + shared.bias + x @ child.A.T @ child.B.T)
    torch.testing.assert_close(child(x), by_hand)
    query = structure.layers(model)[2].self_attn.q_proj
    assert query.scale is None and query.A is not None  # scaled: only what writes into the residual stream


def test_terms_of_a_few_tokens_are_in_fp32():
    """A CPU's 16-bit products of one token cost more than they save; many tokens stay in 16 bits."""
    child = structure.layers(folded(scale=False).bfloat16())[2].self_attn.o_proj
    few = torch.randn(1, 4, child.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert child.A is not None and child.B is not None
    term = (few.float() @ child.A.float().T @ child.B.float().T).bfloat16()
    with torch.no_grad():
        assert torch.equal(child(few), child.shared()(few) + term)
        many = few.expand(2, -1, -1)
        low = nn.functional.linear(many, child.A)
        assert torch.equal(child(many), child.shared()(many) + nn.functional.linear(low, child.B))


def test_parameters_are_counted_once():
    model, dense = folded(rank=0, scale=False), alike()
    held, added = folding.saving(structure.layers(dense)[2], 0, False)
    assert structure.total_parameters(dense) - structure.total_parameters(model) == held and added == 0
    held, added = folding.saving(structure.layers(dense)[2], 3, True)
    assert structure.total_parameters(dense) - structure.total_parameters(folded()) == held - added
    again = copy.deepcopy(folded())
    assert structure.total_parameters(again) == structure.total_parameters(dense) - held + added
    assert structure.layers(again)[2].mlp.down_proj.shared() is structure.layers(again)[1].mlp.down_proj


def test_smollm2_sizes():
    """The sizes of SmolLM2-135M, by arithmetic that knows nothing of this package."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert structure.total_parameters(model) == 134_515_008
    for first in range(0, 30, 2):
        folding.fold(model, (first, first + 1), first, rank=0, scale=False)
    assert structure.total_parameters(model) == 81_430_848
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for first in range(0, 30, 2):
        folding.fold(model, (first, first + 1), first, rank=8, scale=True)
    assert structure.total_parameters(model) == 82_669_248


@pytest.mark.parametrize("owner", [1, 2])
@pytest.mark.parametrize("average", [False, True])
def test_unfold(owner, average):
    model = folded(owner=owner, average=average, attention_bias=False, mlp_bias=True)
    assert len(children(model)) == 14 if average else 7
    before = logits(model)
    folding.unfold(model)
    assert not children(model) and not folding.is_folded(model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert structure.total_parameters(model) == structure.total_parameters(alike(attention_bias=False, mlp_bias=True))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_align(family):
    """A block whose channels and heads were shuffled is recovered exactly, and no renumbering changes a block."""
    model = alike(family, hidden_size=48)
    row, layers = structure.family(model), structure.layers(model)
    size = structure.sizes(model)[1]
    generator = torch.Generator().manual_seed(1)
    layers[2].load_state_dict(layers[1].state_dict())
    channels = torch.randperm(size.intermediate_size, generator=generator)
    groups = torch.randperm(size.num_kv_heads, generator=generator)
    inside = torch.stack([torch.randperm(size.group_size, generator=generator) for _ in groups])
    query = torch.cat([g * size.group_size + inside[i] for i, g in enumerate(groups)])
    spread = lambda k: (k[:, None] * size.head_dim + torch.arange(size.head_dim)).flatten()  # noqa: E731
    q, kv, heads = spread(query), spread(groups), size.num_heads * size.head_dim
    found = {}
    both = torch.cat([channels, channels + size.intermediate_size]) if row.fused_up else channels
    for path in row.up:
        folding._permuted(found, path, structure.part(layers[2], path), rows=both)
    folding._permuted(found, row.down, structure.part(layers[2], row.down), columns=channels)
    if row.fused_qkv:
        rows = torch.cat([q, kv + heads, kv + heads + size.num_kv_heads * size.head_dim])
        folding._permuted(found, row.query, structure.part(layers[2], row.query), rows=rows)
    else:
        for path, rows in ((row.query, q), (row.key, kv), (row.value, kv)):
            folding._permuted(found, path, structure.part(layers[2], path), rows=rows)
    folding._permuted(found, row.output, structure.part(layers[2], row.output), columns=q)
    before = logits(model)
    original = {name: x.clone() for name, x in layers[1].state_dict().items()}
    layers[2].load_state_dict(found, strict=False)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)  # the shuffle itself is harmless
    back = folding.align(layers[1], layers[2], row)
    for name, weight in back.items():
        assert torch.equal(weight, original[name]), name
    before = logits(model)
    layers[3].load_state_dict(folding.align(layers[1], layers[3], row), strict=False)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


# --- generation and training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("mistral", 1), ("gemma3_text", 1)])
def test_generation_with_cache(family, beams):
    """Every logical layer has its own place in the cache: cached generation is uncached generation."""
    model = folded(family)
    padded = IDS.clone()
    padded[0, :4] = 0
    options = {"attention_mask": (padded != 0).long(), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"num_beams": beams, "pad_token_id": 0}
    expected = model.generate(padded, use_cache=False, **options)
    assert torch.equal(model.generate(padded, **options), expected)
    if beams == 1 and family != "mistral":
        assert torch.equal(model.generate(padded, cache_implementation="static", **options), expected)
    first = model(IDS[:, :6], use_cache=True)
    assert len(first.past_key_values.layers) == 4
    rest = model(IDS[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, logits(model)[:, 6:], atol=1e-4, rtol=1e-4)


def test_gradients_with_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = folded().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


def test_adapters_on_top_act_everywhere_and_merge_exactly():
    model = folded()
    made = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    wrapped = [name for name, module in made.named_modules() if type(module).__name__ == "Linear" and "lora" in
               type(module).__module__]  # fmt: skip
    assert len(wrapped) == 3 * 7 and not any(".layers.2." in name for name in wrapped)
    before = logits(made)
    assert not torch.allclose(before, logits(folded()))
    merged = made.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    assert merged.model.layers[2].mlp.down_proj.shared() is merged.model.layers[1].mlp.down_proj


def test_adapters_on_a_checkpoint(saved, tmp_path):
    """Loaded, tuned, the adapter saved and loaded again, merged, and saved: still folded, and the same answers."""
    out = saved(folded())
    tuned = get_peft_model(checkpoint.load(out)[0], LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B alone
        tuned(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(checkpoint.load(out)[0], tmp_path / "adapter").eval()
    expected = logits(tuned.eval())
    assert torch.equal(logits(again), expected) and not torch.allclose(expected, logits(folded()), atol=1e-3)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    written = checkpoint.save(
        merged, checkpoint.load(out)[1], tmp_path / "merged", parent=out, record=STAGE, verify=False
    )
    loaded, _ = checkpoint.load(written)
    assert torch.equal(logits(loaded), logits(merged)) and folding.layout(loaded) == folding.layout(folded())
    assert (written / "model.safetensors").stat().st_size == (out / "model.safetensors").stat().st_size


def test_adapters_by_suffix_are_refused():
    with pytest.raises(ValueError, match="ChildLinear"):
        get_peft_model(folded(), LoraConfig(r=4, target_modules=["q_proj"]))


def test_int8_quantises_owners_once():
    model = folded()
    owners = sum(isinstance(module, nn.Linear) for module in model.modules())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    int8 = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(int8) == owners == 3 * 7 + 1
    assert quantised.model.layers[2].mlp.down_proj.shared() is quantised.model.layers[1].mlp.down_proj
    assert torch.isfinite(logits(quantised)).all()


def test_pruning_a_folded_model_is_refused():
    for granularity in ("channels", "layers"):
        with pytest.raises(ValueError, match="Prune first"):
            structure.units(folded(), granularity)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_save_and_load(family, saved):
    model = folded(family, average=family == "qwen2", owner=2 if family == "llama" else 1)
    out = saved(model, parent=alike(family))
    loaded, _ = checkpoint.load(out)
    assert torch.equal(logits(loaded), logits(model))
    assert folding.layout(loaded) == folding.layout(model)
    unique = sum(p.numel() * p.element_size() for p in model.parameters()) + 4 * len(children(model))
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert (out / "model.safetensors").stat().st_size == unique + 8 + header
    assert sum(p.numel() for p in loaded.parameters()) == structure.total_parameters(model)
    again = saved(loaded, name="again")  # a stage that shares nothing more, such as healing
    assert torch.equal(logits(checkpoint.load(again)[0]), logits(model))


def test_fresh_process_sharded_and_bf16(saved):
    model = folded(tie_word_embeddings=True)
    out = saved(model, parent=alike(tie_word_embeddings=True), verify=True, dtype=torch.bfloat16)
    account = json.loads((out / "compression.json").read_text())["result"]
    assert account["shape"] == "folded" and account["verified"] and account["largest_difference"] < 1e-4
    unique = 2 * (structure.total_parameters(model) + len(children(model)))
    assert unique < account["bytes"] < unique + 20_000
    loaded, _ = checkpoint.load(out)
    folder = out.parent / "sharded"
    loaded.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits(type(loaded).from_pretrained(folder)), logits(loaded))
    assert "modeling_sentei_folded.py" in (out / "README.md").read_text()


def test_what_is_written_twice_is_noticed(saved):
    """A single vector too much, in files whose headers are longer than it."""
    out = saved(folded())
    loaded, _ = checkpoint.load(out)
    loaded.save_pretrained(out.parent / "sharded", max_shard_size="20KB")
    files = sorted((out.parent / "sharded").glob("*.safetensors"))
    checkpoint.folded.check_bytes(out.parent / "sharded", loaded)
    tensors = load_file(files[0])
    name = next(name for name, tensor in tensors.items() if tensor.numel() > 1)
    more, fewer = tensors | {"again": tensors[name][:1].clone()}, {key: tensors[key] for key in tensors if key != name}
    for changed in (more, fewer):
        save_file(changed, files[0])
        with pytest.raises(ValueError, match="not written exactly once"):
            checkpoint.folded.check_bytes(out.parent / "sharded", loaded)


def test_widths_that_differ(saved):
    """A model pruned to unequal widths folds where neighbours are equal, and is saved with both."""
    model = alike()
    units = structure.units(model, "channels")
    structure.remove(model, units, (units.layer_U != 3) | (units.index_U < 30))
    with pytest.raises(AssertionError):
        folding.fold(model, (2, 3), 2, rank=0, scale=False)
    folding.fold(model, (1, 2), 1, rank=2, scale=True)
    out = saved(model, verify=True)
    loaded, _ = checkpoint.load(out)
    assert torch.equal(logits(loaded), logits(model))
    folding.unfold(loaded)
    assert saved(loaded, name="unfolded", verify=True)


def test_lm_eval(saved, tmp_path, task_folder, lm_eval, monkeypatch):  # noqa: F811
    """Tasks are scored as on the unfolded twin."""

    tasks = importlib.import_module("lm_eval.tasks")

    class NoDefaults(tasks.TaskManager):  # lm-eval's own take ten seconds to list
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", NoDefaults)
    out = saved(folded())
    checkpoint.unfold(out, tmp_path / "plain")
    scores = []
    for folder in (out, tmp_path / "plain"):
        model, tokenizer = checkpoint.load(folder)
        scores.append(evaluate.tasks(model, tokenizer, ["own_task"], include_path=task_folder)["own_task"])
    assert scores[0] == scores[1] and scores[0]["samples"] == 12 and 0 < scores[0]["acc"] < 1


def test_stock_classes_refuse(saved):
    out = saved(folded())
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(out)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="n\n")
    assert run.returncode and "trust_remote_code" in run.stderr


def test_files_that_do_not_belong_together(saved):
    out = saved(folded())
    config = json.loads((out / "config.json").read_text())
    config["fold"]["owner"][2] = 0
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not belong together"):
        checkpoint.load(out)


@pytest.mark.parametrize("command", [["unfold"], ["export", "--to", "dense"]])
def test_unfold_from_the_command_line(command, saved, tmp_path, capsys):
    out = saved(folded())
    assert main([*command, str(out), "--out", str(tmp_path / "plain")]) == 0
    said = capsys.readouterr().out
    assert "without sharing" in said and "instead of" in said
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(folded()), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size > (out / "model.safetensors").stat().st_size
    assert main([*command, str(tmp_path / "plain"), "--out", str(tmp_path / "again")]) == 2
    refusal = "is not folded" if command == ["unfold"] else "nothing to make dense"
    assert refusal in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_stock_shapes_are_refused(saved):
    for shape in ("uniform", "padded"):
        with pytest.raises(ValueError, match="sentei unfold"):
            saved(folded(), shape=shape)
