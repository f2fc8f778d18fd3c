"""Rows of public domain sets, or of two files: what to learn from and what to test on, no prompt on both sides."""

from __future__ import annotations

import gzip
import hashlib
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sentei.data import prompts
from sentei.evaluate import domain

SHARED = Path("../shared/data")


def rows_of(args: Namespace) -> tuple[list[prompts.Row], list[prompts.Row]]:
    """Training and test rows of a known data set, or of two files."""
    if args.train:
        train, test = domain.read(args.train), domain.read(args.test)
    else:
        train, test = (
            [prompts.make_row(row, f"{args.data} row {n}") for n, row in enumerate(part)] for part in READ[args.data]()
        )
    taken = {prompts.prompt_hash(row) for row in test}
    train = [row for row in train if prompts.prompt_hash(row) not in taken]
    return first_rows(train, args.train_rows), first_rows(test, args.test_rows)


def first_rows(rows: list[prompts.Row], limit: int | None) -> list[prompts.Row]:
    """At most so many, by the hash of their prompt: files are sorted by task or by answer."""
    return rows if limit is None else sorted(rows, key=prompts.prompt_hash)[:limit]


def write_rows(folder: Path, args: Namespace) -> None:
    """The rows as `sentei compress` and `sentei eval --domain` read them; "text" is for methods that read texts."""
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(args.train).stem if args.train else args.data
    plain = prompts.Template(SimpleNamespace(eos_token=None))  # the plain template asks a tokenizer for nothing else
    for part, rows in zip(("train", "test"), rows_of(args), strict=True):
        made = [
            {key: value for key, value in row.items() if key != "key"} | {"text": text}
            for row, text in zip(rows, prompts.rows_as_text(rows, plain), strict=True)
        ]
        path = folder / f"{name}-{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        print(f"written {path}: {len(rows)} rows")


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pubmedqa() -> tuple[list[Any], list[Any]]:
    """The official split: 500 abstracts to learn from, 500 to test on."""
    answers = ["yes", "no", "maybe"]
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for row in lines(SHARED / "pubmedqa/pqa_labeled.jsonl.gz"):
        made = {"question": row["question"], "choices": answers, "answer": answers.index(row["final_decision"])}
        parts[row["split"] == "test"].append(made | {"context": "\n".join(row["contexts"])})
    return parts[False], parts[True]


def medqa() -> tuple[list[Any], list[Any]]:
    """MedQA's test set only is at hand: four fifths to learn from, by their place in the file."""
    rows = []
    for row in lines(SHARED / "medical_mc/medqa_test.jsonl.gz"):
        options = row["options"]
        letters = sorted(options)
        answer = letters.index(row.get("answer_idx", ""))
        rows.append({"question": row["question"], "choices": [options[k] for k in letters], "answer": answer})
    return [row for n, row in enumerate(rows) if n % 5], rows[::5]


def chatdoctor() -> tuple[list[Any], list[Any]]:
    """Generated dialogues, a tenth of them to test on."""
    rows = []
    for row in lines(SHARED / "chatdoctor/chatdoctor5k.jsonl.gz"):
        asked = row.get("input") or row.get("instruction") or ""
        if asked.strip() and (row.get("output") or "").strip():
            rows.append({"prompt": asked, "response": row["output"]})
    return [row for n, row in enumerate(rows) if n % 10], rows[::10]


def legalbench() -> tuple[list[Any], list[Any]]:
    """Clauses to be answered with yes or no, a fifth of the texts to test on: one text stands under many tasks."""
    train, test = [], []
    for row in lines(SHARED / "legalbench/legalbench_old_test.jsonl.gz"):
        answer, text = str(row.get("label", "")).strip().lower(), row.get("text")
        if answer not in ("yes", "no") or not isinstance(text, str) or not text.strip():
            continue
        question = f"Does the text fit: {str(row.get('task', '')).replace('_', ' ')}?"
        made = {"question": question, "context": text, "choices": ["yes", "no"], "answer": answer}
        digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
        (train if digest[0] % 5 else test).append(made)
    return train, test


READ = {"pubmedqa": pubmedqa, "medqa": medqa, "chatdoctor": chatdoctor, "legalbench": legalbench}
