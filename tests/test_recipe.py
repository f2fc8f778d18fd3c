"""Recipes: what they refuse, what they make, what they do not make twice. And one stage through the Python API."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Literal

import pytest
import yaml
from conftest import tiny_model

from sentei import checkpoint, recipe
from sentei.recipe import stage
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
        ({"stages": [{"method": 5}]}, "no method '5'"),
        ({"stages": [{"method": None}]}, "no method 'None'"),
        ({"stages": [{"method": ["one_shot"]}]}, "no method"),
        ({"stages": [{"method": "one_shot", 5: 1}]}, "a stage's keys are names; got 5"),
        ({"data": 5}, "data is 5; expected text"),
        ({"data": {"python-docs": "much"}}, "must be numbers above 0"),
        ({"stages": ["heal"]}, "a stage is a method and its fields"),
        ({"gates": ["perplexity_ration <= 2"]}, "did you mean 'perplexity_ratio'?"),
        ({"gates": ["perplexity_ratio is 2"]}, "write it as: perplexity_ratio <= 2"),
        ({"gates": ["speedup_decode >= 1"]}, "needs a benchmark"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data": "nothing.txt"}, "nothing.txt"),
        ({"model": 7}, "model is 7; expected text"),
        ({"trust_remote_code": "no"}, "trust_remote_code is 'no'; expected true or false"),
        ({"dtype": "floaty"}, "dtype 'floaty' is not known"),
        ({"prompts": "What?"}, "prompts is 'What?'; expected a list of texts"),
        ({"evaluate": ["texts"]}, "evaluate is ['texts']; expected keys with values"),
        ({"evaluate": {"contexts": [16]}}, "nothing to measure; give texts, tasks or domain"),
        ({"evaluate": {"texts": "python-docs"}}, "texts is 'python-docs'; expected a list of texts"),
        ({"evaluate": {"texts": ["python-docs"], "contexts": 16}}, "contexts is 16; expected a list of whole numbers"),
        ({"evaluate": {"texts": ["python-docs"], "contexts": [1]}}, "contexts is 1; expected 2 or more"),
        ({"evaluate": {"texts": ["python-docs"], "contexts": [65]}}, "ask for 65 tokens; "),
        ({"evaluate": {"texts": ["python-docs"], "contexts": [16], "stride": 16}}, "stride is 16; expected less than"),
        ({"evaluate": {"texts": ["python-docs"], "batch_size": "8"}}, "batch_size is '8'; expected a whole number"),
        ({"evaluate": {"texts": ["gone.txt"]}}, "gone.txt"),
        ({"evaluate": {"domain": ["gone.jsonl"]}}, "gone.jsonl"),
        ({"evaluate": {"tasks": ["mine"], "include_path": "gone"}}, "include_path gone is not a folder"),
        ({"benchmark": True}, "benchmark is True; expected keys with values"),
        ({"benchmark": {"rounds": 0}}, "rounds is 0; expected 1 or more"),
        ({"benchmark": {"prompt_tokens": 60, "new_tokens": 8}}, "ask for 69 tokens; "),
        ({"benchmark": {"dtype": "float7"}}, "dtype 'float7' is not known"),
        ({"stages": [{"method": "one_shot", "name": "parent"}]}, "names of their own, and not parent"),
    ],
)
def test_refused_before_anything_is_written(parent, changes, message):
    path = write(parent.parent, **content(parent, **{"gates": [], **changes}))
    for make in (recipe.check, recipe.run):
        with pytest.raises((ValueError, OSError)) as error:
            make(recipe.load(path))
        assert message in str(error.value)
    assert not (parent.parent / "run").exists()


@pytest.mark.slow  # lm-eval reads thousands of files
def test_tasks_that_lm_eval_does_not_know(parent, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    asked = content(parent, gates=[], evaluate={"tasks": ["of_mine"], "include_path": str(tmp_path / "tasks")})
    with pytest.raises(ValueError, match="lm-eval knows no task of_mine"):
        recipe.check(recipe.load(write(parent.parent, **asked)))


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


def test_what_follows_a_stage_that_was_made_again_is_made_again_after_a_stop(parent, monkeypatch):
    """Stage 1 was made anew, then Ctrl-C: the old stage 2 is of the same settings, but of another model's weights."""
    from sentei.checkpoint import inspect
    from sentei.methods.heal import Heal

    whole = content(parent, prompts=[], gates=[], report=None)
    first = recipe.run(recipe.load(write(parent.parent, **whole)))
    pruned, healed = (parent.parent / "run" / name for name in ("1-one_shot", "2-heal"))
    old = inspect(healed).sha256()

    def stop(*arguments, **options):
        assert not (healed.parent / ".2-heal.work" / "state").exists(), "it began from the old stage 1"
        raise KeyboardInterrupt

    whole["stages"][0]["sparsity"] = 0.5
    changed = recipe.load(write(parent.parent, **whole))
    (healed.parent / ".2-heal.work").mkdir()
    resolved = (healed / "recipe.yaml").read_text()
    (healed.parent / ".2-heal.work" / "recipe.yaml").write_text(resolved)
    (healed.parent / ".2-heal.work" / "state").write_text("half way")
    with monkeypatch.context() as patch:
        patch.setattr(Heal, "compress", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(changed, force=True)
    assert inspect(healed).sha256() == old and (healed / "recipe.yaml").read_text() == resolved

    lines = []
    result = recipe.run(changed, report=lines.append)
    said = [line["message"] for line in lines]
    assert f"{pruned} is there already" in said and "stage 2-heal" in said
    stages = json.loads((healed / "compression.json").read_text())["stages"]
    assert stages[1]["parent"]["sha256"] == inspect(pruned).sha256()
    again = json.loads((healed / "eval.json").read_text())
    assert result["measurements"]["2-heal"][0]["loss"] == again[0]["loss"]
    assert result["measurements"]["2-heal"] != first["measurements"]["2-heal"]
    assert json.loads((healed.parent / "done.json").read_text())["stale"] == []


def test_a_stop_in_the_first_stage_loses_no_mark(parent, monkeypatch):
    """--force was asked: a plain run after the stop makes all of it, and does not take the old stages for new ones."""
    from sentei.methods.one_shot import OneShot

    asked = recipe.load(write(parent.parent, **content(parent, prompts=[], gates=[], report=None, evaluate=None)))
    recipe.run(asked)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OneShot, "compress", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(asked, force=True)
    lines = []
    recipe.run(asked, report=lines.append)
    assert not any("is there already" in line["message"] for line in lines)


def test_a_parent_unpacked_from_another_file_is_not_taken(parent, monkeypatch):
    """Two .gguf files in turn with the same `out`."""
    from types import SimpleNamespace

    whole = content(parent, model="other.gguf", evaluate=None, prompts=[], gates=[])
    shutil.copytree(parent, parent.parent / "run" / "parent")
    (parent.parent / "run" / "parent" / "README.md").write_text("Unpacked by sentei from one.gguf (sha256 1111)")
    monkeypatch.setattr(checkpoint, "inspect", lambda *a, **k: SimpleNamespace(sha256=lambda: "2222"))
    with pytest.raises(FileExistsError, match=r"parent is not other.gguf; give another `out`"):
        recipe.run(recipe.load(write(parent.parent, **whole)))


def test_the_recipe_is_in_the_folder_before_it_has_its_name(parent, monkeypatch):
    """A stop between the two would leave a checkpoint that `run` takes for one of other settings."""
    from sentei import atomic

    def stop(partial, out):
        assert yaml.safe_load((partial / "recipe.yaml").read_text())["stages"][0]["method"] == "one_shot"
        move_onto(partial, out)
        raise KeyboardInterrupt

    move_onto = atomic._move_onto
    monkeypatch.setattr(atomic, "_move_onto", stop)
    asked = recipe.load(write(parent.parent, **content(parent, evaluate=None, prompts=[], gates=[], report=None)))
    with pytest.raises(KeyboardInterrupt):
        recipe.run(asked)
    made = parent.parent / "run" / "1-one_shot"
    assert (made / "compression.json").is_file() and (made / "recipe.yaml").is_file()


@pytest.mark.parametrize("compensate", ["mean", "least-squares"])
@pytest.mark.parametrize(
    ("family", "shape"), [("qwen3", "uniform"), ("phi3", "padded"), ("gemma2", "padded"), ("mistral", "uniform")]
)
def test_biases_without_a_place_are_refused_before_the_search(tmp_path, words, monkeypatch, family, shape, compensate):
    from sentei.methods.one_shot import OneShot

    def never(*arguments, **options):
        raise AssertionError("searched")

    tiny_model(family).save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    monkeypatch.setattr(OneShot, "compress", never)
    fields = {"method": "one_shot", "granularity": "channels", "shape": shape, "compensate": compensate}
    fields |= {"calibration_samples": 8, "calibration_seq_len": 16, "criterion": "magnitude"}
    for make in (recipe.plan, recipe.compress):
        with pytest.raises(ValueError, match="use --compensate none, or --shape heterogeneous"):
            make(tmp_path / "parent", out=tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
    assert recipe.plan(tmp_path / "parent", **fields | {"compensate": "none"})


def test_too_few_tokens_for_a_refit_are_refused_before_the_search(parent):
    fields = {"method": "one_shot", "compensate": "least-squares", "calibration_samples": 4, "calibration_seq_len": 16}
    with pytest.raises(ValueError, match="least-squares needs at least 96 calibration tokens"):
        recipe.plan(parent, **fields)


HELD = "found 0 blocks of 60 tokens, need 1;"
SHORT = {"seq_len": 16, "batch_size": 4, "coarse_steps": 2, "eval_samples": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "one_shot", "calibration_samples": 500, "calibration_seq_len": 16}, "need 500"),
        ({"method": "policy_gradient", **TINY, **SHORT, "batch_size": 200}, "need 400"),
        ({"method": "policy_gradient", **TINY, **SHORT, "seq_len": 60, "batch_size": 1}, HELD),
        ({"method": "policy_gradient", **TINY, **SHORT, "reward": "nothing:at_all"}, "cannot import it"),
        ({"method": "policy_gradient", **TINY, **SHORT, "reward": "exact_match"}, "give reward_data"),
        (
            {"method": "policy_gradient", **TINY, **SHORT, "reward": "exact_match", "reward_data": "gone.jsonl"},
            "gone.jsonl",
        ),
        ({"method": "fold_gpt", "calibration_samples": 500, "calibration_seq_len": 16, "heal_steps": 0}, "need 50"),
        ({"method": "heal", "seq_len": 60}, HELD),
    ],
)
def test_plan_refuses_what_would_come_later(parent, tmp_path, fields, message):
    """The validation part of the text with the fewest lines is shorter than a block."""
    text = tmp_path / "text.jsonl"
    num = 12 if message == HELD else 100
    text.write_text("".join(json.dumps({"text": f"Sentence number {i} of a short text."}) + "\n" for i in range(num)))
    if fields["method"] == "heal":
        fields = fields | {"teacher": str(parent)}
    with pytest.raises((ValueError, OSError)) as error:
        recipe.plan(parent, data=str(text), **fields)
    assert message in str(error.value)


