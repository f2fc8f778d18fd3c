"""ATP from start to end on toys: budget, useless units, resuming bit for bit, and no trace left behind."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import conftest
import pytest
import torch
from conftest import tiny_model

from sentei import checkpoint, cli, data, structure
from sentei.data import prompts
from sentei.data.examples import Examples
from sentei.data.prompts import make_row
from sentei.distill import Distillation
from sentei.methods import atp
from sentei.methods.atp import ATP, PAPER, selection, wiring
from sentei.methods.policy_gradient import PolicyGradient
from sentei.report import reading
from sentei.train import Settings, shuffled, train

TOY = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SHORT = PAPER | {
    "generator_lr": 1e-2,
    "steps": 12, "batch_size": 4, "slice_rows": 8, "seq_len": 40, "round_channels": 4, "lr": 1e-3,
    "eval_rows": 8, "eval_every": 2, "patience": 0, "lora_rank": 4,
}  # fmt: skip
ROOT = Path(__file__).parents[1]
# Toy runs are too short to converge, which ATP says.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(the freeze|lasso's peak|steps are few|was not met|not held|changed sides|misses the|refit was left)"
)


def rows(count, start=0):
    made = [make_row({"prompt": f"say {i}", "response": f"{i} {i}"}, "") for i in range(start, start + count)]
    return [{name: value for name, value in row.items() if name != "key"} for row in made]


class Secret(list):
    def __iter__(self):
        raise AssertionError("ATP looked at the test rows")

    __getitem__ = __len__ = __iter__


@pytest.fixture(scope="module")
def examples():
    return Examples("response", rows(40), rows(8, 100), Secret(), None, "numbers", "0" * 64)


def toy(seed=0, **sizes):
    return tiny_model("llama", seed=seed, **TOY | sizes)


def short(**fields):
    return ATP(**SHORT | fields)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(record):
    """A record without what differs between two runs of the same computation."""
    record = copy.deepcopy(record)
    for entry in (record, *record["history"]):
        for name in ("seconds", "generator_seconds", "tuning_seconds", "search_seconds"):
            entry.pop(name, None)
    return record


def assert_plain(model):
    assert all(type(module).__module__.split(".")[0] != "peft" for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert "peft_config" not in vars(model) and not model.training


@pytest.fixture(scope="module")
def taught(examples):
    """A toy that has learned the rows: only then does the loss say which units matter."""
    words = conftest.words.__wrapped__()
    model = toy()
    encoded = prompts.encode(examples.train, prompts.Template(words), 40)
    make = lambda chosen, n: prompts.collate(encoded, chosen[:, 0].tolist(), pad=0)  # noqa: E731
    batches = shuffled(torch.arange(len(encoded))[:, None], 8, seed=0, make=make)
    list(train(model, batches, Distillation(), Settings(lr=1e-2, steps=150, precision="fp32")))
    return model.eval()


@pytest.mark.parametrize("space", [wiring.SPACES[0], pytest.param(wiring.SPACES[1], marks=pytest.mark.slow)])
def test_meets_the_budget_finds_the_useless_and_empties_the_dropped(space, words, examples, taught, monkeypatch):
    model = copy.deepcopy(taught)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::4] = 0  # ten useless channels of forty
    chosen = {}
    top_k = selection.top_k

    def look(logits, units, *rest, **more):
        chosen.update(logits=logits, units=units, keep=top_k(logits, units, *rest, **more))
        return chosen["keep"]

    monkeypatch.setattr(selection, "top_k", look)
    fields = {"steps": 120, "control_fraction": 0.8, "lr": 1e-4, "alpha": 1.0, "round_pairs": 1, "round_values": 1}
    fields |= {"round_channels": 1, "batch_size": 2, "eval_every": 12}
    record = short(units=space, sparsity=0.3, **fields).compress(model, words, examples)
    units, keep, logits = chosen["units"], chosen["keep"], chosen["logits"]
    kept = int(units.cost_U[keep].sum()) / units.total
    assert abs(record["freeze"]["kept_before"] - 0.7) < 0.05  # the generator came to the budget by itself
    assert 0.7 - int(units.cost_U.min()) / units.total < kept <= 0.7
    assert record["removed_of_prunable"] == pytest.approx(1 - kept)
    useless = torch.zeros(len(units), dtype=torch.bool)
    for layer in range(2):
        useless[units.of(layer, "channels")[::4]] = True
    assert logits[useless].mean() < logits[units.kind_U == 1].median()
    assert record["zeroing"]["forward_gap"] <= 1e-5 and record["cut_against_masked"] <= 1e-4
    assert record["history"][-1]["lasso"] == 0.0
    losses = [entry["validation_ce"] for entry in record["history"] if "validation_ce" in entry]
    assert record["validation_loss"] == min(losses)
    assert_plain(model)


def test_default_alpha_still_listens_to_the_loss(words, examples, taught, monkeypatch):
    """Groups of a seventh of the parameters make alpha 5 pull to and fro; useless units rank below the others still."""
    model = copy.deepcopy(taught)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::4] = 0
    chosen = {}
    top_k = selection.top_k

    def look(logits, units, *rest, **more):
        chosen.update(logits=logits, units=units)
        return top_k(logits, units, *rest, **more)

    monkeypatch.setattr(selection, "top_k", look)
    fields = {"steps": 120, "control_fraction": 0.8, "lr": 1e-4, "round_channels": 1, "batch_size": 2}
    fields |= {"precision": "fp32"}
    how = short(sparsity=0.3, eval_every=12, **fields)
    assert how.alpha == 5.0
    record = how.compress(model, words, examples)
    units, logits = chosen["units"], chosen["logits"]
    channels = torch.stack([units.of(layer, "channels") for layer in range(2)])
    useless = torch.zeros_like(channels, dtype=torch.bool)
    useless[:, ::4] = True
    assert logits[channels[useless]].mean() < logits[channels[~useless]].mean()
    assert record["removed_of_prunable"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("ramp", [1 / 6, 0.5, 1.0])
def test_the_ramp_empties_every_row_however_short_it_is(ramp, words, examples):
    """1, 3 and 6 steps from A's random values: nothing is left to be set to zero at once."""
    record = short(ramp=ramp, lr=1e-4).compress(toy(), words, examples)
    assert record["freeze"]["lasso_a"] > 0.1
    assert record["zeroing"]["largest_norm"] == 0.0 and record["zeroing"]["shrink"] > 4.0
    frozen = [entry["lasso"] for entry in record["history"] if entry["phase"] == "frozen"]
    assert frozen[round(ramp * 6) - 1 :] == [0.0] * (7 - round(ramp * 6))
    assert frozen == sorted(frozen, reverse=True) and (frozen[0] > 0) == (ramp > 0.2)


