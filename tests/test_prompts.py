"""Prompt rows: what is refused, what is cut, what is learned; and the scores on them."""

import json
import math

import pytest
import torch
from conftest import tiny_model

from sentei.data import examples, prompts
from sentei.data.prompts import Template, make_row
from sentei.evaluate import domain

CHOICE = {"question": "Is it so?", "choices": ["yes", "no", "maybe"], "answer": 1, "context": "It was seen " * 5}
RESPONSE = {"prompt": "Say a word.", "response": "Word."}
SUMMARY = {"document": "A long text about little. " * 8, "summary": "Little."}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows(*given):
    return [{k: v for k, v in make_row(row, "here").items() if k != "key"} for row in given]


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "expected those of one kind"),
        ({"prompt": "a"}, "no field 'response'"),
        ({"prompt": "a", "response": "  "}, "'response' is '  '; expected text"),
        ({"question": "q", "choices": [], "answer": 0}, "'choices' is \\[\\]; expected a list of two"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "'answer' is 2; expected an index from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "'answer' is 'c'"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "'answer' is True"),
        ({"kind": "summary", "document": "d"}, "no field 'summary'"),
    ],
)
def test_bad_rows(row, words, tmp_path):
    with pytest.raises(ValueError, match=f"x.jsonl line 2.*{words}"):
        domain.read(write(tmp_path / "x.jsonl", [RESPONSE, row]))