def test_plan_counts_the_forwards(parent):
    """Of `greedy`: each round runs the blocks that are left, from their own layer on; 8 samples are one batch."""
    fields = {"method": "one_shot", "calibration_samples": 8, "calibration_seq_len": 16, "sparsity": 0.5}
    said = recipe.plan(parent, criterion="greedy", **fields)["time"]
    assert "; 6 of them: about" in said  # 4 / 2 + 1 and 3 / 2 + 1, of 4 blocks
    assert "the method needs none" in recipe.plan(parent, criterion="magnitude", **fields)["time"]
    assert "; 3 of them: about" in recipe.plan(parent, criterion="wanda", compensate="mean", **fields)["time"]
    assert "; 1 of them: about" in recipe.plan(parent, criterion="flap", compensate="mean", **fields)["time"]
    refit = recipe.plan(parent, criterion="taylor", compensate="least-squares", **fields)
    assert "; 8 of them: about" in refit["time"]  # three, the refit's three, one and a half to correct it
    widths = {"method": "policy_gradient", **TINY, "seq_len": 16, "batch_size": 4, "compensate": "none", "steps": 4}
    widths |= {"eval_samples": 4, "coarse_steps": 50, "slope_sweeps": 3, "shape": "uniform"}
    # 2 of Wanda, 2 x 4, the dense model's 4, 1.4 evaluations
    assert "; 15 of them: about" in recipe.plan(parent, **widths)["time"]
    assert "; 11 of them: about" in recipe.plan(parent, reward="lm_loss", **widths)["time"]
    assert "calibration needs about 1 MB more; a backward pass comes on top" in refit["memory"]


