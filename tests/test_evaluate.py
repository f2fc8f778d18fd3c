"""Perplexity against hand numbers and brute force, masked-token loss, tasks, and the measurements that are written."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from sentei import data, evaluate, structure
from sentei.evaluate import loss as evaluate_loss

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SPECIAL = {"[PAD]": 0, "[EOS]": 1, "[BOS]": 2, "[CLS]": 3, "[SEP]": 4, "[MASK]": 5, "[UNK]": 6}
FRAMES = {"bos": "[BOS] $A", "encoder": "[CLS] $A [SEP]"}


def tokenizer_of(kind: str = "plain") -> PreTrainedTokenizerFast:
    """One token a word: "w10" is 10."""
    words = {f"w{index}": index for index in range(10, VOCABULARY - 1)} | {"a": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    if kind in FRAMES:
        frame = FRAMES[kind]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[(token, index) for token, index in SPECIAL.items() if token in frame]
        )
    if kind == "bos":
        special["bos_token"] = "[BOS]"
    if kind == "encoder":
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def llama():
    return random_weights(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)))


@pytest.fixture
def bert():
    return random_weights(BertForMaskedLM(BertConfig(**SIZES)))


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(10, VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(1))


def as_text(ids: torch.Tensor) -> str:
    return " ".join(f"w{index}" for index in ids.tolist())


def brute_force(model, ids: list[int], first: int) -> list[float]:
    """Losses of the tokens from `first` on, by whole logits in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return [cross_entropy(logits[index - 1], torch.tensor(ids[index])).item() for index in range(first, len(ids))]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- causal models


def test_equal_logits_have_the_perplexity_of_the_vocabulary(llama):
    torch.nn.init.zeros_(llama.get_output_embeddings().weight)
    result = evaluate.perplexity(llama, random_ids(5, 8), batch_size=2)
    assert result["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert result["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert (result["tokens"], result["context"], result["blocks"]) == (35, 8, 5)


def test_perplexity_of_blocks_is_that_of_whole_logits(llama):
    ids = random_ids(5, 12)
    expected = mean([value for row in ids for value in brute_force(llama, row.tolist(), 1)])
    assert evaluate.perplexity(llama, ids, batch_size=2)["loss"] == pytest.approx(expected, rel=1e-5)


def test_capped_logits_are_scored_as_the_model_returns_them():
    model = random_weights(
        Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0))
    )
    ids = random_ids(3, 10)
    expected = mean([value for row in ids for value in brute_force(model, row.tolist(), 1)])
    uncapped = Gemma2ForCausalLM(
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=None)
    ).eval()
    uncapped.load_state_dict(model.state_dict())
    assert abs(expected - evaluate.perplexity(uncapped, ids)["loss"]) > 0.01
    assert evaluate.perplexity(model, ids)["loss"] == pytest.approx(expected, rel=1e-5)


def test_windows_that_do_not_overlap_leave_the_rest_out(llama):
    ids = random_ids(29)
    expected = [value for start in (0, 8, 16) for value in brute_force(llama, ids[start : start + 8].tolist(), 1)]
    result = evaluate.perplexity_text(llama, tokenizer_of(), as_text(ids), context=8)
    assert result["loss"] == pytest.approx(mean(expected), rel=1e-5)
    assert (result["tokens"], result["blocks"], result["bos"], result["stride"]) == (21, 3, "none", 8)
    first = evaluate.perplexity_text(llama, tokenizer_of(), as_text(ids), context=8, max_blocks=1)
    assert first["loss"] == pytest.approx(mean(expected[:7]), rel=1e-5)


@pytest.mark.parametrize(("length", "stride"), [(29, 3), (29, 7), (32, 4), (8, 4), (9, 1)])
def test_strided_windows_score_every_token_once_with_its_own_window(llama, length, stride):
    ids = random_ids(length).tolist()
    expected, done, start = [], 1, 0
    while done < length:  # a window at a time, and of it what is new
        window = ids[start : start + 8]
        expected += brute_force(llama, window, done - start)
        done, start = start + len(window), start + stride
    assert len(expected) == length - 1
    result = evaluate.perplexity_text(llama, tokenizer_of(), as_text(torch.tensor(ids)), context=8, stride=stride)
    assert result["tokens"] == length - 1
    assert result["loss"] == pytest.approx(mean(expected), rel=1e-5)
    assert result["stride"] == stride


