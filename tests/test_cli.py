"""The command line: quick help, the nearest word, one line with exit code 2 for whatever is wrong with the input."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import tiny_model

from sentei import checkpoint, cli, data
from sentei.methods import METHODS

TINY = ["--calibration-samples", "4", "--calibration-seq-len", "16"]


@pytest.fixture
def parent(tmp_path, words) -> Path:
    """A tiny Llama on disk."""
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run a command that must be refused: exit code 2, one line of ours, nothing written. Returns the line."""

    def run(*words) -> str:
        before = files(tmp_path)
        assert cli.main([str(word) for word in words]) == 2
        said = capsys.readouterr()
        ours = [line for line in said.err.splitlines() if line.startswith("sentei: ")]
        assert len(ours) == 1 and said.err.splitlines()[-1] == ours[0] and "Traceback" not in said.err
        assert files(tmp_path) == before
        return ours[0]

    return run


# ------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "words",
    [["--help"], ["compress", "--help"], ["heal", "--help"], ["plan", "--help"], ["eval", "--help"], ["methods"]],
)
def test_help_imports_no_torch(words):
    """Importing torch takes seconds, so this is what keeps help under one."""
    program = (
        "import sys\nfrom sentei import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nheavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one_shot" in done.stdout or "usage" in done.stdout
    assert time.monotonic() - started < 10  # generous: a loaded machine


def test_help_shows_the_fields_of_the_method(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compress", "--method", "one_shot", "--help"])
    shown = capsys.readouterr().out
    assert "--criterion" in shown and "--calibration-samples" in shown and "taylor" in shown


def test_every_method_is_listed(capsys):
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS) and "2406.10576" in shown


# ------------------------------------------------------------------------------------------------------ bad commands


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compres"], "did you mean compress?"),
        (["compress", "m", "--metod", "one_shot"], "did you mean --method?"),
        (["compress", "m", "--method", "one_shoot", "--out", "o"], "did you mean 'one_shot'?"),
        (["compress", "m", "--method", "one_shot", "--out", "o", "--sparsty", "0.3"], "did you mean --sparsity?"),
        (["compress", "m", "--method", "one_shot", "--out", "o", "--lora-rank", "3"], "no flag --lora-rank"),
        (["compress", "m", "--method", "one_shot"], "--out"),
        (["compress", "m", "--method", "one_shot", "--out", "o", "--sparsity", "much"], "'much'"),
        (["compress", "m", "--method", "one_shot", "--out", "o", "--criterion", "tailor"], "tailor"),
        (["eval", "m"], "nothing to measure"),
        (["eval", "m", "--data", "python-docs", "--context", "long"], "'long'"),
        (["eval", "m", "--data", "python-docs", "--limit", "x"], "--limit"),
        (["run", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["report", "m", "nowhere"], "nowhere"),
        (["bench", "nowhere"], "nowhere"),
        (["heal", "nowhere", "--out", "o"], "nowhere"),
    ],
)
def test_bad_commands(refuse, words, said):
    assert said in refuse(*words)


def test_no_command_at_all(refuse):
    assert "--help" in refuse()


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("sparsity", ["0", "1", "1.2", "-0.3", "nan"])
def test_a_budget_outside_0_and_1(refuse, parent, sparsity):
    line = refuse("compress", parent, "--method", "one_shot", f"--sparsity={sparsity}", "--out", parent.parent / "o")
    assert "between 0 and 1" in line


