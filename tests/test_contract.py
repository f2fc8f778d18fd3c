"""What every structural method promises, on any architecture. A new method joins by a line in METHODS."""

import json
import math

import pytest
import torch
from conftest import ENCODERS, tiny_model

from sentei import checkpoint, data, masks, methods, structure
from sentei.methods.fold_gpt import FoldGPT
from sentei.methods.one_shot import OneShot
from sentei.methods.policy_gradient import PolicyGradient

FEW = {"calibration_samples": 16, "calibration_seq_len": 16}
SEARCH = FEW | {
    "seq_len": 16, "batch_size": 2, "coarse_steps": 3, "eval_every": 2, "eval_samples": 2, "save_every": 1,
}  # fmt: skip
METHODS = {
    "random": OneShot(criterion="random", **FEW),
    "magnitude": OneShot(criterion="magnitude", compensate="mean", **FEW),
    "wanda": OneShot(criterion="wanda", granularity="channels", compensate="least-squares", **FEW),
    "flap": OneShot(criterion="flap", compensate="mean", **FEW),
    "taylor": OneShot(criterion="taylor", **FEW),
    "shortgpt": OneShot(criterion="block_influence", **FEW),
    "sublayers": OneShot(criterion="block_influence", granularity="sublayers", **FEW),
    "greedy": OneShot(criterion="greedy", **FEW),
    "fold_gpt": FoldGPT(gate_steps=3, gate_batch=2, heal_steps=0, eval_samples=2, **FEW),
    "policy_gradient": PolicyGradient(**SEARCH),
    "policy_gradient_units": PolicyGradient(**SEARCH | {"coarse_steps": 0, "steps": 3, "compensate": "none"}),
    "policy_gradient_layers": PolicyGradient(granularity="layers", steps=3, **SEARCH),
}
FAMILIES = ("llama", "gemma3_text", "phi3", "bert")
PHRASE = "so it goes, and goes again, until the end of all the words that anyone has ever said; "


@pytest.fixture(scope="module")
def text():
    return data.Text([PHRASE * 12, PHRASE[::-1] * 12], [PHRASE * 4], [PHRASE], "phrases", "0" * 64)


@pytest.fixture
def ids():
    return torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def with_fields(method, **fields):
    return type(method)(**{**vars(method), **fields})


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def compressed(method, family, words, text, **keywords):
    model = tiny_model(family)
    return model, method.compress(model, words, text, **keywords)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name, family, words, text, ids):
    method = METHODS[name]
    dense = tiny_model(family)
    if name == "fold_gpt" and family in ENCODERS:
        with pytest.raises(ValueError, match="is an encoder"):
            method.compress(dense, words, text)
        return

    # a budget of 0 changes nothing
    model, _ = compressed(with_fields(method, sparsity=0.0), family, words, text)
    assert torch.equal(logits(model, ids), logits(dense, ids))

    # the same seed gives the same result, and nothing is left behind
    model, record = compressed(method, family, words, text)
    again, record_again = compressed(method, family, words, text)
    assert record["kept"] == record_again["kept"] and torch.equal(logits(model, ids), logits(again, ids))
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in dense.named_buffers()]

    # the budget is met in parameters, to within one unit
    units = structure.units(dense, method.resolved_granularity)
    keep = keep_from(record["kept"], units)
    target = masks.removal_target(units, method.sparsity)
    assert target <= units.removed_parameters(keep) < target + int(units.cost_U.max())

    # masked == cut, where no weight was refitted
    if record["compensate"] == "none":
        with masks.masked(dense, units, keep):
            torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-5, rtol=1e-5)

    # the record is JSON, and its fields make the method again
    json.dumps(record, allow_nan=False)
    assert type(method)(**json.loads(json.dumps(vars(method)))) == method

    # cached generation is uncached generation
    if family not in ENCODERS:
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def keep_from(kept, units):
    """The mask back from its account in compression.json."""
    keep = torch.zeros(len(units), dtype=torch.bool)
    for entry in kept["layers"]:
        for kind in units.granularity:
            of = units.of(entry["layer"], kind)
            if kind == "sublayers":
                stays = {structure.SUBLAYERS.index(name) for name in entry[kind]["units"]}
            else:
                runs = [run.split("-") for run in entry[kind]["units"].split(",") if run]
                stays = {i for run in runs for i in range(int(run[0]), int(run[-1]) + 1)}
            keep[of] = torch.tensor([i in stays for i in units.index_U[of].tolist()], dtype=torch.bool)
            assert len(stays) == entry[kind]["kept"] and len(of) == entry[kind]["of"]
    return keep


@pytest.mark.parametrize(
    ("name", "family"), [("fold_gpt", "llama"), ("flap", "llama"), ("policy_gradient", "qwen3"), ("shortgpt", "bert")]
)
def test_saved_and_loaded(name, family, words, text, ids, tmp_path):
    method = METHODS[name]
    tiny_model(family).save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    model, tokenizer = checkpoint.load(tmp_path / "parent", dtype="float32")
    record = method.compress(model, tokenizer, text)
    stage = {
        "method": "m", "fields": vars(method), "seed": 0, "data": {"name": "t", "sha256": "0"}, "record": record,
    }  # fmt: skip
    checkpoint.save(model, tokenizer, tmp_path / "small", parent=str(tmp_path / "parent"), record=stage)
    loaded, _ = checkpoint.load(tmp_path / "small", dtype="float32")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-6, rtol=1e-6)
    stored = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert type(method)(**stored["stages"][-1]["fields"]) == method
    shrunk = (tmp_path / "parent" / "model.safetensors").stat().st_size
    shrunk -= (tmp_path / "small" / "model.safetensors").stat().st_size
    assert abs(shrunk - 4 * record["removed_parameters"]) < 8192  # headers differ by names and sizes of tensors


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor", "policy_gradient"])
def test_planted_units(name, words, text):
    """A useless channel goes before a vital one."""
    model = tiny_model("llama", mlp_bias=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 5] *= 1e-4
            layer.mlp.down_proj.weight[:, 9] *= 10
    method = with_fields(METHODS[name], granularity="channels", sparsity=0.2, compensate="none")
    record = method.compress(model, words, text)
    units = structure.units(tiny_model("llama", mlp_bias=False), "channels")
    keep = keep_from(record["kept"], units)
    for layer in range(4):
        of = units.of(layer, "channels")
        assert keep[of[9]] and not keep[of[5]]


@pytest.mark.parametrize("name", METHODS)
def test_refusals(name, words, text):
    for fields, message in (
        ({"sparsity": 1.0}, "sparsity is the fraction"),
        ({"compensate": "some"}, "compensate is one of"),
        ({"granularity": "neurons"}, "granularity is one of"),
        ({"shape": "round"}, "shape is one of"),
        ({"ridge": math.nan}, "ridge is a finite number"),
    ):
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=message):
            with_fields(METHODS[name], **fields).compress(model, words, text)
        assert structure.total_parameters(model) == structure.total_parameters(tiny_model("llama"))


def test_methods_by_name():
    assert methods.load("policy_gradient") is PolicyGradient
    with pytest.raises(ValueError, match="did you mean 'policy_gradient'"):
        methods.load("policy_gradeint")


def test_nothing_improves_nothing_worsens(words, text):
    """The search never returns worse than its start, as measured on held-out text."""
    _, record = compressed(METHODS["policy_gradient"], "llama", words, text)
    assert record["best_loss"] <= record["start_loss"] < math.inf
