"""The training loop and the losses against a teacher, on toys."""

import copy
import itertools
import math
from contextlib import closing

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from sentei import distill
from sentei.train import (
    IGNORE,
    Settings,
    causal_batch,
    learning_rate,
    masked_batch,
    shuffled,
    train,
    weights_digest,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tiny(seed=0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **fields))


@pytest.fixture
def blocks():
    return torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(1))


def ce_only(model, batch):
    return distill.Distillation()(model, batch)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- the loop -------------------------------------------------------------------------------------------------------


def test_loss_falls_and_records_are_complete(blocks):
    model = tiny()
    steps = list(train(model, shuffled(blocks, 4, seed=0), ce_only, Settings(lr=1e-2, steps=40, weight_decay=0.1)))
    assert [s.step for s in steps] == list(range(1, 41))
    assert steps[-1].progress == 1 and steps[0].lr < steps[3].lr and steps[-1].lr < 1e-4
    assert steps[-1].tokens == 40 * 4 * 15
    assert steps[-1].losses["loss"] < steps[0].losses["loss"] - 0.3
    assert all(math.isfinite(s.grad_norm) and s.grad_norm > 0 for s in steps)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_killed_and_resumed_is_never_killed(blocks, tmp_path, dropout):
    settings = Settings(lr=1e-2, steps=11, save_every=3, weight_decay=0.1)

    def start(folder, state):
        model = tiny(attention_dropout=dropout)
        run = train(model, shuffled(blocks, 4, seed=5), ce_only, settings, folder=folder, state=state)
        return model, run

    whole_state, killed_state = {"seen": []}, {"seen": []}
    whole, run = start(tmp_path / "whole", whole_state)
    records = []
    for record in run:
        records.append(record)
        whole_state["seen"].append(record.losses["loss"])
    _, run = start(tmp_path / "killed", killed_state)
    with closing(run):
        for record in run:
            killed_state["seen"].append(record.losses["loss"])
            if record.step == 8:  # two steps after the checkpoint of step 6 are lost
                break
    torch.rand(7)  # whatever another process did to the global generator must not matter
    resumed_state = {"seen": ["nonsense"]}
    resumed, run = start(tmp_path / "killed", resumed_state)
    again = []
    for record in run:
        again.append(record)
        resumed_state["seen"].append(record.losses["loss"])
    assert [r.step for r in again] == list(range(7, 12))
    assert [(r.losses, r.lr, r.grad_norm, r.tokens) for r in again] == [
        (r.losses, r.lr, r.grad_norm, r.tokens) for r in records[6:]
    ]
    assert resumed_state == whole_state
    assert_same(weights(whole), weights(resumed))
    _, run = start(tmp_path / "killed", {})
    assert list(run) == []  # a finished run stays finished
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["train.pt"]


def test_checkpoint_of_another_run_is_refused(blocks, tmp_path):
    def start(model, lr):
        return list(train(model, shuffled(blocks, 4, seed=0), ce_only, Settings(lr=lr, steps=2), folder=tmp_path))

    start(tiny(), 1e-3)
    with pytest.raises(ValueError, match="another run"):
        start(tiny(), 2e-3)
    with pytest.raises(ValueError, match="another run"):
        start(tiny(seed=1), 1e-3)


def test_a_failed_write_leaves_the_old_checkpoint(blocks, tmp_path, monkeypatch):
    batches, settings = shuffled(blocks, 4, seed=0), Settings(lr=1e-3, steps=4, save_every=2)
    run = train(tiny(), batches, ce_only, settings, folder=tmp_path)
    for _ in range(3):
        next(run)
    before = (tmp_path / "train.pt").read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        list(run)
    assert (tmp_path / "train.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["train.pt"]


def test_accumulation_equals_a_large_batch_even_with_padding(blocks):
    answer = (
        torch.rand(blocks.shape, generator=torch.Generator().manual_seed(2))
        < torch.linspace(0.2, 1, len(blocks))[:, None]
    )
    marked = torch.cat([blocks, answer.long()], 1)

    def make(rows, n):
        return causal_batch(rows[:, :16], None, rows[:, 16:].bool())

    ends = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        model = tiny().double().float()
        settings = Settings(lr=1e-3, steps=3, accumulate=accumulate, precision="fp32")
        last = list(train(model, shuffled(marked, batch_size, seed=0, make=make), ce_only, settings))[-1]
        ends.append((last, weights(model)))
    assert ends[0][0].losses["ce"] == pytest.approx(ends[1][0].losses["ce"], abs=1e-6)
    assert ends[0][0].grad_norm == pytest.approx(ends[1][0].grad_norm, rel=1e-5)
    assert ends[0][0].tokens == ends[1][0].tokens
    for name, value in ends[0][1].items():
        assert torch.allclose(value, ends[1][1][name], atol=1e-5), name


def test_checkpointing_changes_no_number(blocks):
    ends = []
    for checkpointing in (False, True):
        model = tiny()
        settings = Settings(lr=1e-3, steps=3, checkpointing=checkpointing)
        list(train(model, shuffled(blocks, 4, seed=0), ce_only, settings))
        ends.append(weights(model))
        assert not model.is_gradient_checkpointing
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=1e-6), name