def break_file(parent: Path, how: str) -> None:
    weights = parent / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "corrupt":
        weights.write_bytes(b"\xff" * 200)
    elif how == "missing":
        weights.unlink()
    elif how == "pickle":
        weights.rename(parent / "pytorch_model.bin")
    elif how == "no tokenizer":
        for file in parent.glob("token*"):
            file.unlink()
    elif how == "NaN":
        model, _ = checkpoint.load(parent)
        with torch.no_grad():
            model.lm_head.weight[3, 3] = float("nan")
        model.save_pretrained(parent)
    else:
        config = json.loads((parent / "config.json").read_text())
        config |= {"model_type": "gpt2"} if how == "unknown" else {"auto_map": {"AutoModelForCausalLM": "x.Y"}}
        (parent / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "truncated"),
        ("corrupt", "safetensors"),
        ("missing", "no weights"),
        ("pickle", "pickle"),
        ("no tokenizer", "no tokenizer"),
        ("NaN", "NaN"),
        ("unknown", "gpt2"),
        ("remote code", "--trust-remote-code"),
    ],
)
def test_a_bad_parent(refuse, parent, how, said):
    break_file(parent, how)
    assert said in refuse("compress", parent, "--method", "one_shot", "--out", parent.parent / "o", *TINY)


def test_a_parent_that_is_not_there(refuse, tmp_path):
    assert "no/where" in refuse("compress", "no/where", "--method", "one_shot", "--out", tmp_path / "o")
    assert "compression.json" in refuse("bench", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty"), (b"\x00\x01\x02" * 100, "binary"), (None, "no such file")]
)
def test_bad_data(refuse, parent, tmp_path, content, said):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    words = ("--method", "one_shot", "--data", tmp_path / "text.txt", "--out", tmp_path / "o")
    assert said in refuse("compress", parent, *words)


def test_too_little_text_says_how_much_is_needed(refuse, parent, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Sentence number {i} of a short text." for i in range(20)))
    words = ("--method", "one_shot", "--data", tmp_path / "text.txt", "--out", tmp_path / "o")
    line = refuse("compress", parent, *words, "--calibration-samples", "500", "--calibration-seq-len", "16")
    assert "blocks of 16 tokens, need 500" in line


def test_an_output_that_exists(refuse, parent, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("all my work")
    assert "exists" in refuse("compress", parent, "--method", "one_shot", "--out", tmp_path / "o")
    # --force replaces checkpoints, not whatever lies there
    assert "not replaced" in refuse("compress", parent, "--method", "one_shot", "--out", tmp_path / "o", "--force")
    assert "parent itself" in refuse("compress", parent, "--method", "one_shot", "--out", parent, "--force")


def test_a_budget_that_cannot_be_reached(refuse, parent, tmp_path):
    words = ("--method", "one_shot", "--granularity", "heads", "--sparsity", "0.9", "--out", tmp_path / "o")
    for command in ("compress", "plan"):
        assert "lower it or change the granularity" in refuse(command, parent, *words, *TINY)


def test_a_uniform_shape_that_cannot_be(refuse, tmp_path, words):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    flags = ("--method", "one_shot", "--shape", "uniform", "--sparsity", "0.4", "--out", tmp_path / "o")
    for command in ("compress", "plan"):
        assert "nearest possible" in refuse(command, tmp_path / "bert", *flags, *TINY)


def test_a_uniform_ratio_between_whole_groups(refuse, parent, tmp_path):
    flags = ("--method", "one_shot", "--granularity", "heads", "--shape", "uniform", "--out", tmp_path / "o")
    for command in ("compress", "plan"):
        assert "nearest possible: 0." in refuse(command, parent, *flags, "--sparsity", "0.05", *TINY)


@pytest.mark.parametrize("command", [["eval", "--data", "python-docs"], ["bench", "--against", "{parent}"]])
def test_where_nothing_can_be_written_is_told_before_measuring(refuse, parent, tmp_path, monkeypatch, command):
    def never(*arguments, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(checkpoint, "load", never)
    monkeypatch.setattr("sentei.benchmark._Worker", never)
    words = [word.format(parent=parent) for word in command[1:]]
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path, tmp_path / "file" / "out.json"):
        assert "give another file by --json" in refuse(command[0], parent, *words, "--json", place)
    assert "config.json" in refuse(command[0], parent, *words, "--json", parent / "config.json")  # something else


def test_more_tokens_than_the_model_has_positions_for(refuse, parent, tmp_path):
    line = refuse("compress", parent, "--method", "one_shot", "--calibration-seq-len", "65", "--out", tmp_path / "o")
    assert "positions for 64" in line


def test_healing_needs_a_parent(refuse, parent, tmp_path):
    assert "--teacher" in refuse("heal", parent, "--out", tmp_path / "o")
    assert "nowhere" in refuse("heal", parent, "--out", tmp_path / "o", "--teacher", tmp_path / "nowhere")
    words = ("--method", "one_shot", "--teacher", parent, "--out", tmp_path / "o")
    assert "no teacher" in refuse("compress", parent, *words)


def test_a_full_disk(refuse, parent, tmp_path, monkeypatch):
    words = ("compress", parent, "--method", "one_shot", "--criterion", "magnitude", "--out", tmp_path / "o", *TINY)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "o"))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert "No space left" in refuse(*words)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    assert "MB free" in refuse(*words)


