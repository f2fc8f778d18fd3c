"""Quality of a model: perplexity, masked-token loss, lm-eval tasks; written as measurements beside the checkpoint."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentei import data
from sentei.atomic import write_text
from sentei.evaluate.loss import is_masked_lm, masked_lm, perplexity, perplexity_text

__all__ = ["is_masked_lm", "masked_lm", "perplexity", "perplexity_text", "run", "tasks", "write_measurements"]


def tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Scores of lm-eval tasks: task -> {metric, metric + "_stderr", ..., "limit": asked, "samples": rows really used}.

    Args:
        include_path: a folder of task YAML of your own (lm-eval runs the Python functions that it names); paths in it
            are relative to the directory of the process.
        limit: the first so many rows of each task.

    Raises:
        ValueError: lm-eval not installed, an unknown task, a task whose data cannot be had.
    """
    if is_masked_lm(model):
        raise ValueError(f"{type(model).__name__} predicts masked tokens; the tasks need a causal model")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("tasks need lm-eval, which is not installed; pip install 'sentei[eval]'") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path} is not a folder of task YAML")
    folder = None if include_path is None else str(include_path)
    # Reading the thousands of task files that lm-eval brings takes ten seconds or more: only where one is asked for.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        own = sorted(path.stem for path in Path(include_path).glob("[!_]*.yaml")) if include_path else []
        hint = f"; {include_path} has {', '.join(own)}" if own else "; give the folder of its YAML by include_path"
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}{hint}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        # 100 000 bootstrap rounds, lm-eval's default, take minutes; accuracies need none, their error has a formula.
        answer = simple_evaluate(
            wrapped, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"the data of the tasks {', '.join(names)} cannot be had: {error}. Paths in task YAML are relative to the"
            f" current directory, {Path.cwd()}; a data set of the hub needs a network or its cache"
        ) from error
    if answer is None:
        raise ValueError("lm-eval gave no result")
    scores: dict[str, dict[str, Any]] = {}
    for name, values in answer.get("results", {}).items():
        scores[name] = {"limit": limit, "samples": answer.get("n-samples", {}).get(name, {}).get("effective")}
        for key, value in values.items():
            metric, _, _ = key.partition(",")  # "acc,none": the part behind the comma is the filter
            if isinstance(value, int | float) and math.isfinite(value) and metric not in ("alias", "sample_len"):
                scores[name][metric] = value
    return scores