def test_same_seed_same_model(words, examples):
    first, again, other = toy(), toy(), toy()
    records = [short(seed=seed).compress(m, words, examples) for m, seed in ((first, 0), (again, 0), (other, 1))]
    assert records[0]["kept"] == records[1]["kept"] and same(weights(first), weights(again))
    assert not same(weights(first), weights(other))
    json.dumps(records[0], allow_nan=False)
    fields = json.loads(json.dumps(vars(short())))
    assert ATP(**fields) == short()


@pytest.mark.parametrize("stop", [3, 8, 11])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"zeroing": "beta"},
        {"start": "taylor"},
        {"generator_loss": "kl"},
        {"start": "taylor", "lora_on": "dense", "generator_loss": "kl", "compensate": "auto", "lr": 1e-5},
        {"start": "auto", "lora_on": "cut", "generator_loss": "kl", "compensate": "auto", "sparsity": 0.4},
        {"lora_on": "cut", "control_every": 2},
        {"mask": "taylor"},
        {"mask": "random"},
        {"compensate": "least-squares", "start": "taylor", "generator_lr": 1e-9, "lr": 1e-9},
        {"compensate": "least-squares", "mask": "taylor"},
    ],
    ids=str,
)
def test_killed_and_resumed_is_never_killed(stop, fields, words, examples, taught, tmp_path):
    """Stops in the control phase, in the ramp, and after it."""
    how = short(**fields, save_every=2, lora_dropout=0.1, ramp=0.5, log=str(tmp_path / "log.jsonl"))
    model = taught if "compensate" in fields else toy()  # only what has learned something is worth a refit
    whole, killed, resumed = (copy.deepcopy(model) for _ in range(3))
    expected = how.compress(whole, words, examples)
    assert expected["compensate"] == fields.get("compensate", "none").replace("auto", "least-squares")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    before = weights(killed)

    def kill(event):
        if event.get("step") == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        how.compress(killed, words, examples, workdir=tmp_path / "work", report=kill)
    assert same(weights(killed), before)
    assert_plain(killed)
    record = how.compress(resumed, words, examples, workdir=tmp_path / "work")
    assert without_times(record) == without_times(expected)
    assert same(weights(resumed), weights(whole))
    again = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lead = [entry["step"] for entry in again if entry["step"] < 1]
    assert lead == ([*range(how.control_every - 6, 1, how.control_every)] if how.lora_on == "cut" else [])
    assert [entry["step"] for entry in again][len(lead) :] == list(range(1, 13))
    assert [{**e, "seconds": 0} for e in again] == [{**e, "seconds": 0} for e in log]


