"""A search that is killed, spread over processes, finished early, or led by a function of the user's."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from sentei import data, structure
from sentei.data.prompts import Template, make_row
from sentei.methods.policy_gradient import PolicyGradient, reward, search

WORDS = "the quick brown fox jumps over the lazy dog and runs far away into woods "
TEXT = data.Text([WORDS * 40] * 3, [WORDS * 20], [WORDS], "words", "0")
QUICK = {
    "calibration_samples": 4, "calibration_seq_len": 16, "seq_len": 16, "batch_size": 2, "eval_every": 2,
    "eval_samples": 4, "save_every": 1, "slope_sweeps": 1, "coarse_steps": 4, "steps": 4,
}  # fmt: skip
METHOD = PolicyGradient(sparsity=0.3, **QUICK)


def one_search(folder, model=None, **fields):
    workdir = None if folder is None else Path(folder)
    method = dataclasses.replace(METHOD, log=None if folder is None else f"{folder}.jsonl", **fields)
    return method.compress(model or tiny_model("llama"), word_tokenizer(), TEXT, workdir=workdir)


def logged(folder):
    lines = [json.loads(line) for line in Path(f"{folder}.jsonl").read_text().splitlines()]
    return [line | {"seconds": 0} for line in lines]


def in_its_own_process(folder, result):
    torch.set_num_threads(1)
    loss, calls = search.Search.loss, []
    search.Search.loss = lambda self, keep_U, step: calls.append(step) or loss(self, keep_U, step)
    record = one_search(folder)
    found = [record["kept"], [step["losses"] for step in record["history"]]]
    Path(result).write_text(json.dumps({"found": found, "calls": len(calls)}))


def saved_steps(folder):
    """How many steps the state in a folder holds."""
    file = folder / search.STATE
    if not file.exists():
        return 0
    with safe_open(file, "pt") as opened:
        return len(json.loads(opened.metadata()["state"])["history"])


def assert_same_state(folder, other):
    """Every tensor of the search, to the bit."""
    ours, theirs = load_file(folder / search.STATE), load_file(other / search.STATE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_kill_minus_nine_at_twenty_moments(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sentei.methods.policy_gradient", "transformers.models.llama.modeling_llama"])

    def run(folder, result, seconds=None, after_a_save=False):
        before = saved_steps(folder)
        process = context.Process(target=in_its_own_process, args=(str(folder), str(result)))
        process.start()
        while after_a_save and process.is_alive() and saved_steps(folder) == before:
            time.sleep(0.002)
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    run(tmp_path / "whole", tmp_path / "whole.json")  # pays for the start of the server
    whole = json.loads((tmp_path / "whole.json").read_text())
    began = time.monotonic()
    run(tmp_path / "again", tmp_path / "again.json")
    took = time.monotonic() - began
    moments, kills, later, attempts = random.Random(0), 0, 0, 0
    while kills < 20 or later < 5:
        attempts += 1
        assert attempts < 80, f"of {attempts} runs {kills} lived long enough to be killed, {later} had saved before"
        folder, result = tmp_path / str(attempts % 4), tmp_path / f"{attempts}.json"
        before = saved_steps(folder)
        if attempts % 2:  # at any moment; most of the time goes into the start of a process
            run(folder, result, moments.uniform(0.05, 0.7) * took)
        else:  # soon after a save
            run(folder, result, moments.uniform(0.0, 0.1) * took, after_a_save=True)
        if result.exists():  # killed before, perhaps, and done now: start another
            assert json.loads(result.read_text())["found"] == whole["found"]
            shutil.rmtree(folder)
        else:
            kills += 1
            later += saved_steps(folder) > before  # killed after a save of its own
    for number in range(4):
        result, begun = tmp_path / f"resumed{number}.json", saved_steps(tmp_path / str(number))
        run(tmp_path / str(number), result)
        resumed = json.loads(result.read_text())
        assert resumed["found"] == whole["found"]
        assert (resumed["calls"] < whole["calls"]) == (begun > 0)  # what was saved is not measured again
        assert_same_state(tmp_path / str(number), tmp_path / "whole")
        assert logged(tmp_path / str(number)) == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "whole")] == list(range(1, 10))


def both_ranks(monkeypatch, folder, **fields):
    """A search of two ranks as threads of this process, whose means meet at a barrier: rank -> record or exception."""
    barrier, box, mine = threading.Barrier(2), {}, threading.local()

    def meet(x, combine):
        box[mine.rank] = x.clone()
        barrier.wait()
        together = combine(box[0], box[1])
        barrier.wait()
        return together

    monkeypatch.setattr(
        search,
        "processes",
        lambda: SimpleNamespace(process_index=mine.rank, num_processes=2, device=torch.device("cpu")),
    )
    monkeypatch.setattr(search, "reduce", lambda x, how: meet(x, lambda a, b: (a + b) / 2))
    monkeypatch.setattr(search, "broadcast", lambda x: meet(x, lambda a, b: a.clone()))
    records, models = {}, [tiny_model("llama"), tiny_model("llama")]  # one random generator: not made in the threads

    def rank(number):
        mine.rank = number
        try:
            records[number] = one_search(folder, models[number], **fields)
        except BaseException as error:
            records[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(500)
    return records


def test_two_ranks_killed_and_resumed(tmp_path, monkeypatch):
    """Also where each rank's losses are scaled by their spread: one number for both, and saved."""
    fields = {"reward_scale": "std", "slope_sweeps": 0, "coarse_steps": 2, "steps": 6}
    whole = both_ranks(monkeypatch, tmp_path / "whole", **fields)
    assert whole[0]["kept"] == whole[1]["kept"]
    for killed_after in (1, 5):
        folder, saves = tmp_path / str(killed_after), []
        with monkeypatch.context() as patched:
            save = search.Search._save

            def dies(self, levels, save=save, saves=saves, killed_after=killed_after):
                save(self, levels)
                saves.append(self.rank)
                if saves.count(self.rank) == killed_after:
                    raise KeyboardInterrupt

            patched.setattr(search.Search, "_save", dies)
            stopped = both_ranks(patched, folder, **fields)
        assert all(isinstance(stopped[number], KeyboardInterrupt) for number in (0, 1))
        assert saved_steps(folder) == killed_after
        resumed = both_ranks(monkeypatch, folder, **fields)
        for number in (0, 1):
            assert resumed[number]["kept"] == whole[number]["kept"]
        ours, theirs = ([step["losses"] for step in found[1]["history"]] for found in (resumed, whole))
        assert ours[killed_after:] == theirs[killed_after:]
        assert_same_state(folder, tmp_path / "whole")


