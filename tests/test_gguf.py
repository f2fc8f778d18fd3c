"""GGUF: what llama.cpp computes from the file is what the model computes."""

import importlib.util
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import tiny_model
from gguf import GGUFReader, GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from sentei import adapters, checkpoint, folding, structure
from sentei.checkpoint import splitting
from sentei.cli import main
from sentei.export import gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install 'sentei[gguf]'"
)


@pytest.fixture
def bytes_():
    """A byte-level tokenizer with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "9")]
    names = ["<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def toy(family, **overrides):
    """Large enough that an error of arithmetic shows, with heads of an even size."""
    sizes = {
        "vocab_size": 264, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
        "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    return tiny_model(family, **sizes | overrides)


def saved(model, tokenizer, folder):
    """Written as sentei writes what it pruned."""
    parent = folder.with_name("parent")
    tiny = toy("llama")
    tiny.save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    record = {"method": "one_shot", "fields": {}, "seed": 0, "record": {}}
    checkpoint.save(model, tokenizer, folder, parent=str(parent), record=record)
    return folder


def cut(model, keep, biases=False):
    """Remove the units for which `keep(layer, kind, index)` is False; of what is gone a bias may stay."""
    units = structure.units(model)
    asked = zip(units.layer_U.tolist(), units.kind_U.tolist(), units.index_U.tolist(), strict=True)
    keep_U = torch.tensor([bool(keep(layer, structure.KINDS[kind], index)) for layer, kind, index in asked])
    bias = None
    if biases:
        random = torch.Generator().manual_seed(0)
        hidden = model.config.hidden_size
        bias = {
            (layer, kind): torch.randn(hidden, generator=random)
            for layer in range(units.num_layers)
            for kind in ("heads", "channels")
            if not keep_U[units.of(layer, kind)].all()
        }
    structure.remove(model, units, keep_U, bias)
    return model


@needs_llama_cpp
@pytest.mark.parametrize(("family", "biases"), [("llama", False), ("llama", True), ("mistral", True), ("qwen2", True)])
def test_layers_of_different_width_run_in_llama_cpp(family, biases, bytes_, tmp_path):
    """Narrow layers, one without heads (the first, which deci cannot leave out, and another), one without channels."""

    def keep(layer, kind, index):
        if kind == "heads":
            return layer not in (0, 2) and index < 4 - layer % 3
        return layer != 1 and index >= 8 * layer

    overrides = {"sliding_window": 4096} if family == "mistral" else {}
    model = cut(toy(family, **overrides), keep, biases)
    folder = saved(model, bytes_, tmp_path / "small")
    found = gguf.write(folder, tmp_path / "small.gguf", outtype="f32")
    assert found["architecture"] == "deci" and found["difference"] < 1e-4
    assert found["bytes"] == (tmp_path / "small.gguf").stat().st_size


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "overrides", "architecture"),
    [
        ("llama", {}, "llama"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, "llama"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
                },
                "tie_word_embeddings": False,
            },
            "llama",
        ),
        ("qwen2", {}, "llama"),
        ("qwen3", {}, "qwen3"),
    ],
)  # fmt: skip
def test_plain_layers_run_in_llama_cpp(family, overrides, architecture, bytes_, tmp_path):
    model = toy(family, **overrides)
    model.save_pretrained(tmp_path / "model")
    bytes_.save_pretrained(tmp_path / "model")
    found = gguf.write(tmp_path / "model", tmp_path / "model.gguf", outtype="f32")
    assert found["architecture"] == architecture and found["difference"] < 1e-4


@needs_llama_cpp
def test_types(bytes_, tmp_path, capsys):
    """From the command line; a feed-forward of 90 is no multiple of a block and stays in 16 bits."""
    model = cut(toy("llama"), lambda layer, kind, index: kind == "heads" or index < 90 or layer)
    folder = saved(model, bytes_, tmp_path / "small")
    assert "after `sentei export --to gguf`, as its architecture `deci`" in (folder / "README.md").read_text()
    for outtype, bytes_each in (("f16", 2), ("bf16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)):
        out = tmp_path / f"{outtype}.gguf"
        assert main(["export", str(folder), "--to", "gguf", "--outtype", outtype, "--out", str(out)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            f"written {out}" in said
            and f"architecture deci, {outtype} (likely tokens'" in said
            and "run in llama.cpp" in said
        )
        assert ("1 matrices are f16" in said) == outtype.startswith("q")
        assert 1 < out.stat().st_size / (bytes_each * structure.total_parameters(model)) < 1.5


@needs_llama_cpp
@pytest.mark.parametrize("name", splitting.SPLITS)
def test_text_is_split_as_the_tokenizer_does(name, bytes_, tmp_path):
    """There and back; the prompt has a number whose digits the toy tokenizer merges, which these four split apart."""
    bytes_.backend_tokenizer.pre_tokenizer = splitting.made(name)
    assert splitting.name_of(bytes_) == name
    toy("llama", attention_bias=False, mlp_bias=False).save_pretrained(tmp_path / "model")
    bytes_.save_pretrained(tmp_path / "model")
    gguf.write(tmp_path / "model", tmp_path / "model.gguf", outtype="f32")
    model, tokenizer = checkpoint.load(tmp_path / "model.gguf")
    text = "in 1998   77 of the theatres, it's 3.50"
    assert tokenizer(text)["input_ids"] == bytes_(text)["input_ids"] and splitting.name_of(tokenizer) == name
    same, _ = checkpoint.load(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(
            model(**tokenizer(text, return_tensors="pt")).logits, same(**bytes_(text, return_tensors="pt")).logits
        )


def test_splits_that_differ(bytes_):
    """Runs of spaces before a number, and numbers, tell the four apart."""
    found = {}
    for name in splitting.SPLITS:
        splitting.restore(bytes_, name)
        pieces = bytes_.backend_tokenizer.pre_tokenizer.pre_tokenize_str("the   1998")
        found[name] = tuple(piece for piece, _ in pieces)
    assert len(set(found.values())) == len(found)
    splitting.restore(bytes_, "command-r")  # a name that we do not know
    assert splitting.name_of(bytes_) == "qwen2"
    bytes_.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    splitting.restore(bytes_, "gpt-2")
    assert splitting.name_of(bytes_) is None


@needs_llama_cpp
def test_shared_layers_are_written_each(bytes_, tmp_path):
    model = toy("llama")
    folding.fold(model, (1, 2), 1, rank=2, scale=True)
    folder = saved(model, bytes_, tmp_path / "folded")
    found = gguf.write(folder, tmp_path / "folded.gguf", outtype="f32")
    assert found["difference"] < 1e-4 and "written unfolded" in found["notes"][0]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "blk.0.attn_q.bias"),
        (
            {
                "attention_bias": False,
                "mlp_bias": False,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            "rope_freqs.weight",
        ),
    ],
)
def test_what_transformers_would_leave_out_is_refused(overrides, name, bytes_, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_check_run", lambda *arguments: None)
    toy("llama", **overrides).save_pretrained(tmp_path / "model")
    bytes_.save_pretrained(tmp_path / "model")
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=f"holds {name}, which transformers does not read"):
        checkpoint.load(tmp_path / "model.gguf")


def test_neighbours_for_halves():
    rows = torch.arange(8)[:, None].expand(8, 3)
    assert gguf.interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf.interleaved(rows[:, 0], 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_file_that_computes_something_else_is_not_kept(bytes_, tmp_path, monkeypatch):
    """What llama.cpp answers is compared, and so is how it splits the prompt."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    toy("llama").save_pretrained(tmp_path / "model")
    bytes_.save_pretrained(tmp_path / "model")
    count = len(bytes_(gguf.PROMPT)["input_ids"])
    for reply, message in (
        (f'{{"logprobs": {{"5": 1.0}}, "prompt_tokens": {count}}}', "log-probabilities are up to"),
        (f'{{"logprobs": {{}}, "prompt_tokens": {count + 1}}}', f"makes {count + 1} tokens of a prompt"),
        (None, "llama.cpp does not run the file, which is not kept: boom"),
    ):

        def answer(command, reply=reply, **options):
            if reply is not None:
                Path(command[-1]).write_text(reply)
            return type("Done", (), {"stderr": "boom", "stdout": ""})

        monkeypatch.setattr(gguf.subprocess, "run", answer)
        with pytest.raises(ValueError, match=message):
            gguf.write(tmp_path / "model", tmp_path / "model.gguf")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@needs_llama_cpp
