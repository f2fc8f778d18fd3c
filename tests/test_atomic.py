"""A file that is replaced is the old one or the new one, never a part."""

from pathlib import Path

import pytest

from sentei.atomic import can_write, replacing, write_text


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_takes_the_place_of_the_old_in_a_folder_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    write_text(path, "old")
    write_text(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_in_the_way_cannot_be_written_through(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert can_write(tmp_path / "new" / "a.json")
    assert not can_write(tmp_path / "file" / "a.json")
