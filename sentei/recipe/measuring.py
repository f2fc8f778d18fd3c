"""What a recipe measures: its settings checked before the first model is loaded, and the measuring itself."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sentei.atomic import write_text
from sentei.methods import Progress
from sentei.recipe.fields import check_keys, check_type, method_fields

if TYPE_CHECKING:
    from sentei.recipe.running import Recipe

EVALUATE: dict[str, Any] = {
    "texts": list[str], "contexts": list[int], "stride": int | None, "max_blocks": int | None, "add_bos": bool | None,
    "tasks": list[str], "include_path": str | None, "limit": int | None, "batch_size": int, "domain": list[str],
}  # fmt: skip
BENCHMARK: dict[str, Any] = {
    "prompt_tokens": int, "new_tokens": int, "batch_size": int, "rounds": int, "warmup": int, "threads": int | None,
    "dtype": str, "device": str | None,
}  # fmt: skip
_LEAST = {"contexts": 2, "warmup": 0}  # of every other number: 1


def check_settings(evaluate: dict[str, Any] | None, benchmark: dict[str, Any] | None) -> None:
    """Refuse keys, types and numbers that cannot be meant; needs no torch.

    Raises:
        ValueError: which key, and what was expected.
    """
    for where, given, known in (("evaluate", evaluate, EVALUATE), ("benchmark", benchmark, BENCHMARK)):
        check_keys(given or {}, known, where)
        for key, value in (given or {}).items():
            check_type(f"{where}: {key}", value, known[key])
            least = _LEAST.get(key, 1)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool) and number < least:
                    raise ValueError(f"{where}: {key} is {number}; expected {least} or more")
    if not evaluate:
        return
    if not any(evaluate.get(key) for key in ("texts", "tasks", "domain")):
        raise ValueError("evaluate has nothing to measure; give texts, tasks or domain")
    stride, least = evaluate.get("stride"), min(evaluate.get("contexts") or [128])
    if stride is not None and stride >= least:
        raise ValueError(f"evaluate: stride is {stride}; expected less than the context, {least}")


def check_there(recipe: Recipe, model: str) -> None:
    """Refuse texts, rows and tasks that are not there, and more tokens than the model has positions for.

    Raises:
        ValueError, OSError: which one, and how to mend it.
    """
    import torch

    from sentei import checkpoint, data
    from sentei.checkpoint.forms import ENCODERS
    from sentei.evaluate import domain

    asked, bench = recipe.evaluate or {}, recipe.benchmark
    for dtype in (recipe.dtype, (bench or {}).get("dtype", "auto")):
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16 or float16")
    for name in asked.get("texts", ()):
        if Path(name).expanduser().is_file():
            data.read_text(Path(name).expanduser(), text_field=recipe.text_field)
        else:
            data.load(name, text_field=recipe.text_field)
    for file in asked.get("domain", ()):
        domain.read(file)
    config = checkpoint.inspect(model, trust_remote_code=recipe.trust_remote_code).config
    encoder = str(config.get("model_type")).removeprefix("sentei_") in ENCODERS
    if encoder and (wrong := [key for key in ("tasks", "stride", "add_bos") if asked.get(key) not in (None, [])]):
        raise ValueError(f"evaluate: {', '.join(wrong)} need a causal model, and {recipe.model} is an encoder")
    if asked.get("tasks"):
        _check_tasks(asked["tasks"], asked.get("include_path"))
    lengths = {"evaluate: contexts": max(asked.get("contexts") or [128])} if asked.get("texts") else {}
    if bench is not None:
        from sentei import benchmark

        usual = {name: item.default for name, item in inspect.signature(benchmark.run).parameters.items()} | bench
        tokens = usual["prompt_tokens"] + (0 if encoder else usual["new_tokens"] + 1)
        lengths["benchmark: prompt_tokens and new_tokens"] = tokens
    positions = _positions(config)
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise ValueError(f"{name} ask for {length} tokens; {recipe.model} has positions for {positions} at most")


def _positions(config: dict[str, Any]) -> int | None:
    from sentei import structure

    known = {"max_position_embeddings": None, "model_type": "", "pad_token_id": 1} | config
    return structure.positions(SimpleNamespace(config=SimpleNamespace(**known)))


def _check_tasks(names: list[str], include_path: str | None) -> None:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("tasks need lm-eval, which is not installed; pip install 'sentei[eval]'") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"evaluate: include_path {include_path} is not a folder of task YAML")
    missing = set(names)
    for own in (True, False):  # reading what lm-eval brings takes ten seconds
        if missing and (include_path or not own):
            missing -= set(TaskManager(include_path=include_path, include_defaults=not own).all_tasks)
    if missing:
        raise ValueError(
            f"lm-eval knows no task {', '.join(sorted(missing))}; give the folder of its YAML by include_path"
        )


def evaluate_stage(recipe: Recipe, model: str, folder: Path, say: Progress, beside: list[str]) -> list[dict[str, Any]]:
    from sentei import evaluate

    say({"message": f"evaluating {model}"})
    settings = dict(recipe.evaluate or {})
    measured = _evaluate_domain(recipe, model, folder, settings.pop("domain", ()))
    if not settings.get("texts") and not settings.get("tasks"):
        return measured
    result = evaluate.run(
        model,
        json_path=folder / "eval.json",
        beside=beside,
        dtype=recipe.dtype,
        text_field=recipe.text_field,
        trust_remote_code=recipe.trust_remote_code,
        **settings,
    )
    return measured + result["measurements"]


def _evaluate_domain(recipe: Recipe, model: str, folder: Path, files: list[str]) -> list[dict[str, Any]]:
    """Prompt rows, with the template and length of the stage that was tuned on such rows: the parent's too."""
    if not files:
        return []
    from sentei import evaluate
    from sentei.evaluate import domain

    tuned = next((stage for stage in recipe.stages if "template" in method_fields(stage["method"])), {})
    how = {name: tuned.get(name, default) for name, default in (("template", "plain"), ("seq_len", 512))}
    how |= {name: value for name, value in (recipe.evaluate or {}).items() if name in ("batch_size", "limit")}
    measured = []
    for file in files:
        measured += domain.run(model, file, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code, **how)
    evaluate.write_measurements(folder / "eval.json", measured)
    return measured


def benchmark_stage(settings: dict[str, Any], child: Path, parent: str, say: Progress) -> dict[str, Any]:
    from sentei import benchmark

    say({"message": f"timing {child} and its parent in turns"})
    return benchmark.run(child, parent, **settings)


def generate(recipe: Recipe, parent: str, child: Path, say: Progress) -> list[dict[str, str]]:
    """The same prompts continued by both, most likely token first, as chat where the tokenizer knows how."""
    import torch

    from sentei import checkpoint

    rows = [{"prompt": prompt} for prompt in recipe.prompts]
    for side, place in (("parent", parent), ("child", str(child))):
        say({"message": f"{place} writes"})
        model, tokenizer = checkpoint.load(place, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code)
        for row in rows:
            text = row["prompt"]
            if tokenizer.chat_template:
                turns = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
            with torch.inference_mode():
                answer = model.generate(**ids, max_new_tokens=recipe.new_tokens, do_sample=False)
            row[side] = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    write_text(child / "generation.json", json.dumps(rows, indent=1) + "\n")
    return rows
