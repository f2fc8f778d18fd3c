"""One stage: check what can be checked, load, compress by one method, save; resumable."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sentei import methods
from sentei.atomic import can_write, nearest_folder, write_text
from sentei.methods import Progress
from sentei.recipe.fields import make_method

STAMP = "recipe.yaml"  # in every checkpoint: the one stage that made it, every field written out


def compress(
    model: str | Path,
    *,
    method: str,
    out: str | Path,
    data: str | Path | list[str] | dict[str, float] | None = None,
    text_field: str = "text",
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    teacher: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    report: Progress | None = None,
    **fields: Any,
) -> Path:
    """Compress a checkpoint by one method and save the result, which is reloaded in a fresh process and compared.

    A run that was stopped leaves its state in a hidden folder beside `out`, and the same call goes on from there.

    Args:
        model: a folder, a .gguf file, a hub id, or an example: "smollm2" or "minilm".
        method: a name in `sentei.methods.METHODS`.
        out: the new folder. Its parts appear at once or not at all.
        data: what `sentei.data.load` takes, None being the Python reference; what `sentei.data.examples.load` takes for
            methods that read task rows. A method sees the train and validation parts.
            The split does not depend on the seed, so that no run trains on what another holds out.
        dtype: computation, "auto" or a name such as "float32"; the saved dtype is the parent's.
        device_map: for a model larger than one device, "auto" or as in transformers; for one_shot and policy_gradient.
        teacher: for methods that learn from the dense parent: None is the parent that the checkpoint itself records.
        force: replace `out`, and throw away the state of unfinished work with other settings.
        report: called with {"step", "of", "message"} while work goes on.
        fields: of the method. `shape="padded"` saves a heterogeneous result in a stock class, padded with zeros.
    Returns:
        `out`.
    Raises:
        ValueError, OSError: anything that is wrong with the input; nothing is left in `out` then.
    """
    job = Job.check(model, method, fields, out, force=force, teacher=teacher, trust_remote_code=trust_remote_code)
    check_device_map(job, device_map)
    text, head = load_data(job.method, data, text_field)
    from sentei import checkpoint

    say = report or silent
    say({"message": f"loading {model}"})
    loaded, tokenizer = checkpoint.load(
        job.model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **head
    )
    check_positions(loaded, job.method)
    if job.method.structural:  # what cannot be saved is refused before hours of search
        shadow(job, loaded, job.method.units_of(loaded))
    arguments: dict[str, Any] = {}
    if job.teacher is not None:
        say({"message": f"loading the parent {job.teacher}"})
        arguments["teacher"], _ = checkpoint.load(job.teacher, dtype=dtype, trust_remote_code=trust_remote_code)
    resolved = job.resolved(data, text_field, dtype)
    with work_folder(job.out, resolved, force=force) as workdir:
        record = job.method.compress(loaded, tokenizer, text, workdir=workdir, report=report, **arguments)
        if not first_process():
            return job.out  # the first one has the same model, and writes it
        saving = {"model": loaded} | record.pop("saving", {})
        arguments.clear()  # the teacher's memory is free for the check of the save
        stage = {
            "method": method,
            "fields": dataclasses.asdict(job.method),
            "seed": getattr(job.method, "seed", None),
            "data": {"name": text.name, "sha256": text.sha256},
            "record": record,
        }
        say({"message": f"saving {job.out} and loading it again"})
        shared = {"tokenizer": tokenizer, "out": job.out, "parent": str(job.model), "record": stage, "force": force}
        # The recipe goes in with the rest: a folder without it would not be known again by `run`.
        if job.saves_adapter:
            fallback = workdir / job.method.fallback if record.get("fallback") else None
            pages = job.method.pages(record) | {STAMP: _yaml(resolved)}
            checkpoint.adapters.save(**saving, **shared, pages=pages, fallback=fallback)
        else:
            files = saving.pop("files", {}) | {STAMP: workdir / STAMP}
            checkpoint.save(**saving, **shared, shape=job.shape, files=files)
    return job.out


def heal(model: str | Path, *, out: str | Path, **arguments: Any) -> Path:
    """Train a pruned checkpoint briefly against its dense parent: `compress` with the method "heal"."""
    return compress(model, method="heal", out=out, **arguments)


def shadow(job: Job, model: Any, units: Any) -> tuple[Any, Any]:
    """A weightless twin of the model, cut to the budget without a search, and the form it would be saved in.

    Raises:
        ValueError: the budget cannot be reached, or no checkpoint of this shape can hold the result.
    """
    import torch

    from sentei import checkpoint, structure

    score_U = -units.index_U.double() - 1e-6 * units.layer_U.double()
    keep_U = job.method.select(score_U, units, "layer" if job.shape == "uniform" else "global")
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))  # which a cut changes, and the model runs by its own
        bias = _biases(job.method, model, units, keep_U)
    structure.remove(twin, units, keep_U, bias) if bias else job.method.remove(twin, units, keep_U)
    return twin, checkpoint.form(twin, job.shape)


def _biases(method: Any, model: Any, units: Any, keep_U: Any) -> dict[tuple[int, str], Any]:
    """Zeros where the method's compensation will add a bias, (layer, kind) -> [H]: not every class has room for it."""
    import torch

    if not getattr(method, "compensates", False):
        return {}
    pairs = [(layer, kind) for layer in range(units.num_layers) for kind in units.granularity]
    return {pair: torch.zeros(model.config.hidden_size) for pair in pairs if not keep_U[units.of(*pair)].all()}


