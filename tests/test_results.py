"""The figures in README.md and results/README.md are those of the JSON files beside them."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_pages_say_what_the_files_say(script, monkeypatch, tmp_path):
    page = script("readme")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.main()
    for name in ("README.md", "results/README.md"):
        made = (tmp_path / name).read_text(encoding="utf-8")
        assert made == (ROOT / name).read_text(encoding="utf-8"), f"run python benchmarks/readme.py: {name} is older"