def run(
    folder: str | Path,
    *,
    texts: Sequence[str] = (),
    contexts: Sequence[int] = (128,),
    stride: int | None = None,
    max_blocks: int | None = None,
    add_bos: bool | None = None,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    text_field: str = "text",
    json_path: str | Path | None = None,
    beside: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a saved checkpoint and add the measurements to its eval.json.

    Args:
        folder: a checkpoint folder, a .gguf file or a hub id.
        texts: files to measure as a whole, or anything `data.load` takes, of which the test part is measured. A file
            which this checkpoint was made with (by its compression.json) counts as the latter.
        seed: of the split of `data.load` and of the masking of encoders.
        json_path: where to write; eval.json in the folder if not given. For a file or a hub id nothing is written
            then. Measurements of the same thing are replaced, others kept.
        beside: checkpoints to compare with: a file that one of these was made with is measured by its test part, too.

    Returns: {"checkpoint", "measurements": the new ones, "json": path or None}. A measurement has metric, value,
        dataset and compute_dtype; of a text also part, sha256, context, stride, bos, blocks, tokens, loss; of a task
        stderr, limit, samples.

    Raises:
        ValueError: as the functions above, and nothing to measure; nothing is written then.
    """
    from sentei import checkpoint

    if not texts and not tasks:
        raise ValueError("nothing to measure; give a text or a task")
    if json_path is None and Path(folder).is_dir():
        json_path = Path(folder) / "eval.json"
    if json_path is not None:
        _read_measurements(Path(json_path))  # a bad file is told now, not after an hour
    read = [(name, *_text_of(name, (folder, *beside), seed, text_field)) for name in texts]
    model, tokenizer = checkpoint.load(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    measurements = []
    for name, text, part in read:
        for context in contexts:
            result = perplexity_text(
                model,
                tokenizer,
                text,
                context=context,
                stride=stride,
                max_blocks=max_blocks,
                batch_size=batch_size,
                add_bos=add_bos,
                seed=seed,
                progress=progress,
            )
            metric, value = ("masked_lm_loss", "loss") if is_masked_lm(model) else ("perplexity", "perplexity")
            source = {"dataset": name, "part": part, "sha256": data.fingerprint([text])}
            measurements.append({"metric": metric, "value": result[value], **source, **result})
    if tasks:
        measurements += _measure_tasks(model, tokenizer, tasks, include_path, limit, batch_size)
    dtype_used = str(next(model.parameters()).dtype).removeprefix("torch.")
    measurements = [{**measurement, "compute_dtype": dtype_used} for measurement in measurements]
    if json_path is not None:
        write_measurements(json_path, measurements)
    written = None if json_path is None else str(json_path)
    return {"checkpoint": str(folder), "measurements": measurements, "json": written}


def write_measurements(path: str | Path, measurements: Sequence[dict[str, Any]]) -> None:
    """Add measurements to a JSON list, replacing those of the same thing. The file is whole at every moment."""
    path = Path(path)
    new = {_key(measurement): measurement for measurement in measurements}
    merged = [new.pop(_key(old), old) for old in _read_measurements(path)] + list(new.values())
    write_text(path, json.dumps(merged, indent=1, allow_nan=False) + "\n")


def _read_measurements(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        measurements = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away to measure again") from error
    if not isinstance(measurements, list) or not all(isinstance(measurement, dict) for measurement in measurements):
        raise ValueError(f"{path} is not a list of measurements; move it away to measure again")
    return measurements


def _key(measurement: dict[str, Any]) -> str:
    """What is measured and how, without the outcome."""
    outcome = ("value", "perplexity", "loss", "stderr", "tokens", "samples")
    return json.dumps({name: value for name, value in measurement.items() if name not in outcome}, sort_keys=True)


def _measure_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    include_path: str | Path | None,
    limit: int | None,
    batch_size: int,
) -> list[dict[str, Any]]:
    scores = tasks(model, tokenizer, names, include_path=include_path, limit=limit, batch_size=batch_size)
    return [
        {
            "metric": metric,
            "value": score[metric],
            "dataset": name,
            "stderr": score.get(f"{metric}_stderr"),
            "limit": limit,
            "samples": score["samples"],
        }
        for name, score in scores.items()
        for metric in score
        if metric not in ("limit", "samples") and not metric.endswith("_stderr")
    ]


def _text_of(name: str, folders: Sequence[str | Path], seed: int, text_field: str) -> tuple[str, str]:
    """The text to measure and which part of `name` it is: "whole" or "test"."""
    records = [record for folder in folders if (record := Path(folder) / "compression.json").is_file()]
    stages = [stage for record in records for stage in json.loads(record.read_text(encoding="utf-8")).get("stages", [])]
    used = {stage["data"]["name"]: stage["data"]["sha256"] for stage in stages if stage.get("data")}
    path = Path(name).expanduser()
    if path.is_file():
        known = {Path(source).expanduser().resolve() for recorded in used for source in data.sources(recorded)}
        if path.resolve() not in known:
            return data.read_text(path, text_field=text_field), "whole"
    text = data.load(name, seed=seed, text_field=text_field)
    if used.get(name, text.sha256) != text.sha256:
        warnings.warn(
            f"the text {name} or its split is not the one that {folders[0]} was made with: the test part may hold text"
            " that the model has seen",
            stacklevel=3,
        )
    return "\n\n".join(text.test), "test"
