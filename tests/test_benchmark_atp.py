"""The table of ATP and its rivals: guesses, shares, splits, and files that must not mix; the recipes beside it."""

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model

from sentei import recipe
from sentei.data import prompts
from sentei.evaluate import domain, scores

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(script):
    return script("atp")


@pytest.fixture
def domains(table):
    import domains

    return domains


def choices(count, start=0):
    return [
        {"question": f"is {i} even", "choices": ["yes", "no", "maybe"], "answer": i % 2, "context": f"{i} is a number"}
        for i in range(start, start + count)
    ]


# --- what a guess is worth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[552, 338, 110], [50, 50], [97, 2, 1], [1, 1, 1, 0]])
def test_guesses(counts, table):
    answers = [label for label, count in enumerate(counts) for _ in range(200 * count)]
    guesses = torch.randint(len(counts), (len(answers),), generator=torch.Generator().manual_seed(0)).tolist()
    row = {"scores": {"choices": {"chance": 1 / len(counts)}}}
    for guess, predicted in (
        (table.chance, guesses),
        (table.majority, [counts.index(max(counts))] * len(answers)),
    ):
        assert guess("accuracy", row, counts) == pytest.approx(scores.accuracy(predicted, answers), abs=0.01)
        assert guess("macro_f1", row, counts) == pytest.approx(scores.macro_f1(predicted, answers), abs=0.01)
    assert table.chance("rougeL", row, counts) == 0.0 and table.majority("rougeL", row, counts) is None
    assert table.majority("accuracy", row, None) is None


def made(method, accuracy, macro_f1, sparsity=0.4, **more):
    tested = {"accuracy": accuracy, "macro_f1": macro_f1, "chance": 1 / 3, "majority": 0.552}
    perplexities = {"perplexity": {"perplexity": 2.5}, "perplexity_full": {"perplexity": 17.25}}
    row = {"method": method, "sparsity": sparsity, "seed": 0, "removed_of_model": 0.3, "parameters": 10**8}
    return row | {"scores": {"choices": tested, **perplexities}} | more


def test_each_score_stands_by_itself(table):
    """Macro-F1 of chance is 0.306 where the answers are 552 : 338 : 110, not a third."""
    counts, dense, pruned = [552, 338, 110], made("dense-lora", 0.60, 0.32), made("atp", 0.55, 0.31)
    floor = table.chance("macro_f1", pruned, counts)
    assert floor == pytest.approx((1.104 / 2.656 + 0.676 / 2.014 + 0.22 / 1.33) / 3)
    expected = 100 * ((0.55 - 1 / 3) / (0.60 - 1 / 3) + (0.31 - floor) / (0.32 - floor)) / 2
    assert table.recovered(pruned, dense, counts, table.chance) == pytest.approx(expected)
    assert table.recovered(pruned, dense, counts, table.nothing) == pytest.approx(100 * (0.55 / 0.60 + 0.31 / 0.32) / 2)

    dense = made("dense-lora", 0.30, 0.40)  # accuracy below chance: macro-F1 alone is left
    expected = 100 * (0.31 - floor) / (0.40 - floor)
    assert table.recovered(pruned, dense, counts, table.chance) == pytest.approx(expected)
    dense = made("dense-lora", 0.552, 0.30)  # no better than the commonest answer, nor than chance
    assert table.recovered(pruned, dense, counts, table.majority) == pytest.approx(
        100 * (0.31 - table.majority("macro_f1", pruned, counts)) / (0.30 - table.majority("macro_f1", pruned, counts))
    )
    assert table.recovered(pruned, made("dense-lora", 0.3, 0.2), counts, table.chance) is None


