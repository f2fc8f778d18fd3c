"""A reward of one's own: how surely a model prefers the right sentence of a pair to the wrong one.

`python recipes/minimal_pairs.py` writes what recipes/policy-gradient-task.yaml reads: sixty pairs of each of BLiMP's 67
phenomena (CC BY 4.0), none of them among the 1,340 that judge the result (the lm-eval task local_blimp_mini).
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch.nn import functional

PAIRS = Path("../shared/data/blimp")
ROWS = Path("runs/blimp-train.jsonl")


def preference(model: Any, batch: Any) -> float:
    """Mean probability of the right sentence, of the two: smooth where the share of right choices stands still."""
    tokenizer = batch.tokenizer
    first = tokenizer.bos_token or tokenizer.eos_token
    texts = [first + row[side] for side in ("good", "bad") for row in batch.examples]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    inputs = inputs.to(batch.device)
    next_BT = inputs.input_ids[:, 1:]
    logits_NV = model(**inputs).logits[:, :-1].float().flatten(0, 1)
    loss_BT = functional.cross_entropy(logits_NV, next_BT.flatten(), reduction="none").view_as(next_BT)
    good_B, bad_B = (loss_BT * inputs.attention_mask[:, 1:]).sum(1).chunk(2)
    return float((bad_B - good_B).sigmoid().mean())


def main() -> None:
    judges = {(row["uid"], row["pair_id"]) for row in map(json.loads, (PAIRS / "blimp_mini20.jsonl").open())}
    taken: Counter[str] = Counter()
    ROWS.parent.mkdir(exist_ok=True)
    with gzip.open(PAIRS / "blimp.jsonl.gz", "rt") as file, ROWS.open("w") as out:
        for row in map(json.loads, file):
            if (row["uid"], row["pair_id"]) not in judges and taken[row["uid"]] < 60:
                taken[row["uid"]] += 1
                out.write(json.dumps({"good": row["good"], "bad": row["bad"], "text": row["good"]}) + "\n")
    print(f"written {ROWS}: {taken.total()} pairs")


if __name__ == "__main__":
    main()
