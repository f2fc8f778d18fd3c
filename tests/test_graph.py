"""ONNX and OpenVINO: what the runtime computes from the graph is what the model computes."""

import importlib.util
import logging

import pytest
import torch
from conftest import tiny_model

from sentei import checkpoint, folding, structure
from sentei.cli import main
from sentei.export import graph


def runs(to):
    try:
        from transformers.exporters import ExportedModel  # noqa: F401
    except ImportError:
        return False
    return all(importlib.util.find_spec(name) for name in graph.PACKAGES[to])


@pytest.fixture(autouse=True)
def no_traces():
    """pytest collects all that is logged, and torch then writes down every step of an export."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


needs_onnx = pytest.mark.skipif(not runs("onnx"), reason="needs ONNX Runtime: pip install 'sentei[onnx]'")
needs_openvino = pytest.mark.skipif(not runs("openvino"), reason="needs OpenVINO: pip install 'sentei[openvino]'")


@pytest.fixture
def pruned(words, tmp_path):
    """A checkpoint with narrow layers, one without attention."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    units = structure.units(model)
    keep_U = torch.ones(len(units), dtype=torch.bool)
    keep_U[units.of(0, "heads")] = False
    keep_U[units.of(1, "heads")[1:]] = False
    keep_U[units.of(2, "channels")[::2]] = False
    structure.remove(model, units, keep_U)
    record = {"method": "one_shot", "fields": {}, "seed": 0, "record": {}}
    checkpoint.save(model, words, tmp_path / "small", parent=str(tmp_path / "parent"), record=record)
    return tmp_path / "small"


@needs_onnx
def test_a_pruned_decoder_reads_prompts_and_goes_on_with_its_cache(pruned, tmp_path, capsys):
    assert main(["export", str(pruned), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    assert "run in ONNX Runtime: logits within" in capsys.readouterr().out
    model, _ = checkpoint.load(pruned, dtype="float32")
    runtime = graph.load(tmp_path / "onnx", "onnx")
    ids_1T = torch.tensor([[5, 9, 7, 3, 8, 6, 4]])
    assert graph.compare(model, runtime, ids_1T) < 1e-5
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1  # another model is told from it
    assert graph.compare(model, runtime, ids_1T) > 1e-2


@needs_onnx
def test_rows_may_be_padded(pruned, tmp_path):
    found = graph.write(pruned, tmp_path / "onnx")
    runtime, (model, _) = graph.load(found["folder"], "onnx"), checkpoint.load(pruned, dtype="float32")
    ids_BT, mask_BT = torch.tensor([[5, 9, 7], [0, 4, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    cache = graph.empty_cache(model)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    logits_BTV = runtime(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache
    ).logits  # fmt: skip
    with torch.no_grad():
        alone_1TV = model(input_ids=ids_BT[1:, 1:]).logits
    torch.testing.assert_close(logits_BTV[1:, 1:], alone_1TV, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_an_encoder_and_shared_layers(words, tmp_path):
    """The weights of layers that share them lie in the file once."""
    encoder = tiny_model("bert")
    runtime = saved(encoder, tmp_path / "bert")
    assert graph.compare(encoder, runtime, torch.tensor([[5, 9, 7, 3]])) < 1e-5

    sizes = {}
    for name in ("apart", "shared"):
        model = tiny_model("mistral")
        if name == "shared":
            folding.fold(model, [1, 2], 1, rank=0, scale=False)
        runtime = saved(model, tmp_path / name)
        assert graph.compare(model, runtime, torch.tensor([[5, 9, 7, 3]])) < 1e-5
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).glob("*.data"))
        unique = 4 * structure.total_parameters(model)
        assert sizes[name] < 1.1 * unique + 20_000, name
    assert sizes["shared"] < sizes["apart"] - 8_000


def saved(model, folder):
    with graph._quiet():
        graph.export(model, "onnx").save_pretrained(folder)
    return graph.load(folder, "onnx")


@needs_openvino
def test_openvino(words, tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    found = graph.write(tmp_path / "model", tmp_path / "ir", to="openvino")
    assert found["difference"] < 1e-5 and found["bytes"] > 4 * structure.total_parameters(model)


@needs_onnx
def test_what_computes_something_else_is_not_written(pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph, "compare", lambda *given: float("nan"))
    monkeypatch.setattr(graph, "export", lambda model, to: model)
    monkeypatch.setattr(graph, "load", lambda folder, to: None)
    assert main(["export", str(pruned), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "computes other logits than torch" in capsys.readouterr().err

    def broken(model, to):
        raise RuntimeError("no such operator\nand a long traceback")

    monkeypatch.setattr(graph, "export", broken)
    assert main(["export", str(pruned), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("exporter to onnx cannot write this model: no such operator\n")
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "small"}


@pytest.mark.parametrize(
    ("to", "said"), [("onnx", "pip install 'sentei[onnx]'"), ("openvino", "pip install 'sentei[openvino]'")]
)
def test_missing_packages(to, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    assert main(["export", str(tmp_path), "--to", to, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give one of onnx, openvino"):
        graph.write("any", tmp_path / "out", to="gguf")
