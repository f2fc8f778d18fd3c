"""CONTRIBUTING.md, followed word for word: add a method, add an architecture."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from sentei import data, masks, methods, recipe, structure
from sentei.structure import families

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), re.DOTALL)


def code(mark: str) -> str:
    (found,) = [block for block in BLOCKS if mark in block]
    lines = found.splitlines()
    return "\n".join(line[3:] for line in lines)  # the blocks stand inside numbered lists


def test_add_a_method(monkeypatch, words):
    module = types.ModuleType("sentei.methods.my_method")
    monkeypatch.setitem(sys.modules, "sentei.methods.my_method", module)
    exec(code("class LargestChannels"), vars(module))
    monkeypatch.setitem(methods.METHODS, "my_method", "sentei.methods.my_method:LargestChannels")
    made = recipe.make_method("my_method", {"sparsity": "0.2", "compensate": "mean"})
    assert (made.sparsity, made.compensate) == (0.2, "mean")
    model = tiny_model("mistral")
    before = structure.layer_parameters(model)
    phrase = ["and so on, and so on, until there is enough of it for a block or two; " * 20]
    record = made.compress(model, words, data.Text(phrase * 20, phrase, phrase, "phrase", "0"))
    assert structure.layer_parameters(model) < 0.81 * before
    assert record["kept"]["granularity"] == "channels"


def test_add_an_architecture(monkeypatch, tokens):
    with pytest.raises(ValueError, match="granite"):
        structure.family("granite")
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(code('FAMILIES["granite"]'), {"FAMILIES": families.FAMILIES})
    model = tiny_model("granite", head_dim=4)
    units = structure.units(model)
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < 0.6
    with torch.no_grad(), masks.masked(model, units, keep):
        expected = model(input_ids=tokens).logits
    structure.remove(model, units, keep)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))
