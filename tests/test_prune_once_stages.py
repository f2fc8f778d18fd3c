"""Prune Once for All, stage by stage on tiny models: what is sparse stays sparse, what is killed goes on."""

import copy
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import sentei
from sentei import checkpoint, data, structure
from sentei.checkpoint import sparse
from sentei.distill import Distillation, HiddenDistillation, HiddenStates, hidden_loss
from sentei.importance import SecondMoments
from sentei.methods.prune_once import fit, lock, pattern, pretrain
from sentei.methods.prune_once.next_sentence import NextSentence, pairs
from sentei.methods.prune_once.pretrain import Student, Teacher, masked_rows
from sentei.methods.prune_once.tasks import Task, TaskLoss
from sentei.methods.prune_once.transfer import Transfer

FEW = {"batch_size": 2, "seq_len": 16, "lr": 1e-3, "eval_tokens": 64}
WORDS = ["tree", "leaf", "root", "twig", "bark", "moss", "seed", "stem", "bud", "vine"]


def sentence(i):
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 6)) + "."


@pytest.fixture(scope="module")
def text():
    documents = [" ".join(sentence(7 * d + s) for s in range(8)) for d in range(12)]
    return data.Text(documents, documents[:2], documents[2:3], "trees", "1" * 64)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.tsv"
    lines = [f"{sentence(i)}\t{'good' if i % 2 else 'bad'}" for i in range(60)]
    file.write_text("sentence\tlabel\n" + "\n".join(dict.fromkeys(lines)) + "\n")
    return str(file)


@pytest.fixture
def corpus(tmp_path, text):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": f"{d} {i}"}) + "\n" for i, d in enumerate(text.train * 3)))
    return str(file)


@pytest.fixture
def parent(tmp_path, words):
    tiny_model("bert").save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- losses ---------------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    """t^2 KL, t = 2, through a model whose logits are its input."""
    loss = TaskLoss("classification", None, soft=1.0, temperature=2.0)
    for theirs, mine, wanted in (([2.0, 0.0], [0.0, 0.0], 0.443776), ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], 1.280627)):
        found = loss._distance([torch.tensor([mine])], [torch.tensor([theirs])])
        assert float(found) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["mlm", "classification", "qa"])
def test_distillation_of_itself_is_nothing(kind, tokens):
    model = tiny_model("bert") if kind == "mlm" else with_head(kind)
    batch = batch_for(kind, tokens)
    if kind == "mlm":
        found = Distillation(model, 2.0, 0.0, 1.0, positions="all")(model, batch)["kl"]
    else:
        found = TaskLoss(kind, model)(model, batch)["kd"]
    assert abs(float(found)) < 1e-6


def with_head(kind, family="bert"):
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    made = AutoModelForQuestionAnswering if kind == "qa" else AutoModelForSequenceClassification
    torch.manual_seed(0)
    return made.from_config(tiny_model(family).config).eval()


def batch_for(kind, tokens):
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    targets = {
        "mlm": tokens.masked_fill(torch.arange(12) % 4 > 0, -100), "classification": torch.tensor([0, 1]),
        "qa": torch.tensor([[1, 3], [0, 2]]),
    }  # fmt: skip
    return batch | {"targets": targets[kind]}


@pytest.mark.parametrize("kind", ["mlm", "classification", "qa"])
def test_losses_do_not_see_padding(kind, tokens):
    student, teacher = (tiny_model("bert", seed=s) if kind == "mlm" else with_head(kind) for s in (0, 1))
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.05
    loss = TaskLoss(kind, teacher, 0.5, 0.5)
    if kind == "mlm":
        loss = HiddenDistillation(teacher, 2.0, 0.5, 0.5, positions="all", pairs=((0, 0), (1, 1)))
    batch = batch_for(kind, tokens)
    more = torch.zeros(2, 5, dtype=torch.long)
    wide = {name: torch.cat([x, more], 1) for name, x in batch.items() if x.shape == (2, 12)}
    if kind == "mlm":
        wide["targets"][:, 12:] = -100
    padded = batch | wide
    for name, value in loss(student, batch).items():
        assert float(loss(student, padded)[name].detach()) == pytest.approx(float(value.detach()), abs=1e-5), name