def test_bad_files(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        domain.read(tmp_path / "x.jsonl")
    one = write(tmp_path / "one.jsonl", [RESPONSE])
    with pytest.raises(ValueError, match="too few"):
        examples.load(one, kind="response", make=make_row)


def test_an_answer_may_be_a_choice():
    assert make_row(CHOICE | {"answer": "maybe"}, "")["answer"] == 2


def test_kinds_as_text(words):
    template = Template(words)
    choice, response, summary = (template.parts(row) for row in rows(CHOICE, RESPONSE, SUMMARY))
    assert choice.response == " no" and choice.body.startswith("It was") and "- maybe\nAnswer:" in choice.tail
    assert response.body == "Say a word." and response.response == " Word."
    assert summary.head == "Document: " and summary.tail == "\n\nSummary:"
    assert template.parts(rows(CHOICE)[0], "maybe").response == " maybe"


def test_chat_template(words):
    words.chat_template = CHAT
    parts = Template(words, "chat").parts(rows(RESPONSE)[0])
    assert (parts.head, parts.body) == ("<user>", "Say a word.")
    assert parts.tail.endswith("</s><assistant>") and parts.response == "Word." and parts.end == "</s>"
    encoded = prompts.encode(rows(RESPONSE), Template(words, "chat"), 200)
    assert encoded.ids[0][0] != words.bos_token_id and encoded.ids[0][-1] == words.eos_token_id
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Template(words, "chat")


def test_truncation_never_touches_the_response(words):
    template, given = Template(words), rows(CHOICE, RESPONSE, SUMMARY)
    whole = prompts.encode(given, template, 1000)
    short = prompts.encode(given, template, 110)
    assert short.cut == 2 and whole.cut == 0 and max(map(len, short.ids)) <= 110
    for i in range(3):
        response = whole.ids[i][whole.start[i] :]
        assert short.ids[i][short.start[i] :] == response and response[-1] == words.eos_token_id
    tail = words(Template(words).parts(given[0]).tail, add_special_tokens=False)["input_ids"]
    assert short.ids[0][short.start[0] - len(tail) : short.start[0]] == tail


def test_long_responses_are_dropped_and_too_many_refused(words):
    long = {"prompt": "a", "response": "b" * 90}
    encoded = prompts.encode(rows(*[RESPONSE] * 9, long), Template(words), 60)
    assert encoded.dropped == 1 and encoded.kept == list(range(9))
    with pytest.raises(ValueError, match="3 of 4 rows have a response too long"):
        prompts.encode(rows(RESPONSE, long, long, long), Template(words), 60)


def test_the_end_is_learned_where_pad_is_end(words):
    words.pad_token = words.eos_token
    encoded = prompts.encode(rows(RESPONSE, SUMMARY), Template(words), 300)
    pad = prompts.pad_id(words)
    assert pad == words.eos_token_id
    for loss_on in prompts.LOSSES:
        batch = prompts.collate(encoded, [0, 1], pad=pad, loss_on=loss_on)
        length, start = len(encoded.ids[0]), encoded.start[0]
        assert batch["targets"][0, length - 2] == pad and bool((batch["targets"][0, length - 1 :] == -100).all())
        learned = (batch["targets"][0] != -100).sum()
        assert learned == (length - 1 if loss_on == "full" else length - start)


def test_a_prompts_tokens_can_count_less(words):
    encoded = prompts.encode(rows(RESPONSE, SUMMARY), Template(words), 300)
    batch = prompts.collate(encoded, [0, 1], pad=0, loss_on="response", prompt_loss_weight=0.25)
    full, response = (prompts.collate(encoded, [0, 1], pad=0, loss_on=on)["targets"] for on in ("full", "response"))
    assert torch.equal(batch["targets"], full)
    asked, answers = full != -100, response != -100
    assert bool((batch["weights"][answers] == 1).all()) and bool((batch["weights"][asked & ~answers] == 0.25).all())
    assert bool(answers.any()) and bool((asked & ~answers).any())


def test_a_prompt_is_on_one_side_only():
    given = rows(
        *[RESPONSE | {"prompt": f"p {i % 40}"} for i in range(120)],
        *[SUMMARY | {"document": f"d {i}"} for i in range(60)],
    )
    rest, held = prompts.hold_out(given, 30, seed=0)
    assert sorted(rest + held) == list(range(180)) and abs(len(held) - 30) <= 3
    sides = [{prompts.prompt_hash(given[i]) for i in side} for side in (rest, held)]
    assert not sides[0] & sides[1]
    assert sum(given[i]["kind"] == "summary" for i in held) == 10
    assert (rest, held) == prompts.hold_out(given, 30, seed=0) != prompts.hold_out(given, 30, seed=1)


def test_seen_prompts_are_refused():
    given = rows(*[RESPONSE | {"prompt": f"p {i}"} for i in range(5)])
    stored = prompts.seen(given[:3])
    prompts.check_unseen(given[3:], stored)
    again = rows(RESPONSE | {"prompt": "P  2"})
    with pytest.raises(ValueError, match="1 of 3 test prompts were seen in training or by the pruning generator"):
        prompts.check_unseen(given[3:] + again, stored)


# --- scores -------------------------------------------------------------------------------------------------------


def test_choices_by_hand(words):
    """Against a plain loop over the model's own logits, choices of several lengths among them."""
    model = tiny_model("llama")
    given = rows(
        CHOICE, CHOICE | {"question": "And so?"}, {"question": "Which?", "choices": ["a", "b b", "c c c"], "answer": 0}
    )
    template = Template(words)
    found = domain.choices(model, given, template, seq_len=96, batch_size=2)
    expected = []
    for row in given:
        means = []
        for choice in row["choices"]:
            parts = template.parts(row, choice)
            answer = template.response_ids(parts, end=False)
            prompt = template.prompt_ids(parts, 96 - len(answer))
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            means.append(sum(float(log_p[p, t]) for p, t in zip(places, answer, strict=True)) / len(answer))
        expected.append(means.index(max(means)))
    assert found["predicted"] == expected
    assert found["accuracy"] == sum(p == r["answer"] for p, r in zip(expected, given, strict=True)) / 3
    assert found["chance"] == pytest.approx(1 / 3) and "macro_f1" not in found
    assert "macro_f1" in domain.choices(model, given[:2], template, seq_len=96)


def test_measure(words, monkeypatch):
    model, given = tiny_model("llama"), rows(CHOICE, RESPONSE, SUMMARY)
    monkeypatch.setattr(domain, "generate", lambda model, template, row, **_: template.parts(row).response)
    found = domain.measure(model, given, Template(words), seq_len=110, new_tokens=4)
    assert found["rouge"]["rougeL"] == pytest.approx(1.0) and found["rouge"]["samples"] == 2
    assert found["perplexity"]["tokens"] < found["perplexity_full"]["tokens"]
    loss = found["perplexity"]["loss"]
    assert math.isfinite(loss) and found["perplexity"]["perplexity"] == pytest.approx(math.exp(loss))


def test_generation_is_greedy_and_ends(words):
    model, row = tiny_model("llama"), rows(RESPONSE)[0]
    first = domain.generate(model, Template(words), row, seq_len=48, new_tokens=5)
    assert first == domain.generate(model, Template(words), row, seq_len=48, new_tokens=5)