def test_weight_decay_is_on_matrices_only(blocks):
    model = tiny()
    before = weights(model)

    def nothing_to_learn(model, batch):
        return {"loss": sum((p * 0).sum() for p in model.parameters())}

    list(train(model, shuffled(blocks, 4, seed=0), nothing_to_learn, Settings(lr=1e-2, steps=2, weight_decay=0.5)))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim < 2), name


def test_time_limit_is_honoured(blocks):
    seconds = 1.5
    steps = list(train(tiny(), shuffled(blocks, 4, seed=0), ce_only, Settings(lr=1e-3, seconds=seconds)))
    assert steps and steps[-1].seconds < 10 * seconds
    assert steps[-1].lr < steps[len(steps) // 2].lr or len(steps) < 4
    assert all(a.progress <= b.progress for a, b in itertools.pairwise(steps))


def test_time_spent_counts_over_all_sittings(blocks, tmp_path):
    def start():
        settings = Settings(lr=1e-3, seconds=2.0, save_every=1)
        return train(tiny(), shuffled(blocks, 4, seed=0), ce_only, settings, folder=tmp_path)

    first = start()
    next(first)
    next(first)
    first.close()
    second = list(start())
    assert second[0].step == 2 and second[0].seconds > 0


def test_not_finite_stops_after_some_steps_and_skips_until_then(blocks):
    model = tiny()
    before = weights(model)

    def broken(model, batch):
        return {"loss": ce_only(model, batch)["loss"] * float("nan")}

    run = train(model, shuffled(blocks, 4, seed=0), broken, Settings(lr=1e-3, steps=9, patience=3))
    assert math.isnan(next(run).losses["loss"])
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row .*lower lr"):
        list(run)
    assert_same(before, weights(model))


def test_a_single_bad_step_is_survived(blocks):
    model, count = tiny(), iter(range(99))

    def once(model, batch):
        return {"loss": ce_only(model, batch)["loss"] * (float("inf") if next(count) == 2 else 1.0)}

    assert len(list(train(model, shuffled(blocks, 4, seed=0), once, Settings(lr=1e-3, steps=6)))) == 6
    assert all(p.isfinite().all() for p in model.parameters())


def test_global_generator_and_mode_are_left_alone(blocks):
    model = tiny(attention_dropout=0.1).eval()
    torch.manual_seed(3)
    list(train(model, shuffled(blocks, 4, seed=0), ce_only, Settings(lr=1e-3, steps=2)))
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3)) and not model.training


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": 1e-3}, "no end"),
        ({"lr": 0.0, "steps": 1}, "lr must be above 0"),
        ({"lr": 1e-3, "steps": 0}, "steps must be above 0"),
        ({"lr": 1e-3, "steps": 1, "warmup": 1.0}, "warmup"),
        ({"lr": 1e-3, "steps": 1, "precision": "fp16"}, "precision"),
    ],
)
def test_wrong_settings(fields, words):
    with pytest.raises(ValueError, match=words):
        Settings(**fields)


def test_refusals(blocks):
    frozen = tiny().requires_grad_(False)
    settings = Settings(lr=1e-3, steps=1)
    with pytest.raises(ValueError, match="nothing to train"):
        next(train(frozen, shuffled(blocks, 4, seed=0), ce_only, settings))
    with pytest.raises(ValueError, match="must be float32"):
        next(train(tiny().bfloat16(), shuffled(blocks, 4, seed=0), ce_only, settings))
    with pytest.raises(ValueError, match="no target"):
        nothing = shuffled(blocks, 4, seed=0, make=lambda rows, n: causal_batch(rows, None, torch.zeros_like(rows)))
        next(train(tiny(), nothing, ce_only, settings))


