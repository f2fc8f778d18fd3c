"""A recipe file: read, checked, and every step of it made once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sentei import methods
from sentei.methods import Progress
from sentei.recipe.fields import check_keys, make_method, method_fields
from sentei.recipe.gates import judge, parse_gate, values_of
from sentei.recipe.stage import Job, compress, find_model, load_data, parent_of, silent, write, write_yaml

EVALUATE = (
    "texts", "contexts", "stride", "max_blocks", "add_bos", "tasks", "include_path", "limit", "batch_size", "domain",
)  # fmt: skip
BENCHMARK = ("prompt_tokens", "new_tokens", "batch_size", "rounds", "warmup", "threads", "dtype", "device")
STAGE = ("name", "method", "data", "text_field", "teacher", "after")  # keys of a stage that are no fields


@dataclass(frozen=True)
class Recipe:
    """A recipe file, checked; the fields are its keys."""

    model: str
    out: str
    stages: list[dict[str, Any]]
    data: Any = None
    text_field: str = "text"
    seed: int | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    evaluate: dict[str, Any] | None = None
    benchmark: dict[str, Any] | None = None
    prompts: list[str] = field(default_factory=list)
    new_tokens: int = 64
    report: str | None = "report.html"
    result: str | None = None
    gates: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.stages, list) or not self.stages:
            raise ValueError("a recipe needs stages: a list, each with a method and its fields")
        for stage in self.stages:
            if not isinstance(stage, dict) or "method" not in stage:
                raise ValueError(
                    f"a stage is a method and its fields, such as {{method: heal, minutes: 2}}; got {stage!r}"
                )
            if stage["method"] not in methods.METHODS:
                methods.load(stage["method"])  # says which there are
        names = self.names()
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        check_keys(self.evaluate or {}, EVALUATE, "evaluate")
        check_keys(self.benchmark or {}, BENCHMARK, "benchmark")
        if not isinstance(self.prompts, list):
            raise ValueError("prompts is a list of texts")
        adapters = [_saves_adapter(stage) for stage in self.stages]
        if any(adapters[:-1]):
            raise ValueError("a stage that trains PEFT modules must be the last: nothing can start from an adapter")
        if any(adapters) and (self.evaluate or self.benchmark is not None or self.prompts or self.gates):
            raise ValueError(
                "evaluate, benchmark, prompts and gates are for checkpoints; the last stage of this recipe writes an "
                "adapter, whose own thresholds are min_metric and max_drop_vs"
            )
        for gate in self.gates:
            name = parse_gate(gate)[0]
            if name.startswith(("speedup", "memory")) and self.benchmark is None:
                raise ValueError(f"the gate {gate!r} needs a benchmark; add `benchmark: {{}}` to the recipe")
            if name.startswith("perplexity") and not (self.evaluate or {}).get("texts"):
                raise ValueError(f"the gate {gate!r} needs a text; add `evaluate: {{texts: [...]}}` to the recipe")
            if name.startswith("accuracy") and not (self.evaluate or {}).get("tasks"):
                raise ValueError(f"the gate {gate!r} needs tasks; add `evaluate: {{tasks: [...]}}` to the recipe")

    def names(self) -> list[str]:
        """Folder of each stage below `out`."""
        return [str(stage.get("name", f"{number}-{stage['method']}")) for number, stage in enumerate(self.stages, 1)]


def load(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ValueError: no such file, not YAML, a key that is not known (names the nearest), a value that makes no sense.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file; expected YAML") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no recipe; expected keys such as model, data, out and stages")
    known = [item.name for item in dataclasses.fields(Recipe)]
    check_keys(content, known, str(path))
    missing = [key for key in ("model", "out", "stages") if key not in content]
    if missing:
        raise ValueError(f"{path} needs {', '.join(missing)}")
    return Recipe(**content)


def check(recipe: Recipe, *, force: bool = False) -> dict[str, str]:
    """Refuse what `run` would refuse before its first step: stage -> its settings, every field written out.

    Raises:
        ValueError: as `run`.
    """
    model = find_model(recipe.model)
    dense = str(Path(recipe.out) / "parent") if model.endswith(".gguf") else recipe.model
    made = {}
    for name, job in _check_stages(recipe, model, dense, force):
        known = method_fields(job["method"])
        method = make_method(job["method"], {key: value for key, value in job.items() if key in known})
        shown = {key: job[key] for key in ("model", "teacher", "data", "out") if job[key] is not None}
        lines = {**shown, "method": job["method"], **dataclasses.asdict(method)}
        made[name] = "".join(f"    {key}: {value}\n" for key, value in lines.items())
    return made


def run(recipe: Recipe, *, force: bool = False, report: Progress | None = None) -> dict[str, Any]:
    """Make every step of a recipe that is not there yet, from the same settings.

    Everything is checked before the first model is loaded.

    Args:
        force: make every step again.
        report: as in `compress`; also given lines of text as {"message": ...}.
    Returns:
        what is written to `result` (result.json in `out` if not named): "checkpoint", "parent", "values" (by the names
        in GATES, those that were measured), "gates" (each with "passed"), "measurements" per checkpoint, "benchmark",
        "generations", "report".
    Raises:
        ValueError: as `compress`; a stage's folder that was made from other settings, without `force`.
    """
    say = report or silent
    out = Path(recipe.out)
    model = find_model(recipe.model)
    # A GGUF is unpacked once: reading it takes half a minute, and its packed bytes compare with nothing of ours.
    dense = str(out / "parent") if model.endswith(".gguf") else recipe.model
    jobs = _check_stages(recipe, model, dense, force)
    write_yaml(out / "recipe.yaml", json.loads(json.dumps(dataclasses.asdict(recipe))))
    done = _Done(out / "done.json", force)
    if model.endswith(".gguf"):
        if not (out / "parent" / "config.json").exists():
            from sentei import checkpoint

            say({"message": f"unpacking {model} into {dense}"})
            checkpoint.unpack(model, dense)
        model = dense
    fresh = False
    for name, job in jobs:
        if not fresh and not force and job["out"].exists():
            say({"message": f"{job['out']} is there already"})
            continue
        fresh = True  # what follows a new checkpoint is made anew
        done.forget(name)
        say({"message": f"stage {name}"})
        compress(**job, force=True, report=report)
    last = jobs[-1][1]["out"]
    if _saves_adapter(recipe.stages[-1]):  # its scores are its own: a task's, not a text's
        stored = json.loads((last / "prunepeft.json").read_text(encoding="utf-8"))["record"]
        found = {"checkpoint": str(last), "parent": model, "recipe": dataclasses.asdict(recipe), "gates": []}
        found |= {"status": stored["status"], "metric": stored["metric"], "parameters": stored["parameters"]}
        write(Path(recipe.result) if recipe.result else out / "result.json", json.dumps(found, indent=1) + "\n")
        return found
    result: dict[str, Any] = {"checkpoint": str(last), "parent": model, "recipe": dataclasses.asdict(recipe)}
    if recipe.evaluate:
        places = {"parent": model, **{name: str(job["out"]) for name, job in jobs}}
        stages = [str(job["out"]) for _, job in jobs]
        result["measurements"] = measured = {}
        for name, place in places.items():
            measured[name] = done.once(
                f"evaluate {name}", recipe.evaluate, partial(_evaluate, recipe, place, out / name, say, stages)
            )
    if recipe.benchmark is not None:
        result["benchmark"] = done.once(
            f"benchmark {jobs[-1][0]}", recipe.benchmark, lambda: _benchmark(recipe.benchmark or {}, last, model, say)
        )
    if recipe.prompts:
        asked = {"prompts": recipe.prompts, "new_tokens": recipe.new_tokens}
        result["generations"] = done.once(f"generate {jobs[-1][0]}", asked, lambda: _generate(recipe, model, last, say))
    if recipe.report:
        from sentei import report as pages

        folders = [job["out"] for _, job in jobs]
        result["report"] = str(pages.write(out / "parent" if recipe.evaluate else model, folders, out / recipe.report))
    result["values"] = values_of(result, last)
    result["gates"] = [judge(gate, result["values"]) for gate in recipe.gates]
    write(Path(recipe.result) if recipe.result else out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _check_stages(recipe: Recipe, model: str, start: str, force: bool) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of `compress` for every stage, the first from `start`; refuses what would be refused later."""
    jobs: list[tuple[str, dict[str, Any]]] = []
    dense = parent_of(model) if (Path(model) / "compression.json").exists() else start
    previous = start
    places: dict[str, str] = {}
    readable: list[Any] = []
    for name, stage in zip(recipe.names(), recipe.stages, strict=True):
        fields = {k: v for k, v in stage.items() if k not in STAGE}
        if "after" in stage and stage["after"] not in ("parent", *places):
            known = ", ".join(["parent", *places])
            raise ValueError(f"stage {name} comes after {stage['after']!r}; expected a stage before it: {known}")
        if "after" in stage:
            previous = places.get(stage["after"], start)
        if recipe.seed is not None and "seed" in method_fields(stage["method"]):
            fields.setdefault("seed", recipe.seed)
        out = Path(recipe.out) / name
        kind = methods.load(stage["method"])
        teacher = stage.get("teacher", dense if kind.needs_teacher is True else None)
        teacher = places.get(str(teacher), teacher)  # a stage of this recipe, by its name
        text_field = stage.get("text_field", recipe.text_field)
        arguments = {
            "model": previous,
            "method": stage["method"],
            "out": out,
            "data": stage.get("data", recipe.data),
            "text_field": text_field,
            "dtype": recipe.dtype,
            "teacher": teacher,
            "trust_remote_code": recipe.trust_remote_code,
            **fields,
        }
        # The folder of the stage before, and an unpacked parent, need not be there yet: the model stands in for them.
        trust, there = recipe.trust_remote_code, model if teacher in (start, *places.values()) else teacher
        job = Job.check(model, stage["method"], fields, out, force=True, teacher=there, trust_remote_code=trust)
        asked = [job.method.reads, arguments["data"], text_field]
        if asked not in readable:  # unreadable data is told before anything is written
            load_data(job.method, arguments["data"], text_field)
            readable.append(asked)
        unpacked = start if teacher == start != recipe.model else job.teacher
        if teacher in places.values():
            unpacked = str(teacher)
        resolved = dataclasses.replace(job, given=previous, teacher=unpacked).resolved(arguments["data"], text_field)
        stamp = out / "recipe.yaml"
        same = stamp.exists() and yaml.safe_load(stamp.read_text(encoding="utf-8")) == resolved
        if out.exists() and not same and not force:
            raise FileExistsError(f"{out} was made from other settings; give another `out` in the recipe, or --force")
        jobs.append((name, arguments))
        previous = places[name] = str(out)
    return jobs