def test_plan_counts_what_learning_rows_takes(parent):
    """A step is a forward and a backward, which counts as two, and with KL or a teacher one of the dense model more."""
    rows = parent.parent / "rows.jsonl"
    made = [{"prompt": f"say {i}", "response": f"{i} {i} {i}"} for i in range(400)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    atp = {"method": "atp", "data": str(rows), "seq_len": 32, "batch_size": 4, "steps": 16, "sparsity": 0.2}

    def forwards(model=parent, **fields) -> int:
        said = recipe.plan(model, **fields)["time"]
        return int(said.partition("; ")[2].partition(" of them: about")[0].replace(",", ""))

    assert forwards(**atp, mask="none") == 3 * 16
    assert forwards(**atp, start="dense") == 3 * 16 + 4 * 4  # the generator has a quarter of the steps
    assert forwards(**atp, start="dense", generator_loss="ce", control_every=2) == 3 * 16 + 3 * 2
    assert forwards(**atp, start="dense", accumulate=2, heal_steps=8) == 2 * (2 * 3 * 16 + 4 * 4 + 4 * 8)
    assert forwards(**atp) > 3 * 16 + 4 * 4 + 100  # a search for the widths first
    epochs = {key: value for key, value in atp.items() if key != "steps"} | {"mask": "none", "epochs": 20}
    train = int(recipe.plan(parent, **epochs)["data"].partition(": ")[2].partition(" rows")[0])
    assert forwards(**epochs) == 3 * math.ceil(20 * train / 4)

    labelled = parent.parent / "labels.jsonl"
    labels = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(400)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in labels))
    task = {"data": str(labelled), "seq_len": 32, "batch_size": 4, "epochs": 2}
    train = int(recipe.plan(parent, method="prune_peft", **task)["data"].partition(": ")[2].partition(" rows")[0])
    assert forwards(method="prune_peft", **task) == round(3 * 1.3 * math.ceil(2 * train / 4))
    transfer = {"method": "prune_once_transfer", "lock": False, **task}
    assert forwards(**transfer) == 3 * 2 * math.ceil(train / 4)
    taught = recipe.compress(parent, out=parent.parent / "taught", **transfer | {"epochs": 0.1})
    assert forwards(**transfer, teacher=taught) == 4 * 2 * math.ceil(train / 4)