@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
def test_weights_in_the_wrong_order_are_seen(outtype, bytes_, tmp_path, monkeypatch):
    """Coarse types too: llama.cpp is held to the rounded weights."""
    model = toy("llama")
    for layer in structure.layers(model):
        layer.self_attn.q_proj.weight.data *= 30  # attention that matters
        layer.self_attn.o_proj.weight.data *= 30
    for part in (model, bytes_):
        part.save_pretrained(tmp_path / "model")
    found = gguf.write(tmp_path / "model", tmp_path / "right.gguf", outtype=outtype)
    assert found["difference"] < gguf.TYPES[outtype] and (found["rounding"] == 0) == (outtype == "f32")
    monkeypatch.setattr(gguf, "interleaved", lambda rows, head_dim: rows)
    with pytest.raises(ValueError, match="log-probabilities are up to"):
        gguf.write(tmp_path / "model", tmp_path / "wrong.gguf", outtype=outtype)
    assert not (tmp_path / "wrong.gguf").exists()


def test_what_gguf_cannot_hold(bytes_, words, tmp_path, capsys):
    def refused(model, message, tokenizer=bytes_, out="model.gguf", **options):
        if model is not None:
            model.save_pretrained(tmp_path / "model")
            tokenizer.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match=message):
            gguf.write(tmp_path / "model", tmp_path / out, **options)
        assert {path.name for path in tmp_path.iterdir()} <= {"model", "there.gguf"}

    refused(toy("gemma2"), "gemma2 is not written as GGUF here .*--shape uniform or padded")
    refused(tiny_model("bert"), "bert is not written as GGUF here", tokenizer=words)
    refused(toy("llama"), r"the tokenizer \(WordLevel\) is not one that sentei can write as GGUF", tokenizer=words)
    bytes_.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refused(toy("llama"), "split as gpt-2, smollm, llama-bpe or qwen2 do")
    bytes_.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    refused(toy("llama", rope_parameters=yarn), "rotary scaling 'yarn' is not written as GGUF")
    refused(toy("llama", vocab_size=250), "the tokenizer has tokens up to 261, the model 250 of them")
    refused(toy("llama", hidden_act="gelu"), "llama.cpp computes silu in these layers, the model gelu")
    classifier = AutoModelForSequenceClassification.from_config(toy("qwen2", tie_word_embeddings=True).config)
    refused(classifier, "Qwen2ForSequenceClassification is no causal language model")
    with pytest.raises(ValueError, match="a model without any attention has no place"):
        gguf.architecture_of(cut(toy("llama"), lambda layer, kind, index: kind != "heads"))
    (tmp_path / "model" / "sentei_adapter.json").write_text("{}")
    refused(None, "holds adapters, which a .gguf file of the model would leave out")
    (tmp_path / "model" / "sentei_adapter.json").unlink()
    refused(None, "give one that ends in .gguf", out="model")
    refused(None, "outtype 'q5' is not known; use f32, f16", outtype="q5")
    (tmp_path / "there.gguf").write_text("mine")
    refused(None, "there.gguf exists; choose another file, or pass --force", out="there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    model = cut(toy("qwen3"), lambda layer, kind, index: layer or index)
    with pytest.raises(ValueError, match="qwen3 has one width for all layers and no biases"):
        gguf.architecture_of(model)
    assert main(["export", str(tmp_path / "model"), "--to", "gguf", "--out", str(tmp_path / "x")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err
    for more in (["--outtype", "q8_0", "--out", str(tmp_path / "x")], ["--out", str(tmp_path / "x.gguf")]):
        assert main(["export", str(tmp_path / "model"), *more]) == 2
        assert "go with --to gguf" in capsys.readouterr().err


def test_a_models_own_code_runs_with_consent_only(bytes_, tmp_path, capsys):
    for part in (toy("llama"), bytes_):
        part.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "theirs.TheirsForCausalLM"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "theirs.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass TheirsForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    words = ["export", str(tmp_path / "model"), "--to", "gguf", "--out", str(tmp_path / "model.gguf")]
    assert main(words) == 2 and "--trust-remote-code" in capsys.readouterr().err
    assert main([*words, "--trust-remote-code"]) == 0


def test_scaling_in_a_file_is_refused(tmp_path):
    """transformers reads it for no architecture: the model would see other positions."""
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_float32("llama.rope.scaling.factor", 4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"asks for rotary scaling \(linear\), which transformers does not read"):
        checkpoint.load(tmp_path / "model.gguf")


def test_the_end_of_a_text_that_only_the_model_names(bytes_, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_check_run", lambda *arguments: None)
    bytes_.eos_token = None
    model = toy("llama", attention_bias=False, mlp_bias=False)
    model.generation_config.eos_token_id = [2, 1]
    model.save_pretrained(tmp_path / "model")
    bytes_.save_pretrained(tmp_path / "model")
    gguf.write(tmp_path / "model", tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.eos_token_id"].contents() == 2


@needs_llama_cpp
@pytest.mark.slow
def test_the_real_model_narrowed_runs_in_llama_cpp(tmp_path):
    """Its tokenizer, too: llama.cpp gets the prompt as text."""
    model, tokenizer = checkpoint.load(checkpoint.example_model(), dtype="float32")
    assert splitting.name_of(tokenizer) == "smollm"
    units = structure.units(model, "channels")
    structure.remove(model, units, units.index_U < 1536 - 16 * units.layer_U)
    record = {"method": "one_shot", "fields": {}, "seed": 0, "record": {}}
    checkpoint.save(model, tokenizer, tmp_path / "small", parent=str(checkpoint.example_model()), record=record)
    found = gguf.write(tmp_path / "small", tmp_path / "small.gguf", outtype="f32")
    assert found["architecture"] == "deci" and found["difference"] < 1e-3


def test_an_adapter_of_a_gguf_base_says_how_stock_peft_loads_it(bytes_, tmp_path):
    """transformers refuses a .gguf file's path alone; the lines of the card are run as they stand."""
    toy("llama", attention_bias=False, mlp_bias=False).save_pretrained(tmp_path / "model")
    bytes_.save_pretrained(tmp_path / "model")
    gguf.write(tmp_path / "model", tmp_path / "model.gguf", outtype="f32")
    head = {"task": "SequenceClassification", "labels": ["no", "yes"]}
    model, tokenizer = checkpoint.load(tmp_path / "model.gguf", dtype="float32", **head)
    units = adapters.units(model, kinds=("lora",), rank=4, width=8)
    what = {"units": [vars(unit) for unit in units], "alpha_per_rank": 2.0, "dropout": 0.1, "head": head}
    what["fingerprint"] = adapters.fingerprint(model)
    adapters.inject(model, units, alpha_per_rank=2.0)
    with torch.no_grad():
        for parameter in adapters.parameters(model, units):
            parameter.normal_(0, 0.1)
    out = tmp_path / "out"
    record = {"record": {"adapter": what}}
    checkpoint.adapters.save(
        model, tokenizer, out, parent=tmp_path / "model.gguf", record=record, pages={"README.md": "more\n"}
    )
    card = (out / "README.md").read_text()
    assert f'sentei.checkpoint.unpack("{tmp_path}/model.gguf", "FOLDER")' in card
    assert 'gguf_file="model.gguf", num_labels=2, dtype=torch.float32)' in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"out"', repr(str(out)))
    names = {"torch": torch, "transformers": transformers, "peft": peft}
    exec(code, names)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        found, expected = names["model"].eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
