"""Prune Once for All, the int8 stage: with a runtime where it is installed, and codes alone without one."""

import copy
import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from sentei import data
from sentei.checkpoint import sparse
from sentei.data import examples
from sentei.export import torch_1x4
from sentei.methods.prune_once import lock, quantise
from sentei.methods.prune_once.quantise import Quantise
from sentei.recipe import make_method

WORDS = ["tree", "leaf", "root", "twig", "bark", "moss", "seed", "stem", "bud", "vine"]
FEW = {"epochs": 1, "batch_size": 8, "seq_len": 24, "calibration_rows": 16}
needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None or importlib.util.find_spec("openvino") is None,
    reason="needs pip install 'sentei[openvino]'",
)


def sentence(i):
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 4))


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.tsv"
    lines = dict.fromkeys(f"{sentence(i)} {i}\t{'good' if i % 2 else 'bad'}" for i in range(60))
    file.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    return examples.load(str(file))


def sparse_model(auto=AutoModelForSequenceClassification, *, block=1, **more):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=66, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, **more,
    )  # fmt: skip
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for p in lock.prunable(model).values():
            rows = p.reshape(-1, block)
            rows[rows.abs().mean(1).argsort()[: int(0.8 * len(rows))]] = 0.0
            p.mul_(5)
    return model


def zero_sets(model, names):
    state = dict(model.named_parameters())
    return {name: state[name] == 0 for name in names}


