"""Healing, on toys: a model learns a little language, loses parts, and gets some of it back."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sentei import data, lora, structure
from sentei.data import Text
from sentei.distill import Distillation
from sentei.methods import heal as heal_module
from sentei.methods.heal import Heal
from sentei.train import Settings, shuffled, train

NUM_WORDS = 60


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<mask>": 2} | {f"w{i}": i + 3 for i in range(NUM_WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>")


@pytest.fixture(scope="module")
def text():
    """Counting by threes: each word follows from the last, so there is something to learn."""

    def document(seed):
        return " ".join(f"w{(seed * 7 + 3 * i) % NUM_WORDS}" for i in range(60 + seed))

    class Secret(list):
        def __iter__(self):
            raise AssertionError("healing looked at the test text")

        __getitem__ = __len__ = __iter__

    return Text([document(i) for i in range(20)], [document(i) for i in range(20, 24)], Secret(), "counting", "0" * 64)


def tiny(seed=0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUM_WORDS + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


@pytest.fixture(scope="module")
def parent(tokenizer, text):
    model = tiny()
    blocks = data.blocks(text.train, tokenizer, 16)
    list(train(model, shuffled(blocks, 8, seed=0), Distillation(), Settings(lr=1e-2, steps=60)))
    return model.eval()


@pytest.fixture
def pruned(parent):
    """Layers of different widths, one without attention, one with an MLP of width zero."""
    model = copy.deepcopy(parent)
    units = structure.units(model)
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[units.of(0, "heads")[:1]] = False
    keep[units.of(0, "channels")[10:30]] = False
    keep[units.of(1, "heads")] = False
    keep[units.of(1, "channels")[::4]] = False
    structure.remove(model, units, keep)
    last = structure.layers(model)[2].mlp
    with torch.no_grad():
        for linear in (last.gate_proj, last.up_proj):
            linear.weight = nn.Parameter(linear.weight[:0])
            linear.out_features = 0
        last.down_proj.weight = nn.Parameter(last.down_proj.weight[:, :0])
        last.down_proj.in_features = 0
    return model


def short(**fields) -> Heal:
    return Heal(
        **{"steps": 24, "seq_len": 16, "batch_size": 4, "lr": 1e-2, "lora_rank": 4, "eval_tokens": 128} | fields
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_plain(model, before):
    """Same modules, names, shapes, dtypes and flags as before; no adapter, hook or gradient."""
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()] == before
    assert all(type(module).__module__.split(".")[0] != "peft" for module in model.modules())
    assert "peft_config" not in vars(model) and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def shape_of(model):
    return [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quality_comes_back(pruned, parent, tokenizer, text, mode, dtype):
    pruned.to(dtype)
    before, old, seen = shape_of(pruned), weights(pruned), []
    how = short(mode=mode, steps=40, precision="fp32" if dtype == torch.float32 else "auto")
    record = how.compress(pruned, tokenizer, text, teacher=parent, report=seen.append)
    assert record["loss_after"] < 0.8 * record["loss_before"]
    assert record["best_step"] > 0 and record["steps"] == 40 and record["tokens"] == 40 * 4 * 15
    assert len(seen) == 40 and {"step", "of", "message"} <= seen[0].keys()
    assert_plain(pruned, before)
    changed = {name for name, p in pruned.named_parameters() if not torch.equal(p, old[name])}
    assert changed and not any("embed" in name for name in changed)
    if mode == "lora":
        assert all(name.endswith("_proj.weight") for name in changed)
    best = min(entry["validation_loss"] for entry in record["history"])
    assert record["loss_after"] == pytest.approx(best, abs=1e-5 if dtype == torch.float32 else 0.05)
    assert pruned.generate(torch.tensor([[5, 8]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_killed_and_resumed_is_never_killed(pruned, parent, tokenizer, text, mode, tmp_path):
    how = short(mode=mode, eval_every=4)
    whole, killed, resumed = pruned, copy.deepcopy(pruned), copy.deepcopy(pruned)
    expected = how.compress(whole, tokenizer, text, teacher=parent)

    def kill(progress):
        if progress["step"] == 14:
            raise KeyboardInterrupt

    before = shape_of(killed)
    with pytest.raises(KeyboardInterrupt):
        how.compress(killed, tokenizer, text, teacher=parent, workdir=tmp_path, report=kill)
    assert_plain(killed, before)
    steps = []
    record = how.compress(
        resumed, tokenizer, text, teacher=parent, workdir=tmp_path, report=lambda p: steps.append(p["step"])
    )
    assert steps[0] == 13
    assert_same(weights(whole), weights(resumed))
    for entry in (*expected["history"], *record["history"]):
        entry.pop("seconds", None)
    assert {**expected, "seconds": 0} == {**record, "seconds": 0}


def test_a_workdir_of_another_run_is_refused_and_the_model_left_whole(pruned, parent, tokenizer, text, tmp_path):
    short(steps=2).compress(copy.deepcopy(pruned), tokenizer, text, teacher=parent, workdir=tmp_path)
    before, old = shape_of(pruned), weights(pruned)
    with pytest.raises(ValueError, match="another run"):
        short(steps=2, kl_weight=0.5).compress(pruned, tokenizer, text, teacher=parent, workdir=tmp_path)
    assert_plain(pruned, before)
    assert_same(old, weights(pruned))


def test_merged_equals_adapted(pruned):
    ids = torch.arange(3, 19).reshape(2, 8)
    names = heal_module._adapt(pruned, short())
    assert len(names) == 7 + 3 + 4  # the layer without attention has three linears, the one with an empty MLP four
    with torch.no_grad():
        for name, p in pruned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    adapted = pruned(ids).logits
    lora.detach(pruned, names)
    assert (pruned(ids).logits - adapted).abs().max() <= 1e-5


def test_merging_rounds_once():
    """In bf16 the merged weight is the fp32 sum rounded, not a sum of rounded parts."""
    model = tiny().bfloat16()
    names = heal_module._adapt(model, short())
    wrapped = model.get_submodule(names[0])
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    nn.init.normal_(b, std=0.01)
    expected = (wrapped.get_base_layer().weight.float() + (32.0 / 4) * (b @ a)).to(torch.bfloat16)
    lora.detach(model, names)
    assert torch.equal(model.get_submodule(names[0]).weight, expected)


def test_early_stopping_puts_the_best_back(pruned, parent, tokenizer, text, monkeypatch):
    """The validation loss is faked to be best at the second measurement; what is left must be the weights of then."""
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.4, 9.9])
    snapshots = []

    def fake(model, held, precision):
        snapshots.append(weights(model))
        return {"ce": next(losses)}

    monkeypatch.setattr(heal_module, "held_out", fake)
    record = short(mode="full", steps=50, eval_every=2, patience=2).compress(pruned, tokenizer, text, teacher=parent)
    assert record["best_step"] == 4 and record["steps"] == 8 and record["stopped_early"]
    assert_same(weights(pruned), snapshots[2])
    assert not torch.equal(snapshots[2]["model.norm.weight"], snapshots[4]["model.norm.weight"])


def test_never_worse_than_the_start(parent, tokenizer, text):
    """A learning rate that wrecks the model leaves it as it came."""
    model = copy.deepcopy(parent)
    old = weights(model)
    record = short(mode="full", lr=3.0, steps=6).compress(model, tokenizer, text, teacher=parent)
    assert record["best_step"] == 0 and record["loss_after"] == record["loss_before"]
    assert_same(old, weights(model))


def test_the_same_seed_gives_the_same_weights(pruned, parent, tokenizer, text):
    again, other = copy.deepcopy(pruned), copy.deepcopy(pruned)
    torch.manual_seed(1)
    short(steps=4).compress(pruned, tokenizer, text, teacher=parent)
    torch.manual_seed(2)
    short(steps=4).compress(again, tokenizer, text, teacher=parent)
    short(steps=4, seed=1).compress(other, tokenizer, text, teacher=parent)
    assert_same(weights(pruned), weights(again))
    assert not torch.equal(pruned.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_time_limit(pruned, parent, tokenizer, text):
    record = short(steps=None, minutes=0.05).compress(pruned, tokenizer, text, teacher=parent)
    assert record["steps"] >= 1 and record["seconds"] < 30
    assert record["history"][-1]["step"] == record["steps"]
    assert record["loss_after"] <= record["loss_before"]


def test_without_a_teacher(pruned, tokenizer, text):
    with pytest.warns(UserWarning, match="without the dense parent"):
        record = short().compress(pruned, tokenizer, text)
    assert record["loss_after"] < record["loss_before"] and "losses" in record["history"][-1]
    assert "kl" not in record["history"][-1]["losses"]


def test_no_forward_of_a_teacher_that_does_not_count(pruned, tokenizer, text):
    class Never(LlamaForCausalLM):
        def forward(self, *_, **__):
            raise AssertionError("the teacher ran")

    short(steps=2, kl_weight=0.0).compress(pruned, tokenizer, text, teacher=Never(tiny().config))


def test_the_teacher_is_not_touched(pruned, parent, tokenizer, text):
    old = weights(parent)
    short(steps=3).compress(pruned, tokenizer, text, teacher=parent)
    assert_same(old, weights(parent))


def test_encoder(tokenizer, text):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = BertForMaskedLM(BertConfig(vocab_size=NUM_WORDS + 3, pad_token_id=0, **sizes)).eval()
    student = copy.deepcopy(teacher)
    before = shape_of(student)
    record = short(steps=30, lora_rank=8).compress(student, tokenizer, text, teacher=teacher)
    assert math.isfinite(record["loss_after"]) and record["loss_after"] < record["loss_before"]
    assert_plain(student, before)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "qlora"}, "lora or full"),
        ({"lora_rank": 0}, "lora_rank must be above 0"),
        ({"ce_weight": 0.0, "kl_weight": 0.0}, "one above 0"),
        ({"minutes": -1.0}, "minutes must be above 0"),
        ({"seq_len": 1}, "seq_len"),
        ({"lr": -1.0}, "lr must be above 0"),
    ],
)
def test_wrong_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        Heal(**fields)


def test_refusals(pruned, parent, tokenizer, text):
    before, old = shape_of(pruned), weights(pruned)
    with pytest.raises(ValueError, match="the model itself"):
        short().compress(pruned, tokenizer, text, teacher=pruned)
    larger = LlamaForCausalLM(LlamaConfig(**parent.config.to_dict() | {"vocab_size": 70}))
    with pytest.raises(ValueError, match="vocabulary of 70, the model of 63"):
        short().compress(pruned, tokenizer, text, teacher=larger)
    with pytest.raises(ValueError, match="found 0 blocks"):
        short().compress(pruned, tokenizer, Text([], text.validation, [], "", ""), teacher=parent)
    with pytest.raises(ValueError, match="nothing to learn from"):
        short(ce_weight=0.0).compress(pruned, tokenizer, text)
    assert_plain(pruned, before)
    assert_same(old, weights(pruned))