@pytest.mark.parametrize(
    "error",
    [
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),  # torch.save
        RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device"),
    ],
)
def test_a_disk_that_fills_up_during_a_search(refuse, parent, tmp_path, monkeypatch, error):
    from sentei.methods.one_shot import OneShot

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(OneShot, "compress", full)
    line = refuse("compress", parent, "--method", "one_shot", "--out", tmp_path / "o", *TINY)
    assert "disk is full" in line and "free some space" in line


def test_damaged_state_and_faults_of_ours(refuse, parent, tmp_path, monkeypatch):
    from sentei.methods.one_shot import OneShot

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(OneShot, "compress", fail)
    words = ("compress", parent, "--method", "one_shot", "--out", tmp_path / "o", *TINY)
    error = safetensors.SafetensorError("Error while deserializing header: HeaderTooLarge")
    assert "damaged" in refuse(*words)
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError):  # a fault of ours wants its traceback
        cli.main([str(word) for word in words])


def test_other_processes_leave_the_writing_to_the_first(parent, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    words = ["compress", str(parent), "--method", "one_shot", "--out", str(tmp_path / "o"), *TINY]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "" and not (tmp_path / "o").exists()


@pytest.mark.slow
def test_two_processes_end_well_and_write_one_checkpoint(parent, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "sentei.cli", "compress", str(parent), "--method", "policy_gradient", "--coarse-steps", "2"]
    command += ["--batch-size", "2", "--seq-len", "16", "--eval-samples", "4", "--out", str(tmp_path / "o"), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved") == 1 and (tmp_path / "o" / "compression.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_run_is_for_one_process(refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refuse("run", "any.yaml")


@pytest.mark.parametrize("moment", ["data", "load", "compress", "save"])
def test_ctrl_c_at_any_moment(refuse, parent, tmp_path, monkeypatch, moment):
    from sentei.methods.one_shot import OneShot

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    where = {"data": data, "load": checkpoint, "compress": OneShot, "save": checkpoint}[moment]
    monkeypatch.setattr(where, "load" if moment == "data" else moment, stop)
    words = ("--method", "one_shot", "--criterion", "magnitude", "--out", tmp_path / "o", *TINY)
    assert "stopped" in refuse("compress", parent, *words)


def test_a_real_ctrl_c(parent, tmp_path):
    """The signal itself, to a process that is at work: the search of `greedy` would take minutes."""
    words = ["--method", "one_shot", "--criterion", "greedy", "--sparsity", "0.7", "--calibration-samples", "400"]
    words += ["--calibration-seq-len", "60", "--out", str(tmp_path / "o")]
    before = files(tmp_path)
    command = [sys.executable, "-m", "sentei.cli", "compress", str(parent), *words]
    # A shell's background jobs ignore the signal, and so would their children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline()]  # "loading": torch is in, the work begins
        process.send_signal(signal.SIGINT)
        lines += process.stderr.readlines()
    assert process.returncode == 2, lines
    assert lines[-1].startswith("sentei: stopped") and not any("Traceback" in line for line in lines)
    assert files(tmp_path) == before


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no recipe"):
        cli.main(["run", "nowhere.yaml", "--debug"])


# ------------------------------------------------------------------------------------------------------------- work


def test_compress_eval_report(parent, tmp_path, capsys):
    small = tmp_path / "small"
    words = ["compress", str(parent), "--method", "one_shot", "--sparsity", "0.3", "--seed", "1", "--out", str(small)]
    assert cli.main([*words, *TINY, "--round_to", "2"]) == 0  # a field may be written as in a recipe
    shown = capsys.readouterr()
    assert "parameters" in shown.out and "saved" in shown.out and "loading" in shown.err
    stage = json.loads((small / "compression.json").read_text())["stages"][0]
    assert stage["fields"]["round_to"] == 2 and stage["seed"] == 1
    assert (small / "recipe.yaml").is_file() and not list(tmp_path.glob(".*"))

    words = ["--data", "python-docs", "--context", "16", "32", "--max-blocks", "2"]
    assert cli.main(["eval", str(small), *words]) == 0
    assert "context 32, no BOS" in capsys.readouterr().out and (small / "eval.json").is_file()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"{i} alpha beta gamma"}) + "\n" for i in range(20)))
    words = ["--data", str(rows), "--text-field", "body", "--context", "16", "--add-bos"]
    assert cli.main(["eval", str(small), *words, "--json", str(tmp_path / "deep" / "eval.json")]) == 0
    assert "BOS in every window" in capsys.readouterr().out and (tmp_path / "deep" / "eval.json").is_file()

    report = ["report", str(parent), str(small), "--out", str(tmp_path / "page.html")]
    assert cli.main(report) == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "page.md").is_file()
    (tmp_path / "page.html").write_text("mine")
    assert cli.main(report) == 2 and "--force" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "mine"
    assert cli.main([*report, "--force"]) == 0 and (tmp_path / "page.html").read_text() != "mine"


