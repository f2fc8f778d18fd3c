"""Recipes and set-up of this repository, and the commands that measure, heal and run, down to the files they write."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model

from sentei import cli, recipe
from sentei.export import openvino
from sentei.recipe import running

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TINY = {"calibration_samples": 4, "calibration_seq_len": 16}
TRAINING = {"steps": 2, "batch_size": 2, "seq_len": 16, "eval_tokens": 32, "lora_rank": 2}
TIMING = {"prompt_tokens": 8, "new_tokens": 2, "rounds": 1, "threads": 1}


@pytest.fixture
def parent(tmp_path, words) -> Path:
    """A tiny Llama on disk."""
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def flags(fields: dict) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_resolves(path, parent, tmp_path, monkeypatch):
    """Every key, field, order of stages and gate; with a stand-in for the model, and without the data."""
    monkeypatch.setattr(running, "load_data", lambda *arguments: None)
    monkeypatch.setattr(running, "check_there", lambda *arguments: None)
    monkeypatch.setattr(openvino, "check", lambda what: None)  # an extra, which need not be installed
    asked = dataclasses.replace(recipe.load(path), model=str(parent), out=str(tmp_path / "out"))
    assert list(recipe.check(asked)) == asked.names()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_reads_its_data(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    monkeypatch.setattr(openvino, "check", lambda what: None)  # an extra, which need not be installed
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    asked = recipe.load(path)
    said = json.dumps(yaml.safe_load(path.read_text()))  # without the comments
    places = re.findall(r"[\w./-]+\.(?:jsonl\.gz|jsonl|json|tsv|txt)\b", said)
    if missing := sorted({place for place in places if not Path(place).exists()}):
        pytest.skip(f"not here: {', '.join(missing)}")
    recipe.check(dataclasses.replace(asked, model=str(tmp_path / "parent"), out=str(tmp_path / "out")))


@pytest.mark.slow
def test_a_set_up_that_was_stopped_goes_on(tmp_path):
    """venv makes the interpreter first and puts pip in last; nothing is installed here, PIP is replaced."""
    root = Path(__file__).parents[1]
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    command = ["make", f"PYTHON={sys.executable}", "PIP=true", "setup"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run([".venv/bin/python", "-m", "pip", "--version"], cwd=tmp_path, check=True)


def test_heal_and_bench(parent, tmp_path, capsys):
    small, healed = tmp_path / "small", tmp_path / "healed"
    made = {"method": "one_shot", "criterion": "magnitude", "sparsity": 0.3, "out": small}
    assert cli.main(["compress", str(parent), *flags(made | TINY)]) == 0
    assert cli.main(["heal", str(small), *flags(TRAINING | {"out": healed})]) == 0
    stages = json.loads((healed / "compression.json").read_text())["stages"]
    assert [stage["method"] for stage in stages] == ["one_shot", "heal"]
    capsys.readouterr()

    assert cli.main(["bench", str(healed), "--trust-remote-code", *flags(TIMING)]) == 0  # the parent is recorded
    shown = capsys.readouterr().out
    assert "prefill tokens/s" in shown and "peak memory MB" in shown
    assert json.loads((healed / "bench.json").read_text())["parent"]["path"] == str(parent)
    assert not list(healed.glob(".*"))


def test_run(parent, tmp_path, capsys):
    asked = {
        "model": str(parent),
        "out": str(tmp_path / "run"),
        "stages": [{"method": "one_shot", "criterion": "magnitude", "sparsity": 0.3, **TINY}],
        "evaluate": {"texts": ["python-docs"], "contexts": [16], "max_blocks": 2},
        "benchmark": TIMING,
        "prompts": ["ab"],
        "new_tokens": 2,
        "gates": ["layer_parameters_ratio <= 0.75", "speedup_prefill > 0"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    assert "criterion: magnitude" in capsys.readouterr().out and not (tmp_path / "run").exists()

    assert cli.main(["run", str(path)]) == 0
    shown = capsys.readouterr().out
    for words in ("parameters", "context 16", "prefill tokens/s", "prompt   ab", "report.html", "passed  speedup"):
        assert words in shown
    assert json.loads((tmp_path / "run" / "result.json").read_text())["values"]["speedup_prefill"] > 0

    path.write_text(yaml.safe_dump(asked | {"gates": ["perplexity_ratio > 1e9"]}))
    assert cli.main(["run", str(path)]) == 1  # nothing is made again for another gate
    said = capsys.readouterr()
    assert "FAILED  perplexity_ratio > 1e9" in said.out and "is there already" in said.err

    path.write_text(yaml.safe_dump(asked | {"stagse": []}))
    assert cli.main(["run", str(path)]) == 2
    assert "no key 'stagse'; did you mean 'stages'?" in capsys.readouterr().err