def test_markdown(table):
    rows = [made("dense-lora", 0.552, 0.4, 0.0), made("atp", 0.5, 0.3, lora_tokens=10, slice_tokens=5)]
    heal = {"steps": 2, "tokens": 3, "teacher_tokens": 10}
    rows += [made("atp-healed", 0.5, 0.3, lora_tokens=10, slice_tokens=5, heal=heal)]
    overhead = [{n: {"seconds": s, "peak_mb": 100 + s, "loaded_mb": 100} for n, s in (("dense-lora", 2), ("atp", 5))}]
    page = table.markdown(
        {
            "rows": rows,
            "model": {"name": "m", "parameters": 1},
            "data": {"name": "d", "train": 5, "test": 1000, "answers": [552, 338, 110]},
            "settings": {"steps": 3, "batch_size": 1, "seq_len": 8, "loss_on": "full"},
            "dtype": "float32",
            "machine": "one",
            "overhead": {"steps": 4, "rounds": overhead},
        }
    )
    lines = page.splitlines()
    assert "chance accuracy 0.333, macro_f1 0.306; commonest answer accuracy 0.552, macro_f1 0.237" in lines[0]
    assert "loss on all tokens; healed: 2 steps more, taught by dense LoRA. " in lines[0]
    assert lines[2].count("|") == lines[3].count("|") == lines[5].count("|")
    assert "| 2.50 | 17.25 |" in lines[5]
    assert lines[5].endswith("| 10 | 15 |") and lines[6].endswith("| 10 | 28 |")  # the teacher's tokens too
    assert "Left out, dense LoRA being no better: accuracy of seed 0 (0.552, majority 0.552)." in lines
    assert "training time x 2.50, peak memory x 1.03, without the loaded model x 2.50" in lines[-1]


# --- one file, one setting ----------------------------------------------------------------------------------------


def test_a_file_of_other_settings_is_refused(table, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["atp.py"])
    args, model = table.arguments(), tiny_model("llama")
    rows = [prompts.make_row(row, "") for row in choices(6)]
    asked = table.settings_of(args, model, rows[:4], rows[4:])
    out = tmp_path / "table.json"
    assert table.tables.resumed(out, asked) == {"rows": []} | asked
    out.write_text(json.dumps(table.tables.resumed(out, asked) | {"rows": [{"seed": 0}]}))
    assert table.tables.resumed(out, asked)["rows"] == [{"seed": 0}]
    chosen = Namespace(**vars(args) | {"seeds": 9, "methods": ["atp"], "sparsity": [0.2], "out": "other"})
    assert table.settings_of(chosen, model, rows[:4], rows[4:]) == asked  # more rows of the same table
    for name, value in (
        ("lr", 1e-3), ("rank", 4), ("generator_lr", 1e-2), ("control_every", 2), ("slice_rows", 9), ("eval_rows", 5),
        ("calibration", 3), ("steps", 7), ("tokens", "all"), ("seq_len", 9), ("test_rows", 2),
    ):  # fmt: skip
        changed = table.settings_of(Namespace(**vars(args) | {name: value}), model, rows[:4], rows[4:])
        with pytest.raises(SystemExit, match=f"other settings \\({name} .* there, .* here\\); give another --out"):
            table.tables.resumed(out, changed)
    with pytest.raises(SystemExit, match="sha256"):
        table.tables.resumed(out, table.settings_of(args, model, rows[1:5], rows[4:]))
    with pytest.raises(SystemExit, match="parameters"):
        table.tables.resumed(out, table.settings_of(args, tiny_model("llama", num_hidden_layers=1), rows[:4], rows[4:]))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_clause_is_on_one_side_under_all_its_tasks(domains, monkeypatch):
    rows = [
        {"task": f"task_{task}", "label": "Yes" if clause % 2 else "no", "text": f"Clause  {clause} says so."}
        for task in range(6)
        for clause in range(100)
    ]
    rows += [{"task": "copies", "label": "yes", "text": f"clause {clause} SAYS so."} for clause in range(100)]
    monkeypatch.setattr(domains, "lines", lambda path: rows)
    train, test = domains.legalbench()
    texts = [{" ".join(row["context"].casefold().split()) for row in part} for part in (train, test)]
    assert not texts[0] & texts[1] and sum(map(len, texts)) == 100
    assert len(train) + len(test) == 700 and 80 < len(test) < 200

    args = Namespace(train=None, test=None, data="legalbench", train_rows=60, test_rows=20)
    train, test = domains.rows_of(args)
    assert (len(train), len(test)) == (60, 20)
    assert len({row["question"] for row in train}) == 7 and len({row["question"] for row in test}) >= 5
    hashes = [prompts.prompt_hash(row) for row in train]
    assert hashes == sorted(hashes)