def test_who_learns_from_what(words, examples, monkeypatch):
    """The generator's step leaves every weight of the model alone; the LoRA step the generator; no one the base."""
    from sentei.methods.atp import tuning

    decide, loss = tuning.Tuning._decide, tuning.Tuning._lora_loss
    trail = []

    def watched(self, step):
        before = weights(self.model)
        generator = weights(self.generator)
        if trail:
            assert same(trail[-1], generator)
        decide(self, step)
        assert same(before, weights(self.model)) and all(p.grad is None for p in self.model.parameters())
        assert not same(generator, weights(self.generator))
        trail.append(weights(self.generator))
        trail_base.append({n: w for n, w in before.items() if "lora_" not in n})

    trail_base = []
    monkeypatch.setattr(tuning.Tuning, "_decide", watched)
    short().compress(toy(), words, examples)
    assert len(trail) == 6 and all(same(trail_base[0], base) for base in trail_base)
    assert loss is tuning.Tuning._lora_loss


@pytest.mark.parametrize("lora_on", ["cut", "dense"])
def test_the_mask_nearest_to_the_dense_model(lora_on, words, examples, taught, monkeypatch):
    """The default form and its like. No mask disturbs LoRA before the freeze; useless channels rank low."""
    from sentei.methods.atp import tuning

    model, modes, chosen = copy.deepcopy(taught), [], {}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::4] = 0
    learn, top_k = tuning.Tuning._lora_loss, selection.top_k

    def watched(self, model, batch):
        losses = learn(self, model, batch)
        modes.append((self.state["phase"], self.book.mode, "lasso" in losses))
        return losses

    def look(logits, units, *rest, **more):
        chosen.update(logits=logits, units=units)
        return top_k(logits, units, *rest, **more)

    monkeypatch.setattr(tuning.Tuning, "_lora_loss", watched)
    monkeypatch.setattr(selection, "top_k", look)
    ours = {name: value for name, value in SHORT.items() if name not in PAPER}
    how = ATP(
        **ours
        | {"steps": 80, "control_fraction": 0.75, "sparsity": 0.3, "round_channels": 1, "eval_every": 5}
        | {"lora_on": lora_on, "slice_rows": None if lora_on == "cut" else 8}
    )
    record = how.compress(model, words, examples)
    waits = lora_on == "cut"
    assert modes == [("control", "off", False)] * (0 if waits else 60) + [("frozen", "base", False)] * (
        80 if waits else 20
    )
    rows = record["rows"]
    assert (rows["lora"], rows["generator"]) == ((40, 40) if waits else (32, 8)) and how.shares_rows == waits
    control = [entry for entry in record["history"] if entry["phase"] == "control"]
    assert len(control) == 60 and all(entry["slice_kl"] > 0 for entry in control)
    assert "refitted" in record["freeze"] and not any("lasso" in alarm for alarm in record["warnings"])
    channels = torch.stack([chosen["units"].of(layer, "channels") for layer in range(2)])
    useless = torch.zeros_like(channels, dtype=torch.bool)
    useless[:, ::4] = True
    assert chosen["logits"][channels[useless]].mean() < chosen["logits"][channels[~useless]].mean() - 1
    assert record["removed_of_prunable"] == pytest.approx(0.3, abs=0.01)
    assert record["zeroing"]["forward_gap"] <= 1e-5 and record["cut_against_masked"] <= 1e-4
    assert_plain(model)


def test_rows_that_both_read_are_counted_once(words):
    long = {**rows(1)[0], "response": "say " * 60}
    few = Examples("response", [*rows(40), long], rows(8, 100), [], None, "numbers", "0" * 64)
    for fields, generator in (({}, 40), ({"mask": "none"}, 0), ({"slice_rows": 8}, 8)):
        method, model = ATP(seq_len=40, **fields), toy()
        *_, counts = method._data(model, method.units_of(model), words, few)
        assert counts["rows_dropped"] == 1 and counts["rows"]["generator"] in (generator, generator - 1), fields


def test_a_refit_reads_rows_whole_and_drawn_at_random(words):
    """Not the part of them that fits into `seq_len`, nor the first ones: files are sorted by task."""
    long = [{**row, "prompt": row["prompt"] + " of 1,000" * 9} for row in rows(40)]
    model, given = toy(), Examples("response", long, rows(8, 100), [], None, "numbers", "0" * 64)

    def text(**fields):
        method = ATP(seq_len=40, **fields)
        return method._data(model, method.units_of(model), words, given)[0]

    everything = text(refit_tokens=10**6)
    assert everything.text_NT.numel() > 2 * sum(map(len, everything.train.ids))
    few, again, other = (text(refit_tokens=400, seed=seed).text_NT for seed in (0, 0, 1))
    assert few.shape == (10, 40) and torch.equal(few, again) and not torch.equal(few, other)