@pytest.mark.parametrize("kind", ["classification", "qa", "clm"])
def test_the_layers_of_a_tasks_teacher(kind, tokens):
    """The loss of the logits, and the weight times the distance that the models' own hidden states give."""
    family = "llama" if kind == "clm" else "bert"
    student, teacher = (with_head(kind, family) if kind != "clm" else tiny_model(family) for _ in range(2))
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.02
    batch = batch_for("mlm" if kind == "clm" else kind, tokens)
    plain, found = (TaskLoss(kind, teacher.eval(), hidden=weight)(student.eval(), batch) for weight in (0.0, 3.0))
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    mine, theirs = (m(**inputs, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    if kind != "clm":  # a decoder's last hidden state is after the final norm
        expected = torch.stack([hidden_loss(m, t, mask) for m, t in zip(mine, theirs, strict=True)]).mean()
        torch.testing.assert_close(found["hidden"], expected)
    torch.testing.assert_close(found["loss"], plain["loss"] + 3 * found["hidden"])
    assert "hidden" not in plain and float(found["hidden"]) > 0


def test_the_distance_of_hidden_states():
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    student = torch.tensor([[[9.0, 9.0], [1.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[False, True, True]])
    assert float(hidden_loss(student, teacher, mask)) == 1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_first_position_of_a_decoder_is_left_out(family, tokens):
    """In an encoder it is the token that stands for the sentence."""
    student, teacher = tiny_model(family), tiny_model(family)
    last = len(structure.layers(teacher)) - 1

    def changed(module, args, output):
        output = output.clone()
        output[:, 0] += 1
        return output

    structure.layers(teacher)[last].register_forward_hook(changed)
    loss = HiddenDistillation(teacher, pairs=((last, last),))
    batch = {name: x for name, x in batch_for("mlm", tokens).items() if name != "attention_mask"}
    found = loss(student, batch)
    assert (float(found["hidden"]) > 0) == (family == "bert")
    torch.testing.assert_close(found["loss"], found["ce"] + found["kl"] + found["hidden"])


def test_a_student_nearer_to_its_teachers_layers(words, text):
    distances = {}
    for weight in (0.0, 10.0):
        model, teacher = tiny_model("bert"), tiny_model("bert")
        record = Student(steps=100, sparsity=0.7, kd_hidden=weight, **FEW).compress(model, words, text)
        ids = data.blocks(text.validation, words, 16)
        mine, theirs = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (model.eval(), teacher))
        distances[weight] = float(hidden_loss(mine, theirs, torch.ones_like(ids).bool()))
        assert ("hidden" in record["history"][-1]) == bool(weight)
    assert distances[10.0] < 0.8 * distances[0.0], distances


def test_the_layers_alone(words, text):
    """No head is needed, the pooler learns as well, and dropout is off: the distance of a copy is 0."""
    torch.manual_seed(0)
    config = tiny_model("bert").config
    teacher = BertModel(config).eval()
    for matrix in lock.prunable(teacher).values():
        matrix.data *= 10  # so that its layers say something
    student = copy.deepcopy(teacher).train()
    same = tuple((number, number) for number in range(config.num_hidden_layers))
    batch = {"input_ids": data.blocks(text.validation, words, 16)[:2]}
    batch["targets"] = batch["input_ids"]
    assert float(HiddenStates(teacher, same)(student.eval(), batch)["loss"]) == 0
    student.pooler.dense.bias.data += 1.0
    ours, theirs = (model(batch["input_ids"]).pooler_output for model in (student, teacher))
    expected = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean() / (len(same) + 1)
    assert float(HiddenStates(teacher, same)(student, batch)["loss"]) == pytest.approx(float(expected), rel=1e-5)

    model = copy.deepcopy(teacher)
    method = Student(objective="hidden", start="fit", steps=60, sparsity=0.7, **FEW)
    record = method.compress(model, words, text)
    before, fitted, *_, after = [line["validation_loss"] for line in record["history"]]
    assert before == 0 and after < 0.85 * fitted, record["history"]
    with pytest.raises(ValueError, match="no language-model head: use objective hidden"):
        Student(steps=100, **FEW).compress(copy.deepcopy(teacher), words, text)
    assert record["objective"] == "hidden" and type(model) is BertModel and model.pooler is not None
    assert record["sparsity"] == pytest.approx(0.7, abs=0.01)

    task = BertForSequenceClassification(model.config)  # the same encoder one attribute further down
    task.bert = model
    with lock.Lock.on_zeros(lock.prunable(task)) as held:
        assert held.checksum() == record["mask_sha256"]
        next(iter(held.masks.values()))[0, 0] ^= True
        assert held.checksum() != record["mask_sha256"]


def test_pairs_among_the_blocks(text):
    """Two batches in five are of two segments; padding is no target; the teacher's layers say how far it is."""
    words = word_pieces()
    model = BertModel(tiny_model("bert").config)
    for matrix in lock.prunable(model).values():
        matrix.data *= 10  # so that its layers say something
    method = Student(objective="hidden", start="fit", steps=60, sparsity=0.7, pairs=0.4, **FEW)
    batches, held = method._data(model, words, text, "hidden")
    double = [n for n in range(10) if "token_type_ids" in batches(n)]
    assert double == [2, 4, 7, 9] and sum("token_type_ids" in batch for batch in held) == 1 < len(held)
    for batch in (batches(2), held[-1]):
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "targets"}
        assert batch["token_type_ids"].any() and "next_sentence" not in batch
        assert torch.equal(batch["targets"] == -100, batch["attention_mask"] == 0)
    assert not torch.equal(batches(2)["input_ids"], batches(4)["input_ids"])
    record = method.compress(model, words, text)
    first, fitted, *_, last = [line["validation_loss"] for line in record["history"]]
    assert first == 0 and last < fitted
    with pytest.raises(ValueError, match="DistilBertForMaskedLM has one segment only; leave pairs at 0"):
        method.compress(tiny_model("distilbert"), words, text)


def test_chunks_make_no_difference_and_equal_the_full_loss(tokens):
    student, teacher = tiny_model("bert"), tiny_model("bert", seed=1)
    batch = batch_for("mlm", tokens)
    gradients = []
    for chunk in (3, 100):
        student.zero_grad()
        found = Distillation(teacher, 2.0, 0.3, 0.7, chunk=chunk, positions="all")(student, batch)
        found["loss"].backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    mine, theirs = student(**inputs).logits, teacher(**inputs).logits.detach()
    asked = batch["targets"] != -100
    ce = torch.nn.functional.cross_entropy(mine[asked], batch["targets"][asked])
    p, q = ((x / 2).log_softmax(-1) for x in (mine, theirs))
    full = 0.3 * ce + 0.7 * 4 * (q.exp() * (q - p)).sum(-1).mean()
    assert float(found["loss"]) == pytest.approx(float(full), rel=1e-5)
    student.zero_grad()
    full.backward()
    for a, b, p in zip(*gradients, student.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-3)


def test_rows_have_equal_targets(words):
    ids = torch.randint(5, 100, (4, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    batch = masked_rows(ids, words, 0.15, seed=3)
    chosen = batch["targets"] != -100
    assert chosen.sum(1).tolist() == [3] * 4 and not chosen[:, 0].any()
    assert torch.equal(batch["targets"][chosen], ids[chosen]) and torch.equal(batch["input_ids"][~chosen], ids[~chosen])


def test_padded_rows_have_their_share_of_targets(words):
    """A row half full has half as many targets: the share is of its own tokens."""
    ids = torch.randint(5, 100, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[1, 20:] = ids[2, 4:] = words.pad_token_id
    batch = masked_rows(ids, words, 0.15, seed=3)
    assert (batch["targets"] != -100).sum(1).tolist() == [6, 3, 1]


# --- stages A and B -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "qwen3"])
def test_student_of_each_family(family, words, text):
    model = tiny_model(family)
    before = state(model)
    record = Student(steps=100, sparsity=0.8, **FEW).compress(model, words, text)
    masks = record["saving"]["masks"]
    for name, p in model.named_parameters():
        if name in masks:
            assert int((~masks[name]).sum()) == int(0.8 * p.numel()) and not p[~masks[name]].any()
        elif p.ndim == 2:
            assert (p == 0).float().mean() < 0.01, name  # embeddings and heads stay dense
    assert set(masks) == set(lock.prunable(model))
    assert record["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert record["objective"] == ("clm" if len(masks) == 28 else "mlm")
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in masks)
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    json.dumps({key: value for key, value in record.items() if key != "saving"}, allow_nan=False)


@pytest.mark.parametrize(
    "how",
    [
        {"pattern": "1x4"},
        {"pattern": "2:4", "sparsity": 0.5},
        {"scope": "global"},
        {"ties": "paper"},
        {"regrow": False},
        {"start": "fit"},
        {"start": "fit", "pattern": "1x4"},
        {"start": "fit", "pattern": "2:4", "sparsity": 0.5},
    ],
    ids=str,
)
def test_student_patterns(how, words, text):
    model = tiny_model("bert")
    record = Student(**{"steps": 100, "sparsity": 0.75, "kd_soft": 0.0, **FEW, **how}).compress(model, words, text)
    assert record["sparsity"] == pytest.approx(how.get("sparsity", 0.75), abs=0.02)
    for mask in record["saving"]["masks"].values():
        groups = mask.reshape(-1, 4).sum(1)
        if how.get("pattern") == "1x4":
            assert set(groups.tolist()) <= {0, 4}
        if how.get("pattern") == "2:4":
            assert set(groups.tolist()) == {2}


def test_the_mask_freezes_and_the_teacher_does_not_move(words, text, monkeypatch):
    """After t_end the mask no longer moves; the teacher is the model that it started from."""
    moved, teachers = [], []
    move = lock.Lock.move

    def watched(self, masks):
        moved.append(masks)
        return move(self, masks)

    monkeypatch.setattr(lock.Lock, "move", watched)
    made = pretrain.HiddenDistillation

    def distillation(teacher, *args, **more):
        teachers.append(teacher)
        return made(teacher, *args, **more)

    monkeypatch.setattr(pretrain, "HiddenDistillation", distillation)
    model = tiny_model("bert")
    before = state(model)
    steps = []
    record = Student(steps=100, sparsity=0.6, **FEW).compress(
        model, words, text, report=lambda event: steps.append((event["step"], "turnover" in event))
    )
    assert [step for step, new in steps if new] == list(range(1, 81)) and len(moved) == 80
    for name, mask in moved[-1].items():
        assert torch.equal(mask, record["saving"]["masks"][name])
    for name, p in teachers[0].named_parameters():
        assert torch.equal(p, before[name])


class Killed(Exception):
    pass


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "qwen3", "gemma3_text", "phi3"])
def test_a_fitted_start(family, words, text):
    """Nearer to the teacher than what magnitudes leave, exactly as sparse, and zeros of one sign."""
    model, cut, teacher = tiny_model(family), tiny_model(family), tiny_model(family)
    method = Student(steps=1, lr=1e-12, sparsity=0.6, start="fit", **{k: v for k, v in FEW.items() if k != "lr"})
    record = method.compress(model, words, text)
    matrices = lock.prunable(cut)
    masks = record["saving"]["masks"]
    assert set(masks) == set(matrices)
    for name, p in model.named_parameters():
        if name in masks:
            assert int((~masks[name]).sum()) == int(0.6 * p.numel())
            assert not p[~masks[name]].any() and not torch.signbit(p[~masks[name]]).any()
    ids = data.blocks(text.validation, words, 16)

    def distance(of):
        with torch.no_grad():
            ours, theirs = (structure.base_model(m)(input_ids=ids).last_hidden_state for m in (of, teacher))
        return float((ours - theirs).square().sum() / theirs.square().sum())

    with lock.Lock(matrices, pattern.masks({name: p.detach() for name, p in matrices.items()}, 0.6)):
        assert distance(model) < 0.7 * distance(cut), (distance(model), distance(cut))


def test_a_fit_is_not_taken_by_one_long_token(monkeypatch):
    """The first word of a block makes a stream a thousand times as long as the others', which a norm takes out."""
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        embedding, mlp = model.get_input_embeddings().weight, structure.layers(model)[0].mlp
        embedding[:, 0] = 0.0
        embedding[7] = 0.0
        embedding[7, 0] = 1.0
        for p in structure.layers(model)[0].self_attn.o_proj.parameters():
            p.zero_()
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[:16] = 0.0
            linear.weight[:16, 0] = 20.0
    blocks = torch.randint(8, 128, (64, 16), generator=torch.Generator().manual_seed(1))
    blocks[:, 0] = 7

    def made(of):
        found = []
        hook = structure.layers(of)[0].mlp.register_forward_hook(lambda module, args, output: found.append(output))
        with torch.no_grad():
            of(input_ids=blocks[48:])
        hook.remove()
        return found

    gaps = {}
    for relative in (False, True):
        small = copy.deepcopy(model)
        if not relative:
            monkeypatch.setattr(fit, "takes_correction", lambda row: False)
        fit.fit(
            small, model, lock.prunable(small), blocks[:48], 0.6, pattern="unstructured", ties="exact",
            tick=lambda what, done, of: None,
        )  # fmt: skip
        monkeypatch.undo()
        (ours,), (theirs,) = made(small), made(model)
        gaps[relative] = float((ours - theirs)[:, 1:].square().sum() / theirs[:, 1:].square().sum())
    assert gaps[True] < 0.8 * gaps[False], gaps


def test_the_fit_is_the_least_squares_answer():
    """Against `lstsq` of each output alone, with the mean of the inputs taken out for the bias."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(200, 6, generator=generator) + 1.0, torch.randn(200, 3, generator=generator)
    linear = torch.nn.Linear(6, 3).double()
    seen = SecondMoments(6, lambda of: target[of] - linear(x[of].double()).float())
    for rows in x.split(50):
        seen(rows)
    covariance, wanted, mean, shift = seen.normal_equations(linear.weight.detach(), with_bias=True)
    keep = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    found = fit._least_squares(covariance, wanted, keep)
    bias = linear.bias + shift - found @ mean
    for number, kept in enumerate(keep):
        inputs = torch.cat([x[:, kept], torch.ones(200, 1)], 1).double()
        expected = torch.linalg.lstsq(inputs, target[:, number].double()).solution
        assert torch.allclose(torch.cat([found[number, kept], bias[number : number + 1]]), expected, atol=1e-4)
        assert not found[number, ~kept].any()


@pytest.mark.parametrize(("at", "fields"), [(30, {}), (70, {}), (90, {}), (30, {"start": "fit"})])
def test_killed_student_goes_on(at, fields, words, text, tmp_path):
    """To the bit: weights, masks and dormant values."""
    method = Student(steps=100, sparsity=0.7, save_every=20, **FEW, **fields)
    whole = tiny_model("bert")
    record = method.compress(whole, words, text, workdir=tmp_path / "whole")

    def kill(event):
        if event.get("step") == at:
            raise Killed

    with suppress(Killed):
        method.compress(tiny_model("bert"), words, text, workdir=tmp_path / "cut", report=kill)
    resumed = tiny_model("bert")
    seen = []
    again = method.compress(resumed, words, text, workdir=tmp_path / "cut", report=lambda e: seen.append(e.get("step")))
    assert next(step for step in seen if step) == at // 20 * 20 + 1
    assert again["mask_sha256"] == record["mask_sha256"]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_teacher_gives_an_encoder_its_head(words, text):
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                                 intermediate_size=40, max_position_embeddings=66))  # fmt: skip
    record = Teacher(steps=60, **FEW | {"lr": 3e-3}).compress(model, words, text)
    made = record["saving"]["model"]
    assert type(made).__name__ == "BertForMaskedLM"
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    assert record["loss_after"] < record["loss_before"]


def test_a_teacher_of_which_only_the_head_is_trained(words, text):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=40, max_position_embeddings=66)  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    before = state(model)
    record = Teacher(steps=60, train="head", **FEW | {"lr": 3e-3}).compress(model, words, text)
    made = record["saving"]["model"]
    assert record["loss_after"] < record["loss_before"]
    assert all(torch.equal(p, before[name]) for name, p in made.bert.named_parameters())
    assert all(p.requires_grad for p in made.parameters())
    with pytest.raises(ValueError, match="no weights of its own; use train all"):
        Teacher(steps=2, train="head", **FEW).compress(tied(), words, text)


def tied():
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                                        intermediate_size=40, tie_word_embeddings=True))  # fmt: skip


def test_the_student_reads_what_its_teacher_read(parent, corpus, tmp_path):
    teacher = sentei.compress(parent, method="prune_once_teacher", data=corpus, out=tmp_path / "t", steps=2, **FEW)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(corpus).read_text().replace("tree", "rock"))
    with pytest.raises(ValueError, match="trained on another corpus"):
        sentei.compress(teacher, method="prune_once_student", data=other, out=tmp_path / "s", steps=100, **FEW)


def word_pieces():
    """BERT's own tokenizer over a few pieces."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "le", "##af"]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})


def test_next_sentence_pairs(words, text):
    with pytest.raises(ValueError, match=r"no \[CLS\] or no \[SEP\]"):
        pairs(text.train, words, 64, seed=0)
    words = word_pieces()
    made = pairs(text.train, words, 64, seed=0)
    whole = words("tree leaf.", "root.")  # what the tokenizer itself makes of a pair
    short = pairs(["tree leaf. root.", "moss. seed."], words, 64, seed=1, random=0.0)
    size = len(whole["input_ids"])
    assert short.ids[0, :size].tolist() == whole["input_ids"] and not short.ids[0, size:].any()
    assert short.segments[0, :size].tolist() == whole["token_type_ids"]
    assert short.attention[0].sum() == size
    assert 0.3 < float(made.random.float().mean()) < 0.8 and made.attention.sum(1).max() <= 64
    for ids, segments, attention in zip(made.ids, made.segments, made.attention, strict=True):
        length = int(attention.sum())
        ends = (ids[:length] == words.sep_token_id).nonzero().flatten().tolist()
        assert ids[0] == words.cls_token_id and len(ends) == 2 and ends[1] == length - 1
        assert not segments[: ends[0] + 1].any() and segments[ends[0] + 1 : length].all()
    with pytest.raises(ValueError, match="two documents"):
        pairs(text.train[:1], words, 64, seed=0)
    torch.manual_seed(0)
    config = tiny_model("bert").config
    model, teacher = (BertForPreTraining(config).eval() for _ in range(2))
    batch = made.batches(2, seed=0, mask=lambda ids, n: masked_rows(ids, words, 0.15, seed=n))(0)
    same = NextSentence(Distillation(model, 2.0, 0.0, 1.0, positions="all"))(model, batch)
    assert abs(float(same["loss"])) < 1e-5
    other = NextSentence(Distillation(teacher, 2.0, 0.5, 0.5, positions="all"))(model, batch)
    parts = 0.5 * (other["ce"] + other["nsp"]) + 0.5 * (other["kl"] + other["nsp_kl"])
    assert float(other["loss"]) == pytest.approx(float(parts), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "family", "message"),
    [
        ({"objective": "mlm_nsp"}, "bert", "no next-sentence head; use objective mlm"),
        ({"objective": "clm"}, "bert", "cannot be trained by clm"),
        ({"objective": "mlm"}, "llama", "cannot be trained by mlm"),
        ({"include": "nothing"}, "bert", "no weight is left"),
        ({"pattern": "1x4", "exclude": "key"}, "llama", None),
    ],
)
def test_student_refusals(fields, family, message, words, text):
    method = Student(steps=100, **FEW | fields)
    if message is None:
        method.outline(tiny_model(family))
        return
    with pytest.raises(ValueError, match=message):
        method.compress(tiny_model(family), words, text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 50}, "at least 100 steps"),
        ({"preset": "huge"}, "preset is one of"),
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"pattern": "2:4"}, "exactly half"),
        ({"kd_hard": 0.0, "kd_soft": 0.0}, "hard or soft above 0"),
        ({"kd_hidden": -1.0}, "none below 0"),
        ({"scope": "layer"}, "scope is matrix or global"),
        ({"ties": "none"}, "ties is one of"),
        ({"start": "sparse"}, "start is dense or fit"),
        ({"start": "fit", "scope": "global"}, "one block after the other"),
        ({"start": "fit", "fit_tokens": 0}, "fit_tokens must be at least 1"),
        ({"objective": "hidden", "checkpointing": True}, "leave one of them"),
        ({"pairs": 0.5}, "pairs is for objective=hidden"),
        ({"pairs": 1.5, "objective": "hidden"}, "from 0 to 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Student(**fields)


def test_a_teacher_has_no_teacher():
    with pytest.raises(ValueError, match="needs a teacher, which stage A makes"):
        Teacher(objective="hidden")


# --- stage C, and the commands --------------------------------------------------------------------------------------


@pytest.fixture
def student(parent, corpus, tmp_path):
    fields = {"steps": 100, "sparsity": 0.8} | FEW
    return sentei.compress(parent, method="prune_once_student", data=corpus, out=tmp_path / "student", **fields)


def test_stages_from_folders(parent, student, corpus, rows, tmp_path):
    """Student in the container; two tasks and a dense teacher from it and its parent; the zeros are the same."""
    assert (student / sparse.FILE).is_file() and not (student / "model.safetensors").exists()
    few = {"epochs": 1, "batch_size": 8, "seq_len": 32, "text_field": "sentence", "data": rows}
    dense = sentei.compress(parent, method="prune_once_transfer", out=tmp_path / "dense", lock=False, **few)
    task = sentei.compress(student, method="prune_once_transfer", out=tmp_path / "task", teacher=dense, **few)
    model, _ = sentei.load(student)
    tuned, _ = sentei.load(task)
    record = json.loads((task / "compression.json").read_text())["stages"]
    assert [stage["method"] for stage in record] == ["prune_once_student", "prune_once_transfer"]
    assert record[0]["record"]["mask_sha256"] == record[1]["record"]["mask_sha256"]
    assert set(record[1]["record"]["scores"]["validation"]) == {"accuracy", "matthews", "f1"}
    zeros, tuned_zeros = ({n: p == 0 for n, p in lock.prunable(m).items()} for m in (model, tuned))
    assert all(torch.equal(zeros[name], tuned_zeros[name]) for name in zeros)
    assert type(tuned).__name__ == "BertForSequenceClassification" and tuned.config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(ValueError, match="nothing to lock"):
        sentei.compress(parent, method="prune_once_transfer", out=tmp_path / "no", **few)
    assert not (tmp_path / "no").exists()
    checkpoint.export_dense(task, tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_a_kept_zero_stays_free(parent, words, tmp_path):
    """A kept weight that became 0 is no hole: the lock is the stored mask, not what is 0 now."""
    model, _ = checkpoint.load(parent)
    matrices = lock.prunable(model)
    random = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(p.shape, generator=random) < 0.3 for name, p in matrices.items()}
    name = next(iter(matrices))
    row, column = masks[name].nonzero()[0].tolist()
    with torch.no_grad(), lock.Lock(matrices, masks) as held:
        matrices[name][row, column] = 0.0
    record = {"method": "m", "fields": {}, "seed": 0, "data": {}, "record": {}}
    out = checkpoint.save(
        model, words, tmp_path / "s", parent=parent, record=record, shape="sparse", masks=dict(held.masks)
    )
    loaded, _ = checkpoint.load(out)
    found = lock.Lock.on_zeros(lock.prunable(loaded), loaded.name_or_path)
    assert found.checksum() == held.checksum() and found.masks[name][row, column]
    assert not lock.Lock.on_zeros(lock.prunable(loaded)).masks[name][row, column]
    with torch.no_grad():
        lock.prunable(loaded)[name].fill_(1.0)[0] = 0.0  # no longer what was stored
    moved = lock.Lock.on_zeros(lock.prunable(loaded), out).masks[name]
    assert torch.equal(moved, lock.prunable(loaded)[name] != 0)


@pytest.mark.parametrize("kind", ["regression", "qa", "clm"])
def test_other_tasks(kind, student, tmp_path, corpus):
    if kind == "regression":
        file = tmp_path / "r.tsv"
        file.write_text("text\tlabel\n" + "".join(f"{sentence(i)} {i}\t{i / 7}\n" for i in range(60)))
    elif kind == "qa":
        file = tmp_path / "q.json"
        paragraphs = [
            {"context": f"{sentence(i)} {i}", "qas": [{"id": f"{i}", "question": "what", "answers": [
                {"text": sentence(i)[:4], "answer_start": 0}]}]} for i in range(40)
        ]  # fmt: skip
        file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    else:
        file = corpus
    out = sentei.compress(
        student, method="prune_once_transfer", task=kind, data=str(file), out=tmp_path / kind, epochs=1, batch_size=8,
        seq_len=48 if kind == "qa" else 32, stride=8,
    )  # fmt: skip
    record = json.loads((out / "compression.json").read_text())["stages"][-1]["record"]
    wanted = {"regression": {"pearson", "spearman"}, "qa": {"exact_match", "f1"}, "clm": {"loss", "perplexity"}}
    assert set(record["scores"]["test"]) == wanted[kind] and record["task"] == kind
    if kind == "clm":
        few = Transfer(task="clm", limit=3, held_limit=1).read(file, "text")
        assert (len(few.train), len(few.validation), len(few.test)) == (3, 1, 1)


def test_the_metric_of_a_task(student, rows, tmp_path):
    """Named in the fields; better or worse by its own direction; none where nothing can be said."""
    few = {"epochs": 1, "batch_size": 8, "seq_len": 32, "text_field": "sentence", "data": rows}
    out = sentei.compress(student, method="prune_once_transfer", out=tmp_path / "t", metric="matthews", **few)
    assert json.loads((out / "compression.json").read_text())["stages"][-1]["record"]["metric"] == "matthews"
    text = data.Text([sentence(1)], [], [], "t", "0" * 64)
    perplexity = Task("clm", text, None, 16)
    assert perplexity.metric == "perplexity"
    assert perplexity.drop({"perplexity": 10.0}, {"perplexity": 12.0}) == 2.0  # worse, as a lower accuracy is
    labelled = Transfer().read(rows, "sentence")
    accuracy = Task("classification", labelled, None, 16)
    assert accuracy.drop({"accuracy": 0.75}, {"accuracy": 0.5}) == 0.25
    assert accuracy.drop({"accuracy": None}, {"accuracy": 0.5}) is None and accuracy.drop({}, {}) is None
    with pytest.raises(ValueError, match="metric is 'pearson'; a task of kind classification has auto, accuracy"):
        Task("classification", labelled, None, 16, asked="pearson")
    with pytest.raises(ValueError, match="metric is one of"):
        Transfer(metric="bleu")


@pytest.mark.parametrize(("side", "reason"), [("prediction", "every prediction is 0.5"), ("label", "every label is 2")])
def test_the_correlation_of_a_constant_is_null(side, reason, tmp_path, words):
    file = tmp_path / "r.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{sentence(i)} {i}\t{i / 7}\n" for i in range(60)))
    rows = Transfer(task="regression").read(str(file), "text")
    for row in rows.test:
        row["label"] = 2.0 if side == "label" else row["label"]
    task = Task("regression", rows, words, 32)
    logits = (lambda n: torch.full((n, 1), 0.5)) if side == "prediction" else (lambda n: torch.rand(n, 1))
    found = task.scores(lambda batch: [logits(len(batch["input_ids"]))], "test")
    assert found == {"pearson": None, "spearman": None, "undefined": reason}
    assert task.drop({"pearson": 0.5}, found) is None
    json.dumps(found, allow_nan=False)