def test_bos_starts_every_window_and_is_not_scored(llama):
    ids = random_ids(23)
    text = as_text(ids)
    expected = [value for start in (0, 7, 14) for value in brute_force(llama, [2, *ids[start : start + 7].tolist()], 1)]
    result = evaluate.perplexity_text(llama, tokenizer_of("bos"), text, context=8)
    assert result["loss"] == pytest.approx(mean(expected), rel=1e-5)
    assert (result["tokens"], result["blocks"], result["bos"]) == (21, 3, "every window")
    without = evaluate.perplexity_text(llama, tokenizer_of("bos"), text, context=8, add_bos=False)
    assert without["bos"] == "none"
    assert without["loss"] == evaluate.perplexity_text(llama, tokenizer_of(), text, context=8)["loss"]
    with pytest.raises(ValueError, match="has no BOS token"):
        evaluate.perplexity_text(llama, tokenizer_of(), text, context=8, add_bos=True)


def test_logits_are_never_there_for_all_tokens(llama, monkeypatch):
    monkeypatch.setattr(evaluate_loss, "LOGIT_BYTES", 10 * VOCABULARY * 4)
    rows = []
    llama.get_output_embeddings().register_forward_hook(lambda _, __, output: rows.append(output.numel() // VOCABULARY))
    ids = random_ids(4, 16)
    in_chunks = evaluate.perplexity(llama, ids, batch_size=4)
    assert max(rows) == 10
    monkeypatch.undo()
    assert in_chunks["loss"] == pytest.approx(evaluate.perplexity(llama, ids)["loss"], rel=1e-6)


def test_model_is_left_as_it_was(llama):
    llama.train()
    evaluate.perplexity(llama, random_ids(2, 8))
    head = llama.get_output_embeddings()
    assert llama.training
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert llama(input_ids=random_ids(1, 8)).logits.shape == (1, 8, VOCABULARY)


def test_loss_that_is_not_finite_is_an_error(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="blocks 0 to 1 is not finite"):
        evaluate.perplexity(llama, random_ids(4, 8), batch_size=2)


def test_bad_windows(llama):
    text = as_text(random_ids(20))
    for arguments, message in [
        ({"context": 32}, "the text has 20 tokens, one window needs 32"),
        ({"context": 65}, "positions for 64 at most"),
        ({"context": 8, "stride": 8}, "expected 1 to 7"),
        ({"context": 8, "stride": 0}, "expected 1 to 7"),
        ({"context": 8, "max_blocks": 0}, "max_blocks is 0"),
        ({"context": 1}, "more than one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.perplexity_text(llama, tokenizer_of(), text, **arguments)
    with pytest.raises(ValueError, match=r"shape \[0, 8\]"):
        evaluate.perplexity(llama, random_ids(0, 8))


# --- encoders


def test_equal_logits_of_an_encoder_have_the_loss_of_the_vocabulary(bert):
    decoder = bert.get_output_embeddings()
    for parameter in decoder.parameters():
        torch.nn.init.zeros_(parameter)
    result = evaluate.masked_lm(bert, tokenizer_of("encoder"), random_ids(6, 20))
    assert result["loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert result["tokens"] == 6 * 3  # 15 % of 20


def test_masked_tokens_are_seeded_scored_and_never_special(bert):
    seen = []
    bert.register_forward_pre_hook(lambda _, __, arguments: seen.append(arguments), with_kwargs=True)
    tokenizer = tokenizer_of("encoder")
    ids = data.blocks([as_text(random_ids(90))], tokenizer, 20)
    result = evaluate.masked_lm(bert, tokenizer, ids, batch_size=100)
    input_NT = seen[-1]["input_ids"]
    mask_NT = input_NT == 5
    assert mask_NT.sum(dim=1).tolist() == [3] * len(ids)  # 15 % of the 18 that are not special
    assert not mask_NT[torch.isin(ids, torch.tensor([1, 3, 4]))].any()
    assert torch.equal(input_NT[~mask_NT], ids[~mask_NT])
    with torch.no_grad():
        logits = bert(input_ids=input_NT).logits
    assert result["loss"] == pytest.approx(cross_entropy(logits[mask_NT], ids[mask_NT]).item(), rel=1e-5)
    assert evaluate.masked_lm(bert, tokenizer, ids) == pytest.approx(result)
    assert evaluate.masked_lm(bert, tokenizer, ids, seed=1)["loss"] != result["loss"]


def test_text_of_an_encoder_is_framed_and_masked(bert):
    tokenizer = tokenizer_of("encoder")
    ids = random_ids(40)
    result = evaluate.perplexity_text(bert, tokenizer, as_text(ids), context=20)
    blocks = torch.stack([torch.tensor([3, *ids[start : start + 18].tolist(), 4]) for start in (0, 18)])
    assert result["loss"] == evaluate.masked_lm(bert, tokenizer, blocks)["loss"]
    assert result["masked_fraction"] == 0.15
    with pytest.raises(ValueError, match="for causal models"):
        evaluate.perplexity_text(bert, tokenizer, as_text(ids), context=20, stride=10)


def test_the_wrong_measure_for_a_model(bert, llama):
    with pytest.raises(ValueError, match="measure it with evaluate"):
        evaluate.perplexity(bert, random_ids(2, 8))
    with pytest.raises(ValueError, match="predicts no masked tokens"):
        evaluate.masked_lm(llama, tokenizer_of("encoder"), random_ids(2, 8))
    with pytest.raises(ValueError, match="has no mask token"):
        evaluate.masked_lm(bert, tokenizer_of(), random_ids(2, 8))
    with pytest.raises(ValueError, match="predicts no tokens"):
        evaluate.perplexity(BertModel(bert.config), random_ids(2, 8))
    with pytest.raises(ValueError, match="need a causal model"):
        evaluate.tasks(bert, tokenizer_of("encoder"), ["anything"])


def test_roberta_has_fewer_positions_than_its_table():
    model = random_weights(RobertaForMaskedLM(RobertaConfig(**SIZES | {"max_position_embeddings": 22}, pad_token_id=1)))
    tokenizer = tokenizer_of("encoder")
    assert evaluate.masked_lm(model, tokenizer, random_ids(1, 20))["tokens"] == 3
    with pytest.raises(ValueError, match="positions for 20 at most"):
        evaluate.masked_lm(model, tokenizer, random_ids(1, 21))
    assert structure.positions(model) == 20


# --- lm-eval tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
num_fewshot: 0
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task_folder(tmp_path):
    rows = tmp_path / "rows.jsonl"
    questions = [
        {"question": f"w{10 + index}", "choices": ["w20", f"w{30 + index}"], "label": index % 2} for index in range(12)
    ]
    rows.write_text("".join(json.dumps(question) + "\n" for question in questions))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own_task.yaml").write_text(TASK.format(name="own_task", rows=rows))
    (folder / "lost_task.yaml").write_text(TASK.format(name="lost_task", rows=tmp_path / "none.jsonl"))
    return folder


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    module = pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return module


def test_task_of_a_local_file(llama, task_folder, lm_eval):
    scores = evaluate.tasks(llama, tokenizer_of(), ["own_task"], include_path=task_folder, limit=10)
    # By hand: the choice with the higher log-probability after the question.
    right = 0
    for index in range(10):
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([[10 + index]])).logits[0, -1]
        right += int(logits[30 + index] > logits[20]) == index % 2
    assert scores["own_task"]["acc"] == pytest.approx(right / 10)
    assert {"acc_norm", "acc_stderr", "acc_norm_stderr"} <= set(scores["own_task"])
    assert (scores["own_task"]["limit"], scores["own_task"]["samples"]) == (10, 10)


def test_bad_tasks(llama, task_folder, lm_eval, monkeypatch):
    class NoDefaults(lm_eval.tasks.TaskManager):  # lm-eval's own tasks take ten seconds to list
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", NoDefaults)
    for names, folder, message in [
        (["no_such_task"], task_folder, "knows no task no_such_task; .* has lost_task, own_task"),
        (["no_such_task"], None, "give the folder of its YAML"),
        (["own_task"], task_folder / "none", "is not a folder of task YAML"),
        (["lost_task"], task_folder, "data of the tasks lost_task cannot be had"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.tasks(llama, tokenizer_of(), names, include_path=folder)


# --- measurements


@pytest.fixture
def checkpoint(llama, tmp_path, monkeypatch):
    """A folder with a record, and a loader that gives the tiny model for it."""
    folder = tmp_path / "small"
    folder.mkdir()
    module = pytest.importorskip("sentei.checkpoint")
    monkeypatch.setattr(module, "load", lambda path, **_: (llama, tokenizer_of()))
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(as_text(random_ids(60)[index:]) for index in range(40)))
    return path


def measured(path):
    return json.loads(path.read_text())


def test_run_writes_and_replaces_measurements(checkpoint, text_file):
    answer = evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8, 16])
    written = measured(checkpoint / "eval.json")
    assert written == answer["measurements"]
    assert answer["json"] == str(checkpoint / "eval.json")
    assert [measurement["context"] for measurement in written] == [8, 16]
    first = written[0]
    assert (first["metric"], first["dataset"], first["part"]) == ("perplexity", str(text_file), "whole")
    assert first["value"] == first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    assert first["bos"] == "none"
    assert first["compute_dtype"] == "float32"
    first["value"] = -1
    (checkpoint / "eval.json").write_text(json.dumps(written))
    evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8])
    again = measured(checkpoint / "eval.json")
    assert [measurement["context"] for measurement in again] == [8, 16]
    assert again[0]["value"] > 0
    assert [path.name for path in checkpoint.iterdir()] == ["eval.json"]


def test_run_writes_where_it_is_told(checkpoint, text_file, tmp_path):
    evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8], json_path=tmp_path / "new" / "m.json")
    assert len(measured(tmp_path / "new" / "m.json")) == 1
    assert not (checkpoint / "eval.json").exists()


