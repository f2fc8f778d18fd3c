"""Scores of a classifier or regressor, by scikit-learn and scipy: predictions and labels in, a number out.

All are fractions or correlations (1 is perfect), not per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Share of predictions that are right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of label 1, of two labels; 0 where neither predictions nor labels have it."""
    return float(_sklearn().f1_score(labels, predicted, zero_division=0.0))


def macro_f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Mean over labels of their F1."""
    return float(_sklearn().f1_score(labels, predicted, average="macro", zero_division=0.0))


def matthews(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation; 0 where all predictions, or all labels, are the same."""
    return float(_sklearn().matthews_corrcoef(labels, predicted))


def pearson(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation; 0 where one side is constant, as for `matthews`."""
    return _correlation("pearsonr", predicted, labels)


def spearman(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Correlation of the ranks; 0 where one side is constant."""
    return _correlation("spearmanr", predicted, labels)


SCORES: dict[str, Callable[[Sequence, Sequence], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
OF_NUMBERS = ("pearson", "spearman")


def score(name: str, predicted: Sequence, labels: Sequence) -> float:
    """A score by its name.

    Args:
        predicted, labels: [N] indices of labels, or numbers for the scores in OF_NUMBERS.
    Raises:
        ValueError: no such score, unequal lengths, nothing to score, or a number that is not finite.
    """
    if name not in SCORES:
        raise ValueError(f"no score {name!r}; known: {', '.join(SCORES)}")
    if len(predicted) != len(labels):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    if not len(labels):
        raise ValueError("there is no prediction to score")
    if name in OF_NUMBERS and not np.isfinite(np.asarray(predicted, dtype=float)).all():
        raise ValueError(f"{name}: a prediction is not finite; the model's training has diverged")
    return SCORES[name](predicted, labels)


def standard_error(name: str, value: float, count: int) -> float:
    """Of a score over `count` rows: binomial for shares, Fisher's for correlations. An estimate, used for warnings."""
    if name in ("accuracy", "f1", "macro_f1"):
        return math.sqrt(max(value * (1 - value), 0.0) / count)
    return (1 - value * value) / math.sqrt(max(count - 1, 1))


def _correlation(name: str, predicted: Sequence[float], labels: Sequence[float]) -> float:
    try:
        import scipy.stats
    except ImportError as error:
        raise _missing("scipy") from error
    if len(set(predicted)) < 2 or len(set(labels)) < 2:
        return 0.0
    return float(getattr(scipy.stats, name)(predicted, labels).statistic)


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise _missing("scikit-learn") from error
    return sklearn.metrics


def _missing(package: str) -> ValueError:
    return ValueError(f"this score needs {package}, which is not installed; pip install 'sentei[tasks]'")
