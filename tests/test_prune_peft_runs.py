"""PrunePEFT: whole searches on toys."""

import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from sentei import adapters, checkpoint, recipe
from sentei.data import examples
from sentei.methods.prune_peft import CRITERIA, PrunePEFT, pages, planning
from sentei.methods.prune_peft import assignment as assigning
from sentei.methods.prune_peft.criteria import Recorder
from sentei.methods.prune_peft.tasks import Task
from sentei.methods.prune_peft.training import Bench

FAST = {
    "lora_r": 2, "lora_alpha": 4, "adapter_width": 4, "batch_size": 8, "epochs": 1.0, "lr": 5e-3, "seq_len": 16,
    "steps_per_round": 4, "warmup_examples": 40, "warmup_epochs": 1, "warmup_turns": 2, "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    draw = random.Random(0)
    lines = ["text\tpair\tlabel\tscore"]
    for _ in range(120):
        text = "".join(draw.choice("abcdefgh") for _ in range(10))
        lines.append(f"{text}\t{text[::-1]}\t{int(text[0] < 'e')}\t{ord(text[0]) / 10}")
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.tsv"


def start(family, method, rows, words, tmp_path, **overrides):
    """A model with the method's head, and the rows; the tiny base is on disk."""
    folder = tmp_path / family
    if not folder.exists():
        tiny_model(family, **overrides).save_pretrained(folder)
        words.save_pretrained(folder)
    text = method.read(str(rows), "text")
    model, tokenizer = checkpoint.load(folder, dtype="float32", **method.head(text))
    return model, tokenizer, text


def search(method, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.compress(*arguments, **keywords)


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "phases", "search_ratio")}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("distilbert", {"pair_field": "pair", "assignment": "equal", "compare": True}),
        ("llama", {"assignment": "paper", "lora_split": True}),
        (
            "qwen3",
            {"label_field": "score", "kinds": ("lora",), "assignment": "gradient", "lora_targets": ("q", "down")},
        ),
        ("llama", {"task": "response", "label_field": "pair", "assignment": "random"}),
    ],
)
def test_searches(family, fields, rows, words, tmp_path):
    method = PrunePEFT(**FAST | fields)
    model, tokenizer, text = start(family, method, rows, words, tmp_path)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = search(method, model, tokenizer, text)
    json.dumps(record, allow_nan=False)

    # the budget is met, to within one cheapest removed unit, and masks only shrink
    units = {unit["id"]: unit for unit in record["units"]}
    kept = sum(units[name]["parameters"] for name in record["living"])
    removed = [units[name]["parameters"] for name in units if name not in record["living"]]
    assert kept == record["parameters"]["living"] <= record["parameters"]["budget"]
    assert record["parameters"]["budget"] - kept < min(removed)
    masks = [set(found["living"]) for found in record["rounds"]]
    assert all(later < earlier for earlier, later in pairwise(masks))

    # the model holds the survivors and nothing else
    heads = tuple(f"{name}." for name in adapters.head(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    counted = sum(model.get_parameter(name).numel() for name in trained if not name.startswith(heads or ("\0",)))
    assert counted == kept
    with torch.no_grad():
        adapters.unload(model)
    for name, p in model.named_parameters():
        assert name.startswith(heads or ("\0",)) or torch.equal(p, base[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    # it can be read
    texts = pages.all_pages(record)
    assert "modules, 0 others" in texts["README.md"] and texts["heat_map.svg"].count("<title>") == len(units)
    check = record["adapter"]["pattern_check"]
    hits = [n for n, _ in model.named_modules() if re.fullmatch(record["adapter"]["pattern"], n)]
    assert len(hits) == check["matched"] == check["expected"]
    if fields.get("compare"):
        assert record["plain_lora"]["parameters"] > 0 and record["search_ratio"]["seconds"] > 0
        spent = {name: record["phases"][name] for name in ("tokenising", "warmup", "rounds", "retrain", "plain_lora")}
        whole = (spent["warmup"] + spent["rounds"] + spent["retrain"]) / spent["plain_lora"]
        assert record["search_ratio"]["with_training"] == pytest.approx(whole)
        assert f"one LoRA training, in seconds | {whole:.2f} |" in texts["README.md"]


@pytest.mark.parametrize("assignment", ["gradient", "random"])
def test_a_search_over_ranks(assignment, rows, words, tmp_path):
    """Each layer's LoRA goes down from its highest rank; what stays is one LoRA of that rank."""
    method = PrunePEFT(**FAST | {"lora_r": None, "rank_choices": (1, 2, 4), "assignment": assignment, "budget": 0.4})
    model, tokenizer, text = start("bert", method, rows, words, tmp_path)
    record = search(method, model, tokenizer, text)
    units = [adapters.Unit(**unit) for unit in record["adapter"]["units"]]
    assert record["adapter"]["alpha_per_rank"] == 1.0  # lora_alpha is of the last choice
    assert sum(unit.parameters for unit in units) == record["parameters"]["living"] <= record["parameters"]["budget"]
    assert all(unit.start == 0 or any(unit.stands_on(other) for other in units) for unit in units)
    for found in record["rounds"]:
        of = {unit["id"]: unit for unit in record["units"]}
        assert len({of[name]["layer"] for name in found["removed"] if of[name]["kind"] == "lora"}) == sum(
            of[name]["kind"] == "lora" for name in found["removed"]
        )  # at most the top of each ladder
    for unit in units:
        if unit.is_lora and not any(other.stands_on(unit) for other in units):
            assert {module.r["default"] for module in adapters.modules(model, unit)} == {unit.rank}
    picture = pages.all_pages(record)["heat_map.svg"]
    assert all(f">{name}</text>" in picture for name in ("adapter", "lora.r0-1", "lora.r1-2", "lora.r2-4"))
    with pytest.raises(ValueError, match="rank_choices and lora_r exclude each other"):
        PrunePEFT(rank_choices=(2, 4), lora_r=4)


@pytest.mark.parametrize("family, ends, alpha", [("bert", [2, 4, 8, 16, 32], 32), ("llama", [2, 4, 8], 16)])
def test_ranks_to_choose_from_unless_one_is_given(family, ends, alpha):
    model = tiny_model(family)
    one = [unit for unit in PrunePEFT(lora_r=8).space(model) if unit.is_lora]
    several = [unit for unit in PrunePEFT().space(model) if unit.is_lora]
    assert [unit.id for unit in one if unit.layer == 0] == ["lora.L0"]
    assert [unit.rank for unit in several if unit.layer == 0] == ends
    assert PrunePEFT().alpha_per_rank(model) == PrunePEFT(rank_choices=(1, 4)).alpha_per_rank(model) == alpha / ends[-1]
    assert PrunePEFT(lora_alpha=4).alpha_per_rank(model) == 4 / ends[-1]
    assert PrunePEFT(lora_r=4).alpha_per_rank(model) == alpha / 4


def test_seconds_of_a_search_are_all_of_it(rows, words, tmp_path, monkeypatch):
    """Injection and the watched metric too; tokenising belongs to no training."""
    slow = {"put": 0.05, "score": 0.05}
    for name, seconds in slow.items():
        monkeypatch.setattr(Bench, name, delayed(getattr(Bench, name), seconds))
    monkeypatch.setattr(Task, "_tokens", delayed(Task._tokens, 0.005))
    method = PrunePEFT(**FAST | {"assignment": "random", "max_drop": 0.9, "patience": 9, "units_per_round": 2})
    model, tokenizer, text = start("bert", method, rows, words, tmp_path)
    record = search(method, model, tokenizer, text)
    assert record["phases"]["rounds"] > 0.1 * len(record["rounds"])
    assert record["phases"]["tokenising"] > 0.005 * (len(text.train) + len(text.validation))
    assert record["phases"]["measuring"] > 0.05


def delayed(function, seconds):
    def slow(*arguments, **keywords):
        time.sleep(seconds)
        return function(*arguments, **keywords)

    return slow


def test_equal_seeds_equal_results_and_resuming(rows, words, tmp_path):
    method = PrunePEFT(**FAST | {"save_every": 2})
    whole_model, tokenizer, text = start("bert", method, rows, words, tmp_path)
    whole = search(method, whole_model, tokenizer, text)
    assert len(whole["rounds"]) >= 3 and whole["votes"] is not None

    class Killed(Exception):
        pass

    def kill_at(moment):
        seen = []

        def report(event):
            seen.append(event)
            if len(seen) == moment:
                raise Killed

        return report

    for moment in (7, 15, 20, 34):  # in the warm-up, in two rounds, in the final training
        workdir = tmp_path / f"work{moment}"
        model, tokenizer, _ = start("bert", method, rows, words, tmp_path)
        with pytest.raises(Killed):
            search(method, model, tokenizer, text, workdir=workdir, report=kill_at(moment))
        model, tokenizer, _ = start("bert", method, rows, words, tmp_path)
        again = search(method, model, tokenizer, text, workdir=workdir)
        assert without_times(again) == without_times(whole)
        for (name, one), (_, two) in zip(whole_model.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(one, two), name
    model, tokenizer, _ = start("bert", method, rows, words, tmp_path)
    finished = search(method, model, tokenizer, text, workdir=workdir)
    assert without_times(finished) == without_times(whole)
    assert finished["phases"]["retrain"] == again["phases"]["retrain"]  # of a training that was complete already
    other = PrunePEFT(**FAST | {"save_every": 2, "lr": 1e-3})
    with pytest.raises(ValueError, match="holds a search with other lr"):
        search(other, *start("bert", method, rows, words, tmp_path), workdir=workdir)
    different = search(PrunePEFT(**FAST | {"seed": 1}), *start("bert", method, rows, words, tmp_path))
    assert without_times(different) != without_times(whole)


def planted(monkeypatch, learns):
    """Units for which `learns` is false get no gradient in a search: they stay as they began."""
    real = Recorder.gradients

    def gradients(self):
        for unit in self.living:
            for weight in adapters.parameters(self.model, [unit]):
                if weight.grad is not None and not learns(unit):
                    weight.grad.zero_()
        real(self)

    monkeypatch.setattr(Recorder, "gradients", gradients)


QUICK = FAST | {"epochs": 0.1, "steps_per_round": 6}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_planted_useless_units_go_first(criterion, rows, words, tmp_path, monkeypatch):
    useless = {"lora.L3", "adapter.L1"}
    planted(monkeypatch, lambda unit: unit.id not in useless)
    method = PrunePEFT(**QUICK | {"assignment": criterion, "units_per_round": 2, "budget": 0.8})
    record = search(method, *start("bert", method, rows, words, tmp_path, num_hidden_layers=6))
    assert set(record["rounds"][0]["removed"]) == useless


@pytest.mark.parametrize("criterion", CRITERIA)
def test_planted_vital_units_stay(criterion, rows, words, tmp_path, monkeypatch):
    """Only they learn; all others are as useless as at the start."""
    vital = {"lora.L2", "adapter.L4"}
    planted(monkeypatch, lambda unit: unit.id in vital)
    for seed in range(3):
        method = PrunePEFT(**QUICK | {"assignment": criterion, "units_per_round": 4, "budget": 0.25, "seed": seed})
        record = search(method, *start("bert", method, rows, words, tmp_path, num_hidden_layers=6))
        assert vital <= set(record["living"]) and len(record["living"]) < 6
        assert not vital & {name for found in record["rounds"] for name in found["removed"]}


LADDER = QUICK | {"lora_r": None, "lora_alpha": None, "units_per_round": 4}


@pytest.mark.parametrize("criterion", ["gradient", "sensitivity", "weight", "activation"])
def test_planted_layers_of_the_default_ladder(criterion, rows, words, tmp_path, monkeypatch):
    """Where a layer's LoRA is useless, its slices go first, down to the last; where it alone learns, they stay."""

    def found(learns, budget):
        with monkeypatch.context() as patched:
            planted(patched, learns)
            method = PrunePEFT(**LADDER | {"assignment": criterion, "budget": budget})
            record = search(method, *start("bert", method, rows, words, tmp_path, num_hidden_layers=6))
        gone = [[name for name in one["removed"] if name.startswith("lora")] for one in record["rounds"]]
        return record, [[name.partition(".r")[0] for name in names] for names in gone]

    record, gone = found(lambda unit: unit.kind != "lora" or unit.layer != 3, 0.3)
    assert not any(name.startswith("lora.L3") for name in record["living"])
    last = max(number for number, names in enumerate(gone) if "lora.L3" in names)
    assert all(names[0] == "lora.L3" for names in gone[: last + 1] if names)
    assert all(names.count(layer) <= 2 for names in gone for layer in names)
    record, gone = found(lambda unit: unit.kind == "lora" and unit.layer == 2, 0.25)
    assert {"lora.L2.r0-2", "lora.L2.r8-16", "lora.L2.r16-32"} <= set(record["living"])
    assert not any("lora.L2" in names for names in gone)


def test_rounds_that_were_not_planned_are_said(rows, words, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "count_rounds", lambda *arguments: 1)
    method = PrunePEFT(**FAST | {"assignment": "paper", "units_per_round": 1, "steps_per_round": 4})
    said = "the search takes round 2, 1 were planned: it will cost 0.93x of one training, goal 0.30"
    with pytest.warns(UserWarning, match=re.escape(said)):
        record = method.compress(*start("bert", method, rows, words, tmp_path))
    assert said in record["notes"] and record["search_ratio"]["rows"] > 2 * 4 / 12
    strict = PrunePEFT(**vars(method) | {"max_search_ratio": 0.5, "strict_search_ratio": True})
    with pytest.raises(ValueError, match=r"round 2, 1 were planned.*; raise max_search_ratio"):
        search(strict, *start("bert", method, rows, words, tmp_path))
    ample = PrunePEFT(**vars(method) | {"max_search_ratio": 9.0, "strict_search_ratio": True})
    assert not search(ample, *start("bert", method, rows, words, tmp_path))["notes"]


def test_a_large_batch_needs_no_warm_up(rows, words, tmp_path):
    """Which the defaults' 100 rows are too few for: refused where a warm-up runs alone."""
    fields = FAST | {"batch_size": 30, "warmup_examples": 50, "steps_per_round": 4}
    paper = PrunePEFT(**fields | {"assignment": "paper"})
    assert search(paper, *start("bert", paper, rows, words, tmp_path))["living"]
    with pytest.raises(ValueError, match="a warm-up of 50 rows is fewer than 2 batches of 30"):
        search(PrunePEFT(**fields), *start("bert", paper, rows, words, tmp_path))


def test_the_last_mask_is_watched_too(rows, words, tmp_path, monkeypatch):
    """One removal meets the budget; the metric falls after it, and the search goes back to all units."""
    values = iter([0.9, 0.5])
    monkeypatch.setattr(Bench, "score", lambda self, rows: next(values, 0.7))
    fields = {"assignment": "paper", "budget": 0.9, "units_per_round": 1, "max_drop": 0.1, "patience": 1}
    method = PrunePEFT(**FAST | fields)
    record = search(method, *start("bert", method, rows, words, tmp_path))
    assert record["status"] == "stopped_early" and len(record["rounds"]) == 2 == record["plan"]["rounds"]
    assert len(record["living"]) == len(record["units"])
    values = iter([0.9, 0.85])
    record = search(method, *start("bert", method, rows, words, tmp_path))
    assert record["status"] == "accepted" and [found["removed"] for found in record["rounds"]][1] == []
    few = PrunePEFT(**FAST | fields | {"patience": 2})
    with pytest.warns(UserWarning, match="max_drop will stop nothing: 2 rounds after the first must fall"):
        few.compress(*start("bert", method, rows, words, tmp_path))


def test_rolling_back(rows, words, tmp_path, monkeypatch):
    values = iter([0.9, 0.88, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(Bench, "score", lambda self, rows: next(values, 0.7))
    method = PrunePEFT(**FAST | {"assignment": "paper", "budget": 0.2, "units_per_round": 1, "max_drop": 0.1})
    model, tokenizer, text = start("bert", method, rows, words, tmp_path)
    record = search(method, model, tokenizer, text)
    # rounds 3 and 4 fail: back to the mask of round 2, before the removal that round 3 trained with
    assert record["status"] == "stopped_early" and record["living"] == record["rounds"][1]["living"]
    assert len(record["rounds"]) == 4 and record["parameters"]["living"] > record["parameters"]["budget"]
    assert record["stopped_early"] and "stopped early, in round 4" in record["notes"][-1]
    # a result that is rejected too does not hide it
    values = iter([0.9, 0.88, 0.5, 0.5, 0.5, 0.5])
    method = PrunePEFT(**vars(method) | {"min_metric": 0.8})
    record = search(method, *start("bert", method, rows, words, tmp_path))
    assert record["status"] == "rejected" and record["stopped_early"] and "stopped early" in pages.markdown(record)


def test_a_search_that_must_reach_its_budget(rows, words, tmp_path, monkeypatch, capsys):
    from sentei import cli

    tiny_model("bert").save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    flags = [word for name, value in FAST.items() for word in (f"--{name}", str(value))]
    command = ["compress", str(tmp_path / "bert"), "--method", "prune_peft", "--data", str(rows), *flags]
    command += ["--assignment", "random", "--units-per-round", "1", "--max-drop", "0.1", "--patience", "1"]
    for strict, code in ((True, 4), (False, 0)):
        values = iter([0.9, 0.5])
        monkeypatch.setattr(Bench, "score", lambda self, rows, values=values: next(values, 0.7))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = ["--out", str(tmp_path / f"out{code}"), "--strict-budget", str(strict).lower()]
            assert cli.main([*command, *out]) == code
    capsys.readouterr()


def test_budget_with_the_head_and_weights_of_kinds(rows, words, tmp_path):
    method = PrunePEFT(**FAST | {"assignment": "random", "count_head": True, "budget": 1500})
    record = search(method, *start("bert", method, rows, words, tmp_path))
    assert record["parameters"]["head"] == 24 * 24 + 24 + 2 * 24 + 2
    assert record["parameters"]["budget"] == 1500 - record["parameters"]["head"]
    fields = {"assignment": "random", "units_per_round": 2, "kind_weights": (1.0, 1e6)}
    record = search(PrunePEFT(**FAST | fields), *start("bert", method, rows, words, tmp_path))
    assert {name.partition(".")[0] for name in record["rounds"][0]["removed"]} == {"adapter"}


def test_a_16_bit_base(rows, words, tmp_path):
    """The head is trained in fp32, and measured, saved and loaded in the base's dtype."""
    method = PrunePEFT(**FAST | {"assignment": "equal", "precision": "bf16", "compare": True})
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    text = method.read(str(rows), "text")
    model, tokenizer = checkpoint.load(tmp_path / "llama", dtype="bfloat16", **method.head(text))
    record = search(method, model, tokenizer, text)
    assert model.score.weight.dtype == torch.bfloat16
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("score")]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    out = checkpoint.adapters.save(
        model, tokenizer, tmp_path / "out", parent=tmp_path / "llama", record={"record": record}
    )
    loaded, _ = checkpoint.load(out, dtype="bfloat16")
    task = Task(text, tokenizer, loaded, metric=None, length=16)
    again = task.predict(loaded, text.validation, batch_size=32, precision="bf16")
    assert again == task.predict(model, text.validation, batch_size=32, precision="bf16")
    assert task.score(loaded, text.validation, batch_size=32, precision="bf16") == record["metric"]["value"]


def test_thresholds_reject_and_warn(rows, words, tmp_path):
    method = PrunePEFT(**FAST | {"assignment": "paper", "min_metric": 1.1})
    record = search(method, *start("bert", method, rows, words, tmp_path))
    assert record["status"] == "rejected" and "below min_metric 1.1" in record["rejected"][0]
    method = PrunePEFT(**FAST | {"assignment": "paper", "max_drop": 0.001})
    with pytest.warns(UserWarning, match="less than 2 standard errors of accuracy"):
        method.compress(*start("bert", method, rows, words, tmp_path))


def test_a_saved_assignment_is_used_again(rows, words, tmp_path):
    table = {"lora": [["gradient"]] * 4, "adapter": [["weight", "zeros"]] * 4}
    (tmp_path / "x.json").write_text(json.dumps(table))
    method = PrunePEFT(**FAST | {"assignment": f"file:{tmp_path / 'x.json'}"})
    record = search(method, *start("bert", method, rows, words, tmp_path, num_hidden_layers=6))
    assert record["assignment"] == {kind: [list(cell) for cell in blocks] for kind, blocks in table.items()}
    whole = {"method": "prune_peft", "record": json.loads(json.dumps(record))}  # as prunepeft.json has it
    (tmp_path / "prunepeft.json").write_text(json.dumps(whole))
    cell_of = {f"{kind}.{block}": (kind, block) for kind in table for block in range(4)}
    found = assigning.from_file(tmp_path / "prunepeft.json", cell_of)
    assert assigning.as_table(found) == table
    (tmp_path / "x.json").write_text('{"lora": []}')
    with pytest.raises(ValueError, match="is no assignment for these units"):
        search(method, *start("bert", method, rows, words, tmp_path))


def test_from_the_command_line_to_a_loaded_adapter(rows, words, tmp_path, capsys):
    from sentei import cli

    tiny_model("bert").save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    flags = [word for name, value in FAST.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "out"
    command = ["compress", str(tmp_path / "bert"), "--method", "prune_peft", "--data", str(rows), "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*command, *flags, "--assignment", "paper"]) == 0
        assert "parameters" in capsys.readouterr().out
        worse = ["--compare", "true", "--max-drop-vs", "-1"]  # nothing is better by 1
        assert cli.main([*command, *flags, "--assignment", "paper", "--min-metric", "1.1", *worse, "--force"]) == 3
    assert {file.name for file in out.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "sentei_adapter.json", "prunepeft.json", "report.md",
        "heat_map.svg", "README.md", "recipe.yaml",
    }  # fmt: skip
    checkpoint.load(out, dtype="float32")
    stored = json.loads((out / "prunepeft.json").read_text())
    assert len(stored["record"]["living"]) == len(stored["record"]["adapter"]["units"])
    assert recipe.make_method("prune_peft", stored["fields"]) == PrunePEFT(
        **FAST, assignment="paper", min_metric=1.1, compare=True, max_drop_vs=-1.0
    )
    checkpoint.load(out / "fallback", dtype="float32")  # LoRA everywhere, which was trained to compare with
    assert len(json.loads((out / "fallback" / "sentei_adapter.json").read_text())["units"]) == 3
    assert not list(tmp_path.glob(".out*"))
    assert cli.main(["plan", *command[1:4], "--data", str(rows), *flags]) == 0
    assert "96 to train on" in " ".join(capsys.readouterr().out.replace("rows ", "").split())


def test_a_recipe_prunes_and_then_adapts_the_pruned_model(rows, words, tmp_path):
    """Layers of different width, one without attention: the search runs on what is left and the folder loads."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    lines = [f"so it goes, and goes again {i}, until the end of all the words.\n\n" for i in range(400)]
    (tmp_path / "t.txt").write_text("".join(lines))
    cut = {
        "method": "one_shot", "criterion": "magnitude", "sparsity": 0.4, "calibration_samples": 4,
        "calibration_seq_len": 16, "data": str(tmp_path / "t.txt"),
    }  # fmt: skip
    find = {"method": "prune_peft", "data": str(rows), "assignment": "paper", **FAST}
    asked = {"model": str(tmp_path / "llama"), "out": str(tmp_path / "runs"), "report": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = recipe.run(recipe.Recipe(stages=[cut, find], **asked))
    assert result["status"] == "accepted" and result["parameters"]["living"] <= result["parameters"]["budget"]
    model, _ = checkpoint.load(result["checkpoint"], dtype="float32")
    assert type(model).__name__ == "SenteiLlamaForSequenceClassification"
    with pytest.raises(ValueError, match="must be the last"):
        recipe.Recipe(stages=[find, cut], **asked)
    with pytest.raises(ValueError, match="min_metric and max_drop_vs"):
        recipe.Recipe(stages=[find], evaluate={"texts": ["python-docs"]}, **asked)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget_of": "half"}, "budget_of is one of supernet, base"),
        ({"assignment": "vote"}, "assignment is one of warmup, paper"),
        ({"adapter_init": "one"}, "adapter_init is one of"),
        ({"task": "chess"}, "task is one of classification"),
        ({"lr": 0}, "lr must be above 0"),
        ({"depth_cuts": (0.5, 0.2, 0.8)}, "three rising numbers"),
        ({"kinds": ("adapter",), "compare": True}, "compare trains LoRA everywhere, which is not among kinds"),
        ({"max_drop_vs": 0.1}, "compare=true"),
        ({"kind_weights": (1.0,)}, "a number above 0 for each of lora, adapter"),
        ({"score_from": 1.0}, "score_from and dropout"),
        ({"search_fraction": 2.0}, "at most 1"),
        ({"threshold": 0.0}, "threshold must be above 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PrunePEFT(**fields)


def test_bad_inputs(rows, words, tmp_path):
    def refused(message, family="bert", data=rows, model=None, **fields):
        method = PrunePEFT(**FAST | {"assignment": "paper"} | fields)
        with pytest.raises(ValueError, match=message):
            arguments = start(family, method, data, words, tmp_path)
            search(method, model or arguments[0], *arguments[1:])

    refused("nothing would be removed; the search space has", budget=10_000_000)
    refused("below the cheapest unit", budget=3)
    refused("metric 'spearman' is not for classification", metric="spearman")
    refused("goal 0.30; raise max_search_ratio", strict_search_ratio=True)
    refused("no field 'mark'", label_field="mark")
    warmup = {"assignment": "warmup", "max_search_ratio": 99.0}
    refused("a warm-up of 15 rows is fewer than 2 batches of 8", warmup_examples=15, **warmup)
    model = tiny_model("bert")
    adapters.inject(model, adapters.units(model, rank=4, width=8))
    refused("has PEFT modules already", model=model)
    refused("use one process or DDP", model=torch.nn.DataParallel(tiny_model("bert")))
    few = tmp_path / "few.tsv"
    few.write_text("text\tlabel\n" + "".join(f"row {i}\t{i % 2}\n" for i in range(16)))
    refused("fewer than 2 batches of 8", data=few)
    refused("metric f1 is of two labels, the rows have 3; use macro_f1", data=three(tmp_path), metric="f1")
    wrong, _ = checkpoint.load(tmp_path / "bert", dtype="float32", task="SequenceClassification", labels=list("abc"))
    refused(r"the model's head has 3 outputs, the rows need 2 \(0, 1\); load the model with num_labels=2", model=wrong)
    refused(r"has 3 outputs, the rows need 1 \(a number\)", model=wrong, label_field="score")
    refused("1 steps leave fewer than 2 scored batches; raise steps_per_round", steps_per_round=1)
    refused("3 steps leave fewer than 2 scored batches; raise steps_per_round", steps_per_round=3)
    one = tmp_path / "one.tsv"
    one.write_text("text\tlabel\n" + "".join(f"row {i}\t1\n" for i in range(60)))
    refused("a classification needs two or more", data=one)
    with pytest.raises(ValueError, match="this method learns from labelled rows"):
        recipe.compress(tmp_path / "bert", method="prune_peft", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def three(folder):
    """Rows of three labels."""
    (folder / "three.tsv").write_text("text\tlabel\n" + "".join(f"row {i}\t{i % 3}\n" for i in range(90)))
    return folder / "three.tsv"


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_split_gradients_are_refused(flag, rows, words, tmp_path, monkeypatch):
    method = PrunePEFT(**FAST)
    arguments = start("bert", method, rows, words, tmp_path)
    monkeypatch.setenv(flag, "true")
    with pytest.raises(ValueError, match=f"{flag}: the search reads whole gradients: use one process or DDP"):
        search(method, *arguments)


RANKS = """
import os, sys, warnings
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import torch
from conftest import tiny_model
from sentei import checkpoint
from sentei.methods.prune_peft import PrunePEFT
warnings.simplefilter("ignore")
folder, batch, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
method = PrunePEFT(**{fields!r} | {{"batch_size": batch, "compare": True, "dropout": 0.0}})
text = method.read(str(folder / "rows.tsv"), "text")
model, tokenizer = checkpoint.load(folder / "bert", dtype="float32", **method.head(text))
record = method.compress(model, tokenizer, text, workdir=folder / name)
torch.save([record["rounds"], record["living"], record["plan"], {{n: p.detach() for n, p in model.named_parameters()}}],
           folder / (name + os.environ.get("RANK", "-")))
"""


@pytest.mark.slow
def test_two_processes_have_one_mask(rows, words, tmp_path):
    """Data-parallel: both ranks end with the same masks and weights, those of one process with the whole batch."""
    tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    script = tmp_path / "ranks.py"
    fields = FAST | {"units_per_round": 2}
    here = Path(__file__)
    script.write_text(RANKS.format(tests=str(here.parent), root=str(here.parents[1]), fields=fields))
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29715", str(script)]
    subprocess.run([sys.executable, *both, str(tmp_path), "4", "two"], check=True, env=quiet, capture_output=True)
    subprocess.run([sys.executable, str(script), str(tmp_path), "8", "one"], check=True, env=quiet)
    first, second, alone = (torch.load(tmp_path / name, weights_only=True) for name in ("two0", "two1", "one-"))
    assert first[:3] == second[:3]
    for name, p in first[3].items():
        assert torch.equal(p, second[3][name]), name
    assert first[2]["steps"] == alone[2]["steps"] and first[2]["warmup_steps"] == alone[2]["warmup_steps"]
    assert [found["removed"] for found in first[0]] == [found["removed"] for found in alone[0]]
    for name, p in first[3].items():
        assert float((p - alone[3][name]).abs().mean()) < 1e-3, name  # sums in another order, and AdamW's first steps
    assert {file.name for file in (tmp_path / "two").iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}


def test_slices_hold_every_label(rows):
    text = examples.load(rows, text_field="text")
    few = examples.stratified(text.train, 8, seed=0, labels=2)
    assert {row["label"] for row in few} == {0, 1}