def test_two_processes_equal_the_same_masks_in_one(tmp_path, monkeypatch):
    """Two gloo processes, against both ranks as threads of one process whose means meet at a barrier."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import json, torch; torch.set_num_threads(1)\n"
        "import test_policy_gradient_runs as t\n"
        "record = t.one_search(sys.argv[3])\n"
        "print(json.dumps([record['kept'], record['processes'], [s['losses'] for s in record['history']]]))\n"
    )
    here = Path(__file__).parent
    processes = []
    for rank in ("0", "1"):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", code, str(here), str(here.parent), str(tmp_path / "state")]
        processes.append(
            subprocess.Popen(command, env={**os.environ, **where}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    found = []
    for process in processes:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err.decode()[-2000:]
        found.append(json.loads(out.decode().splitlines()[-1]))
    assert found[0][0] == found[1][0] and found[0][1] == 2  # one mask
    assert found[0][2] != found[1][2]  # other batches and masks on each

    records = both_ranks(monkeypatch, None)
    for number in (0, 1):
        assert json.loads(json.dumps(records[number]["kept"])) == found[number][0]
        losses = [step["losses"] for step in records[number]["history"]]
        for ours, theirs in zip(losses, found[number][2], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_finish_cuts_the_best_mask_so_far(tmp_path, monkeypatch):
    save, saves = search.Search._save, []

    def dies(self, levels):
        save(self, levels)
        saves.append(self.best["keep"].clone())
        if len(saves) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(search.Search, "_save", dies)
        with pytest.raises(KeyboardInterrupt):
            one_search(tmp_path)
    finished = PolicyGradient(sparsity=0.3, finish=True, **QUICK)
    model = tiny_model("llama")
    units = structure.units(model)
    record = finished.compress(model, word_tokenizer(), TEXT, workdir=tmp_path)
    assert record["kept"] == structure.kept(units, saves[-1])
    assert len(record["history"]) == 4
    with pytest.raises(ValueError, match="no state of an interrupted search"):
        finished.compress(tiny_model("llama"), word_tokenizer(), TEXT, workdir=tmp_path / "none")


def command_line(tmp_path, fields):
    """`sentei compress` of a tiny parent, which is made here."""
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    word_tokenizer().save_pretrained(tmp_path / "parent")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} {WORDS * 9}"}) + "\n" for i in range(60)))
    flags = [word for name, value in (QUICK | fields).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["compress", str(tmp_path / "parent"), "--method", "policy_gradient", "--sparsity", "0.3", *flags]
    return [*command, "--data", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "small")]


def test_finish_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The state of the interrupted search is still there when the same command comes back with --finish."""
    from sentei.cli import main

    command = command_line(tmp_path, {})
    save, saves = search.Search._save, []

    def dies(self, levels):
        save(self, levels)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(search.Search, "_save", dies)
        assert main(command) == 2
    assert main([*command, "--finish", "true"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "small" / "compression.json").read_text())["stages"][-1]["record"]
    assert len(record["history"]) == 3


