"""Rows of film reviews as a question with two choices: what recipes/policy-gradient-task.yaml reads.

`python recipes/sentiment.py` writes three files from SST-2's sentences: rows to tune on and rows to prune on (both of
the training part, none in both), and the development part, which judges.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

SENTENCES = Path("../shared/data/glue/sst2_sentences")
FOLDER = Path("runs")
LABELS = ["negative", "positive"]
TUNED_ON = 4000


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    train, judges = rows(SENTENCES / "train.tsv"), rows(SENTENCES / "dev.tsv")
    for name, part in {"tune": train[:TUNED_ON], "prune": train[TUNED_ON:], "judge": judges}.items():
        file = FOLDER / f"sentiment-{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"written {file}: {len(part)} rows")


def rows(file: Path) -> list[dict[str, object]]:
    """`text` is the row as the plain template writes it: what the model is tuned on, and a search for the loss."""
    with file.open(encoding="utf-8", newline="") as opened:
        read = [(line["sentence"], int(line["label"])) for line in csv.DictReader(opened, delimiter="\t", quoting=3)]
    options = "\nOptions:\n" + "\n".join(f"- {label}" for label in LABELS) + "\nAnswer:"
    return [
        {"question": sentence, "choices": LABELS, "answer": label,
         "text": f"Question: {sentence}{options} {LABELS[label]}"}
        for sentence, label in read
    ]  # fmt: skip


if __name__ == "__main__":
    main()
