"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sentei"
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Modules of sentei that a file imports, at any depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("sentei")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_one_way(file):
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    found = imported(file)
    methods = {name for name in found if name.startswith("sentei.methods.") and name.count(".") >= 2}
    if room in ("checkpoint", "evaluate", "benchmark", "report", "structure", "masks", "importance", "data", "train"):
        assert not any(name.startswith("sentei.methods") for name in found)
    if room == "methods":  # `structural` is what methods share; the names after `import` are not modules
        places = {path.stem for path in (ROOT / "methods").iterdir() if path.suffix == ".py" or path.is_dir()}
        own = file.relative_to(ROOT / "methods").parts[0]
        assert {name.split(".")[2] for name in methods} & places <= {"structural", own}
    if room not in ("cli", "__init__"):
        assert not any(name.startswith("sentei.cli") for name in found)
    if room == "remote" and file.stem != "__init__":
        assert not found


@pytest.mark.parametrize("module", ["sentei", "sentei.cli", "sentei.recipe", "sentei.report", "sentei.methods"])
def test_no_torch_before_there_is_work(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_nothing_names_this_machine():
    for file in [*FILES, *ROOT.parent.glob("*.md")]:
        text = file.read_text()
        assert "/" + "work/" not in text and "/" + "tmp/smol" not in text, file