def test_the_papers_form_by_one_word():
    paper = ATP(preset="paper", lora_on="dense")
    assert {name: getattr(paper, name) for name in PAPER} == PAPER | {"lora_on": "dense"}
    assert all(getattr(ATP(), name) != value for name, value in PAPER.items())


def test_a_refit_comes_by_itself_where_it_can():
    assert ATP().refits and ATP(heal_steps=5).refits and ATP(compensate="least-squares", mask="taylor").refits
    for fields in (
        {"units": "head-dims+channels"},
        {"zeroing": "beta"},
        {"mask": "taylor"},
        {"mask": "none"},
        {"mask": "none", "compensate": "least-squares"},
        {"compensate": "none"},
    ):
        assert not ATP(**fields).refits, fields
        ATP(**fields).check()


@pytest.mark.parametrize("mask", ["taylor", "random", "none"])
def test_baselines(mask, words, examples):
    model = toy()
    before = structure.total_parameters(model)
    record = short(mask=mask).compress(model, words, examples)
    assert record["lora_tokens"] > 0 and record["slice_tokens"] == 0
    assert (structure.total_parameters(model) < before) == (mask != "none")
    if mask == "none":
        assert record["removed_parameters"] == 0
    else:
        assert 0.35 < record["removed_of_prunable"] < 0.6 and record["zeroing"]["forward_gap"] <= 1e-5
    assert_plain(model)


def test_a_start_by_taylor_scores(words, examples):
    """Six steps of the generator do not bring a dense start to the budget; this one is there."""
    kept = {}
    for start in ("dense", "taylor"):
        record = short(start=start, sparsity=0.4, round_channels=1, generator_lr=1e-3).compress(toy(), words, examples)
        kept[start] = record["freeze"]["kept_before"]
    assert kept["dense"] > 0.8 and abs(kept["taylor"] - 0.6) < 0.15, kept


def test_a_start_from_what_another_checkpoint_kept(words, examples, tmp_path):
    """A generator that hardly moves ends at that mask; one of another model is refused before anything is trained."""
    how = short(start=str(tmp_path), round_channels=1, generator_lr=1e-6)
    units = how.units_of(toy())
    score_U = torch.rand(len(units), generator=torch.Generator().manual_seed(1))
    keep_U = how.select(score_U, units)
    file = tmp_path / "compression.json"
    file.write_text(json.dumps({"stages": [{"record": {"kept": structure.kept(units, keep_U)}}, {"record": {}}]}))
    record = how.compress(toy(), words, examples)
    assert record["kept"] == structure.kept(units, keep_U)
    with pytest.raises(ValueError, match=r"start: .* is not of this model and its units: .* in 3 layers"):
        how.compress(toy(num_hidden_layers=3), words, examples)
    file.write_text(json.dumps({"stages": [{"record": {}}]}))
    with pytest.raises(ValueError, match="tells of 0 stages that removed units"):
        how.compress(toy(), words, examples)
    for other in ("[]", "no JSON", '{"stages": [{}]}', '{"stages": 3}'):
        file.write_text(other)
        with pytest.raises(ValueError, match="does not tell of stages"):
            how.compress(toy(), words, examples)
    with pytest.raises(ValueError, match="a folder that sentei has written; got 'nowhere'"):
        short(start="nowhere").compress(toy(), words, examples)


