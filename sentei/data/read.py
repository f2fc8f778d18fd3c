"""Readers: a file, a folder or a dataset -> documents (strings). Nothing here unpickles."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics as python_topics
from typing import Any

# .raw and .tokens are the suffixes under which WikiText is distributed.
SUFFIXES = (".txt", ".raw", ".tokens", ".jsonl", ".parquet")
# Running text without headings is cut to documents of this many characters: long enough for a few contexts of tokens,
# short enough that a file of a megabyte can be split finely.
DOCUMENT_CHARACTERS = 4000

HEADING = re.compile(r" ?= (?![= ]).*(?<![= ]) = ?$")
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
DATASET_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")


def read_documents(path: str | Path, *, text_field: str = "text") -> list[str]:
    """All documents of a file or folder, in order, none of them blank.

    Running text is split at its top-level WikiText headings (" = Title = ") where it has them, else at blank lines into
    contiguous runs of a few thousand characters. A folder gives the files it can read, in the order of their names.

    Raises:
        ValueError: a path that is missing, empty, binary or of an unknown kind; a bad row, by its line.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and suffix(file) in SUFFIXES)
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise ValueError(f"the folder {path} holds no text; expected files ending in {', '.join(SUFFIXES)}")
        return [document for file in files for document in read_documents(file, text_field=text_field)]
    kind = suffix(path)
    if kind == ".jsonl":
        documents = _read_jsonl(path, text_field)
    elif kind == ".parquet":
        documents = _read_parquet(path, text_field)
    else:
        documents = _split_text(read_characters(path))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def read_text(path: str | Path, *, text_field: str = "text") -> str:
    """A whole file as one text, for perplexity.

    A .txt is taken as it stands. A .raw or .tokens file is WikiText and becomes what published perplexities are of:
    its rows (the line with its line end; nothing for a blank line) joined by an empty line. The documents of other
    kinds are joined by an empty line.

    Raises:
        ValueError: as `read_documents`.
    """
    path = Path(path).expanduser()
    if not path.is_file() or suffix(path) in (".jsonl", ".parquet"):
        return "\n\n".join(read_documents(path, text_field=text_field))
    text = read_characters(path)
    if suffix(path) == ".txt":
        return text
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line end is not a line
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def is_dataset(source: str) -> bool:
    """Whether the source can only be the name of a Hugging Face dataset."""
    if Path(source).expanduser().exists() or suffix(Path(source)) in SUFFIXES or source.startswith("."):
        return False
    return DATASET_NAME.fullmatch(source) is not None


def read_dataset(source: str, text_field: str, split: str) -> list[str]:
    """The documents of a Hugging Face dataset, "name" or "name:config". ValueError where it cannot be had."""
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client, the cache and the builders each raise kinds of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source!r} is no file or folder here, and the split {split!r} of a Hugging Face dataset of this name"
            f" could not be loaded: {reason}"
        ) from error
    if text_field not in dataset.column_names:
        raise ValueError(_missing_field(source, text_field, dataset.column_names))
    documents = [_field({text_field: text}, text_field, source) for text in dataset[text_field]]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{source!r} (split {split!r}) holds no text")
    return documents


def python_documents() -> list[str]:
    """The topics of Python's own help, each paragraph once.

    Long topics repeat short ones word for word ("compound" holds "if", "for", "with" and more: a fifth of the text).
    A repeated paragraph stays in the shortest topic that has it, so that no held-out text was trained on.
    """
    documents = {}
    seen: set[str] = set()
    for topic in sorted(python_topics, key=lambda topic: (len(python_topics[topic]), topic)):
        paragraphs = [paragraph.strip("\n") for paragraph in BLANK_LINES.split(python_topics[topic])]
        documents[topic] = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.strip() not in seen)
        seen.update(paragraph.strip() for paragraph in paragraphs)
    return [documents[topic] for topic in sorted(documents) if documents[topic].strip()]


def suffix(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not content.strip():
        raise ValueError(f"{path} is empty")
    return content


def read_characters(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The text of a UTF-8 file, unpacked. ValueError: another suffix, empty, binary or in another encoding."""
    if suffix(path) not in suffixes:
        raise ValueError(f"{path} is of an unknown kind; expected a file ending in {', '.join(suffixes)}")
    content = _read_bytes(path)
    if b"\0" in content:
        raise ValueError(f"{path} is a binary file (NUL byte at offset {content.index(0)}); expected UTF-8 text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {content[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"{path} is not UTF-8 text ({place}); convert it to UTF-8") from error
    return text.replace("\r\n", "\n")


def _read_jsonl(path: Path, text_field: str) -> list[str]:
    documents = []
    for number, line in enumerate(read_characters(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{path} line {number} is a {kind}; expected an object with the field {text_field!r}")
        documents.append(_field(row, text_field, f"{path} line {number}"))
    return documents


def _read_parquet(path: Path, text_field: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    if path.name.lower().endswith(".gz"):
        raise ValueError(f"{path}: parquet is compressed inside; unpack it first")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        fields = file.schema_arrow.names
        if text_field in fields:
            rows = file.read(columns=[text_field]).to_pylist()
            return [_field(row, text_field, f"{path} row {number}") for number, row in enumerate(rows)]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error
    raise ValueError(_missing_field(str(path), text_field, fields))


def _field(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise ValueError(_missing_field(where, text_field, list(row)))
    text = row[text_field]
    if text is None:
        return ""  # a row without text, dropped like a blank one
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {text_field!r} is {type(text).__name__}; expected text")
    return text


def _missing_field(where: str, text_field: str, fields: list[str]) -> str:
    known = ", ".join(fields)
    return f"{where} has no field {text_field!r}; its fields are: {known}. Name the one with the text by text_field"


def _split_text(text: str) -> list[str]:
    lines = text.split("\n")
    starts = [
        number
        for number, line in enumerate(lines)
        # Blank lines around it, or it is the line of a formula.
        if HEADING.match(line)
        and not "".join(lines[max(number - 1, 0) : number]).strip()
        and not "".join(lines[number + 1 : number + 2]).strip()
    ]
    if len(starts) < 3:  # one article, not a collection
        return list(_runs(text))
    starts = sorted({0, *starts})
    return ["\n".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _runs(text: str) -> Iterator[str]:
    """Contiguous runs, each cut at the last blank line, else line, sentence or word, of its second half."""
    length = min(DOCUMENT_CHARACTERS, max(200, len(text) // 20))  # a short file still gives enough documents to split
    text = BLANK_LINES.sub("\n\n", text)
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                cut = text.rfind(mark, start + length // 2, end)
                if cut >= 0:
                    end = cut + len(mark)
                    break
        yield text[start:end]
        start = end
