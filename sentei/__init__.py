"""sentei: make language models smaller, and prove it.

    model, tokenizer = sentei.load("small/")
    sentei.compress("parent/", method="policy_gradient", sparsity=0.3, data="text.txt", out="small/")
    sentei.evaluate.run("small/", texts=["test.txt"])
    sentei.benchmark.run("small/", "parent/")
    sentei.report.write("parent/", ["small/"], "report.html")

Importing the package is quick: torch and transformers load at first use. `import sentei` also makes
`AutoModelForCausalLM.from_pretrained` open a heterogeneous checkpoint without the trust flag.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = {
    "load": "sentei.checkpoint",
    "save": "sentei.checkpoint",
    "compress": "sentei.recipe",
    "heal": "sentei.recipe",
}
_ROOMS = (
    "benchmark",
    "checkpoint",
    "data",
    "evaluate",
    "importance",
    "masks",
    "methods",
    "recipe",
    "report",
    "structure",
)
__all__ = ["__version__", *_FUNCTIONS, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"sentei.{name}")
    raise AttributeError(f"module 'sentei' has no attribute {name!r}")


class _RegisterWithTransformers(MetaPathFinder):
    """Adds our classes to transformers' Auto classes once those are imported, and not before: that takes seconds."""

    trigger = "transformers.models.auto.modeling_auto"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_register(module: Any) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_then_register  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _register() -> None:
    importlib.import_module("sentei.remote").register()


if _RegisterWithTransformers.trigger in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
