"""benchmarks/fold.py on a tiny model: equal text in every row, and what a second run adds to a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_fold_gpt import PHRASE, small

from sentei.methods.fold_gpt import FoldGPT

ROWS = ["remove: gates", "fold", "remove: Taylor"]


class Killed(Exception):
    pass


@pytest.fixture
def bench(words, tmp_path, monkeypatch, script):
    """(the script, a function that runs it with more flags and returns the table)"""
    script = script("fold")
    small(9, max_position_embeddings=256).save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {PHRASE * 3}" for i in range(60)))
    fixed = {
        "model": tmp_path / "parent", "out": tmp_path / "table.json", "work": tmp_path / "work",
        "data": tmp_path / "text.txt", "test": tmp_path / "text.txt", "tokens": 16, "calibration": 2,
        "gate-steps": 4, "gate-batch": 2, "fold-samples": 2, "heal-steps": 2, "batch-size": 2, "blocks-128": 2,
        "blocks-1024": 0, "parent": "first", "lora-rank": 2, "plan": "dp", "stored": 0.8,
    }  # fmt: skip

    def run(*more, rows=ROWS, **changed):
        flags = [word for key, value in (fixed | changed).items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr("sys.argv", ["fold.py", "--rows", *rows, *flags, *more])
        script.main()
        return json.loads((tmp_path / "table.json").read_text())

    return script, run


def test_all_rows_have_the_same_text(bench, monkeypatch):
    script, run = bench
    seen = []
    heal = FoldGPT.heal

    def spy(method, run, *rest):
        seen.append({name: blocks.clone() for name, blocks in run.texts.items()} | {"used": run.calibration})
        return heal(method, run, *rest)

    monkeypatch.setattr(FoldGPT, "heal", spy)
    table = run()
    assert [row["healed"] for row in table["rows"]] == [False] + [False, True] * 3 and len(seen) == 3
    for other in seen[1:]:
        assert all(torch.equal(other[name], blocks) for name, blocks in seen[0].items())
    assert torch.equal(seen[0]["used"], seen[0]["calibration"])
    assert script.markdown(table).count("| remove: gates |") == 1
    assert run()["rows"] == table["rows"]  # nothing is made twice
    for changed in ({"heal-lr": 1e-2}, {"tokens": 8}):
        with pytest.raises(SystemExit, match="made with other settings"):
            run(**changed)
    with pytest.raises(SystemExit, match="scale True there, False here"):
        run("--no-scale")


def test_a_row_goes_on_where_it_was_stopped(bench, monkeypatch):
    script, run = bench
    expected = run(rows=["fold"])
    for file in (Path(script.arguments().out), *Path(script.arguments().work).glob("plan-*")):
        file.unlink()

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(FoldGPT, "heal", kill)
        with pytest.raises(Killed):
            run(rows=["fold"])
    table = run(rows=["fold"])
    assert [row.get("resumed") for row in table["rows"]] == [None, False, True]
    assert table["rows"][2]["measurements"] < expected["rows"][2]["measurements"]
    for row, other in zip(table["rows"], expected["rows"], strict=True):
        assert row["perplexity"] == other["perplexity"] and row.get("groups") == other.get("groups")
    left = Path(script.arguments().work)
    assert not [place for place in left.iterdir() if place.is_dir() and place.name != "parent"]
    assert len(run("--no-heal", rows=["fold"], stored=0.75)["rows"]) == 4  # not healed, and its windows are known
    assert [file.name for file in left.glob("plan-*")] == ["plan-none-0-2.json"]


def test_a_gguf_is_unpacked_once(bench, tmp_path, monkeypatch):
    script, _ = bench
    unpacked = []

    def unpack(found, out):
        unpacked.append(found)
        out.mkdir(parents=True)
        return out

    monkeypatch.setattr(script.recipe, "find_model", lambda name: f"{name}.gguf")
    monkeypatch.setattr(script.checkpoint, "unpack", unpack)
    for _ in range(2):
        assert script.parent_folder("smollm2", tmp_path / "work") == str(tmp_path / "work" / "parent")
    assert unpacked == ["smollm2.gguf"]