def test_run_of_tasks(checkpoint, task_folder, lm_eval):
    evaluate.run(checkpoint, tasks=["own_task"], include_path=task_folder, limit=4)
    rows = {measurement["metric"]: measurement for measurement in measured(checkpoint / "eval.json")}
    assert set(rows) == {"acc", "acc_norm"}
    assert rows["acc"]["dataset"] == "own_task"
    assert rows["acc"]["samples"] == rows["acc"]["limit"] == 4
    assert rows["acc"]["stderr"] >= 0


def record_data(folder, text):
    stage = {"method": "one_shot", "data": {"name": text.name, "sha256": text.sha256}}
    (folder / "compression.json").write_text(json.dumps({"stages": [stage]}))


def test_text_that_the_model_was_made_with_is_measured_on_its_test_part(checkpoint, text_file):
    text = data.load(str(text_file))
    record_data(checkpoint, text)
    measurement = evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8])["measurements"][0]
    assert measurement["part"] == "test"
    assert measurement["sha256"] == data.fingerprint(["\n\n".join(text.test)])


def test_a_parent_is_measured_on_what_its_child_is(checkpoint, text_file, tmp_path):
    child = tmp_path / "child"
    child.mkdir()
    record_data(child, data.load(str(text_file)))
    alone = evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8])["measurements"][0]
    beside = evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8], beside=[child])["measurements"][0]
    assert (alone["part"], beside["part"]) == ("whole", "test")