def test_killed_transfer_goes_on(student, rows, tmp_path, words):
    method = Transfer(epochs=2, batch_size=8, seq_len=32, save_every=2)
    examples = method.read(rows, "sentence")

    def fresh():
        return checkpoint.load(student, **method.head(examples))[0]

    whole, resumed = fresh(), fresh()
    method.compress(whole, words, examples)

    def kill(event):
        if event["step"] == 5:
            raise Killed

    with suppress(Killed):
        method.compress(fresh(), words, examples, workdir=tmp_path / "cut", report=kill)
    method.compress(resumed, words, examples, workdir=tmp_path / "cut")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pruned_on_the_task(parent, rows, words):
    """The rival: the same schedule inside the fine-tuning of a dense model."""
    method = Transfer(epochs=60, batch_size=4, seq_len=24, lock=False, prune=0.7)
    examples = method.read(rows, "sentence")
    model, _ = checkpoint.load(parent, **method.head(examples))
    record = method.compress(model, words, examples)
    assert record["sparsity"] == pytest.approx(0.7, abs=0.01) and record["steps"] >= 100
    assert lock.zeros(lock.prunable(model)) == pytest.approx(0.7, abs=0.01)
    assert not (model.bert.pooler.dense.weight == 0).any()  # new with the head: it stays dense, as elsewhere
    with pytest.raises(ValueError, match="only with lock off"):
        Transfer(prune=0.5)