def test_bf16_keeps_fp32_master_weights(blocks):
    model = tiny()
    list(train(model, shuffled(blocks, 4, seed=0), ce_only, Settings(lr=1e-3, steps=2, precision="bf16")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_schedule():
    settings = Settings(lr=2.0, steps=1, warmup=0.2, final_lr=0.1)
    assert learning_rate(settings, 0.0) == 0
    assert learning_rate(settings, 0.1) == pytest.approx(1.0)
    assert learning_rate(settings, 0.2) == pytest.approx(2.0)
    assert learning_rate(settings, 0.6) == pytest.approx(1.1)
    assert learning_rate(settings, 1.0) == pytest.approx(0.2)


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_number_alone(blocks):
    a, b, other = shuffled(blocks, 5, seed=0), shuffled(blocks, 5, seed=0), shuffled(blocks, 5, seed=1)
    for n in (7, 0, 3):
        assert torch.equal(a(n)["input_ids"], b(n)["input_ids"])
    assert not torch.equal(a(0)["input_ids"], other(0)["input_ids"])
    epoch = torch.cat([shuffled(blocks, 6, seed=0)(n)["input_ids"] for n in range(4)])
    assert sorted(epoch.tolist()) == sorted(blocks.tolist())


def test_targets_are_the_next_tokens():
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    batch = causal_batch(ids, torch.tensor([[1, 1, 1, 0, 0]]))
    assert batch["targets"].tolist() == [[6, 7, IGNORE, IGNORE, IGNORE]]
    answer = torch.tensor([[0, 0, 1, 0, 0]]).bool()
    assert causal_batch(ids, None, answer)["targets"].tolist() == [[IGNORE, 7, IGNORE, IGNORE, IGNORE]]


class Words:
    all_special_ids = (0, 1, 2)
    mask_token_id = 2

    def __len__(self):
        return 96


def test_masked_batch():
    ids = torch.randint(3, 96, (64, 64))
    ids[:, 0] = 1
    batch = masked_batch(ids, Words(), seed=4)
    chosen = batch["targets"] != IGNORE
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert not chosen[:, 0].any() and torch.equal(batch["targets"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    assert (batch["input_ids"][chosen] == 2).float().mean().item() == pytest.approx(0.8, abs=0.05)
    assert torch.equal(masked_batch(ids, Words(), seed=4)["input_ids"], batch["input_ids"])


# --- distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_of_the_same_is_zero_with_zero_gradient(blocks, temperature):
    model = tiny()
    loss_function = distill.Distillation(tiny(), temperature, ce_weight=0.0, chunk=7)
    parts = loss_function(model, causal_batch(blocks))
    assert parts["kl"] == 0 and parts["loss"] == 0
    parts["loss"].backward()
    assert all(not p.grad.any() for p in model.parameters())
    logits = torch.randn(3, 4, 9, requires_grad=True)
    same = distill.kl(logits, logits.detach(), temperature)
    same.backward()
    assert same == 0 and logits.grad.abs().max() < 1e-7


def test_kl_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert distill.kl(student, teacher).item() == pytest.approx(by_hand, abs=1e-6)
    q = 3**0.5 / (1 + 3**0.5)
    soft = 4 * (q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q)))
    assert distill.kl(student, teacher, 2.0).item() == pytest.approx(soft, abs=1e-6)
    two = torch.cat([student, student + torch.tensor([[9.0, 0.0]])])
    assert distill.kl(two, teacher.expand(2, 2), mask=torch.tensor([True, False])).item() == pytest.approx(
        by_hand, abs=1e-6
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_chunks_equal_whole_logits(blocks, tied, temperature, chunk):
    """Values and all gradients, of the head as well, against the losses written in the usual way; with padding."""
    student, teacher = tiny(tie_word_embeddings=tied), tiny(seed=1).eval()
    mask = (
        torch.arange(16) < torch.randint(4, 17, (len(blocks), 1), generator=torch.Generator().manual_seed(0))
    ).long()
    batch = causal_batch(blocks, mask)
    parts = distill.Distillation(teacher, temperature, ce_weight=0.3, kl_weight=0.9, chunk=chunk)(student, batch)
    parts["loss"].backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    logits = student(input_ids=blocks, attention_mask=mask).logits
    with torch.no_grad():
        teacher_logits = teacher(input_ids=blocks, attention_mask=mask).logits
    labels = blocks.masked_fill(mask == 0, IGNORE)
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    kl = distill.kl(logits[:, :-1], teacher_logits[:, :-1], temperature, mask=mask[:, 1:].bool())
    (0.3 * ce + 0.9 * kl).backward()
    assert parts["ce"].item() == pytest.approx(ce.item(), abs=1e-5)
    assert parts["kl"].item() == pytest.approx(kl.item(), abs=1e-5)
    with torch.no_grad():
        alone = distill.Distillation(chunk=chunk)(student, batch)["loss"]
    assert alone.item() == pytest.approx(ce.item(), abs=1e-5)
    for name, p in student.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-6), name


@pytest.mark.parametrize("chunk", [7, 4096])
def test_targets_have_weights(blocks, chunk):
    """The cross-entropy is the weighted mean, whether it is differentiated or not; the divergence knows no weights."""
    student, teacher = tiny(), tiny(seed=1).eval()
    weights = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0))
    batch = causal_batch(blocks) | {"weights": weights}
    parts = distill.Distillation(teacher, 2.0, ce_weight=0.3, kl_weight=0.9, chunk=chunk)(student, batch)
    parts["loss"].backward()
    ours = student.lm_head.weight.grad.clone()
    student.zero_grad()
    logits = student(input_ids=blocks).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
    ce = (each * weights[:, :-1].flatten()).sum() / weights[:, :-1].sum()
    with torch.no_grad():
        expected = teacher(input_ids=blocks).logits[:, :-1]
    (0.3 * ce + 0.9 * distill.kl(logits, expected, 2.0)).backward()
    assert parts["ce"].item() == pytest.approx(ce.item(), abs=1e-5)
    assert torch.allclose(ours, student.lm_head.weight.grad, atol=1e-6)
    assert distill.held_out(student, [batch], "fp32")["ce"] == pytest.approx(ce.item(), abs=1e-5)


