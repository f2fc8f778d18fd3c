"""SQuAD: rows, windows, answers from logits, and the score by hand."""

import json

import pytest
import torch

from sentei.data import squad
from sentei.evaluate import squad as scoring

CONTEXT = "In 1912 the tree was cut. A gardener, Ada Lovelace, did it with an old saw near the river."


def question(i=0, text="Ada Lovelace", context=CONTEXT, **more):
    return {
        "id": str(i),
        "question": "Who cut it?",
        "answers": [{"text": text, "answer_start": context.index(text)}],
    } | more


def official(path, paragraphs):
    data = [{"title": "t", "paragraphs": [{"context": c, "qas": q} for c, q in paragraphs]}]
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("the  Norman dynasty!", ["Norman Dynasty"], 1, 1),
        ("A cat", ["an CAT."], 1, 1),
        ("cat sat", ["cat"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        ("cat", ["dog", "the cat sat"], 0, 2 / 3),
        ("the", ["a"], 1, 0),  # nothing is left of either: equal, and without a shared word
        ("", ["the"], 1, 0),
        ("the", ["cat"], 0, 0),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both have it
        ("well-known", ["wellknown"], 1, 1),
    ],
)
def test_score_by_hand(answer, golds, exact, f1):
    found = scoring.score([answer], [golds])
    assert found["exact_match"] == exact and found["f1"] == pytest.approx(f1)


def test_score_refuses_nothing():
    with pytest.raises(ValueError, match="0 answers"):
        scoring.score([], [])


def test_read_and_split_by_paragraph(tmp_path):
    contexts = [f"{CONTEXT} Number {i}." for i in range(20)]
    file = official(
        tmp_path / "s.json", [(c, [question(f"{i}-{j}", context=c) for j in (0, 1)]) for i, c in enumerate(contexts)]
    )
    rows = squad.load(str(file))
    parts = [{row["context"] for row in part} for part in (rows.train, rows.validation, rows.test)]
    assert rows.kind == "qa" and not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    assert [len(part) for part in (rows.train, rows.validation, rows.test)] == [32, 4, 4]
    by_columns = {"text": ["Ada Lovelace"], "answer_start": [CONTEXT.index("Ada Lovelace")]}
    lines = [{"id": "0", "context": c, "question": "Who?", "answers": by_columns} for c in contexts]
    flat = tmp_path / "s.jsonl"
    flat.write_text("\n".join(map(json.dumps, lines)))
    assert squad.load(str(flat)).train[0]["answers"] == [{"text": "Ada Lovelace", "start": 38}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"is_impossible": True}, "SQuAD v2 is not supported"),
        ({"answers": []}, "SQuAD v2 is not supported"),
        ({"answers": [{"text": "Ada", "answer_start": 3}]}, "does not stand at character 3"),
        ({"question": " "}, "the field 'question'"),
    ],
)
def test_bad_rows(row, message, tmp_path):
    file = official(tmp_path / "s.json", [(CONTEXT, [question() | row])])
    with pytest.raises(ValueError, match=message):
        squad.load(str(file))


def test_not_squad(tmp_path):
    (tmp_path / "s.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="not in SQuAD's format"):
        squad.load(str(tmp_path / "s.json"))


def test_windows_and_answers(words):
    """Every window that holds the answer points at it, and logits on those tokens give it back."""
    rows = [{"id": "0", "context": CONTEXT, "question": "Who?", "answers": [{"text": "Ada Lovelace", "start": 38}]}]
    words.model_input_names = ["input_ids", "attention_mask"]
    made = squad.windows(rows, words, length=40, stride=16)
    assert len(made) > 1 and all(len(w["input_ids"]) <= 40 for w in made)
    starts, ends, holding = [], [], 0
    for window in made:
        start, end = window["targets"]
        start_T, end_T = torch.zeros(50), torch.zeros(50)
        if (start, end) != (0, 0):
            holding += 1
            assert CONTEXT[window["spans"][start][0] : window["spans"][end][1]] == "Ada Lovelace"
            start_T[start] = end_T[end] = 5.0
        starts.append(start_T)
        ends.append(end_T)
    assert holding and squad.answers(rows, made, starts, ends) == ["Ada Lovelace"]
    # an end before the start, or an answer that is too long, is none
    start_T, end_T = torch.zeros(50), torch.zeros(50)
    inside = [i for i, span in enumerate(made[0]["spans"]) if span is not None]
    start_T[inside[5]], end_T[inside[2]], end_T[inside[7]] = 9.0, 9.0, 8.0
    spans = made[0]["spans"]
    found = squad.answers(rows, made[:1], [start_T], [end_T])
    assert found == [CONTEXT[spans[inside[5]][0] : spans[inside[7]][1]]]
    with pytest.raises(ValueError, match="raise seq_len"):
        squad.windows([rows[0] | {"question": "Who? " * 20}], words, length=40, stride=16)