@pytest.fixture
def written(domains, monkeypatch, tmp_path):
    """A folder with what `--rows` writes."""
    monkeypatch.setitem(domains.READ, "pubmedqa", lambda: (choices(240), choices(20, 1000)))
    domains.write_rows(tmp_path, Namespace(train=None, test=None, data="pubmedqa", train_rows=None, test_rows=None))
    return tmp_path


def test_rows_are_written_as_the_methods_read_them(written):
    train, test = (domain.read(written / f"pubmedqa-{part}.jsonl") for part in ("train", "test"))
    assert [row["question"] for row in test] == [row["question"] for row in choices(20, 1000)]
    assert train[3]["answer"] == 1 and train[3]["context"] == "3 is a number"
    text = json.loads((written / "pubmedqa-train.jsonl").read_text().splitlines()[3])["text"]
    assert text.startswith("Context: 3 is a number") and text.endswith("Answer: no")


@pytest.mark.parametrize("name", ["atp-pubmedqa", "atp-rivals"])
def test_recipes_with_the_rows_they_ask_for(name, written, words, monkeypatch):
    """Every stage and its data are checked as `sentei run --dry-run` does it, on a toy in place of the real model."""
    tiny_model("llama", max_position_embeddings=512).save_pretrained(written / "parent")
    words.save_pretrained(written / "parent")
    monkeypatch.chdir(written)
    path = ROOT / "recipes" / f"{name}.yaml"
    assert "python benchmarks/atp.py --data pubmedqa --rows ." in path.read_text()
    (written / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": "parent"}))
    stages = recipe.check(recipe.load(written / "recipe.yaml"))
    if name == "atp-rivals":
        assert list(stages) == [
            "dense-lora", "wanda", "wanda-lora", "taylor", "taylor-lora", "policy-gradient", "policy-gradient-lora",
            "fixed-mask", "atp", "atp-paper",
        ]  # fmt: skip
        for rival in ("wanda", "taylor", "policy-gradient"):
            assert f"model: atp-rivals/{rival}\n" in stages[f"{rival}-lora"] and "mask: none" in stages[f"{rival}-lora"]
            assert "model: parent\n" in stages[rival] and "data: pubmedqa-train.jsonl\n" in stages[rival]
        same = (
            "lora_rank: 8\n",
            "steps: 800\n",
            "batch_size: 4\n",
            "seq_len: 256\n",
            "data: train=pubmedqa-train.jsonl",
        )
        tuned = [stage for stage in stages.values() if "method: atp\n" in stage]
        assert len(tuned) == 7 and all(line in stage for stage in tuned for line in same)


# --- overhead -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_overhead(written, words, table):
    tiny_model("llama", num_hidden_layers=2, max_position_embeddings=512).save_pretrained(written / "parent")
    words.save_pretrained(written / "parent")
    files = ["--train", "pubmedqa-train.jsonl", "--test", "pubmedqa-test.jsonl"]
    command = [sys.executable, str(ROOT / "benchmarks" / "atp.py"), "--model", "parent", *files, "--out", "t.json"]
    command += [
        "--overhead",
        "1",
        "--overhead-steps",
        "4",
        "--slice-rows",
        "8",
        "--sparsity",
        "0.2",
        "--seq-len",
        "120",
    ]
    done = subprocess.run(command, cwd=written, env=_quiet(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads((written / "t.json").read_text())["overhead"]
    (pair,) = measured["rounds"]
    assert pair["atp"]["lora_tokens"] == pair["dense-lora"]["lora_tokens"] > 0
    for of in pair.values():
        assert of["peak_mb"] >= of["loaded_mb"] > 0 and math.isfinite(of["seconds"]) and of["seconds"] > 0
    assert table.overhead_in_words(measured) in done.stdout


def _quiet():
    import os

    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | quiet