@pytest.mark.parametrize(
    "fields",
    [
        {"zeroing": "immediate"},
        {"final_mask": "last_sample"},
        {"final_mask": "threshold", "mask_in_loss": "hard"},
        {"control_every": 3, "accumulate": 2},
        {"shape": "uniform", "sparsity": 0.2},
        {"checkpointing": True},
        {"checkpointing": True, "generator_loss": "kl"},
        {"loss_on": "response", "group_lr_scale": 0.1},
        {"precision": "bf16"},
        {"compensate": "least-squares"},
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_variants(fields, words, examples):
    model = toy()
    record = short(steps=6, eval_every=None, **fields).compress(model, words, examples)
    assert math.isfinite(record["validation_loss"]) and record["cut_against_masked"] <= 1e-4
    assert_plain(model)
    if fields.get("shape") == "uniform":
        assert len({(s.num_kv_heads, s.intermediate_size) for s in structure.sizes(model)}) == 1
    if "final_mask" in fields:
        assert "misses_budget_by" in record["freeze"]


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_nearness_to_the_dense_model_is_on_all_tokens_of_a_row(loss, words, examples):
    """`loss_on` is what LoRA learns; a generator that lowers the same loss keeps to it."""
    read = {}
    for loss_on in ("full", "response"):
        fields = {"steps": 2, "control_fraction": 0.5, "eval_every": None, "generator_loss": loss, "loss_on": loss_on}
        read[loss_on] = short(**fields).compress(toy(), words, examples)
    full, response = read["full"], read["response"]
    assert response["lora_tokens"] < full["lora_tokens"]
    assert (response["slice_tokens"] == full["slice_tokens"]) == (loss == "kl")


def test_prompts_may_count_less_than_responses(words, examples):
    """A weight of 1 is the loss on everything; the best step is chosen by responses all the same."""
    made = {}
    for name, fields in {
        "full": {}, "as much": {"loss_on": "response", "prompt_loss_weight": 1.0},
        "less": {"loss_on": "response", "prompt_loss_weight": 0.1}, "response": {"loss_on": "response"},
    }.items():  # fmt: skip
        made[name] = short(steps=4, eval_every=None, **fields).compress(toy(), words, examples)
    ce = {name: [entry["ce"] for entry in record["history"]] for name, record in made.items()}
    assert ce["as much"] == pytest.approx(ce["full"], abs=1e-5)
    assert made["as much"]["validation_loss"] != pytest.approx(made["full"]["validation_loss"], abs=1e-3)
    first = {name: values[0] for name, values in ce.items()}
    assert min(first["full"], first["response"]) < first["less"] < max(first["full"], first["response"])
    assert made["less"]["lora_tokens"] == made["full"]["lora_tokens"] > made["response"]["lora_tokens"]


def test_the_rate_may_fall(words, examples, monkeypatch):
    from sentei.methods.atp import healing, tuning

    rates = []

    def watched(*args, **fields):
        for step in train(*args, **fields):
            rates.append(step.lr)
            yield step

    monkeypatch.setattr(tuning, "train", watched)
    monkeypatch.setattr(healing, "train", watched)
    for final_lr in (1.0, 0.1):
        short(steps=8, heal_steps=8, final_lr=final_lr, lr=1e-3, eval_every=None).compress(toy(), words, examples)
    assert rates[:24] == [1e-3] * 24  # the teacher's, the masked model's and those of healing
    for start in (24, 32, 40):
        fallen = rates[start : start + 8]
        assert fallen == sorted(fallen, reverse=True) and 1e-3 > fallen[0] > 9e-4 and 1e-4 < fallen[-1] < 2e-4


def test_another_cut_than_the_masks_is_refused(words, examples, monkeypatch):
    def other(self, model, units, keep_U):
        of = units.of(0, "channels")
        changed_U = keep_U.clone()
        changed_U[of] = keep_U[of].roll(1)
        wiring.remove(model, units, changed_U)

    monkeypatch.setattr(ATP, "remove", other)
    with pytest.raises(ValueError, match=r"cut and masked model differ by .* first at layer 0"):
        short(steps=6).compress(toy(), words, examples)


def test_a_cut_may_differ_by_what_rounding_does(words, examples, monkeypatch):
    """Shaken embeddings tell how much that is; nothing of it stays in the model."""
    model, ids = toy(), torch.arange(2, 14)[None]
    plain, shaken = atp._logits(model, [ids]), atp._logits(model, [ids], shaken=True)
    ((relative, absolute),) = atp._gaps(shaken, plain)
    assert 0 < relative <= absolute < 1e-4
    assert torch.equal(atp._logits(model, [ids])[0][-1], plain[0][-1])
    assert atp._compare(shaken, plain, [relative]) == (relative, absolute)
    with pytest.raises(ValueError, match="differ by"):
        atp._compare(shaken, plain, [relative / 2])
    with pytest.raises(ValueError, match="differ by nan"):
        atp._compare([(*plain[0][:-1], plain[0][-1] * math.nan)], plain, [1.0])
    record = short(steps=6).compress(model, words, examples)
    assert record["cut_against_masked"] <= record["cut_limit"] == 1e-4
    monkeypatch.setattr(atp, "SHAKEN", 1e9)  # a model that makes anything of a rounding error is still compared
    assert short(steps=6).compress(toy(), words, examples)["cut_limit"] == 1e-2


def test_bf16_base(words, examples):
    model = toy().to(torch.bfloat16)
    record = short(steps=6, precision="bf16").compress(model, words, examples)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert record["cut_against_masked"] <= 1e-4 < record["cast_against_masked"]


def test_checkpointing_gives_the_same_run(words, examples):
    plain, recomputed = toy(), toy()
    short(steps=6).compress(plain, words, examples)
    short(steps=6, checkpointing=True).compress(recomputed, words, examples)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True))