def test_codes_without_a_runtime(rows, words, tmp_path):
    """scheme weights: nothing is trained, zeros stay, values are code * step, the file is a quarter or less."""
    model = sparse_model()
    before = zero_sets(model, lock.prunable(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = Quantise(scheme="weights", scope="linear+embeddings", **FEW).compress(model, words, rows)
    after = zero_sets(model, before)
    assert all(torch.equal(before[name], before[name] & after[name]) for name in before)
    steps = record["saving"]["scales"]
    assert "bert.embeddings.word_embeddings.weight" in steps and set(before) <= set(steps)
    for name, p in model.named_parameters():
        if name in steps:
            assert (p - weights[name]).abs().max() <= 0.5001 * steps[name].max()
        else:
            assert torch.equal(p, weights[name])
    table = record["bytes"]
    assert table["ours"]["matrices"] < table["int8"]["matrices"] < table["fp16"]["matrices"] < table["fp32"]["matrices"]
    assert set(record["scores"]) == {"fp32", "torch"}
    json.dumps({key: value for key, value in record.items() if key != "saving"}, allow_nan=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int4"}, "scheme is one of"),
        ({"scope": "none"}, "scope is one of"),
        ({"fast_path": "cuda"}, "fast_path is one of"),
        ({"calibration_rows": 0}, "calibration_rows must be above 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Quantise(**{"scheme": "weights", **fields})


def test_without_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nncf" else find(name, *a))
    with pytest.raises(ValueError, match=r"pip install 'sentei\[openvino\]' \(not found: nncf"):
        make_method("prune_once_quantise", {})
    make_method("prune_once_quantise", {"scheme": "weights"})


def test_the_fast_path_needs_blocks(rows, words):
    with pytest.raises(ValueError, match="needs pattern 1x4"):
        Quantise(scheme="weights", fast_path="torch_1x4", **FEW).compress(sparse_model(), words, rows)


def test_a_dense_model_is_refused(rows, words):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(sparse_model().config)
    with pytest.raises(ValueError, match="nothing to lock"):
        Quantise(scheme="weights", **FEW).compress(model, words, rows)


@needs_runtime
@pytest.mark.slow  # NNCF compiles its extension on a new machine
@pytest.mark.parametrize(
    "how",
    [{}, {"scope": "linear+embeddings"}, {"scheme": "int8_paper"}, {"fast_path": "torch_1x4"}, {"kd_hidden": 3.0}],
    ids=str,
)
def test_int8_in_the_runtime(how, rows, words, tmp_path):
    model = sparse_model(block=4 if how.get("fast_path") else 1)
    before = zero_sets(model, lock.prunable(model))
    teacher = copy.deepcopy(model) if how.get("kd_hidden") else None
    record = Quantise(**FEW | {"lr": 1e-3} | how).compress(model, words, rows, teacher=teacher, workdir=tmp_path)
    assert (record["history"][-1].get("hidden", 0) > 0) == (teacher is not None)  # of the quantised layers' outputs
    after = zero_sets(model, before)
    assert all(torch.equal(before[name], before[name] & after[name]) for name in before)
    kernel = {"torch_1x4"} if how.get("fast_path") else set()
    assert set(record["scores"]) == {"fp32", "torch", "openvino", "openvino f32"} | kernel
    saving = record["saving"]
    assert set(saving["activations"]) == {name.removesuffix(".weight") for name in before if kernel}
    assert (saving["files"]["openvino"] / "openvino_model.bin.zst").stat().st_size == record["bytes"]["ir zst"]
    # the container's values are those of the runtime: same logits in torch with the codes, but for the inputs' rounding
    steps = saving["scales"]
    state = dict(model.named_parameters())
    most = 64 if how.get("fast_path") else 127
    for name in before:
        step = steps[name].reshape(-1, 1)
        codes = (state[name] / step).round()
        assert codes.abs().max() <= most and torch.equal(codes * step, state[name])
        assert (step.numel() == 1) == (how.get("scheme") == "int8_paper")
    sparse.write(tmp_path / "m", {n: (state[n] / steps[n].reshape(-1, 1)).round().to(torch.int8) for n in before},
                 scales={n: steps[n] for n in before})  # fmt: skip
    assert all(torch.equal(value, state[name]) for name, value in sparse.read(tmp_path / "m").items())


@needs_runtime
@pytest.mark.slow
def test_without_a_folder_nothing_is_left_and_nothing_is_lost(rows, words, tmp_path, monkeypatch):
    """A folder of the user's own that is called openvino stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "notes.txt").write_text("mine")
    record = Quantise(**FEW).compress(sparse_model(), words, rows)
    assert record["saving"]["files"] == {} and record["bytes"]["ir"] > 0
    assert [file.name for file in (tmp_path / "openvino").iterdir()] == ["notes.txt"]


class Killed(Exception):
    pass


@needs_runtime
@pytest.mark.slow
def test_killed_quantise_goes_on(rows, words, tmp_path):
    """Weights, ranges and codes to the bit."""
    method = Quantise(**FEW | {"lr": 1e-3, "save_every": 2})

    def kill(event):
        if event.get("step") == 5:
            raise Killed

    whole, resumed, seen = sparse_model(), sparse_model(), []
    wanted = method.compress(whole, words, rows, workdir=tmp_path / "whole")
    with pytest.raises(Killed):
        method.compress(sparse_model(), words, rows, workdir=tmp_path / "cut", report=kill)
    found = method.compress(
        resumed, words, rows, workdir=tmp_path / "cut", report=lambda event: seen.append(event.get("step"))
    )
    assert next(step for step in seen if step) == 5
    assert found["mask_sha256"] == wanted["mask_sha256"] and found["scores"] == wanted["scores"]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_1x4_kernel(words):
    """A model computed by torch's kernel is the one in fp32 but for the steps of its inputs and outputs."""
    model = sparse_model(block=4)
    names = [name.removesuffix(".weight") for name in lock.prunable(model)]
    codes, ranges, seen = {}, {}, {}
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            step = weight.abs().amax(1).clamp(min=1e-8) / 64
            code = (weight / step[:, None]).round().to(torch.int8)
            weight.copy_(code.float() * step[:, None])
            codes[f"{name}.weight"] = code, step
    batch = dict(words(["the old tree", "by the river"], return_tensors="pt"))
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for name in names:
        linear = model.get_submodule(name)
        linear.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        wanted = model(**batch).logits
        for name, (x, y) in seen.items():
            (in_scale, in_zp), (out_scale, out_zp) = (
                torch_1x4.uint8_range(float(t.min()), float(t.max())) for t in (x, y)
            )
            ranges[name] = {"in_scale": in_scale, "in_zp": in_zp, "out_scale": out_scale, "out_zp": out_zp}
        made = torch_1x4.converted(model, codes, ranges)
        torch.testing.assert_close(made(**batch).logits, wanted, atol=0.05, rtol=0.05)
        one = names[0]  # one linear in integers: at most a step from the kernel
        linear, (x, y) = made.get_submodule(one), seen[one]
        steps = ((linear(x) - y).abs() / ranges[one]["out_scale"]).max()
        slack = ranges[one]["in_scale"] / 2 * model.get_submodule(one).weight.abs().sum(1).max()
        assert steps <= 1 + slack / ranges[one]["out_scale"]
    code, step = codes[f"{one}.weight"]
    with pytest.raises(ValueError, match="saturates for codes above 64"):
        torch_1x4.Linear(code.clone().fill_(65), step, None, ranges[one])


@needs_runtime
@pytest.mark.slow
def test_runtime_equals_training(rows, words):
    """The IR computes what the quantised torch model computes, to 1e-6, after training has moved the weights."""
    from sentei.export import openvino

    method = Quantise(**FEW | {"lr": 1e-3})
    model = sparse_model()
    task = method._task(rows, words)
    quantised = method._quantised(model, task)
    found = quantise._weight_quantisers(quantised, quantise._example(task))
    clamp = quantise._Clamp(quantised, found)
    method._learn(quantised, task, None, between=lambda step, state: clamp(), workdir=None, report=None)
    made = openvino.convert(quantised, quantise._example(task))
    batch = task.collate(task.encoded("test"))
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    with torch.no_grad():
        wanted = quantised.eval()(**inputs).logits
    (logits,) = openvino.runner(made, precision="f32")(inputs)
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-5)


@needs_runtime
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qa", "clm"])
def test_other_kinds_in_the_runtime(kind, words, tmp_path):
    words.model_input_names = ["input_ids", "attention_mask"]
    if kind == "qa":
        model = sparse_model(AutoModelForQuestionAnswering)
        row = {
            "id": "0",
            "context": "the old tree by the river",
            "question": "what",
            "answers": [{"text": "tree", "start": 8}],
        }
        rows = examples.Examples("qa", [row] * 9, [row] * 2, [row] * 2, None, "q", "0" * 64)
    else:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=128, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                             num_attention_heads=3, num_key_value_heads=3)  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for p in lock.prunable(model).values():
                p[p.abs() < p.abs().median()] = 0.0
        documents = [sentence(i) * 4 for i in range(20)]
        rows = data.Text(documents, documents[:4], documents[4:8], "t", "0" * 64)
    record = Quantise(task=kind, **FEW | {"seq_len": 40 if kind == "qa" else 24}).compress(
        model, words, rows, workdir=tmp_path
    )
    torch_score, runtime_score = (
        record["scores"][place]["test"][record["metric"]] for place in ("torch", "openvino f32")
    )
    assert runtime_score == pytest.approx(torch_score, rel=1e-3)