# --- rewards ---------------------------------------------------------------------------------------------------------


def layer_one_is_a_burden(model, batch):
    """Minus the share of layer 1's channels that act: not differentiable, blind to the text."""
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        model(batch.input_ids)
    finally:
        hook.remove()
    return -float((seen[0].abs().sum((0, 1)) > 0).float().mean())


def raises_later(model, batch):
    raises_later.calls += 1
    if raises_later.calls > 6:
        raise raises_later.error
    return 1.0


raises_later.error = KeyError("no such answer")


def finite_for_the_start(model, batch):
    """A number for the start, on what is held out; for every batch of the search none."""
    finite_for_the_start.calls += 1
    return 1.0 if finite_for_the_start.calls == 1 else math.nan


def needs_gradients(model, batch):
    model(batch.input_ids).logits.sum().backward()
    return 0.0


def not_a_number(model, batch):
    return "good"


def rows_only(model, batch):
    assert batch.input_ids is None and len(batch.examples) and batch.tokenizer is not None
    return sum(row["score"] for row in batch.examples) / len(batch.examples)


def test_a_reward_of_the_users_leads_the_search():
    model = tiny_model("llama")
    method = PolicyGradient(
        sparsity=0.15, granularity="channels", compensate="none", reward=f"{__name__}:layer_one_is_a_burden",
        keep_best=False, **QUICK | {"slope_sweeps": 2, "coarse_steps": 60, "coarse_sigma": 0.1, "coarse_lr": 0.1},
    )  # fmt: skip
    method.compress(model, word_tokenizer(), TEXT)
    widths = [size.intermediate_size for size in structure.sizes(model)]
    assert widths[1] < 0.6 * min(widths[0], *widths[2:]), widths


@pytest.mark.parametrize("kind", [KeyError, ValueError, OSError, MemoryError])
def test_a_reward_that_raises_keeps_the_state_and_its_traceback(tmp_path, monkeypatch, capsys, kind):
    """Through the command line, which tells of wrong input in one line; of this the user must see where it failed."""
    from sentei.cli import main

    raises_later.calls = 0
    monkeypatch.setattr(raises_later, "error", kind("no such answer"))
    flags = {"reward": f"{__name__}:raises_later", "save_every": 100, "slope_sweeps": 0, "eval_samples": 2}
    with pytest.raises(Exception, match="no such answer" if kind is KeyError else "raises_later failed") as caught:
        main(command_line(tmp_path, flags))
    shown = "".join(traceback.format_exception(caught.value))
    assert "raise raises_later.error" in shown and f"{kind.__name__}: " in shown
    assert saved_steps(tmp_path / ".small.work") == 2
    assert "--finish true" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("steps", [{"slope_sweeps": 3, "coarse_steps": 0}, {"slope_sweeps": 0, "coarse_steps": 30}])
def test_a_reward_that_is_never_a_number(steps):
    """The default search is three sweeps: it must not take twenty of them to see that nothing is measured."""
    finite_for_the_start.calls = 0
    fields = QUICK | steps | {"steps": 0, "eval_samples": 2}
    method = PolicyGradient(sparsity=0.3, reward=f"{__name__}:finite_for_the_start", **fields)
    with pytest.raises(ValueError, match=r"was not finite \d+ times in a row: let it return a number"):
        method.compress(tiny_model("llama", num_hidden_layers=12), word_tokenizer(), TEXT)


