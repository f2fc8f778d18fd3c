"""One page that says what was done to a model, what it cost and what it gained, made from JSON files alone.

    write("parent/", ["small/", "smaller/"], "report.html")     # and report.md beside it, a table for a README

The page is one HTML file without scripts and without anything to load. torch is not imported: a report can be made on a
machine that could never run the model. Everything read is treated as text from a stranger and escaped.

What is read
============
From each child's folder; every file and every field may be missing, and the page then says so and how to get it.

`compression.json` (checkpoint.save)::

    {"sentei": "0.1.0",
     "stages": [{"method": "policy_gradient", "fields": {"sparsity": 0.25, ...}, "seed": 0,
                 "data": {"name": "python-docs", "sha256": "..."},
                 "record": {"seconds": 61.2, "peak_memory_bytes": 1.1e9, "warnings": ["..."],
                            "kept": {...},               # as below, when several stages removed something
                            "history": [{"step": 0, "loss": 3.9}]}}],     # used when there is no log.jsonl
     "parent": {"path": "...", "sha256": "...", "parameters": 134515008, "layer_parameters": 106202880, "bytes": 1},
     "result": {"parameters": 1, "layer_parameters": 1, "bytes": 1, "shape": "heterogeneous", "model_type": "..."},
     "kept": {"granularity": "heads+channels",           # structure.kept
              "layers": [{"layer": 0, "heads": {"of": 3, "kept": 2, "units": "0-1"}, "channels": {...}}]},
     "versions": {"torch": "2.13.0", ...}}

`eval.json` (evaluate.run; a parent's folder may hold one too)::

    {"measurements": [
        {"metric": "perplexity", "dataset": "wikitext-2", "value": 60.1, "context": 128, "stride": null, "bos": false,
         "blocks": 100, "tokens": 12700},
        {"metric": "acc", "dataset": "piqa", "value": 0.66, "stderr": 0.02, "limit": 200}],
     "parent_measurements": [...],       # same rows of the dense parent, for a parent that has no folder to write to
     "machine": {"cpu": "...", "cores": 2, ...}, "notes": ["..."]}

The list of measurements alone will do too. Two rows are the same measurement when metric, dataset (of a path, the
file's name), split, slice, part, sha256, context, stride, bos, blocks, limit, num_fewshot, template and seq_len agree;
only such rows are compared. Accuracies are fractions of 1. "samples" and "tokens" are shown.

`bench.json` (benchmark.run)::

    {"speedup_prefill": 1.21, "speedup_first_token": ..., "speedup_decode": ..., "speedup_of_ideal": 0.95,
     "ideal": {"touched_ratio": 0.8, "speedup": 1.25, "speedup_with_attention": ..., "speedup_first_token": ...},
     "speedups": {"prefill": {"median": ..., "min": ..., "max": ..., "rounds": [...]}, "first_token": .., "decode": ..},
     "ratios": {"parameters", "layer_parameters", "bytes", "peak_memory", "loaded_memory"},           # child / parent
     "parent": {"path", "parameters", "layer_parameters", "bytes" (or null), "dtype", "device", "threads",
                "linear_parameters_per_token", "attention_share", "prefill_operations", "first_token_weights",
                "memory": {"imports_bytes", "loaded_bytes", "peak_bytes", "cuda_peak_bytes" (or null)},
                "prefill_tokens_per_second": {"median", "min", "max", "rounds"}, "decode_tokens_per_second": {...},
                "first_token_seconds": {...}},           # an encoder has no decode and no first token
     "child": {... the same ...},
     "settings": {"prompt_tokens", "new_tokens", "batch_size", "rounds", "warmup", "threads", "dtype", "device"},
     "machine": {"cpu", "cores", "threads", "device", "torch", "date", "load_average_before", ...}, "notes": ["..."]}

`log.jsonl`: a line per step: {"stage": "heal", "step": 10, "loss": 3.2, "validation_loss": 3.4, "kept": 0.8, ...}. Any
numeric field is drawn; `validation_*`, `eval_*` and `test_*` share the plot of the field they belong to.

`generation.json`: [{"prompt": "...", "parent": "...", "child": "..."}]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentei.atomic import write_text
from sentei.report import page, reading, table

__all__ = ["markdown", "write"]


def write(
    parent: str | Path | None, children: Sequence[str | Path] | str | Path, out: str | Path, *, force: bool = True
) -> Path:
    """Write the HTML page, and the Markdown table beside it under the same name with `.md`.

    Args:
        parent: the dense model: a folder that may hold an eval.json, a file, or a hub id (only named); None takes what
            the children say about it.
        children: folders of compressed checkpoints, in the order of the columns.
        out: the page; a folder gets `report.html`.
        force: replace an older page and table.
    Returns:
        the path of the page.
    Raises:
        ValueError: no child given, a child's folder is missing or holds none of the files, a file is not JSON, or the
            page is there already and not to be replaced.
    """
    report = reading.read(parent, _several(children))
    out = Path(out)
    if out.is_dir():
        out = out / "report.html"
    if out.suffix == ".md":
        raise ValueError(f"{out} is the name of the Markdown table; give the page's name, such as report.html")
    for file in (out, out.with_suffix(".md")):
        if file.exists() and not force:
            raise ValueError(f"{file} exists; give another --out, or --force (force=True) to replace it")
    write_text(out, page.html(report))
    write_text(out.with_suffix(".md"), table.markdown(report))
    return out


def markdown(parent: str | Path | None, children: Sequence[str | Path] | str | Path) -> str:
    """The table of `write` alone: one row per model, the dense parent first. Same arguments and errors."""
    return table.markdown(reading.read(parent, _several(children)))


def _several(children: Sequence[str | Path] | str | Path) -> list[str | Path]:
    return [children] if isinstance(children, str | Path) else list(children)
