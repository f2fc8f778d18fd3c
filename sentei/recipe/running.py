"""A recipe file: read, checked, and every step of it made once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sentei import methods
from sentei.atomic import write_text
from sentei.methods import Progress
from sentei.recipe.fields import check_keys, check_type, make_method, method_fields
from sentei.recipe.gates import judge, parse_gate, values_of
from sentei.recipe.measuring import benchmark_stage, check_settings, check_there, evaluate_stage, generate
from sentei.recipe.stage import (
    STAMP,
    Job,
    compress,
    find_model,
    load_data,
    parent_of,
    silent,
    state_of,
    write_yaml,
)

STAGE = ("name", "method", "data", "text_field", "teacher", "after")  # keys of a stage that are no fields


@dataclass(frozen=True)
class Recipe:
    """A recipe file, checked; the fields are its keys."""

    model: str
    out: str
    stages: list[dict[str, Any]]
    data: str | list[str] | dict[str, Any] | None = None
    text_field: str = "text"
    seed: int | None = None
    dtype: str = "auto"
    device_map: str | dict[str, Any] | None = None
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
            if not isinstance(stage["method"], str) or stage["method"] not in methods.METHODS:
                methods.load(str(stage["method"]))  # says which there are
            if odd := [key for key in stage if not isinstance(key, str)]:
                raise ValueError(f"a stage's keys are names; got {odd[0]!r}")
        names = self.names()
        if len({*names, "parent"}) <= len(names):
            raise ValueError(f"stages need names of their own, and not parent; got {', '.join(names)}")
        for key, kind in typing.get_type_hints(Recipe).items():
            check_type(key, getattr(self, key), kind)
        check_settings(self.evaluate, self.benchmark)
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
    jobs = _check_stages(recipe, model, dense, force)
    check_there(recipe, model)
    for name, job in jobs:
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
    unpack = model.endswith(".gguf") and not _is_unpacked(model, Path(dense))
    if unpack and not force and (Path(dense) / "config.json").exists():
        raise FileExistsError(f"{dense} is not {model}; give another `out` in the recipe, or --force")
    done = _Done(out / "done.json", force)
    jobs = _check_stages(recipe, model, dense, force, done.stale)
    check_there(recipe, model)
    write_yaml(out / "recipe.yaml", json.loads(json.dumps(dataclasses.asdict(recipe))))
    if unpack:
        from sentei import checkpoint

        say({"message": f"unpacking {model} into {dense}"})
        checkpoint.unpack(model, dense, force=force)
    if model.endswith(".gguf"):
        model = dense
    _make_stages(jobs, done, force, say, report)
    last = jobs[-1][1]["out"]
    if _saves_adapter(recipe.stages[-1]):  # its scores are its own: a task's, not a text's
        stored = json.loads((last / "prunepeft.json").read_text(encoding="utf-8"))["record"]
        found = {"checkpoint": str(last), "parent": model, "recipe": dataclasses.asdict(recipe), "gates": []}
        found |= {"status": stored["status"], "metric": stored["metric"], "parameters": stored["parameters"]}
        write_text(Path(recipe.result) if recipe.result else out / "result.json", json.dumps(found, indent=1) + "\n")
        return found
    result: dict[str, Any] = {"checkpoint": str(last), "parent": model, "recipe": dataclasses.asdict(recipe)}
    if recipe.evaluate:
        places = {"parent": model, **{name: str(job["out"]) for name, job in jobs}}
        stages = [str(job["out"]) for _, job in jobs]
        loaded = {"dtype": recipe.dtype, "text_field": recipe.text_field}
        result["measurements"] = measured = {}
        for name, place in places.items():
            measured[name] = done.once(
                f"evaluate {name}",
                recipe.evaluate | loaded,
                partial(evaluate_stage, recipe, place, out / name, say, stages),
            )
    if recipe.benchmark is not None:
        result["benchmark"] = done.once(
            f"benchmark {jobs[-1][0]}",
            recipe.benchmark,
            lambda: benchmark_stage(recipe.benchmark or {}, last, model, say),
        )
    if recipe.prompts:
        asked = {"prompts": recipe.prompts, "new_tokens": recipe.new_tokens, "dtype": recipe.dtype}
        result["generations"] = done.once(f"generate {jobs[-1][0]}", asked, lambda: generate(recipe, model, last, say))
    if recipe.report:
        from sentei import report as pages

        folders = [job["out"] for _, job in jobs]
        result["report"] = str(pages.write(out / "parent" if recipe.evaluate else model, folders, out / recipe.report))
    result["values"] = values_of(result, last)
    result["gates"] = [judge(gate, result["values"]) for gate in recipe.gates]
    write_text(Path(recipe.result) if recipe.result else out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _is_unpacked(gguf: str, folder: Path) -> bool:
    """Was this folder unpacked from this very file? Its card says from which."""
    from sentei import checkpoint

    card = folder / "README.md"
    return card.is_file() and checkpoint.inspect(gguf).sha256() in card.read_text(encoding="utf-8")


def _make_stages(
    jobs: list[tuple[str, dict[str, Any]]], done: _Done, force: bool, say: Progress, report: Progress | None
) -> None:
    """Make the first stage that is missing or stale, and all after it: they came from its old checkpoint, if any."""
    there = [not force and name not in done.stale and job["out"].exists() for name, job in jobs]
    first = there.index(False) if False in there else len(jobs)
    for _, job in jobs[:first]:
        say({"message": f"{job['out']} is there already"})
    if first == len(jobs):
        return
    # Said on disk before the first one changes: whatever stops this run, the next one goes on from here.
    done.forget([name for name, _ in jobs[first:]])
    for _, job in jobs[first + 1 :]:
        shutil.rmtree(state_of(job["out"]), ignore_errors=True)  # of a search that began from the old one
    for name, job in jobs[first:]:
        say({"message": f"stage {name}"})
        compress(**job, force=True, report=report)
        done.made(name)


def _check_stages(
    recipe: Recipe, model: str, start: str, force: bool, stale: Container[str] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of `compress` for every stage, the first from `start`; refuses what would be refused later.

    Args:
        stale: stages that will be made again, whatever their settings were.
    """
    if (Path(recipe.out) / "compression.json").exists():
        raise FileExistsError(f"{recipe.out} is a checkpoint; a recipe's out is a folder for all it makes: give --out")
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
            "device_map": recipe.device_map if getattr(kind, "several_devices", False) else None,
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
        resolved = dataclasses.replace(job, given=previous, teacher=unpacked).resolved(
            arguments["data"], text_field, recipe.dtype
        )
        stamp = out / STAMP
        same = stamp.exists() and yaml.safe_load(stamp.read_text(encoding="utf-8")) == resolved
        if out.exists() and not same and not force and name not in stale:
            raise FileExistsError(f"{out} was made from other settings; give another `out` in the recipe, or --force")
        jobs.append((name, arguments))
        previous = places[name] = str(out)
    return jobs


def _saves_adapter(stage: dict[str, Any]) -> bool:
    return methods.load(stage["method"]).saves == "adapter"


class _Done:
    """What a run has measured, by step and settings, so that a second run need not measure again.

    Attributes:
        stale: stages whose folders, if there, come from checkpoints that were made again since, or are about to be.
    """

    def __init__(self, path: Path, force: bool):
        self.path = path
        self.steps: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.stale: list[str] = self.steps.pop("stale", [])
        if force:
            self.steps = {}

    def once(self, step: str, settings: Any, make: Callable[[], Any]) -> Any:
        settings = json.loads(json.dumps(settings))
        if self.steps.get(step, {}).get("settings") != settings:
            self.steps[step] = {"settings": settings, "result": make()}
            self._write()
        return self.steps[step]["result"]

    def forget(self, names: list[str]) -> None:
        """Stages that are about to be made again, and their measurements."""
        self.stale = list(dict.fromkeys([*self.stale, *names]))
        self.steps = {step: made for step, made in self.steps.items() if step.split(" ", 1)[1] not in names}
        self._write()

    def made(self, name: str) -> None:
        self.stale = [stage for stage in self.stale if stage != name]
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps({"stale": self.stale, **self.steps}, indent=1) + "\n")