def counts_rows(model, batch):
    counts_rows.seen.append(len(batch.examples))
    return sum(row["score"] for row in batch.examples) / len(batch.examples)


def test_held_out_rows_come_in_batches_too(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"score": i / 40}) + "\n" for i in range(40)))
    counts_rows.seen = []
    method = PolicyGradient(
        sparsity=0.3, reward=f"{__name__}:counts_rows", reward_data=str(file),
        **QUICK | {"slope_sweeps": 0, "coarse_steps": 1, "steps": 0, "batch_size": 3, "eval_samples": 7},
    )  # fmt: skip
    record = method.compress(tiny_model("llama"), word_tokenizer(), TEXT)
    assert counts_rows.seen[:3] == [3, 3, 1]
    held = reward.examples(str(file))[1][:7]
    assert record["start_loss"] == pytest.approx(-sum(row["score"] for row in held) / 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:needs_gradients", "run forward only"),
        (f"{__name__}:not_a_number", "expected one number"),
        (f"{__name__}:missing", "cannot import"),
        ("no_such_reward", "module:function"),
    ],
)
def test_rewards_that_cannot_work(name, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(sparsity=0.3, reward=name, **QUICK).compress(tiny_model("llama"), word_tokenizer(), TEXT)


def test_reward_rows(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"score": i / 40}) + "\n" for i in range(40)))
    method = PolicyGradient(
        sparsity=0.3, reward=f"{__name__}:rows_only", reward_data=str(file), **QUICK | {"slope_sweeps": 0}
    )
    said = []
    record = method.compress(tiny_model("llama"), word_tokenizer(), TEXT, workdir=tmp_path / "work", report=said.append)
    assert record["ties"] == len(record["history"])  # this reward cannot tell masks apart
    assert any("in 8 of 8 steps all masks had the same reward" in event["message"] for event in said)
    search_rows, held = reward.examples(str(file))
    assert len(search_rows) + len(held) == 40 and not {r["score"] for r in search_rows} & {r["score"] for r in held}
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(f"{line}\n" for line in reversed(file.read_text().splitlines())))
    assert reward.examples(str(backwards)) == (search_rows, held)  # shuffled: a batch is not of one kind
    assert search_rows != sorted(search_rows, key=lambda row: row["score"])
    with monkeypatch.context() as patched:
        few = both_ranks(patched, None, reward=f"{__name__}:rows_only", reward_data=str(file), eval_samples=1)
    assert "leaves 1 held-out rows to 2 processes" in str(few[0]) and isinstance(few[0], ValueError)
    file.write_text("".join(json.dumps({"score": i / 41}) + "\n" for i in range(40)))
    with pytest.raises(ValueError, match=r"another run \(reward rows differs\)"):
        method.compress(tiny_model("llama"), word_tokenizer(), TEXT, workdir=tmp_path / "work")
    file.write_text('{"score": 1}\nnot json\n')
    with pytest.raises(ValueError, match="line 2"):
        reward.examples(str(file))
    with pytest.raises(ValueError, match="reward_data is for a reward"):
        PolicyGradient(reward_data="rows.jsonl").check()
    assert math.isfinite(record["best_loss"])