def test_the_recipe_in_a_checkpoint_makes_it_again(parent):
    from safetensors.torch import load_file

    out = recipe.compress(parent, method="one_shot", criterion="random", out=parent.parent / "a", **TINY)
    again = recipe.load(out / "recipe.yaml")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="is a checkpoint; a recipe's out is a folder for all it makes"):
        recipe.run(again)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(FileExistsError, match="was made from other settings"):
        made_anew = recipe.run(dataclasses.replace(again, out=str(parent.parent / "c"), report=None))
        recipe.run(dataclasses.replace(again, out=made_anew["recipe"]["out"], dtype="float32"))
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
    arguments = {"method": "one_shot", "out": parent.parent / "small", **TINY}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipe.compress(parent, sparsity=0.3, **arguments)
    with pytest.raises(FileExistsError, match=r"other settings \(sparsity 0.3 there, 0.4 here\)"):
        recipe.compress(parent, sparsity=0.4, **arguments)
    with pytest.raises(FileExistsError, match=r"other settings \(dtype 'auto' there, 'float32' here\)"):
        recipe.compress(parent, sparsity=0.3, dtype="float32", **arguments)
    assert seen == [False, True]
    with pytest.raises(KeyboardInterrupt):
        recipe.compress(parent, sparsity=0.4, force=True, **arguments)
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


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_leave_together(rank, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(stage, "meet", lambda: seen.append((tmp_path / ".out.work").exists()))
    with stage.work_folder(tmp_path / "out", {}) as folder:
        folder.mkdir(exist_ok=True)
        assert len(seen) == 1  # the first one has made the folder
    assert len(seen) == 2 and (rank == "1" or seen == [True, False])