def _saves_adapter(stage: dict[str, Any]) -> bool:
    return methods.load(stage["method"]).saves == "adapter"


class _Done:
    """What a run has measured, by step and settings, so that a second run need not measure again."""

    def __init__(self, path: Path, force: bool):
        self.path = path
        self.steps: dict[str, Any] = {}
        if path.exists() and not force:
            self.steps = json.loads(path.read_text(encoding="utf-8"))

    def once(self, step: str, settings: Any, make: Callable[[], Any]) -> Any:
        settings = json.loads(json.dumps(settings))
        if self.steps.get(step, {}).get("settings") != settings:
            self.steps[step] = {"settings": settings, "result": make()}
            write(self.path, json.dumps(self.steps, indent=1) + "\n")
        return self.steps[step]["result"]

    def forget(self, name: str) -> None:
        """Measurements of a stage that is about to be made again."""
        self.steps = {step: made for step, made in self.steps.items() if step.split(" ", 1)[1] != name}


def _evaluate(recipe: Recipe, model: str, folder: Path, say: Progress, beside: list[str]) -> list[dict[str, Any]]:
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


def _benchmark(settings: dict[str, Any], child: Path, parent: str, say: Progress) -> dict[str, Any]:
    from sentei import benchmark

    say({"message": f"timing {child} and its parent in turns"})
    return benchmark.run(child, parent, **settings)


def _generate(recipe: Recipe, parent: str, child: Path, say: Progress) -> list[dict[str, str]]:
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
    write(child / "generation.json", json.dumps(rows, indent=1) + "\n")
    return rows
