"""What the last stage of a recipe must reach: "perplexity_ratio <= 2"."""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path
from typing import Any

from sentei.recipe.fields import nearest

GATES = {
    "perplexity": "of the last stage, on the first text at the first context",
    "perplexity_ratio": "that, over the parent's",
    "accuracy": "of the last stage, mean over the tasks",
    "accuracy_ratio": "that, over the parent's",
    "parameters_ratio": "last stage over parent, all parameters",
    "layer_parameters_ratio": "last stage over parent, parameters of the layers",
    "bytes_ratio": "last stage over parent, bytes of the weights on disk",
    "speedup_prefill": "parent's seconds over the last stage's",
    "speedup_first_token": "parent's seconds over the last stage's",
    "speedup_decode": "parent's seconds over the last stage's",
    "speedup_of_ideal": "prefill speed-up over what the removed weights promise",
    "memory_ratio": "last stage over parent, peak memory of the process",
}
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_GATE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")


def parse_gate(gate: Any) -> tuple[str, str, float]:
    match = _GATE.fullmatch(str(gate))
    if match is None:
        raise ValueError(f"cannot read the gate {gate!r}; write it as: perplexity_ratio <= 2")
    name, comparison, bound = match.groups()
    if name not in GATES:
        raise ValueError(f"no gate {name!r}{nearest(name, GATES)} Known: {', '.join(GATES)}")
    try:
        return name, comparison, float(bound)
    except ValueError:
        raise ValueError(f"the bound of the gate {gate!r} is no number") from None


def judge(gate: str, values: dict[str, float]) -> dict[str, Any]:
    name, comparison, bound = parse_gate(gate)
    value = values.get(name)
    return {"gate": gate, "value": value, "passed": value is not None and _COMPARE[comparison](value, bound)}


def values_of(result: dict[str, Any], last: Path) -> dict[str, float]:
    """The names of GATES -> what was measured of the last stage."""
    record = json.loads((last / "compression.json").read_text(encoding="utf-8"))
    values = {
        f"{what}_ratio": record["result"][what] / record["parent"][what]
        for what in ("parameters", "layer_parameters", "bytes")
        if record["result"].get(what) and record["parent"].get(what)
    }
    if str(record["parent"]["path"]).endswith(".gguf"):
        values.pop("bytes_ratio", None)  # a quantised file against one that is not
    if "measurements" in result:
        parent, child = (result["measurements"][name] for name in ("parent", last.name))
        for name, pick in (("perplexity", _perplexity), ("accuracy", _accuracy)):
            before, after = pick(parent), pick(child)
            if before and after is not None:
                values[name], values[f"{name}_ratio"] = after, after / before
    if "benchmark" in result:
        bench = result["benchmark"]
        values |= {name: bench[name] for name in GATES if name.startswith("speedup") and bench.get(name) is not None}
        values["memory_ratio"] = bench["ratios"]["peak_memory"]
    return values


def _perplexity(measurements: list[dict[str, Any]]) -> float | None:
    return next((row["perplexity"] for row in measurements if row.get("perplexity") is not None), None)


def _accuracy(measurements: list[dict[str, Any]]) -> float | None:
    rows = [row["value"] for row in measurements if row["metric"] == "acc"]
    return sum(rows) / len(rows) if rows else None
