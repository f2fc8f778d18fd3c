"""FoldGPT from start to end: targets, resuming, refusals at the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_fold_gpt import FEW, PHRASE, TEXT, logits, small

from sentei import checkpoint, folding, report, structure
from sentei.cli import main
from sentei.methods.fold_gpt import FoldGPT


@pytest.fixture
def text():
    return TEXT


def test_targets_are_met(words, text):
    dense = small(7)
    blocks, total = structure.layer_parameters(dense), structure.total_parameters(dense)
    few = FEW | {"heal_steps": 0, "plan": "greedy", "parent": "first"}
    for target, allowed in (
        ({"target_blocks": 0.8}, total - int(0.2 * blocks)),
        ({"target_model": 0.8}, int(0.8 * total)),
    ):
        model = small(7)
        record = FoldGPT(sparsity=0, **few | target).compress(model, words, text)
        stored = structure.total_parameters(model)
        assert stored <= allowed and record["fold"]["obtained_parameters"] == stored
        one_fold = record["fold"]["saved_parameters"] // len(record["fold"]["groups"])
        assert stored + one_fold > allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_bytes_is_what_is_written(dtype, words, text, tmp_path):
    """The file has the parent's dtype, whatever the method computes in."""
    parent = tmp_path / "parent"
    small(9, intermediate_size=240).to(dtype).save_pretrained(parent)
    words.save_pretrained(parent)
    target = int(0.85 * checkpoint.inspect(parent).bytes)
    few = FEW | {"heal_steps": 0, "plan": "dp", "parent": "first"}
    model, tokenizer = checkpoint.load(parent, dtype=torch.float32)
    record = FoldGPT(sparsity=0, target_bytes=target, **few).compress(model, tokenizer, text)
    stage = {"method": "fold_gpt", "fields": {}, "seed": 0, "data": {"name": "t", "sha256": "0"}, "record": {}}
    out = checkpoint.save(model, tokenizer, tmp_path / "small", parent=parent, record=stage, verify=False)
    written = (out / "model.safetensors").stat().st_size
    one_fold = dtype.itemsize * record["fold"]["saved_parameters"] // len(record["fold"]["groups"])
    assert written <= target < written + 2 * one_fold


def test_all_and_larger_groups(words, text):
    model = small(7)
    few = FEW | {"heal_steps": 0, "lora_rank": 0, "scale": False, "parent": "first"}
    FoldGPT(sparsity=0, plan="all", **few).compress(model, words, text)
    assert folding.layout(model)["owner"] == [0, 1, 1, 3, 3, 5, 6]
    model = small(7)
    method = FoldGPT(sparsity=0, plan="dp", group_size=3, target_blocks=0.85, **few)
    method.compress(model, words, text)
    owners = folding.layout(model)["owner"]
    assert sorted(owners.count(owner) for owner in set(owners))[-1] == 3  # two of seven blocks: 0.71
    model = small(7)
    method = FoldGPT(sparsity=0, plan="dp", group_size=3, target_blocks=0.87, **few)
    method.compress(model, words, text)
    owners = folding.layout(model)["owner"]
    assert sorted(owners.count(owner) for owner in set(owners))[-1] == 2  # one is enough: the window is made smaller


class Killed(Exception):
    pass


def test_killed_and_resumed_is_never_killed(words, text, tmp_path):
    method = FoldGPT(sparsity=0.1, target_blocks=0.72, **FEW | {"parent": "first"})
    model = small(9)
    expected = method.compress(model, words, text)
    kills = {"gates": 2, "folding pairs": 1, "folding on top": 1, "healing": 1}

    def kill(event):
        for what in list(kills):
            if event["message"].startswith(what):
                kills[what] -= 1
                if not kills[what]:
                    del kills[what]
                    raise Killed

    for _ in range(len(kills) + 1):
        again = small(9)
        try:
            record = method.compress(again, words, text, workdir=tmp_path, report=kill)
            break
        except Killed:
            continue
    assert not kills
    assert record["fold"]["groups"] == expected["fold"]["groups"] and record["scores"][0]["dropped"]
    assert [entry["gates"] for entry in record["gates"]] == [entry["gates"] for entry in expected["gates"]]
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    other = FoldGPT(**{**vars(method), "gate_lr": 0.2})
    with pytest.raises(ValueError, match="another run"):
        other.compress(small(9), words, text, workdir=tmp_path)


