"""The table of PEFT configurations: equal rounds, files that must not mix, differences, costs and masks."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from sentei import checkpoint
from sentei.methods.prune_peft import CRITERIA, PrunePEFT

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(script):
    return script("prune_peft")


def made(configuration, task, seed, value, seconds, **more):
    row = {"configuration": configuration, "task": task, "seed": seed, "value": value, "metric": "accuracy"}
    return row | {"parameters": 100, "train_seconds": seconds, "seconds": 2 * seconds} | more


def test_markdown(table):
    rows = [made("LoRA everywhere", "cola", seed, 0.5 + seed / 100, 10.0, living=["lora.L0:4"]) for seed in range(3)]
    rows += [made("full fine-tuning", "cola", seed, 0.6 + seed / 100, 20.0) for seed in range(3)]
    masks = (["lora.L0", "lora.L1"], ["lora.L1"], ["lora.L2"])
    for seed, living in enumerate(masks):
        more = {"living": living, "search_seconds": 3.0, "search_ratio": 0.25}
        rows.append(made("warm-up at B", "cola", seed, 0.52 + seed / 100, 11.0, **more))
    settings = {"model": "toy", "rows": 9, "epochs": 1.0, "batch_size": 4, "test_rows": 5}
    text = table.markdown({"rows": rows, "settings": settings, "machine": "here"})
    scores, costs = text.split("\n\nDifferences")
    assert "| warm-up at B | 100 | 53.0 ± 1.0 | 53.0 |" in scores
    # against full fine-tuning, LoRA everywhere; search ratio; (11 + 3) / 10; Jaccard (1/2 + 0 + 0) / 3
    assert "| warm-up at B | -8.0 ± 0.0 (n=3) | +2.0 ± 0.0 (n=3) | 0.25 | 1.40 | 0.17 | 22 |" in costs
    assert "| LoRA everywhere | -10.0 ± 0.0 (n=3) |  |  | 1.00 |  | 20 |" in costs
    rows.append(made("random removal of ranks at B", "cola", 0, 0.5, 1.0))
    del rows[-1]["train_seconds"]  # of another machine: it has no part in ratios of time
    costs = table.markdown({"rows": rows, "settings": settings, "machine": "here"}).split("\n\nDifferences")[1]
    assert "| random removal of ranks at B | -10.0 (n=1) | +0.0 (n=1) |  |  |  |  | 2 |" in costs


def test_a_file_of_other_settings_is_refused(table, tmp_path, monkeypatch):
    out = tmp_path / "t.json"
    names = ("rows", "test_rows", "epochs", "batch_size", "seq_len", "grid", "precision")
    monkeypatch.setattr(sys, "argv", ["prune_peft.py", "--model", "toy", "--out", str(out)])
    settings = {name: getattr(table.arguments(), name) for name in names} | {"model": "toy"}
    others = (("model", "another"), ("epochs", 0.5), ("grid", [0.5]), ("precision", "bf16"), ("budget_share", 0.1))
    for name, other in others:
        out.write_text(json.dumps({"rows": [{}], "settings": settings | {name: other}, "lr": {}}))
        there = re.escape(f"other settings ({name} {other!r} there, ")
        with pytest.raises(SystemExit, match=f"{there}.* here\\); give another --out"):
            table.main()


def test_searches_differ_in_nothing_but_the_search(table):
    model = tiny_model("bert", num_hidden_layers=6)
    for kinds in (("lora", "adapter"), ("lora",)):
        method = PrunePEFT(kinds=kinds, lora_r=32)
        assert table.same_rounds(method, model) == {"steps_per_round": 16, "units_per_round": 2}
    ladder = PrunePEFT()
    assert table.same_rounds(ladder, model) == {"steps_per_round": 16, "units_per_round": 6}  # of 36 units
    assert set(table.DEFAULT_TASKS) <= set(table.TASKS) and len(table.DEFAULT_TASKS) >= 6


def test_the_budget_is_a_share(table, tmp_path, monkeypatch):
    """Half, as files without one have it; another share is no continuation of those."""
    model = tiny_model("bert", num_hidden_layers=6)
    half, tenth = (table.budget(PrunePEFT(lora_r=32, **more), model) for more in ({}, {"budget": 0.1}))
    assert half == 5 * tenth or abs(half - 5 * tenth) < 5
    named = [name for name in table.CONFIGURATIONS if "ranks at B" in name]
    assert {f"{criterion} alone, ranks at B" for criterion in CRITERIA} < set(named)
    out = tmp_path / "t.json"
    monkeypatch.setattr(sys, "argv", ["prune_peft.py", "--model", "toy", "--out", str(out)])
    names = ("rows", "test_rows", "epochs", "batch_size", "seq_len", "grid", "precision")
    settings = {name: getattr(table.arguments(), name) for name in names} | {"model": "toy"}
    done = [
        {"task": t, "configuration": c, "seed": s} for t in table.TASKS for c in table.CONFIGURATIONS for s in range(5)
    ]
    out.write_text(json.dumps({"rows": done, "settings": settings, "lr": {}}))
    table.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--budget-share", "0.25"])
    with pytest.raises(SystemExit, match=r"budget_share None there, 0\.25 here"):
        table.main()
    shown = {"rows": [], "settings": settings | {"budget_share": 0.25}, "machine": "here"}
    assert "; B is 0.25 of the smaller kind. Mean" in table.markdown(shown)


ROWS = ["full fine-tuning", "LoRA everywhere at B", "warm-up at B, on all rows", "gradient alone, ranks at B"]


@pytest.mark.parametrize("configuration", ROWS)
def test_a_row_of_a_16_bit_model(table, configuration, words, tmp_path):
    """Each kind of row is made on a copy of the model, which stays as it was."""
    lines = [f"{'abcdefgh'[i % 8]} then {i}\t{i % 2}" for i in range(80)]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    tiny_model("bert").to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    method = PrunePEFT(lora_r=2, adapter_width=4, batch_size=8, epochs=1.0, seq_len=16, precision="bf16")
    rows = method.read(str(tmp_path / "rows.tsv"), "text")
    model, tokenizer = checkpoint.load(tmp_path / "bert", dtype="bfloat16", **method.head(rows))
    before = {name: p.clone() for name, p in model.named_parameters()}
    row = table.run(configuration, method, model, tokenizer, rows, "test", None)
    assert 0 <= row["value"] <= 1 and row["train_seconds"] > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if "ranks" in configuration:
        assert any(".r" in name for name in row["living"]) and row["parameters"] <= table.budget(method, model)
    if "warm-up" in configuration:
        assert row["assigned_by"] == "warmup" and row["parameters"] <= table.budget(method, model)


@pytest.mark.shared
def test_the_tasks_can_be_read(table):
    if not (ROOT / table.SHARED).exists():
        pytest.skip("needs ../shared/data")
    for name in table.DEFAULT_TASKS:
        rows = table.read(name, Namespace(rows=40, test_rows=20))
        assert len(rows.train) == 40 and rows.validation and rows.test, name
