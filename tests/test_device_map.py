"""A model whose layers accelerate's hooks place: all on one device here, for want of two."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from conftest import tiny_model

from sentei import checkpoint, data
from sentei.cli import main
from sentei.methods.one_shot import OneShot
from sentei.methods.policy_gradient import PolicyGradient

WORDS = "the quick brown fox jumps over the lazy dog and runs far away into woods "
TEXT = data.Text([WORDS * 40] * 3, [WORDS * 20], [WORDS], "words", "0")
FIELDS = {"calibration_samples": 16, "calibration_seq_len": 16}
QUICK = FIELDS | {"seq_len": 16, "batch_size": 2, "coarse_steps": 4, "eval_every": 2, "eval_samples": 4, "steps": 2}


def places(first, second):
    """All that `tiny_model("llama")` is made of: the upper layers, the norm and the head on the second device."""
    upper = {f"model.layers.{i}": second for i in (2, 3)} | {"model.norm": second, "lm_head": second}
    return {
        "model.embed_tokens": first,
        "model.rotary_emb": first,
        "model.layers.0": first,
        "model.layers.1": first,
    } | upper


@pytest.mark.parametrize(
    "method",
    [
        PolicyGradient(sparsity=0.3, slope_sweeps=1, **QUICK),
        PolicyGradient(sparsity=0.3, compensate="least-squares", init="flap", correction=0.3, **QUICK),
        OneShot(sparsity=0.3, criterion="taylor", compensate="mean", **FIELDS),
        OneShot(sparsity=0.3, criterion="greedy", granularity="sublayers", **FIELDS),
    ],
    ids=["policy_gradient", "refit", "taylor", "greedy"],
)  # fmt: skip
def test_under_accelerates_hooks_all_is_as_without(method, words):
    plain = tiny_model("llama")
    hooked = dispatch_model(copy.deepcopy(plain), places("cpu", "cpu"), main_device="cpu", force_hooks=True)
    found = [method.compress(model, words, TEXT)["kept"] for model in (plain, hooked)]
    assert found[0] == found[1]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, hooked(input_ids=ids).logits)


def test_what_is_offloaded_is_refused(words, tmp_path):
    source = saved(words, tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the devices of device_map.*weights were offloaded"):
        checkpoint.load(source, device_map=places("cpu", "disk"))
    with pytest.raises(ValueError, match="device and device_map exclude each other"):
        checkpoint.load(source, device="cpu", device_map="auto")
    (tmp_path / "sentei_adapter.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapters, which sentei loads on one device; leave device_map out"):
        checkpoint.load(tmp_path, device_map="auto")
    model, _ = checkpoint.load(source, device_map="auto")
    assert {str(weight.device) for weight in model.parameters()} == {"cpu"}


def test_methods_that_work_on_one_device_say_so(words, tmp_path, capsys):
    source, out = saved(words, tmp_path), tmp_path / "out"
    assert main(["heal", str(source), "--teacher", str(source), "--device-map", "auto", "--out", str(out)]) == 2
    assert "method heal works on one device; leave device_map out" in capsys.readouterr().err
    assert not out.exists()


def saved(words, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
