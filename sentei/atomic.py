"""Files and folders that are there whole or not at all: written beside their place, then moved onto it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well; a kill at any moment leaves the old file.

    The name is of this process alone, and nothing stays under it after an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder that becomes `path` when the block ends well, in place of a folder that is there.

    Nothing stays of it after an error, Ctrl-C included.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield part
        part.chmod(0o755)  # mkdtemp makes it private
        for file in part.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        _move_onto(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move_onto(part: Path, path: Path) -> None:
    """An old folder is moved away first and removed last."""
    if not path.exists() or not any(path.iterdir()):
        part.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    try:
        path.replace(old)
        part.replace(path)
    except BaseException:
        if not path.exists():
            old.replace(path)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def nearest_folder(path: Path) -> Path:
    """The nearest of the folders above `path` that is there (a file, if one stands in the way)."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def can_write(path: Path) -> bool:
    """May this process make `path`, and the folders to it?"""
    place = nearest_folder(path)
    return place.is_dir() and os.access(place, os.W_OK)
