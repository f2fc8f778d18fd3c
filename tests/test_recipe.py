"""Recipes: what they refuse, what they make, what they do not make twice. And one stage through the Python API."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import yaml
from conftest import tiny_model

from sentei import checkpoint, recipe
from sentei.recipe.fields import convert

TINY = {"calibration_samples": 4, "calibration_seq_len": 16}


@pytest.fixture
def parent(tmp_path, words) -> Path:
    """A tiny Llama on disk."""
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def write(folder: Path, **content) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def content(parent: Path, **changes) -> dict:
    stages = [
        {"method": "one_shot", "criterion": "magnitude", "sparsity": 0.3, **TINY},
        {"method": "heal", "steps": 2, "batch_size": 2, "seq_len": 16, "eval_tokens": 32, "lora_rank": 2},
    ]
    whole = {
        "model": str(parent),
        "out": str(parent.parent / "run"),
        "seed": 3,
        "stages": stages,
        "evaluate": {"texts": ["python-docs"], "contexts": [16], "max_blocks": 2},
        "prompts": ["ab"],
        "new_tokens": 3,
        "gates": ["layer_parameters_ratio <= 0.75", "perplexity_ratio > 1e9"],
    }
    return whole | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "no key 'modle'; did you mean 'model'?"),
        ({"evaluate": {"context": [16]}}, "evaluate has no key 'context'; did you mean 'contexts'?"),
        ({"benchmark": {"round": 1}}, "did you mean 'rounds'?"),
        ({"stages": [{"method": "one_shoot"}]}, "did you mean 'one_shot'?"),
        ({"stages": [{"method": "one_shot", "sparsty": 0.1}]}, "no field 'sparsty'; did you mean 'sparsity'?"),
        ({"stages": [{"method": "one_shot", "sparsity": 1.5}]}, "between 0 and 1; got 1.5"),
        ({"stages": []}, "needs stages"),
        ({"stages": ["heal"]}, "a stage is a method and its fields"),
        ({"gates": ["perplexity_ration <= 2"]}, "did you mean 'perplexity_ratio'?"),
        ({"gates": ["perplexity_ratio is 2"]}, "write it as: perplexity_ratio <= 2"),
        ({"gates": ["speedup_decode >= 1"]}, "needs a benchmark"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data": "nothing.txt"}, "nothing.txt"),
    ],
)
def test_refused_before_anything_is_written(parent, changes, message):
    path = write(parent.parent, **content(parent, **changes))
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("[", r"\[")):
        recipe.run(recipe.load(path))
    assert not (parent.parent / "run").exists()


def test_the_text_of_a_later_stage_is_read_before_anything_is_written(parent):
    rows = parent.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} alpha beta gamma"}) + "\n" for i in range(200)))
    whole = content(parent, data=str(rows))
    whole["stages"][1]["text_field"] = "body"  # the same file, another column
    with pytest.raises(ValueError, match="body"):
        recipe.run(recipe.load(write(parent.parent, **whole)))
    assert not (parent.parent / "run").exists()


def test_missing_keys_and_files(tmp_path):
    with pytest.raises(ValueError, match="needs model, out, stages"):
        recipe.load(write(tmp_path, data="python-docs"))
    with pytest.raises(ValueError, match="no recipe at"):
        recipe.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        recipe.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        (float, "2e-3", 0.002),
        (float, 1, 1.0),
        (int, "12", 12),
        (int, 3.0, 3),
        (int | None, "none", None),
        (int | None, "4", 4),
        (bool, "no", False),
        (bool, True, True),
        (str, False, "off"),
        (Literal["mean", "none"], "none", "none"),
        (tuple[int, ...], "1, 2", (1, 2)),
        (tuple[float, ...], [1, 2], (1.0, 2.0)),
    ],
)
def test_values_become_the_type_of_the_field(kind, given, wanted):
    made = convert("field", given, kind)
    assert made == wanted and type(made) is type(wanted)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (int, "1.5", "field is '1.5'; expected a whole number"),
        (int, True, "field is True; expected a whole number"),
        (float | None, "much", "field is 'much'; expected a number"),
        (bool, "maybe", "expected true or false"),
        (Literal["mean", "none"], "maen", "did you mean 'mean'?"),
    ],
)
def test_values_of_another_type_are_refused(kind, given, message):
    with pytest.raises(ValueError) as error:
        convert("field", given, kind)
    assert message in str(error.value)


def test_a_run_makes_every_step_once(parent, monkeypatch):
    path = write(parent.parent, **content(parent))
    lines = []
    result = recipe.run(recipe.load(path), report=lines.append)
    run = parent.parent / "run"
    pruned, healed = run / "1-one_shot", run / "2-heal"
    assert result["checkpoint"] == str(healed)
    assert (run / "report.html").is_file() and (healed / "generation.json").is_file()
    assert set(result["measurements"]) == {"parent", "1-one_shot", "2-heal"}
    assert [gate["passed"] for gate in result["gates"]] == [True, False]
    assert json.loads((run / "result.json").read_text())["values"] == result["values"]
    assert not list(run.glob(".*")), "no work folder is left"

    resolved = yaml.safe_load((pruned / "recipe.yaml").read_text())
    assert resolved["model"] == str(parent)
    stage = resolved["stages"][0]
    assert stage["seed"] == 3 and stage["sparsity"] == 0.3 and stage["granularity"] == "auto", "every field is there"
    assert yaml.safe_load((healed / "recipe.yaml").read_text())["stages"][0]["teacher"] == str(parent)
    stages = json.loads((healed / "compression.json").read_text())["stages"]
    assert [stage["method"] for stage in stages] == ["one_shot", "heal"]

    def never(*args, **kwargs):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", never)
        assert recipe.run(recipe.load(path)) == result

    changed = content(parent)
    changed["stages"][1]["steps"] = 3
    with pytest.raises(FileExistsError, match=r"2-heal was made from other settings"):
        recipe.run(recipe.load(write(parent.parent, **changed)))


def test_the_recipe_in_a_checkpoint_makes_it_again(parent):
    from safetensors.torch import load_file

    out = recipe.compress(parent, method="one_shot", criterion="random", out=parent.parent / "a", **TINY)
    again = recipe.load(out / "recipe.yaml")
    again = dataclasses.replace(again, out=str(parent.parent / "b"), report=None)
    made = Path(recipe.run(again)["checkpoint"])
    first, second = (load_file(folder / "model.safetensors") for folder in (out, made))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_stopped_work_is_kept_and_foreign_state_is_not(parent, monkeypatch):
    from sentei.methods.one_shot import OneShot

    seen = []

    def stopped(self, model, tokenizer, text, *, workdir, report):
        seen.append((workdir / "state").exists())
        (workdir / "state").write_text("half way")
        raise KeyboardInterrupt

    monkeypatch.setattr(OneShot, "compress", stopped)
    for sparsity in (0.3, 0.3, 0.4):
        with pytest.raises(KeyboardInterrupt):
            recipe.compress(parent, method="one_shot", sparsity=sparsity, out=parent.parent / "small", **TINY)
    assert seen == [False, True, False]
    assert not (parent.parent / "small").exists()


def test_a_rehearsal_leaves_the_model_alone():
    """The twin that is cut to see whether the result can be saved has a configuration of its own."""
    from conftest import tiny_model

    from sentei import structure
    from sentei.methods.one_shot import OneShot
    from sentei.recipe.stage import Job, shadow

    model = tiny_model("gemma3_text")
    job = Job("m", "m", "one_shot", OneShot(criterion="greedy", sparsity=0.5), Path(), "heterogeneous", None)
    twin, _ = shadow(job, model, structure.units(model, "layers"))
    assert twin.config.num_hidden_layers == len(twin.config.layer_types) == 2
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 4