def test_a_student_of_a_task_nearer_to_its_teachers_layers(student, rows, words, tmp_path):
    """Layers of the task's teacher are learnt too, without dropout; nothing to say where there is no teacher."""
    fields = {"epochs": 4, "batch_size": 4, "seq_len": 16, "lr": 3e-3, "metric": "accuracy"}
    made = Transfer(**fields).read(str(rows), "sentence")

    def load():
        return checkpoint.load(student, **Transfer(**fields).head(made))[0]

    teacher, last = load(), {}
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    for weight in (0.0, 10.0):
        record = Transfer(**fields, kd_hidden=weight).compress(load(), words, made, teacher=teacher)
        last[weight] = record["history"][-1]
    assert "hidden" not in last[0.0] and last[10.0]["hidden"] < 0.5
    with pytest.raises(ValueError, match="give one"):
        Transfer(**fields, kd_hidden=1.0).compress(load(), words, made)
    with pytest.raises(ValueError, match="on top of kd_soft"):
        Transfer(**fields, kd_hidden=1.0, kd_soft=0.0, kd_hard=1.0)


def test_teacher_must_fit(student, rows, words):
    method = Transfer(epochs=1, batch_size=8, seq_len=32)
    examples = method.read(rows, "sentence")
    model, _ = checkpoint.load(student, **method.head(examples))
    other = with_head("classification")
    with pytest.raises(ValueError, match="first difference: label 0"):
        method.compress(model, words, examples, teacher=other)
    with pytest.raises(ValueError, match="for MaskedLM"):
        method.compress(model, words, examples, teacher=tiny_model("bert"))
    with pytest.raises(ValueError, match="vocabulary differs"):
        method.compress(model, words, examples, teacher=tiny_model("bert", vocab_size=100))


