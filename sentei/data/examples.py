"""Task rows: labelled texts, questions with choices, prompts with responses; read, and split so that no input leaks.

    rows = examples.load("reviews.tsv", text_field="sentence")
    rows = examples.load({"train": "train.tsv", "test": ["in.tsv", "out.tsv"]}, text_field="a", pair_field="b")

The unit is the input: rows with the same input stay in one part, and where a part has its own file, training rows whose
input is also held out are dropped. Which part an input belongs to depends on its hash and the seed alone, not on the
order of the file, its other rows, or a limit.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentei.data.read import is_dataset, read_characters, suffix

Row = dict[str, Any]
MakeRow = Callable[[Row, str], Row]
"""(row as read, where it stands) -> row as the kind has it, with "key", the input text that decides its part."""

KINDS = ("classification", "regression", "choices", "response", "qa")
PARTS = ("train", "validation", "test")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Examples:
    """Rows of a task in three parts that share no input.

    Attributes:
        kind: one of KINDS. Rows of "classification" and "regression" hold "text", "pair" (a second text, or None) and
            "label": an index into `labels`, or a number. Rows of the other kinds hold what their maker gave them.
        labels: names in the order of their indices; None where the kind has none.
        name, sha256: what was asked for, and the fingerprint of the parts.
        dropped: training rows left out because their input is held out too.
    """

    kind: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: list[str] | None
    name: str
    sha256: str
    dropped: int = 0


def load(
    spec: str | Path | Mapping[str, Any],
    *,
    kind: str | None = None,
    text_field: str = "text",
    pair_field: str | None = None,
    label_field: str = "label",
    make: MakeRow | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    limit: int | None = None,
    held_limit: int | None = None,
) -> Examples:
    """Read task rows and split them into train, validation and test.

    Args:
        spec: a .tsv, .csv, .jsonl, .json or .parquet file (text ones also .gz), or a Hugging Face dataset "name" or
            "name:config"; or parts, {"train": ..., "test": [..., ...]}, also written "train=a.tsv,test=b.tsv,test=c".
            A part that is not given is taken from train by its fraction; 0 leaves it empty.
        kind: None: "regression" if a label has a fraction, else "classification". The other kinds need `make`.
        make: rows of another kind; raises ValueError with the place it is given for a row that does not fit.
        limit: at most so many rows of train, chosen by `seed` after the split.
        held_limit: the same for validation and for test.

    Raises:
        ValueError: what cannot be read; a row without text or label; a label that train lacks; a single label; an
            empty part.
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}; expected at least 0 and below 1")
    if validation_fraction + test_fraction >= 1:
        raise ValueError("validation_fraction + test_fraction leave nothing to train on; their sum must be below 1")
    for name, value in (("limit", limit), ("held_limit", held_limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1 row")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    labelled = kind in (None, "classification", "regression")
    if make is None:
        if not labelled:
            raise ValueError(f"rows of kind {kind!r} need make, the function that reads one")
        make = labelled_row(text_field, pair_field, label_field)
    given = parts_of(spec)
    read = {
        part: [make(row, where) for source in files for row, where in read_rows(source, part)]
        for part, files in given.items()
    }
    fractions = {"validation": validation_fraction, "test": test_fraction}
    missing = {part: fraction for part, fraction in fractions.items() if part not in read}
    parts, dropped = _split(read, missing, seed)
    empty = [part for part in PARTS if not parts[part] and (part in given or part == "train" or fractions[part])]
    if empty:
        count = sum(map(len, read.values()))
        raise ValueError(f"{_name(given)} has {count} rows, too few: {', '.join(empty)} would be empty; give more rows")
    labels = None
    if labelled:
        kind, labels = _number_labels(parts, kind, _name(given))
    parts = {part: _limited(rows, limit if part == "train" else held_limit, seed) for part, rows in parts.items()}
    return Examples(str(kind), *parts.values(), labels, _name(given), _fingerprint(parts), dropped)


def parts_of(spec: str | Path | Mapping[str, Any]) -> dict[str, list[str]]:
    """Part -> its files or datasets. ValueError for a spec that names none, or a part that is not one of PARTS."""
    if isinstance(spec, Mapping):
        items = [(str(part), file) for part, files in spec.items() for file in _listed(files)]
    elif isinstance(spec, str) and "=" in spec and not Path(spec).expanduser().exists():
        pairs = [item.strip().partition("=") for item in spec.split(",")]
        items = [(part, file) for part, _, file in pairs]
    else:
        items = [("train", spec)]
    parts: dict[str, list[str]] = {}
    for part, file in items:
        if part not in PARTS or not file:
            raise ValueError(f"{spec!r} names {part or 'no part'!r}; expected train=FILE,validation=FILE,test=FILE")
        parts.setdefault(part, []).append(str(file))
    if "train" not in parts:
        raise ValueError(f"{spec!r} has no train part; expected train=FILE, and optionally validation= and test=")
    return parts


def read_rows(source: str, split: str = "train") -> list[tuple[Row, str]]:
    """Rows of a file or dataset, each with the place to name in an error. Nothing is unpickled.

    Args:
        split: of a Hugging Face dataset.
    Raises:
        ValueError: missing, empty, binary, of an unknown kind, or a bad row, by its line.
    """
    path = Path(source).expanduser()
    if not path.exists() and is_dataset(source) and suffix(path) not in SUFFIXES:
        rows = _dataset_rows(source, split)
        return [(row, f"{source} row {number}") for number, row in enumerate(rows)]
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    ending = suffix(path)
    if ending in (".tsv", ".csv"):
        return _table(path, "\t" if ending == ".tsv" else ",")
    if ending == ".jsonl":
        lines = enumerate(read_characters(path, SUFFIXES).split("\n"), start=1)
        return [
            (_json(line, f"{path} line {number}"), f"{path} line {number}") for number, line in lines if line.strip()
        ]
    if ending == ".json":
        content = _json(read_characters(path, SUFFIXES), str(path), list)
        return [(_object(row, f"{path} row {number}"), f"{path} row {number}") for number, row in enumerate(content)]
    if ending == ".parquet":
        return [(row, f"{path} row {number}") for number, row in enumerate(_parquet(path))]
    raise ValueError(f"{path} is of an unknown kind; expected a file ending in {', '.join(SUFFIXES)}")


def labelled_row(text_field: str, pair_field: str | None, label_field: str) -> MakeRow:
    """Makes rows {"text", "pair", "label"}; labels stay as they were read."""

    def make(row: Row, where: str) -> Row:
        text = field(row, text_field, where)
        pair = None if pair_field is None else field(row, pair_field, where)
        label = row.get(label_field, None) if label_field in row else _missing(row, label_field, where)
        if label is None or label == "":
            raise ValueError(f"{where} has no label in {label_field!r}; leave out rows, or a file, without labels")
        return {"text": text, "pair": pair, "label": label, "key": text if pair is None else f"{text}\n{pair}"}

    return make


def field(row: Row, name: str, where: str) -> str:
    """A text of a row. ValueError: no such field, not a text, or blank."""
    if name not in row:
        _missing(row, name, where)
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the field {name!r} is {text!r}; expected text")
    return text


def stratified(rows: Sequence[Row], count: int, *, seed: int, labels: int | None = None) -> list[Row]:
    """`count` rows in their order, the same for the same seed: at least two of each label, else in proportion.

    Args:
        labels: their number; None draws by quantile where rows have numbers as labels, else at random.
    Raises:
        ValueError: fewer rows than two for each label.
    """
    if count >= len(rows):
        return list(rows)
    order = sorted(range(len(rows)), key=lambda i: _hash(f"slice {seed}", _key(rows[i]) + str(i)))
    if labels is None and rows and isinstance(rows[0].get("label"), float):
        by_value = sorted(range(len(rows)), key=lambda i: (rows[i]["label"], i))
        bins = [by_value[len(rows) * b // count : len(rows) * (b + 1) // count] for b in range(count)]
        place = {i: rank for rank, i in enumerate(order)}
        return [rows[i] for i in sorted(min(members, key=place.__getitem__) for members in bins)]
    if labels is None:
        return [rows[i] for i in sorted(order[:count])]
    if count < 2 * labels:
        raise ValueError(f"{count} rows are too few for {labels} labels; at least two of each are needed")
    members = [[i for i in order if rows[i]["label"] == label] for label in range(labels)]
    quota = [min(len(of), max(2, math.floor(count * len(of) / len(rows)))) for of in members]
    chosen = {i for of, number in zip(members, quota, strict=True) for i in of[:number]}
    for i in order:  # what rounding left over; or, where the minimum of two took too many, from the largest
        if len(chosen) >= count:
            break
        chosen.add(i)
    for of in sorted(members, key=len, reverse=True):
        surplus = [i for i in reversed(of) if i in chosen][: max(0, len(chosen) - count)]
        keep_two = max(0, sum(i in chosen for i in of) - 2)
        chosen -= set(surplus[:keep_two])
    return [rows[i] for i in sorted(chosen)]


# --- reading ------------------------------------------------------------------------------------


def _listed(files: Any) -> list[Any]:
    return list(files) if isinstance(files, list | tuple) else [files]


def _name(parts: Mapping[str, list[str]]) -> str:
    if list(parts) == ["train"] and len(parts["train"]) == 1:
        return parts["train"][0]
    return ",".join(f"{part}={file}" for part, files in parts.items() for file in files)


def _table(path: Path, delimiter: str) -> list[tuple[Row, str]]:
    """A table with a header. Tabs separate without quoting, as GLUE has it; commas with CSV's quoting."""
    text = read_characters(path, SUFFIXES)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    # A field of a document's length is no error, and a line end inside a text other than \n ends no row.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, quoting=quoting)
    rows: list[tuple[Row, str]] = []
    header: list[str] = []
    for values in reader:
        if not values or values == [""]:
            continue
        if not header:
            header = values
            continue
        where = f"{path} line {reader.line_num}"
        if len(values) != len(header):
            raise ValueError(f"{where} has {len(values)} fields, the header has {len(header)}: {', '.join(header)}")
        rows.append((dict(zip(header, values, strict=True)), where))
    if not rows:
        raise ValueError(f"{path} holds no row below its header")
    return rows


def _json(text: str, where: str, kind: type = dict) -> Any:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{where} is a {type(content).__name__}; expected {'an object' if kind is dict else 'a list'}")
    return content


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}; expected an object")
    return row


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error


def _dataset_rows(source: str, split: str) -> list[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        return list(datasets.load_dataset(name, config or None, split=split))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # the hub's client, the cache and the builders each raise kinds of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source!r} is no file here, and the split {split!r} of a Hugging Face dataset of this name could not be "
            f"loaded: {reason}"
        ) from error


def _missing(row: Row, name: str, where: str) -> None:
    raise ValueError(f"{where} has no field {name!r}; its fields are: {', '.join(map(str, row))}")


# --- parts --------------------------------------------------------------------------------------


def _hash(salt: str, key: str) -> bytes:
    return hashlib.sha256(f"{salt}\n{key}".encode()).digest()


def _key(row: Row) -> str:
    return row["text"] if row.get("pair") is None and "text" in row else json.dumps(row, sort_keys=True, default=str)


def _split(read: dict[str, list[Row]], fractions: dict[str, float], seed: int) -> tuple[dict[str, list[Row]], int]:
    """The parts, and how many training rows were dropped; fractions are of rows, met to within one input's rows."""
    held = {" ".join(row["key"].split()) for part in ("validation", "test") for row in read.get(part, [])}
    rows = [row for row in read["train"] if " ".join(row["key"].split()) not in held]
    dropped = len(read["train"]) - len(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:  # the spaces of a copy may differ
        groups.setdefault(" ".join(row["key"].split()), []).append(row)
    part_of: dict[str, str] = {}
    room = {part: fractions[part] * len(rows) for part in ("test", "validation") if fractions.get(part)}
    taken = dict.fromkeys(room, 0)
    for key in sorted(groups, key=lambda key: _hash(f"split {seed}", key)):
        part = next((part for part in room if taken[part] < room[part] - 0.5 or not taken[part]), "train")
        part_of[key] = part
        if part in room:
            taken[part] += len(groups[key])
    test = {row["key"] for row in read.get("test", [])}
    parts = {
        "train": [row for row in rows if part_of[" ".join(row["key"].split())] == "train"],
        "validation": [row for row in read.get("validation", []) if row["key"] not in test],
        "test": read.get("test", []),
    }
    for part in room:
        parts[part] = [row for row in rows if part_of[" ".join(row["key"].split())] == part]
    return {part: [{k: v for k, v in row.items() if k != "key"} for row in of] for part, of in parts.items()}, dropped


def _number_labels(parts: dict[str, list[Row]], kind: str | None, name: str) -> tuple[str, list[str] | None]:
    """Labels as numbers, in place; the kind, and the names of a classification."""
    values = {part: [row["label"] for row in rows] for part, rows in parts.items()}
    numbers = {part: [_number(value) for value in of] for part, of in values.items()}
    fractional = any(n is not None and not n.is_integer() for n in numbers["train"])
    all_numbers = all(n is not None and math.isfinite(n) for of in numbers.values() for n in of)
    if kind is None:
        kind = "regression" if fractional and all_numbers else "classification"
    if kind == "regression":
        if not all_numbers:
            bad = next(v for p in PARTS for v, n in zip(values[p], numbers[p], strict=True) if n is None or n != n)
            raise ValueError(f"{name}: the label {bad!r} is no number, as a regression needs")
        for part, rows in parts.items():
            for row, number in zip(rows, numbers[part], strict=True):
                row["label"] = number
        if len(set(numbers["train"])) < 2:
            raise ValueError(
                f"{name}: every training label is {values['train'][0]}; nothing can be learned from one value"
            )
        return kind, None
    whole = all_numbers and all(n is not None and n.is_integer() for of in numbers.values() for n in of)
    spelled = {
        part: [
            str(int(n)) if whole and n is not None else str(v) for v, n in zip(values[part], numbers[part], strict=True)
        ]
        for part in parts
    }
    labels = sorted(set(spelled["train"]), key=(lambda text: (int(text), text)) if whole else None)
    if len(labels) < 2:
        raise ValueError(f"{name}: every training row has the label {labels[0]!r}; a classification needs two or more")
    if len(labels) > max(50, len(spelled["train"]) // 4):
        raise ValueError(
            f"{name}: {len(labels)} distinct labels in {len(spelled['train'])} training rows; is this the right "
            'label_field? Numbers to be predicted are of kind="regression"'
        )
    for part, rows in parts.items():
        for row, label in zip(rows, spelled[part], strict=True):
            if label not in labels:
                raise ValueError(
                    f"{name}: the label {label!r} of a {part} row is not among train's: {', '.join(labels)}"
                )
            row["label"] = labels.index(label)
    return kind, labels


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _limited(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda i: _hash(f"limit {seed}", _key(rows[i]) + str(i)))
    return [rows[i] for i in sorted(order[:limit])]


def _fingerprint(parts: dict[str, list[Row]]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