def test_plan_says_what_will_happen_and_writes_nothing(parent, tmp_path, capsys):
    before = files(tmp_path)
    out = str(tmp_path / "o")
    words = ["plan", str(parent), "--method", "policy_gradient", "--sparsity", "0.25", "--seq-len", "32", "--out", out]
    assert cli.main([*words, *TINY]) == 0
    shown = capsys.readouterr().out
    assert "12 heads, 160 channels" in shown and "heterogeneous, sentei_llama" in shown
    assert "mean; least-squares from 96 calibration tokens on" in shown
    gone = float(shown.partition("parameters: ")[2].partition("%")[0])
    assert 25 <= gone <= 30  # one KV group of this model is a few per cent
    assert all(word in shown for word in ("time", "memory", "MB", "minutes"))
    assert files(tmp_path) == before


def test_plan_of_a_method_that_reads_rows(parent, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "response": f"{i} {i} {i}"}) + "\n" for i in range(90)))
    words = ["plan", str(parent), "--method", "atp", "--sparsity", "0.25", "--seq-len", "32", "--data", str(rows)]
    assert cli.main([*words, "--round-channels", "4", "--batch-size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "12 heads, 160 channels" in shown and "learned, from slopes, then a refit" in shown
    assert "forward of 4 x 32 tokens" in shown and "needs none" not in shown


def test_progress_without_a_terminal_is_lines(capsys, monkeypatch):
    monkeypatch.setattr("sentei.cli.show.SECONDS_BETWEEN_LINES", 0.0)
    with cli.Progress() as progress:
        progress({"message": "loading"})
        for step in range(1, 4):
            progress({"step": step, "of": 3, "message": "searching"})
    assert capsys.readouterr().err.splitlines() == ["loading", "1/3 searching", "2/3 searching", "3/3 searching"]


def test_the_time_left_of_a_run_that_goes_on(capsys, monkeypatch):
    """Ten of a hundred steps took a second each since the start at 80: what came before that says nothing."""
    clock = iter(range(1000))
    monkeypatch.setattr("sentei.cli.show.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sentei.cli.show.time.monotonic", lambda: float(next(clock)) / 2)
    with cli.Progress() as progress:
        for step in range(80, 91):
            progress({"step": step, "of": 100, "message": "searching"})
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("90/100 searching, ") and 8 <= int(last.split()[2]) <= 12, last
