"""Task rows: reading, the split by input, labels, slices, scores, and models with a new head."""

import gzip
import json

import pytest
import torch
from conftest import tiny_model

from sentei import checkpoint
from sentei.data import examples
from sentei.evaluate import scores


def write_tsv(path, rows, header=("sentence", "label")):
    path.write_text("\n".join("\t".join(map(str, row)) for row in [header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write_tsv(tmp_path / "rows.tsv", [(f"this is sentence {i}", i % 3) for i in range(200)])


def inputs(rows):
    return {row["text"] for row in rows}


def test_the_parts_share_no_input(tmp_path):
    rows = [(f"sentence {i % 60}", i % 2) for i in range(300)]  # five copies of each, with different labels
    found = examples.load(write_tsv(tmp_path / "a.tsv", rows), text_field="sentence")
    assert len(found.train) + len(found.validation) + len(found.test) == 300
    assert not inputs(found.train) & inputs(found.test) and not inputs(found.train) & inputs(found.validation)
    assert not inputs(found.validation) & inputs(found.test)
    assert 25 <= len(found.test) <= 35 and 25 <= len(found.validation) <= 35


def test_the_part_depends_on_the_input_alone(file, tmp_path):
    whole = examples.load(file, text_field="sentence")
    lines = file.read_text().splitlines()
    mixed = tmp_path / "mixed.tsv"
    mixed.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    again = examples.load(mixed, text_field="sentence")
    assert inputs(whole.test) == inputs(again.test) and inputs(whole.train) == inputs(again.train)
    few = examples.load(file, text_field="sentence", limit=20, held_limit=5)
    assert len(few.train) == 20 and len(few.test) == 5
    assert inputs(few.train) < inputs(whole.train) and inputs(few.test) < inputs(whole.test)
    other = examples.load(file, text_field="sentence", seed=1)
    assert inputs(other.test) != inputs(whole.test) and other.sha256 != whole.sha256


def test_files_for_parts(tmp_path):
    train = write_tsv(tmp_path / "train.tsv", [(f"t {i}", i % 2) for i in range(50)] + [("held  out", 1)])
    one = write_tsv(tmp_path / "one.tsv", [("held out", 0), ("x", 1)])
    two = write_tsv(tmp_path / "two.tsv", [("y", 1)])
    spec = {"train": str(train), "test": [str(one), str(two)]}
    found = examples.load(spec, text_field="sentence")
    assert [row["text"] for row in found.test] == ["held out", "x", "y"]
    assert found.dropped == 1 and "held  out" not in inputs(found.train)
    assert len(found.validation) == 5  # a tenth of what train has left
    same = examples.load(f"train={train},test={one},test={two}", text_field="sentence")
    assert same == found
    none = examples.load(spec, text_field="sentence", validation_fraction=0)
    assert not none.validation


def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"a": f'one "{i}", two', "b": f"pair {i}", "label": ("no", "yes")[i % 2]} for i in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "r.jsonl").write_text(lines)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    write_tsv(tmp_path / "r.tsv", [row.values() for row in rows], ("a", "b", "label"))
    quoted = "".join(f'"{row["a"].replace(chr(34), chr(34) * 2)}",{row["b"]},{row["label"]}\n' for row in rows)
    (tmp_path / "r.csv").write_text("a,b,label\n" + quoted)
    found = [
        examples.load(tmp_path / f"r.{ending}", text_field="a", pair_field="b")
        for ending in ("jsonl", "jsonl.gz", "json", "parquet", "tsv", "csv")
    ]
    assert len({each.sha256 for each in found}) == 1
    assert found[0].labels == ["no", "yes"] and found[0].kind == "classification"
    assert set(found[0].train[0]) == {"text", "pair", "label"}


def test_kinds_and_label_order(tmp_path):
    numbers = [(f"s {i}", i / 10) for i in range(40)]
    found = examples.load(write_tsv(tmp_path / "a.tsv", numbers), text_field="sentence")
    assert found.kind == "regression" and found.labels is None and isinstance(found.train[0]["label"], float)
    ten = [(f"s {i}", i % 11) for i in range(100)]
    found = examples.load(write_tsv(tmp_path / "b.tsv", ten), text_field="sentence")
    assert found.labels == [str(i) for i in range(11)]  # 10 after 9, not after 1


def test_a_maker_of_other_rows(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": f"why {i}", "a": "so"}) + "\n" for i in range(30)))

    def make(row, where):
        return {"prompt": row["q"], "response": row["a"], "key": row["q"]}

    found = examples.load(tmp_path / "q.jsonl", kind="response", make=make)
    assert found.kind == "response" and found.labels is None and set(found.train[0]) == {"prompt", "response"}


def test_stratified():
    rows = [{"text": f"{i}", "pair": None, "label": 0 if i < 90 else 1 if i < 97 else 2} for i in range(100)]
    for count in (6, 7, 10, 50):
        few = examples.stratified(rows, count, seed=3, labels=3)
        assert len(few) == count and min(sum(r["label"] == label for r in few) for label in range(3)) >= 2
        assert few == examples.stratified(rows, count, seed=3, labels=3)
    assert examples.stratified(rows, 10, seed=4, labels=3) != examples.stratified(rows, 10, seed=3, labels=3)
    with pytest.raises(ValueError, match="5 rows are too few for 3 labels"):
        examples.stratified(rows, 5, seed=0, labels=3)
    numbers = [{"text": f"{i}", "pair": None, "label": float(i)} for i in range(100)]
    tenths = [int(row["label"] // 10) for row in examples.stratified(numbers, 10, seed=0)]
    assert tenths == list(range(10))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("sentence\tlabel\na\t1\nb\n", {}, r"line 3 has 1 fields, the header has 2"),
        ("sentence\tlabel\na\t1\nb\t\n", {}, r"line 3 has no label in 'label'"),
        ("sentence\tlabel\n", {}, "no row below its header"),
        ("sentence\tlabel\n \t1\nb\t0\n", {}, "line 2: the field 'sentence' is ' '; expected text"),
        ("text\tlabel\na\t1\n", {}, "no field 'sentence'; its fields are: text, label"),
        ("sentence\tlabel\n" + "".join(f"s{i}\t1\n" for i in range(30)), {}, "has the label '1'; a classification"),
        ("sentence\tlabel\n" + "".join(f"s{i}\tn{i}\n" for i in range(90)), {}, "distinct labels in"),
        ("sentence\tlabel\na\t1\nb\t0\n", {}, "has 2 rows, too few"),
        ("sentence\tlabel\n" + "".join(f"s{i}\tx\n" for i in range(30)), {"kind": "regression"}, "no number"),
        ("x", {"limit": 0}, "limit is 0"),
        ("x", {"kind": "chess"}, "kind is 'chess'"),
        ("x", {"kind": "qa"}, "need make"),
        ("x", {"test_fraction": 1.5}, "test_fraction is 1.5"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, content, options, message):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        examples.load(tmp_path / "a.tsv", **{"text_field": "sentence", **options})


def test_refused_specs(file, tmp_path):
    for spec, message in (
        ("nowhere.tsv", "no such file"),
        (f"train={file},exam={file}", "'exam'"),
        (f"test={file}", "no train part"),
        (tmp_path, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            examples.load(spec, text_field="sentence")
    held = write_tsv(tmp_path / "held.tsv", [("x", 7)])
    with pytest.raises(ValueError, match="the label '7' of a test row is not among train's: 0, 1, 2"):
        examples.load({"train": file, "test": held}, text_field="sentence")


def test_scores_by_hand():
    predicted, labels = [1, 1, 0, 0, 1], [1, 0, 0, 0, 1]
    assert scores.accuracy(predicted, labels) == pytest.approx(0.8)
    assert scores.f1(predicted, labels) == pytest.approx(0.8)  # precision 2/3, recall 1
    assert scores.macro_f1(predicted, labels) == pytest.approx(0.8)  # label 0: precision 1, recall 2/3
    assert scores.matthews(predicted, labels) == pytest.approx(2 * 2 / (3 * 2 * 2 * 3) ** 0.5)
    assert scores.pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert scores.spearman([1.0, 2.0, 30.0], [1.0, 8.0, 9.0]) == pytest.approx(1)
    assert scores.pearson([1.0, 2.0, 30.0], [1.0, 8.0, 9.0]) < 0.99
    assert scores.matthews([1, 1], [0, 1]) == 0 and scores.spearman([1.0, 1.0], [0.0, 1.0]) == 0
    assert scores.standard_error("accuracy", 0.5, 100) == pytest.approx(0.05)
    for arguments, message in (
        (("bleu", [1], [1]), "no score 'bleu'"),
        (("accuracy", [1], [1, 2]), "1 predictions for 2"),
        (("accuracy", [], []), "no prediction"),
        (("pearson", [float("nan"), 1.0], [1.0, 2.0]), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            scores.score(*arguments)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "roberta", "distilbert"])
def test_a_new_head(family, words, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    words.pad_token = None if family == "llama" else words.pad_token
    words.save_pretrained(tmp_path / "model")
    head = {"task": "SequenceClassification", "labels": ["bad", "fair", "good"]}
    loaded, tokenizer = checkpoint.load(tmp_path / "model", dtype="float32", **head)
    again, _ = checkpoint.load(tmp_path / "model", dtype="float32", **head)
    batch = tokenizer(["abc", "a longer one"], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = loaded(**batch).logits
        assert torch.equal(logits, again(**batch).logits) and logits.shape == (2, 3)
        alone = tokenizer(["abc"], return_tensors="pt", return_token_type_ids=False)
        torch.testing.assert_close(loaded(**alone).logits, logits[:1], atol=1e-5, rtol=1e-5)
    assert loaded.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    loaded.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    kept, _ = checkpoint.load(tmp_path / "three", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(kept(**batch).logits, logits)
    one, _ = checkpoint.load(tmp_path / "three", dtype="float32", task=head["task"], labels=["score"])
    assert one.config.num_labels == 1 and one.config.problem_type == "regression"
    with pytest.raises(ValueError, match="go together"):
        checkpoint.load(tmp_path / "model", labels=["a", "b"])
    with pytest.raises(ValueError, match="task is 'Chess'"):
        checkpoint.load(tmp_path / "model", task="Chess")
