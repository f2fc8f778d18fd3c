"""JSON files beside checkpoints -> one `Report`. Nothing is trusted to be there or to have the right type."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("compression.json", "eval.json", "bench.json", "log.jsonl", "generation.json")
# What tells two measurements apart, besides metric and dataset.
CONDITIONS = (
    "split", "slice", "part", "sha256", "context", "stride", "bos", "blocks", "limit", "num_fewshot", "template",
    "seq_len",
)  # fmt: skip
LOWER_IS_BETTER = ("perplexity", "loss", "bits")
Key = tuple[str, str, tuple[tuple[str, str], ...]]


def is_language(key: Key) -> bool:
    """Perplexities and losses: the lower the better. Everything else is a score."""
    return any(word in key[0] for word in LOWER_IS_BETTER)


@dataclass(frozen=True)
class Measurement:
    metric: str
    dataset: str
    conditions: tuple[tuple[str, str], ...]
    value: float
    stderr: float | None = None
    tokens: float | None = None
    samples: float | None = None

    @property
    def key(self) -> Key:
        return self.metric, self.dataset, self.conditions

    @property
    def lower_is_better(self) -> bool:
        return is_language(self.key)


@dataclass(frozen=True)
class Child:
    label: str
    path: str
    compression: dict[str, Any]
    evaluation: dict[str, Any]
    bench: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    generations: tuple[dict[str, Any], ...]
    measurements: dict[Key, Measurement]

    @property
    def stages(self) -> list[dict[str, Any]]:
        return dicts(self.compression.get("stages"))

    def size(self, what: str) -> float | None:
        """`parameters`, `layer_parameters` or `bytes` of what was saved."""
        return first(number(self.compression, "result", what), number(self.bench, "child", what))

    def parent_size(self, what: str) -> float | None:
        return first(number(self.compression, "parent", what), number(self.bench, "parent", what))

    def removed(self, what: str) -> float | None:
        """Fraction of the parent's `parameters`, `layer_parameters` or `bytes` that is gone."""
        before, after = self.parent_size(what), self.size(what)
        return None if before is None or after is None or before <= 0 else 1 - after / before

    def kept(self) -> list[tuple[str, dict[str, Any]]]:
        """(stage's name, structure.kept) of every stage that says what it removed, in order."""
        found = []
        for position, stage in enumerate(self.stages):
            account = dig(stage, "record", "kept")
            if dicts(dig(account, "layers")):
                found.append((text(stage, "method") or f"stage {position + 1}", account))
        if found:
            return found
        whole = self.compression.get("kept")
        accounts = dicts(whole) if isinstance(whole, list) else dicts([whole])
        return [("", account) for account in accounts if dicts(account.get("layers"))]

    def steps(self) -> list[dict[str, Any]]:
        """Records with a `stage` and a `step`, from log.jsonl or else from the stages' histories."""
        if self.log:
            return list(self.log)
        return [
            {"stage": text(stage, "method") or "", "step": position} | record
            for stage in self.stages
            for position, record in enumerate(dicts(dig(stage, "record", "history")))
        ]


@dataclass(frozen=True)
class Report:
    parent: str
    children: tuple[Child, ...]
    parent_measurements: dict[Key, Measurement]
    parent_evaluation: dict[str, Any]

    def rows(self) -> list[Key]:
        """All measurements in order of appearance: perplexities first, then tasks."""
        seen = dict.fromkeys(self.parent_measurements)
        for child in self.children:
            seen.update(dict.fromkeys(child.measurements))
        return sorted(seen, key=lambda key: not is_language(key))

    def language(self) -> list[Key]:
        """Perplexities, or the masked losses of an encoder."""
        return [key for key in self.rows() if is_language(key)]

    def measurement(self, key: Key) -> Measurement:
        """One example of a measurement, whichever model has it."""
        columns = (self.parent_measurements, *(child.measurements for child in self.children))
        return next(column[key] for column in columns if key in column)

    def tasks(self) -> list[Key]:
        """Accuracies that the parent (if it was measured) and all measured children have: what a mean is taken over."""
        columns = [c for c in (self.parent_measurements, *(child.measurements for child in self.children)) if c]
        return [key for key in self.rows() if key[0] == "acc" and all(key in column for column in columns)]

    def mean_accuracy(self, measurements: dict[Key, Measurement]) -> float | None:
        """Mean over `tasks()`, None with fewer than two."""
        tasks = self.tasks()
        if len(tasks) < 2 or not all(key in measurements for key in tasks):
            return None
        return sum(measurements[key].value for key in tasks) / len(tasks)

    def parent_size(self, what: str) -> float | None:
        return first(*(child.parent_size(what) for child in self.children))