def test_built_in_rewards(tmp_path, monkeypatch):
    """A probability of right answers, an accuracy and an exact match that hand counts confirm."""
    from sentei.data import prompts
    from sentei.evaluate import domain, rewards

    model, tokenizer = tiny_model("llama"), word_tokenizer()
    rows = [{"question": f"is {i} big", "choices": ["yes", "no"], "answer": i % 2} for i in range(30)]
    batch = reward.Batch(tokenizer, torch.device("cpu"), examples=rows)
    made = [prompts.make_row(row, "here") for row in rows]
    found = domain.choices(model, made, prompts.Template(tokenizer), seq_len=64)
    right = sum(p == row["answer"] for p, row in zip(found["predicted"], rows, strict=True)) / 30
    assert rewards.choice_accuracy(model, batch) == pytest.approx(right)
    assert 0 < rewards.choice_probability(model, batch) < 1
    said = domain.generate(
        model, prompts.Template(tokenizer), prompts.make_row({"prompt": "go", "response": "x"}, "here"),
        seq_len=rewards.SEQ_LEN, new_tokens=rewards.NEW_TOKENS,
    )  # fmt: skip
    answers = [{"prompt": "go", "response": said}, {"prompt": "go", "response": "~never~"}]
    assert rewards.exact_match(model, reward.Batch(tokenizer, torch.device("cpu"), examples=answers)) == 0.5
    told = domain.rouge(
        model, [prompts.make_row(row, "here") for row in answers], prompts.Template(tokenizer),
        seq_len=rewards.SEQ_LEN, new_tokens=rewards.NEW_TOKENS,
    )  # fmt: skip
    assert rewards.rouge_l(model, reward.Batch(tokenizer, torch.device("cpu"), examples=answers)) == told["rougeL"]
    with monkeypatch.context() as patched:
        for said, hit in (("4", 1), ("The 4.\nFor two and two are four", 1), ("42", 0), ("not 4", 0)):
            patched.setattr(domain, "generate", lambda *args, said=said, **kwargs: said)
            examples = [{"prompt": "2 + 2", "response": "4"}]
            assert rewards.exact_match(model, reward.Batch(tokenizer, torch.device("cpu"), examples=examples)) == hit
    with pytest.raises(ValueError, match="rows of kind choices"):
        rewards.choice_accuracy(model, reward.Batch(tokenizer, torch.device("cpu"), examples=answers))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = PolicyGradient(
        sparsity=0.3, reward="choice_probability", reward_data=str(file), **QUICK | {"coarse_steps": 2, "steps": 0}
    )
    assert -1 < method.compress(model, tokenizer, TEXT)["best_loss"] < 0


def test_a_classifier_is_pruned_for_its_labels(tmp_path, monkeypatch, capsys):
    """An encoder that was tuned for a task needs no language-model head to be pruned; its head stays as it is."""
    from sentei import checkpoint
    from sentei.cli import main
    from sentei.evaluate import rewards

    config = tiny_model("bert").config
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    torch.manual_seed(0)
    model, tokenizer = BertForSequenceClassification(config).eval(), word_tokenizer()
    model.save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    rows = [{"text": f"is {i}", "text_pair": "big", "label": "yes" if i % 2 else "no"} for i in range(40)]
    batch = reward.Batch(tokenizer, torch.device("cpu"), examples=rows)
    with torch.no_grad():
        inputs = tokenizer([row["text"] for row in rows], ["big"] * 40, padding=True, return_tensors="pt")
        right = [p[i % 2] for i, p in enumerate(model(**inputs).logits.softmax(1).tolist())]
        assert rewards.label_probability(model, batch) == pytest.approx(sum(right) / 40)
        assert rewards.label_accuracy(model, batch) == sum(p > 0.5 for p in right) / 40
        numbered = [row | {"label": i % 2} for i, row in enumerate(rows)]
        by_number = reward.Batch(tokenizer, torch.device("cpu"), examples=numbered)
        assert rewards.label_accuracy(model, by_number) == rewards.label_accuracy(model, batch)
        model.config.label2id = {"1": 0, "2": 1}  # stars: names that are numbers are names all the same
        stars = [row | {"label": i % 2 + 1} for i, row in enumerate(rows)]
        by_star = reward.Batch(tokenizer, torch.device("cpu"), examples=stars)
        assert rewards.label_accuracy(model, by_star) == sum(p > 0.5 for p in right) / 40
        model.config.label2id = {"no": 0, "yes": 1}
        for wrong, message in (
            ([{"text": "x"}], "rows of text, label and, for pairs, text_pair"),
            ([{"text": "x", "label": "maybe"}], "label 'maybe' is not one of the model's: no, yes"),
        ):
            with pytest.raises(ValueError, match=message):
                rewards.label_accuracy(model, reward.Batch(tokenizer, torch.device("cpu"), examples=wrong))
        with pytest.raises(ValueError, match="LlamaForCausalLM is no classifier"):
            rewards.label_accuracy(tiny_model("llama"), by_number)

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("text.txt").write_text("\n\n".join(f"{i} {WORDS * 8}" for i in range(40)))
    fields = QUICK | {"slope_sweeps": 0, "coarse_steps": 2, "steps": 2, "calibration_samples": 8}
    flags = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["compress", "parent", "--method", "policy_gradient", "--sparsity", "0.3", "--data", "text.txt"]
    command += ["--reward", "label_probability", "--reward-data", "rows.jsonl", "--out", "small", *flags]
    assert main(command) == 0, capsys.readouterr().err
    small, _ = checkpoint.load("small")
    assert type(small).__name__ == "SenteiBertForSequenceClassification" and small.config.label2id == {
        "no": 0,
        "yes": 1,
    }
    assert torch.equal(small.classifier.weight, model.classifier.weight)
    assert structure.layer_parameters(small) <= 0.7 * structure.layer_parameters(model) + 200