@pytest.mark.parametrize("change", [{"heal_lr": 1e-2, "kl_weight": 0.5}, {"target_blocks": 0.78, "plan": "greedy"}])
def test_what_a_field_does_not_change_is_not_made_again(change, words, text, tmp_path):
    """Killed in its healing, a run with other settings of the healing, or another target, has gates and windows."""
    method = FoldGPT(sparsity=0.1, target_blocks=0.72, **FEW | {"parent": "first"})

    def kill(event):
        if event["message"].startswith("healing"):
            raise Killed

    with pytest.raises(Killed):
        method.compress(small(9), words, text, workdir=tmp_path, report=kill)
    said = []
    other = replace(method, **change)
    record = other.compress(small(9), words, text, workdir=tmp_path, report=lambda event: said.append(event["message"]))
    assert not [line for line in said if line.startswith(("gates:", "folding pairs"))]
    expected = other.compress(small(9), words, text)
    assert record["fold"]["groups"] == expected["fold"]["groups"] and record["gates"] == expected["gates"]
    for wrong in ({"gate_quad": 5.0}, {"align": False}):
        with pytest.raises(ValueError, match="another run"):
            replace(other, **wrong).compress(small(9), words, text, workdir=tmp_path)
    with pytest.raises(ValueError, match="another run"):  # the same sizes, other weights
        other.compress(tiny_model("llama", seed=1, num_hidden_layers=9), words, text, workdir=tmp_path)


def test_gates_that_do_not_polarise_are_an_alarm(words, text):
    record = FoldGPT(sparsity=0.2, **FEW | {"heal_steps": 0, "gate_lr": 1e-6}).compress(small(), words, text)
    assert record["gates_polarised"] == 1 and "warnings" not in record  # all are still open
    record = FoldGPT(sparsity=0.2, **FEW | {"heal_steps": 0, "gate_lr": 1e-6, "gate_init": 0.5, "gate_eps_end": 0.02})
    record = record.compress(small(), words, text)
    assert record["gates_polarised"] == 0 and "did not polarise" in record["warnings"][0]


def test_removal_only_heals_with_adapters(words, text):
    model = small(6)
    record = FoldGPT(sparsity=0.2, **FEW | {"heal_lr": 1e-2}).compress(model, words, text)
    assert len(structure.layers(model)) == 4 and record["fold"] is None and record["healing"]["trained_parameters"] > 0
    assert not folding.is_folded(model) and getattr(model.config, "fold", None) is None
    assert record["stored_of_layers"] == pytest.approx(4 / 6)
    cache = record["kv_bytes_per_token"]  # removal shortens it
    assert cache == {"dense": 4 * 6 * 2 * 3 * 8, "now": 4 * 4 * 2 * 3 * 8}
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("granularity", ["layers", "sublayers"])
def test_folding_what_is_left(granularity, words, text, tmp_path):
    """After unequal width pruning, and after blocks or sub-layers went: saved, loaded, and a report drawn."""
    dense = small(7)
    dense.save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    model, tokenizer = checkpoint.load(tmp_path / "parent")
    units = structure.units(model, "channels")
    structure.remove(model, units, (units.layer_U % 7 < 5) | (units.index_U < 30))
    method = FoldGPT(sparsity=0.1, granularity=granularity, plan="all", score=("greedy",), **FEW)
    record = method.compress(model, tokenizer, text)
    owners = record["fold"]["owner"]
    assert len(set(owners)) < len(owners) and record["removed_of_layers"] >= 0.1 - 1e-6
    stage = {"method": "fold_gpt", "fields": vars(method), "seed": 0, "data": {"name": "t", "sha256": "0"}}
    out = checkpoint.save(model, tokenizer, tmp_path / "small", parent=tmp_path / "parent",
                          record=stage | {"record": record})  # fmt: skip
    loaded, _ = checkpoint.load(out)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.fold["parent"] == "best" and loaded.config.fold["gate_rate"] is None
    page = report.write(None, [out], tmp_path / "report.html").read_text()
    assert "Blocks that share weights" in page and "greedy" in page


def test_from_the_command_line(words, tmp_path, capsys):
    """Folding only: a sparsity of 0 is fine for a method that does more than remove."""
    small(7).save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {PHRASE * 3}" for i in range(40)))
    fields = {key: value for key, value in FEW.items() if key != "save_every"} | {"sparsity": 0, "target_blocks": 0.8}
    flags = [word for key, value in fields.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [str(tmp_path / "parent"), "--method", "fold_gpt", "--data", str(tmp_path / "text.txt"), *flags]
    assert main(["plan", *command]) == 0
    assert "groups of 2" in capsys.readouterr().out
    assert main(["compress", *command, "--out", str(tmp_path / "small")]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "small" / "compression.json").read_text())["result"]
    assert result["shape"] == "folded" and result["layer_parameters"] <= 0.8 * structure.layer_parameters(small(7))
    bad = [*command, "--target-model", "0.5", "--out", str(tmp_path / "bad")]
    assert main(["compress", *bad]) == 2 and "one target" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob(".bad*"))
