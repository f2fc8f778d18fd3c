"""benchmark.py on two tiny checkpoints on disk. Nothing here asserts a time: only sizes, counts and plain failures."""

import json
import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sentei import benchmark

HIDDEN, VOCABULARY, PROMPT = 32, 128, 16
SMALL = {"prompt_tokens": PROMPT, "new_tokens": 2, "rounds": 2, "warmup": 0, "threads": 1, "progress": False}


def save(model, folder):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.eos_token = "w1"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(folder, layers, width):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return save(LlamaForCausalLM(config), folder)


def touched(layers, width):
    """Weights of the linears one token passes: q, o, k, v (half as wide), gate, up, down, and the LM head."""
    return layers * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * width) + VOCABULARY * HIDDEN


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return llama(root / "child", 2, 48), llama(root / "parent", 3, 64)


@pytest.fixture(scope="module")
def result(pair):
    return benchmark.run(*pair, **SMALL)


def test_ratios_are_finite_and_rounds_are_kept(result):
    for quantity in ("prefill", "first_token", "decode"):
        spread = result["speedups"][quantity]
        assert len(spread["rounds"]) == SMALL["rounds"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"] < math.inf
        assert result[f"speedup_{quantity}"] == spread["median"]
    assert result["speedup_of_ideal"] == pytest.approx(result["speedup_prefill"] / result["ideal"]["speedup"])
    for side in ("parent", "child"):
        assert len(result[side]["decode_tokens_per_second"]["rounds"]) == SMALL["rounds"]


def test_ideal_counts_every_linear_and_the_head_but_no_lookup(result):
    assert result["parent"]["linear_parameters_per_token"] == touched(3, 64)
    assert result["child"]["linear_parameters_per_token"] == touched(2, 48)
    assert result["ideal"]["touched_ratio"] == pytest.approx(touched(2, 48) / touched(3, 64))
    head = VOCABULARY * HIDDEN
    first = [layers_and_head * PROMPT - (PROMPT - 1) * head for layers_and_head in (touched(3, 64), touched(2, 48))]
    assert result["ideal"]["speedup_first_token"] == pytest.approx(first[0] / first[1])


def test_attention_is_counted_apart(result):
    attention = 3 * 4 * PROMPT * PROMPT * HIDDEN  # layers x two products of two operations
    linears = 2 * PROMPT * touched(3, 64)
    assert result["parent"]["attention_share"] == pytest.approx(attention / (attention + linears), rel=0.1)


def test_parameters_bytes_and_memory(result, pair):
    norms = HIDDEN
    parameters = {"child": touched(2, 48) + 5 * norms, "parent": touched(3, 64) + 7 * norms}
    for side, folder in zip(("child", "parent"), pair, strict=True):
        assert result[side]["parameters"] == parameters[side]
        assert result[side]["bytes"] == (folder / "model.safetensors").stat().st_size
        memory = result[side]["memory"]
        assert 0 < memory["imports_bytes"] <= memory["peak_bytes"]
        assert memory["cuda_peak_bytes"] is None or memory["cuda_peak_bytes"] > 0
    assert result["ratios"]["parameters"] == parameters["child"] / parameters["parent"]


def test_written_beside_the_child(result, pair):
    assert json.loads((pair[0] / "bench.json").read_text()) == result
    assert not (pair[1] / "bench.json").exists()


def load_here(folder):
    """The worker's model in this process: a process of its own costs seconds of imports."""
    subject = benchmark._Subject()
    settings = {name: SMALL[name] for name in ("prompt_tokens", "new_tokens")}
    answer = subject.load(str(folder), **settings, batch_size=1, threads=None, dtype="auto", device=None)
    return subject, answer


def test_encoder_has_no_tokens_to_generate(tmp_path):
    config = BertConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    subject, answer = load_here(save(BertForMaskedLM(config), tmp_path / "bert"))
    seconds = {name: [value] for name, value in subject.prefill().items()}
    sides = {"parent": answer, "child": dict(answer)}
    result = benchmark._compare(sides, {"parent": seconds, "child": seconds}, SMALL | {"batch_size": 1})
    assert result["speedup_prefill"] == result["speedup_of_ideal"] == 1
    assert "speedup_decode" not in result and "first_token_seconds" not in result["child"]


def test_prompt_longer_than_the_model_has_room_for(tmp_path, monkeypatch):
    folder = llama(tmp_path / "llama", 1, 48)
    monkeypatch.setitem(SMALL, "prompt_tokens", 100)
    with pytest.raises(ValueError, match="room for 64 positions, 103 are asked; lower prompt_tokens"):
        load_here(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"warmup": -1}, "warmup must be 0 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"prompt_tokens": 0}, "prompt_tokens must be 1 or more"),
    ],
)
def test_wrong_numbers(pair, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        benchmark.run(*pair, **SMALL | change)
    assert "\n" not in str(caught.value)


def test_missing_child(pair, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at "):
        benchmark.run(tmp_path / "nowhere", pair[1], **SMALL)


def test_a_crashed_worker_says_its_last_line(pair, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    out = tmp_path / "out.json"
    with pytest.raises(ValueError, match=r"broken stopped while it should load: .+") as caught:
        benchmark.run(pair[0], broken, **SMALL, json_path=out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