def test_a_source_of_a_mixture_counts_as_used(checkpoint, text_file):
    record_data(checkpoint, data.load(f"{text_file}=0.5,python-docs=0.5"))
    assert evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8])["measurements"][0]["part"] == "test"


def test_another_split_than_that_of_the_record_is_a_warning(checkpoint, text_file):
    record_data(checkpoint, data.load(str(text_file), seed=5))
    with pytest.warns(UserWarning, match="may hold text that the model has seen"):
        evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8])


def test_the_default_text_is_measured_on_its_test_part(checkpoint):
    measurement = evaluate.run(checkpoint, texts=["python-docs"], contexts=[8], max_blocks=2)["measurements"][0]
    assert (measurement["dataset"], measurement["part"], measurement["blocks"]) == ("python-docs", "test", 2)


def test_nothing_is_written_on_an_error(checkpoint, text_file, llama):
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate.run(checkpoint)
    with pytest.raises(ValueError, match="positions for 64"):
        evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8, 128])
    assert not list(checkpoint.iterdir())
    (checkpoint / "eval.json").write_text("{broken")
    with pytest.raises(ValueError, match="is not JSON"):
        evaluate.run(checkpoint, texts=[str(text_file)], contexts=[8])
    assert (checkpoint / "eval.json").read_text() == "{broken"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "eval.json"
    evaluate.write_measurements(path, [{"metric": "perplexity", "value": 2.0, "dataset": "a"}])
    old = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluate.write_measurements(path, [{"metric": "perplexity", "value": float("nan"), "dataset": "b"}])
    assert path.read_text() == old
    assert list(tmp_path.iterdir()) == [path]
