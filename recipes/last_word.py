"""A reward of one's own: how probable a model finds the last word of a passage.

    python recipes/last_word.py
    sentei compress smollm2 --method policy_gradient --reward recipes.last_word:last_word \\
        --reward-data runs/lambada-from-1000.jsonl --data runs/lambada-from-1000.jsonl --out small

The first line writes the passages of LAMBADA (its test part as OpenAI published it) from the 1,001st on; the first
1,000, which lm-eval asks with `--limit 1000`, are not among them.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from torch.nn import functional

PASSAGES = Path("../shared/data/zeroshot/lambada_openai_test.jsonl.gz")
ROWS = Path("runs/lambada-from-1000.jsonl")
JUDGES = 1000


def last_word(model: Any, batch: Any) -> float:
    """Mean probability of the last word after all before it: smooth where the share of right guesses stands still."""
    tokenizer = batch.tokenizer
    before = tokenizer([row["text"].rpartition(" ")[0] for row in batch.examples], add_special_tokens=False)
    whole = tokenizer(
        [row["text"] for row in batch.examples],
        add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt",
    ).to(batch.device)  # fmt: skip
    next_BT = whole.input_ids[:, 1:]
    logits_BTV = model(**whole).logits[:, :-1]
    found = []
    for b, context in enumerate(before.input_ids):
        word = slice(len(context) - 1, int(whole.attention_mask[b].sum()) - 1)
        found.append(-functional.cross_entropy(logits_BTV[b, word].float(), next_BT[b, word], reduction="sum"))
    return sum(float(log_p.exp()) for log_p in found) / len(found)


def main() -> None:
    ROWS.parent.mkdir(exist_ok=True)
    with gzip.open(PASSAGES, "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file][JUDGES:]
    ROWS.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages), encoding="utf-8")
    print(f"written {ROWS}: {len(passages)} passages")


if __name__ == "__main__":
    main()