def test_the_recipe_of_a_task_with_the_rows_it_asks_for(tmp_path, monkeypatch, capsys):
    """Every stage and its data are checked as `sentei run --dry-run` does it, on a toy in place of the real model."""
    from sentei.cli import main

    root = Path(__file__).parents[1]
    tiny_model("llama", max_position_embeddings=512).save_pretrained(tmp_path / "parent")
    word_tokenizer().save_pretrained(tmp_path / "parent")
    (tmp_path / "runs").mkdir()
    monkeypatch.syspath_prepend(root)
    from recipes import sentiment

    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"{i} {WORDS}\t{i % 2}\n" for i in range(800)))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nnot bad\t1\n")
    monkeypatch.setattr(sentiment, "SENTENCES", tmp_path)
    monkeypatch.setattr(sentiment, "TUNED_ON", 400)
    monkeypatch.chdir(tmp_path)
    sentiment.main()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "sentiment-judge.jsonl").read_text().splitlines()]
    assert rows[0]["answer"] == 1 and rows[0]["text"].endswith("Answer: positive")
    made = Template(word_tokenizer()).parts(make_row(rows[0], "here"))  # what the model is tuned on
    assert rows[0]["text"] == made.head + made.body + made.tail + made.response
    recipe = (root / "recipes" / "policy-gradient-task.yaml").read_text().replace("model: smollm2", "model: parent")
    (tmp_path / "any.txt").write_text("\n\n".join(f"{i} {WORDS}" for i in range(800)))
    recipe = recipe.replace("../shared/data/wikitext-103-tok/valid.txt", "any.txt")  # what may not be here
    (tmp_path / "recipe.yaml").write_text(recipe.partition("evaluate:")[0])
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    said = re.split(r"\n(for-[a-z-]+)\n", capsys.readouterr().out)
    stages = dict(zip(said[1::2], said[2::2], strict=True))
    rewards = {name: re.search(r"reward: (\w+)\n", stage)[1] for name, stage in stages.items()}
    answer, loss = "choice_probability", "lm_loss"
    assert rewards == {
        "for-the-task": answer, "for-the-loss": loss, "for-any-text": "kl",
        "for-the-task-means": answer, "for-the-loss-means": loss,
    }  # fmt: skip
    same = ("sparsity: 0.6\n", "slope_sweeps: 2\n", "granularity: sublayers+channels\n")
    assert all(line in stage for line in same for stage in stages.values())


def test_the_example_of_a_reward_of_one_s_own(monkeypatch):
    """The probability of each passage's last word, of one token or more, one by one and without padding."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    model, tokenizer = tiny_model("llama").eval(), word_tokenizer()
    rows = [{"text": "a cat sits on the mat, it"}, {"text": "who are you?"}]
    expected = 0.0
    for row in rows:
        ids = tokenizer(row["text"], add_special_tokens=False, return_tensors="pt").input_ids
        known = len(tokenizer(row["text"].rpartition(" ")[0], add_special_tokens=False).input_ids)
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[known - 1 :]
        expected += float(log_p.sum().exp()) / len(rows)
    with torch.no_grad():
        found = -reward.Reward("recipes.last_word:last_word")(
            model, reward.Batch(tokenizer, torch.device("cpu"), examples=rows)
        )
    assert found == pytest.approx(expected, rel=1e-4) and len(ids[0]) - known > 1


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_the_report_draws_the_loss_and_the_held_out_one():
    from sentei.report import sections

    history = one_search(None, slope_sweeps=0)["history"]
    child = SimpleNamespace(label="small", steps=lambda: [{"stage": "policy_gradient"} | record for record in history])
    drawn = sections.curves(SimpleNamespace(children=[child]))
    assert "<figcaption>loss and held loss (dashed)</figcaption>" in drawn
    assert drawn.index("held loss") < drawn.index("<figcaption>kept")