def test_micro_batches_count_by_their_weights(blocks):
    """Accumulated, and held out, as one large batch."""
    weights = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0))
    weights[:2] *= 10
    batch = causal_batch(blocks) | {"weights": weights}
    whole, halves = (
        {name: x[:4] for name, x in batch.items()},
        [{name: x[at : at + 2] for name, x in batch.items()} for at in (0, 2)],
    )
    ends = []
    for batches, accumulate in ((lambda n: whole, 1), (halves.__getitem__, 2)):
        model = tiny()
        settings = Settings(lr=1e-2, steps=1, accumulate=accumulate, precision="fp32")
        (step,) = list(train(model, batches, distill.Distillation(), settings))
        ends.append((step.losses["ce"], step.tokens, model.lm_head.weight.detach()))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5) and ends[0][1] == ends[1][1] == 4 * 15
    assert torch.allclose(ends[0][2], ends[1][2], atol=1e-5)
    held = [distill.held_out(tiny(), of, "fp32")["ce"] for of in ([whole], halves)]
    assert held[0] == pytest.approx(held[1], abs=1e-5)


def test_padding_is_not_learnt_from(blocks):
    """What stands on the padding changes neither the losses nor a gradient."""
    mask = torch.ones_like(blocks)
    mask[:, 10:] = 0
    found = []
    for filler in (0, 50):
        model = tiny()
        ids = blocks.masked_fill(mask == 0, filler)
        parts = distill.Distillation(tiny(seed=1).eval())(model, causal_batch(ids, mask))
        parts["loss"].backward()
        found.append(
            [parts["loss"].item(), parts["kl"].item(), model.model.layers[0].mlp.up_proj.weight.grad.sum().item()]
        )
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_soft_cap_is_part_of_the_head(blocks):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5))
    distill.check_head(model, blocks[:1, :8])
    parts = distill.Distillation()(model, causal_batch(blocks))
    expected = distill.cross_entropy(model(input_ids=blocks).logits, causal_batch(blocks)["targets"])
    assert parts["ce"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_head_that_does_more_is_refused(blocks):
    class Scaled(LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 8
            return output

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="changes its logits"):
        distill.check_head(Scaled(LlamaConfig(**SIZES)), blocks[:1, :8])


def test_only_a_chunk_of_logits_exists_at_a_time(blocks):
    rows = []

    class Watched(nn.Linear):
        def forward(self, x):
            rows.append(x.shape[0])
            return super().forward(x)

    model = tiny()
    watched = Watched(32, 96, bias=False)
    model.set_output_embeddings(watched)
    distill.Distillation(chunk=32)(model, causal_batch(blocks))["loss"].backward()
    assert max(rows) == 32 and sum(rows) == blocks.numel() - len(blocks)


def test_the_digest_of_weights_sees_the_last_bit_and_the_dtype():
    model = nn.Sequential(nn.Linear(300, 70), nn.Linear(70, 3)).double()
    before = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == before
    with torch.no_grad():
        weight = model[0].weight
        weight[17, 123] = torch.nextafter(weight[17, 123], torch.tensor(9.0, dtype=torch.double))
    assert weights_digest(model) != before
    zeros = nn.Linear(2, 2, bias=False)
    zeros.weight.data.zero_()
    assert weights_digest(zeros) != weights_digest(zeros.bfloat16())