def check_positions(model: Any, method: Any) -> None:
    """A model with learned positions cannot run past their end, and one with rotary ones should not."""
    from sentei import structure

    positions = structure.positions(model)
    for name, value in dataclasses.asdict(method).items():
        if name.endswith("seq_len") and positions is not None and value > positions:
            raise ValueError(f"{name} is {value}; the model has positions for {positions} tokens at most")


def check_device_map(job: Job, device_map: Any) -> None:
    if device_map is not None and not getattr(job.method, "several_devices", False):
        raise ValueError(f"method {job.name} works on one device; leave device_map out")


def silent(event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Job:
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

    @property
    def saves_adapter(self) -> bool:
        """Does the method leave the model's weights alone and train a few beside them?"""
        return type(self.method).saves == "adapter"

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
    ) -> Job:
        _check_sparsity(name, fields)
        method = make_method(name, fields)
        needs_teacher = type(method).needs_teacher
        if teacher is not None and needs_teacher is False:
            raise ValueError(f"method {name} has no teacher; leave it out")
        from sentei import checkpoint

        path = find_model(model)
        source = checkpoint.inspect(path, trust_remote_code=trust_remote_code)
        if out is not None:
            check = checkpoint.adapters.check_output if type(method).saves == "adapter" else checkpoint.check_output
            check(out, parent=path, force=force)
            _check_space(Path(out), source.bytes)
        found = find_model(teacher) if teacher else parent_of(path) if needs_teacher is True else None
        if found is not None:
            checkpoint.inspect(found, trust_remote_code=trust_remote_code)
        shape = method.shape if "shape" in dataclasses.asdict(method) else _saved_shape(path)
        return Job(str(model), path, name, method, Path(out or ""), shape, found)

    def resolved(self, data: Any, text_field: str, dtype: str) -> dict[str, Any]:
        """The recipe of this stage alone, every field written out."""
        stage = {"method": self.name, **methods.settings(self.method)}
        if self.teacher is not None:
            stage["teacher"] = self.teacher
        recipe = {"model": self.given, "data": data, "text_field": text_field, "dtype": dtype, "out": str(self.out)}
        recipe["stages"] = [stage]
        return json.loads(json.dumps(recipe, default=str))  # as it will be read back: tuples become lists


def _check_space(out: Path, need: int) -> None:
    """The result is at most as large as the weights it comes from."""
    place = nearest_folder(out)
    if not can_write(out):
        raise ValueError(f"cannot write to {place}; give another --out")
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(f"{place} has {free / 1e6:,.0f} MB free, the checkpoint may need {need / 1e6:,.0f} MB")


def _check_sparsity(name: str, fields: Mapping[str, Any]) -> None:
    if "sparsity" not in fields:
        return
    try:
        sparsity = float(fields["sparsity"])
    except (TypeError, ValueError):
        raise ValueError(f"sparsity is {fields['sparsity']!r}; expected a number between 0 and 1") from None
    if sparsity == 0 and getattr(methods.load(name), "may_keep_all", False):
        return
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity is the fraction of the decoder-layer parameters to remove, between 0 and 1; got {sparsity:g}"
        )


def find_model(model: str | Path) -> str:
    """What `checkpoint.load` is given for a name: the same, or the place of "smollm2" or "minilm"."""
    if str(model) not in ("smollm2", "minilm"):
        return str(model)
    from sentei import checkpoint

    return str(checkpoint.example_model() if str(model) == "smollm2" else checkpoint.example_encoder())


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


def load_data(method: Any, spec: Any, text_field: str) -> tuple[Any, dict[str, Any]]:
    """What the method reads, text or task rows, and the head that its model is loaded with (arguments of `load`)."""
    if type(method).reads == "text":
        return load_text(spec, text_field), {}
    if spec is None:
        raise ValueError("this method learns from labelled rows; give --data FILE (data=...) with a text and a label")
    rows = method.read(spec, text_field)
    return rows, method.head(rows)


def load_text(spec: Any, text_field: str) -> Any:
    from sentei import data

    return data.load(spec, text_field=text_field)


@contextmanager
def work_folder(out: Path, resolved: dict[str, Any], *, force: bool = False) -> Iterator[Path]:
    """A hidden folder beside `out` for a method's state; kept when the work is cut short, so that it can go on.

    Of several processes the first one writes.

    Args:
        force: throw the state of other settings away.
    Raises:
        FileExistsError: there is such a state, without `force`.
    """
    folder = state_of(out)
    if not first_process():
        meet()
        yield folder
        meet()  # nobody goes on to a checkpoint that is not there yet
        return
    stamp = folder / STAMP
    old = yaml.safe_load(stamp.read_text(encoding="utf-8")) if stamp.exists() else None
    if folder.exists() and old != resolved:
        if old is not None and not force:
            raise FileExistsError(
                f"{folder} holds unfinished work with other settings ({_differing(old, resolved)}); "
                "repeat them to go on, or throw it away with --force"
            )
        shutil.rmtree(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(stamp, resolved)
    meet()
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
    meet()


def _differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names and both values of the settings that two resolved recipes of a stage differ in."""
    flat = [{key: made[key] for key in made if key != "stages"} | made["stages"][0] for made in (old, new)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} {flat[0].get(name)!r} there, {flat[1].get(name)!r} here" for name in names)


def state_of(out: Path) -> Path:
    """Where the state of unfinished work on `out` lies."""
    return out.absolute().parent / f".{out.name}.work"


def first_process() -> bool:
    """False in all but one process of `accelerate launch` and its like."""
    return os.environ.get("RANK", "0") == "0"


def meet() -> None:
    """Wait for the other processes, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from sentei.train import processes

        processes().wait_for_everyone()


def write_yaml(path: Path, content: Any) -> None:
    write_text(path, _yaml(content))


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=False, width=120)