def read(parent: str | Path | None, children: list[str | Path]) -> Report:
    """See `sentei.report.write` for arguments and errors."""
    if not children:
        raise ValueError("no compressed checkpoint to report on; give at least one folder that `sentei compress` wrote")
    folders = [Path(child) for child in children]
    found = [_child(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    evaluation = _evaluation(Path(parent)) if parent is not None and Path(parent).is_dir() else {}
    measurements = _measurements(evaluation.get("measurements"))
    for child in found:
        for key, measurement in _measurements(child.evaluation.get("parent_measurements")).items():
            measurements.setdefault(key, measurement)
    name = None if parent is None or _only_measurements(Path(parent)) else str(parent)
    for child in found:
        name = name or text(child.compression, "parent", "path") or text(child.bench, "parent", "path")
    name = name or str(parent or "unknown parent")
    return Report(name, tuple(found), measurements, evaluation)


def _only_measurements(folder: Path) -> bool:
    """A folder made to hold the eval.json of a parent that lies elsewhere: no name for a model."""
    return (folder / "eval.json").is_file() and not (folder / "config.json").is_file()


def _child(folder: Path, label: str) -> Child:
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}: give folders that `sentei compress` wrote")
    if not any((folder / name).exists() for name in FILES):
        raise ValueError(f"nothing to report in {folder}: it holds none of {', '.join(FILES)}")
    evaluation = _evaluation(folder)
    return Child(
        label=label,
        path=str(folder),
        compression=_object(folder / "compression.json"),
        evaluation=evaluation,
        bench=_object(folder / "bench.json"),
        log=tuple(_lines(folder / "log.jsonl")),
        generations=tuple(dicts(_json(folder / "generation.json"))),
        measurements=_measurements(evaluation.get("measurements")),
    )


def _labels(folders: list[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    absolute = [folder.absolute() for folder in folders]
    for length in range(1, max(len(path.parts) for path in absolute) + 1):
        labels = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path.name} ({number})" for number, path in enumerate(absolute, 1)]


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); measure again, or move the file away") from error


def _object(path: Path) -> dict[str, Any]:
    content = _json(path)
    return content if isinstance(content, dict) else {}


def _evaluation(folder: Path) -> dict[str, Any]:
    """eval.json: an object, or just its list of measurements."""
    content = _json(folder / "eval.json")
    return {"measurements": content} if isinstance(content, list) else content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a line that is not JSON is passed over, for a killed run leaves half a line."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return dicts(records)


def _measurements(rows: Any) -> dict[Key, Measurement]:
    found: dict[Key, Measurement] = {}
    for row in dicts(rows):
        value = number(row, "value")
        if value is None:
            continue
        conditions = tuple((name, str(row[name])) for name in CONDITIONS if row.get(name) is not None)
        measurement = Measurement(
            text(row, "metric") or "value",
            _dataset(text(row, "dataset") or ""),
            conditions,
            value,
            number(row, "stderr"),
            number(row, "tokens"),
            number(row, "samples"),
        )
        found[measurement.key] = measurement
    return found


def _dataset(name: str) -> str:
    """A file is known by its own name, wherever it lay; a data set of the hub keeps its owner."""
    path = Path(name)
    return path.name if path.is_absolute() or path.suffix else name


def dig(content: Any, *keys: str) -> Any:
    """The value at the end of nested objects, None where one is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def number(content: Any, *keys: str) -> float | None:
    """A finite number, or None. Beyond 1e100 nothing was measured, and the arithmetic of axes would overflow."""
    value = dig(content, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e100:
        return None
    return float(value) if abs(value) >= 1e-100 else 0.0


def text(content: Any, *keys: str) -> str | None:
    value = dig(content, *keys)
    return value if isinstance(value, str) and value.strip() else None


def dicts(content: Any) -> list[dict[str, Any]]:
    """The objects in a list; nothing for anything else."""
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []


def strings(content: Any) -> list[str]:
    return [item for item in content if isinstance(item, str)] if isinstance(content, list) else []


def first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