def test_a_recipe_branches(parent, corpus, rows, tmp_path, capsys):
    """All four stages: two tasks of one student, with teachers that are stages; a second run makes nothing again."""
    from sentei import recipe
    from sentei.cli import main

    few = "epochs: 1, batch_size: 8, seq_len: 32, text_field: sentence"
    file = tmp_path / "r.yaml"
    file.write_text(f"""
model: {parent}
out: {tmp_path / "out"}
data: {corpus}
report: null
stages:
  - {{name: teacher, method: prune_once_teacher, steps: 10, batch_size: 2, seq_len: 16}}
  - {{name: student, method: prune_once_student, steps: 100, batch_size: 2, seq_len: 16, sparsity: 0.8}}
  - {{name: dense, method: prune_once_transfer, after: teacher, lock: false, data: {rows}, {few}}}
  - {{name: one, method: prune_once_transfer, after: student, teacher: dense, data: {rows}, {few}}}
  - {{name: codes, method: prune_once_quantise, scheme: weights, data: {rows}, {few}}}
  - {{name: two, method: prune_once_transfer, after: student, seed: 1, data: {rows}, {few}}}
""")
    assert main(["run", str(file), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists() and "sparsity: 0.8" in capsys.readouterr().out
    recipe.run(recipe.load(file))
    records = {
        name: json.loads((tmp_path / "out" / name / "compression.json").read_text())["stages"]
        for name in ("teacher", "student", "dense", "one", "codes", "two")
    }
    masks = {records[name][-1]["record"]["mask_sha256"] for name in ("student", "one", "codes", "two")}
    assert len(masks) == 1 and len(records["dense"]) == 2 and len(records["codes"]) == 4
    times = {name: (tmp_path / "out" / name / "compression.json").stat().st_mtime_ns for name in records}
    recipe.run(recipe.load(file))
    for name, time in times.items():
        assert (tmp_path / "out" / name / "compression.json").stat().st_mtime_ns == time
    assert main(["export", str(tmp_path / "out" / "codes"), "--out", str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    file.write_text(file.read_text().replace("after: student, seed", "after: pupil, seed"))
    with pytest.raises(ValueError, match="after 'pupil'; expected a stage before it"):
        recipe.run(recipe.load(file))


RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {  # of the real models, without weights
    "prune-once-bert-base": lambda: BertForPreTraining(BertConfig()),
    "prune-once-minilm": lambda: BertForPreTraining(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ),
    "prune-once-smollm2": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_recipes_say_what_they_will_do(name, monkeypatch):
    """Every field of every stage is known and fits; what would be pruned of the real model, in weights and bytes."""
    from sentei import recipe
    from sentei.export import openvino
    from sentei.recipe import make_method

    monkeypatch.setattr(openvino, "check", lambda what: None)
    keys = ("name", "method", "data", "text_field", "teacher", "after")
    stages = recipe.load(RECIPES / f"{name}.yaml").stages
    made = [make_method(s["method"], {k: v for k, v in s.items() if k not in keys}) for s in stages]
    names = [stage["name"] for stage in stages]
    assert all(stage.get(key, names[0]) in ("parent", *names) for stage in stages for key in ("after", "teacher"))
    with torch.device("meta"):
        model = SIZES[name]()
    if name == "prune-once-minilm":  # taught by the model itself
        made.insert(0, Teacher())
    lines = [method.outline(model) for method in made[:2]]
    assert isinstance(made[0], Teacher) and isinstance(made[1], Student)
    assert list(lines[1]) == ["may go", "will go", "container", "training"] and list(lines[0]) == ["training"]
    if name == "prune-once-bert-base":
        assert lines[1]["may go"] == "85,524,480 weights in 73 matrices (77.7% of the model)"
        assert lines[1]["will go"] == "76,972,032 weights: 90% of these, 69.9% of the model"
        assert lines[1]["container"] == "about 143 MB in fp32, the matrices 19.2 MB in int8"
        assert lines[1]["training"].startswith("100,000 steps; 2.63 GB in each process")
        for method in made[:2]:  # for one process; the recipe says what to change for more
            assert (method.batch_size * method.accumulate, method.seq_len, method.lr) == (256, 512, 5e-5)
            assert method.objective == "mlm_nsp" and method.save_every == 1000
        squad = made[names.index("squad")]
        assert (squad.lr, squad.epochs, squad.batch_size, squad.seq_len, squad.stride) == (1.5e-4, 8, 12, 384, 128)


def test_the_paper_recipe_is_checked_before_it_starts(tmp_path, words, text, monkeypatch):
    """Its files and fields, with a small model in the place of BERT-Base; nothing is written."""
    import yaml

    from sentei import recipe
    from sentei.export import openvino

    monkeypatch.setattr(openvino, "check", lambda what: None)
    monkeypatch.chdir(tmp_path)
    BertForPreTraining(tiny_model("bert", max_position_embeddings=512).config).save_pretrained("bert")
    words.save_pretrained("bert")
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in text.train * 2))
    Path("squad").mkdir()
    row = {"id": "0", "question": "what", "answers": [{"text": "tree", "answer_start": 0}]}
    for part in ("train", "dev"):
        paragraphs = [{"context": f"tree {part} {i}", "qas": [row]} for i in range(20)]
        Path(f"squad/{part}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    content = yaml.safe_load((RECIPES / "prune-once-bert-base.yaml").read_text()) | {"model": "bert"}
    Path("r.yaml").write_text(yaml.safe_dump(content))
    before = sorted(tmp_path.rglob("*"))
    assert list(recipe.check(recipe.load("r.yaml"))) == [stage["name"] for stage in content["stages"]]
    assert sorted(tmp_path.rglob("*")) == before


RANKS = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from conftest import tiny_model, words
from sentei import data
from sentei.methods.prune_once.pretrain import Student
documents = [" ".join(f"tree {{(7 * d + s) % 13}} leaf." for s in range(8)) for d in range(12)]
text = data.Text(documents, documents[:2], documents[2:3], "trees", "1" * 64)
model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
few = {{"seq_len": 16, "lr": 1e-3, "eval_tokens": 64}}
method = Student(steps=100, sparsity=0.7, batch_size=int(sys.argv[2]), **few)
record = method.compress(model, words.__wrapped__(), text)
import os
torch.save([record["mask_sha256"], {{n: p.detach() for n, p in model.named_parameters()}}],
           sys.argv[1] + os.environ.get("RANK", "-"))
"""


@pytest.mark.slow
def test_two_processes_have_one_mask(tmp_path):
    """Data-parallel: both ranks end with the same masks and weights, those of one process with the whole batch."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[1])))
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713", str(script)]
    subprocess.run([sys.executable, *both, str(tmp_path / "two"), "2"], check=True, env=quiet, capture_output=True)
    subprocess.run([sys.executable, str(script), str(tmp_path / "one"), "4"], check=True, env=quiet)
    first, second, alone = (torch.load(tmp_path / name, weights_only=True) for name in ("two0", "two1", "one-"))
    assert first[0] == second[0]
    for name, p in first[1].items():
        assert torch.equal(p, second[1][name]), name
        same = (p == 0) == (alone[1][name] == 0)
        assert same.float().mean() > 0.97, name  # sums in another order move a weight across the threshold now and then
