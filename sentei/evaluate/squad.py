"""Exact match and F1 of extracted answers, by the definition of SQuAD v1.1 (arXiv 1606.05250, section 6.1).

Before they are compared, answers are put in lower case, without punctuation and the articles a, an and the, with single
spaces. A question counts with the gold answer that fits it best.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, gold: str) -> float:
    return float(normal(answer) == normal(gold))


def overlap(answer: str, gold: str) -> float:
    """F1 of the words that both share; 0 where they share none, even if nothing is left of either."""
    given, wanted = normal(answer).split(), normal(gold).split()
    shared = sum((Counter(given) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over questions, as fractions: "exact_match" and "f1".

    Raises:
        ValueError: nothing to score, or lists of unequal length.
    """
    if not answers or len(answers) != len(golds):
        raise ValueError(f"{len(answers)} answers for {len(golds)} questions")
    pairs = list(zip(answers, golds, strict=True))
    return {
        "exact_match": sum(max(exact(answer, gold) for gold in of) for answer, of in pairs) / len(pairs),
        "f1": sum(max(overlap(answer, gold) for gold in of) for answer, of in pairs) / len(pairs),
    }