def test_micro_batches_are_one_larger_batch(words, examples):
    whole, parts = toy(), toy()
    records = [
        short(lora_dropout=0.0, batch_size=4 // n, accumulate=n, precision="fp32").compress(model, words, examples)
        for model, n in ((whole, 1), (parts, 2))
    ]
    assert records[0]["kept"] == records[1]["kept"]
    assert records[0]["lora_tokens"] == records[1]["lora_tokens"]
    assert records[0]["slice_tokens"] == records[1]["slice_tokens"]
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("every", "checks"), [(1, 3), (3, 4), (5, 3)])
def test_masks_are_compared_whatever_the_decisions_interval(every, checks, words, examples, monkeypatch):
    from sentei.methods.atp import ranks, tuning

    compared = []
    monkeypatch.setattr(tuning, "CHECK_EVERY", 4)
    monkeypatch.setattr(ranks, "check_same", lambda keep: compared.append(keep))
    short(steps=24, control_every=every).compress(toy(), words, examples)
    assert len(compared) == checks


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused(name, words, examples, monkeypatch):
    model, before = toy(), weights(toy())
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard; use plain data parallelism"):
        short().compress(model, words, examples)
    assert same(weights(model), before)
    assert_plain(model)


@pytest.mark.parametrize(("mask", "compensate"), [("learned", "none"), ("taylor", "none"), ("taylor", "least-squares")])
def test_healing_by_the_tuned_dense_model(mask, compensate, words, examples, tmp_path, monkeypatch):
    """The teacher has the weights that it was tuned on, whatever the masked model's were refitted to."""
    from sentei.methods.atp import refit

    how = short(heal_steps=4, mask=mask, compensate=compensate)
    whole, killed, resumed = toy(), toy(), toy()
    plain, taught = weights(whole), []
    undone = refit.Refit.undone

    @contextmanager
    def watched(self):
        with undone(self):
            now = {name.replace(".base_layer", ""): p for name, p in self.model.named_parameters()}
            taught.append(all(torch.equal(p, now[name].to(p.dtype)) for name, p in plain.items()))
            yield

    monkeypatch.setattr(refit.Refit, "undone", watched)
    record = how.compress(whole, words, examples)
    assert record["heal"]["tokens"] > 0 and record["cut_against_masked"] <= 1e-4
    assert record["heal"]["teacher_tokens"] == record["lora_tokens"]  # dense, but of the same rows and steps
    assert record["compensate"] == compensate and len(taught) == 4 and all(taught)
    assert_plain(whole)

    def kill(event):
        if "healing" in event["message"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        how.compress(killed, words, examples, workdir=tmp_path, report=kill)
    assert_plain(killed)
    how.compress(resumed, words, examples, workdir=tmp_path)
    assert same(weights(whole), weights(resumed))


def test_loss_that_is_not_finite_stops_the_run(words, examples, tmp_path, monkeypatch):
    from sentei.methods.atp import tuning

    model, before = toy(), weights(toy())
    taken = tuning.Tuning._mask_gradient

    def broken(self, mask, step):
        losses, gradient, tokens = taken(self, mask, step)
        return ({**losses, "loss": math.nan}, gradient, tokens) if step == 4 else (losses, gradient, tokens)

    monkeypatch.setattr(tuning.Tuning, "_mask_gradient", broken)
    with pytest.raises(ValueError, match=r"step 4 \(phase control, fp32\); the last good state is in"):
        short(precision="fp32").compress(model, words, examples, workdir=tmp_path)
    assert same(weights(model), before)


def test_a_refit_at_the_freeze_does_what_lora_had_no_time_for(words, examples, taught):
    """Two steps at a tiny rate: what differs is the refit. A run that stops after it leaves the weights alone."""
    fields = {"steps": 2, "lr": 1e-7, "mask": "taylor", "sparsity": 0.3, "round_channels": 1, "correction": 0.0}
    losses = {}
    for compensate in ("none", "least-squares"):
        record = short(compensate=compensate, **fields).compress(copy.deepcopy(taught), words, examples)
        losses[compensate] = record["validation_loss"]
        assert record["compensate"] == compensate
    assert losses["least-squares"] < losses["none"] - 0.1, losses

    def kill(event):
        if event.get("step") == 1:
            raise KeyboardInterrupt

    model = copy.deepcopy(taught)
    with pytest.raises(KeyboardInterrupt):
        short(compensate="least-squares", **fields).compress(model, words, examples, report=kill)
    assert same(weights(model), weights(taught))


@pytest.mark.parametrize("shape", ["heterogeneous", "uniform"])
def test_a_refit_leaves_biases_where_the_format_has_a_place_for_them(shape, words, examples, taught, tmp_path):
    model = copy.deepcopy(taught)
    fields = {"steps": 2, "sparsity": 0.4, "round_channels": 1, "lora_on": "cut", "start": "flap", "shape": shape}
    record = short(compensate="least-squares", **fields).compress(model, words, examples)
    assert record["freeze"]["refitted"] and record["cut_against_masked"] <= 1e-4
    assert any(size.mlp_bias for size in structure.sizes(model)) == (shape == "heterogeneous")
    taught.save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    stage = {"method": "atp", "fields": {}, "seed": 0, "data": {}, "record": {}}
    checkpoint.save(model, words, tmp_path / "small", parent=tmp_path / "parent", record=stage, shape=shape)
    again, _ = checkpoint.load(tmp_path / "small")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_it_starts_at_what_policy_gradient_keeps(words, examples, tmp_path):
    """The search of widths on LoRA's rows, a tenth of them to judge it; a generator that stands still keeps that."""
    how = short(start="slopes", lora_on="cut", sparsity=0.3, steps=4, generator_lr=1e-9)
    record = how.compress(toy(), words, examples, workdir=tmp_path)
    texts = prompts.rows_as_text(
        [examples.train[i] for i in prompts.hold_out(examples.train, 8, 0)[0]], prompts.Template(words, "plain")
    )
    text = data.Text(texts[3:], texts[:3], [], "rows", "")
    blocks = len(data.blocks(text.train, words, 40))
    method = PolicyGradient(
        sparsity=0.3 * structure.units(toy(), "heads+channels").total / structure.units(toy()).layer_parameters,
        compensate="none", round_to=4, calibration_samples=blocks, calibration_seq_len=40, batch_size=4, seq_len=40,
        eval_samples=8,
    )  # fmt: skip
    parent = toy()
    keep_U, _ = method.choose(method.start(parent, words, text))
    assert record["kept"] == structure.kept(structure.units(parent), keep_U)
    assert record["search_seconds"] > 0 and (tmp_path / "search").exists()


@pytest.mark.parametrize("phase", ["search", "generator"])
def test_a_start_that_was_killed_goes_on(phase, words, examples, tmp_path):
    how = short(start="slopes", lora_on="cut", sparsity=0.3, steps=4, save_every=1)
    whole = toy()
    expected = how.compress(whole, words, examples)

    def kill(event):
        searching = "searching" in event.get("message", "")
        if event.get("step", 0) >= 2 and searching == (phase == "search"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        how.compress(toy(), words, examples, workdir=tmp_path, report=kill)
    model = toy()
    record = how.compress(model, words, examples, workdir=tmp_path)
    assert record["kept"] == expected["kept"] and same(weights(model), weights(whole))


def test_where_the_masks_begin(words, examples):
    assert ATP().first_mask == "slopes" and ATP(shape="uniform").first_mask == "flap"
    assert ATP(units="head-dims+channels").first_mask == "taylor" and ATP(preset="paper").first_mask == "dense"
    for fields, said in (
        ({"units": "head-dims+channels", "start": "slopes"}, "start=slopes scores whole heads"),
        ({"shape": "uniform", "start": "slopes"}, "leaves no widths to search over"),
    ):
        with pytest.raises(ValueError, match=said):
            short(**fields).compress(toy(), words, examples)


def test_the_steps_of_another_run_are_refused(words, examples, tmp_path):
    how = short(lora_on="cut", save_every=2)

    def kill(event):
        if event.get("step") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        how.compress(toy(), words, examples, workdir=tmp_path, report=kill)
    with pytest.raises(ValueError, match=r"generator.pt belongs to another run; delete it"):
        short(lora_on="cut", alpha=4.0).compress(toy(), words, examples, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"generator.pt belongs to another run; delete it"):
        how.compress(toy(seed=1), words, examples, workdir=tmp_path)


def test_a_refit_that_makes_held_out_rows_worse_is_left_out(words, examples, taught, monkeypatch):
    from sentei.methods.atp.refit import Refit

    fields = {"sparsity": 0.3, "zeroing": "immediate", "round_channels": 1}
    plain, spoilt = copy.deepcopy(taught), copy.deepcopy(taught)
    run = Refit.run
    monkeypatch.setattr(Refit, "run", lambda self, keep_U: None)
    short(compensate="least-squares", **fields).compress(plain, words, examples)

    def spoil(self, keep_U):
        run(self, keep_U)
        for linear, *_ in self._old.values():
            linear.weight.data.mul_(-1)

    monkeypatch.setattr(Refit, "run", spoil)
    with pytest.warns(UserWarning, match="the least-squares refit was left out: held-out rows have"):
        record = short(compensate="least-squares", **fields).compress(spoilt, words, examples)
    assert record["compensate"] == "none" and not record["freeze"]["refitted"]
    assert record["freeze"]["loss_after_refit"] > record["freeze"]["loss_before_refit"]
    assert same(weights(spoilt), weights(plain))


def test_too_few_tokens_to_refit(words, examples):
    with pytest.raises(ValueError, match="at least 128 tokens for linears of width 64; the training rows give 120"):
        short(compensate="least-squares", refit_tokens=120).compress(toy(), words, examples)


def test_too_few_rows(words):
    few = Examples("response", rows(120), [], [], None, "few", "0")
    with pytest.raises(ValueError, match="120 rows: the generator needs a held-out slice of 64 and twice that"):
        short(slice_rows=None).compress(toy(), words, few)


PROCESS = """
import sys, json, torch
sys.path.insert(0, {tests!r})
from test_atp_run import Examples, rows, short, toy, weights
import conftest
words = conftest.words.__wrapped__()
examples = Examples("response", rows(40), rows(8, 100), [], None, "numbers", "0" * 64)
model = toy()
import warnings; warnings.simplefilter("ignore")
how = short(steps=4, batch_size={batch}, lora_dropout=0.0, precision="fp32", lora_on="{lora_on}")
record = how.compress(model, words, examples)
import os
torch.save({{"weights": weights(model), "kept": json.dumps(record["kept"]),
            "ce": [e.get("ce", e.get("slice_ce")) for e in record["history"]]}}, {out!r} + os.environ.get("RANK", "0"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora_on", ["masked", "cut"])
def test_two_processes_are_one_with_the_doubled_batch(lora_on, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    code = {
        n: PROCESS.format(tests=str(ROOT / "tests"), batch=4 // n, out=str(tmp_path / f"{n}-"), lora_on=lora_on)
        for n in (1, 2)
    }
    jobs = [subprocess.Popen([sys.executable, "-c", code[1]], env=plain | quiet)]
    for rank in range(2):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        jobs.append(
            subprocess.Popen([sys.executable, "-c", code[2]], env=plain | quiet | where | {"MASTER_PORT": str(port)})
        )
    assert [job.wait(timeout=240) for job in jobs] == [0, 0, 0]
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert first["kept"] == second["kept"] == one["kept"]
    assert same(first["weights"], second["weights"])
    assert first["ce"] == pytest.approx(one["ce"], abs=1e-5)


def compared_accuracies(folder):
    """Accuracies that parent and child share, conditions and all."""
    report = reading.read(folder / "parent", [folder / "small"])
    (child,) = report.children
    return [key for key in report.parent_measurements if key in child.measurements and key[0] == "accuracy"]


def test_from_the_command_line(words, tmp_path, capsys):
    toy().save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    given = [{"question": f"is {i} even", "choices": ["yes", "no"], "answer": i % 2} for i in range(60)]
    lines = [json.dumps(row) for row in given]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:50]))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[50:]))
    data = f"train={tmp_path / 'train.jsonl'},test={tmp_path / 'test.jsonl'}"
    fields = ["--steps", "6", "--batch-size", "4", "--slice-rows", "8", "--seq-len", "60", "--round-channels", "4"]
    command = ["compress", str(tmp_path / "parent"), "--method", "atp", "--data", data, *fields]
    assert cli.main([*command[:2], "--method", "atp", "--data", data, "--out", str(tmp_path / "small"), *fields]) == 0
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["stages"][0]["record"]["rows"]["generator"] == 8
    assert record["result"]["largest_difference"] < 1e-4
    assert cli.main(["eval", str(tmp_path / "small"), "--domain", str(tmp_path / "test.jsonl")]) == 0
    measured = {m["metric"]: m for m in json.loads((tmp_path / "small" / "eval.json").read_text())}
    assert measured["accuracy"]["samples"] == 10 and measured["accuracy"]["chance"] == 0.5
    assert (measured["accuracy"]["template"], measured["accuracy"]["seq_len"]) == ("plain", 60)
    page = tmp_path / "report.html"
    measure = ["eval", str(tmp_path / "parent"), "--domain", str(tmp_path / "test.jsonl")]
    assert cli.main(measure) == 0  # plain, 512 tokens: not what the child was measured with
    assert not compared_accuracies(tmp_path)
    assert cli.main([*measure, "--template", "plain", "--seq-len", "60"]) == 0
    assert len(compared_accuracies(tmp_path)) == 1
    assert cli.main(["report", str(tmp_path / "parent"), str(tmp_path / "small"), "--out", str(page)]) == 0
    for drawn in ("ce and slice ce", "kept and wanted kept (dashed)", "control steps are few"):
        assert drawn in page.read_text(), drawn
    assert cli.main([*command, "--preset", "paper", "--out", str(tmp_path / "paper")]) == 0
    assert cli.main(["report", str(tmp_path / "parent"), str(tmp_path / "paper"), "--out", str(page), "--force"]) == 0
    for drawn in ("ce and slice ce", "kept and wanted kept (dashed)", "lasso", "control steps are few"):
        assert drawn in page.read_text(), drawn
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "small"), "--data", "python-docs", "--seq-len", "60"]) == 2
    assert "give --domain FILE" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "small"), "--domain", str(tmp_path / "train.jsonl")]) == 2
    assert "test prompts were seen in training" in capsys.readouterr().err
