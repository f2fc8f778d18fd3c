"""Tiny random models of every family, quick enough to prune hundreds of times."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
ENCODERS = ("bert", "roberta", "distilbert")
VOCAB = 128

_DECODER_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_SPECIAL: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True, "hidden_size": 48},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"hidden_size": 48, "rope_scaling": None},
}
_ENCODER_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip


def tiny_model(family: str, seed: int = 0, **overrides) -> nn.Module:
    """A random fp32 model: head_dim unlike hidden / heads, GQA, biases, q/k norms, windows, as the family has."""
    sizes = _ENCODER_SIZES if family in ENCODERS else _DECODER_SIZES
    sizes = sizes | _SPECIAL.get(family, {}) | overrides
    if family == "distilbert":
        names = {
            "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
        }  # fmt: skip
        sizes = {names.get(key, key): value for key, value in sizes.items()}
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(seed)
    model = (AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM).from_config(config)
    for parameter in model.parameters():  # norms and biases too, so that a lost one shows
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1) * 0.5, std=0.2)
    return model.eval()


@pytest.fixture
def script(monkeypatch):
    """The script of benchmarks/ with a name, imported anew."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")

    def found(name: str):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return found


@pytest.fixture(params=DECODERS + ENCODERS)
def any_model(request) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 12] token ids without special ones."""
    return torch.randint(5, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters for the tiny models' vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    vocab |= {chr(i): len(vocab) + i - 32 for i in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        mask_token="<mask>",
    )  # fmt: skip
