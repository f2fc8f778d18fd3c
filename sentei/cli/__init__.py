"""The command line: reads flags, calls `sentei.recipe` and the measuring rooms, prints. No torch before there is work.

A method's fields are flags of `compress`, `heal` and `plan`; they are read from its dataclass once the method is named.
Whatever is wrong with the input ends in one line on stderr and exit code 2; a recipe that misses a gate in exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sentei.atomic import can_write
from sentei.cli.flags import check_flags, methods, nearest, parsers
from sentei.cli.show import Progress, adapter_sizes, print_benchmark, print_measurements, sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log wants lines, not the bars of the libraries below us
    # --lora_rank is --lora-rank: fields are also recipe keys, and those have underscores.
    words = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in given if word != "--debug"]
    try:
        return _command(words)
    except KeyboardInterrupt:
        if debug:
            raise
        return _fail(
            "stopped; what was finished stays, nothing half-written does. The same command goes on where this one was"
        )
    except Exception as error:
        message = _explain(error)
        if debug or message is None:
            raise
        return _fail(message)


def _explain(error: Exception) -> str | None:
    """One line for what the user or the machine did; None for what is our fault, and wants a traceback."""
    if isinstance(error, ValueError):
        return _message(error)
    if (place := _full_disk(error)) is not None:
        return f"the disk{place} is full (No space left on device); free some space and give the same command again"
    if isinstance(error, OSError | MemoryError):
        return _message(error)
    if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        return f"out of memory; lower batch_size or use a smaller model ({_message(error)})"
    if type(error).__name__ == "SafetensorError":  # imported it would cost every command its time
        return (
            f"a .safetensors file is damaged ({_message(error)}); get the checkpoint again, or remove the hidden .work "
            "folder beside --out"
        )
    return None


def _full_disk(error: BaseException | None) -> str | None:
    """Where no space was left, as " of FILE" or "" if nobody knows; None if that is not what happened.

    safetensors has an exception of its own, and torch.save only notices that it did not get as far as it meant to.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f" of {error.filename}" if error.filename else ""
        if re.search(r"no space left|os error 28|inline_container.*(unexpected pos|write failed)", str(error), re.I):
            return ""
        error = error.__cause__ or error.__context__
    return None


def _fail(message: str) -> int:
    print(f"sentei: {message}", file=sys.stderr)
    return 2


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _command(arguments: list[str]) -> int:
    parser, commands = parsers(arguments, _COMMANDS)
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in commands:
            parser.error(f"no command {arguments[0]!r}{nearest(arguments[0], list(commands))}")
        check_flags(commands[arguments[0]], arguments[1:])
    options = parser.parse_args(arguments)
    return options.run(options)


def _stage(options: argparse.Namespace) -> dict[str, Any]:
    fields = {key.partition(":")[2]: value for key, value in vars(options).items() if key.startswith("field:")}
    names = ("data", "text_field", "out", "teacher", "force", "dtype", "device_map", "trust_remote_code")
    return {name: getattr(options, name) for name in names} | fields


def _compress(options: argparse.Namespace, method: str | None = None) -> int:
    from sentei import recipe

    with Progress() as report:
        out = recipe.compress(options.model, method=method or options.method, report=report, **_stage(options))
    if not recipe.first_process():
        return 0  # the first one is still writing what they share, and tells of it
    if not (out / "compression.json").exists():
        return _adapter(out)
    record = json.loads((out / "compression.json").read_text(encoding="utf-8"))
    print(sizes(record["parent"], record["result"]))
    print(f"saved {out}  (its recipe.yaml makes it again, in another --out)")
    print(f"next: sentei eval {out} --data TEXT; sentei bench {out}")
    return 0


def _adapter(out: Path) -> int:
    """What a search found; 3 if its result was rejected, 4 if it stopped before its budget and that is an error."""
    stored = json.loads((out / "prunepeft.json").read_text(encoding="utf-8"))
    print(adapter_sizes(stored["record"]))
    print(f"saved {out}  (report.md says why each unit stayed; its recipe.yaml makes it again, in another --out)")
    status = stored["record"]["status"]
    if status == "rejected":
        return 3
    return 4 if status == "stopped_early" and stored["fields"]["strict_budget"] else 0


def _heal(options: argparse.Namespace) -> int:
    return _compress(options, "heal")


def _plan(options: argparse.Namespace) -> int:
    from sentei import recipe

    with Progress() as report:
        lines = recipe.plan(options.model, method=options.method, report=report, **_stage(options))
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:{width}}  {line}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if not options.data and not options.tasks and not options.domain:
        raise ValueError(
            "nothing to measure; give --data TEXT (python-docs is always there), --tasks NAMES or --domain FILE"
        )
    if not options.domain and (options.template or options.seq_len):
        raise ValueError("--template and --seq-len say how the rows of --domain are read; give --domain FILE")
    try:
        contexts = [int(number) for words in options.context for number in words.split(",")]
    except ValueError:
        given = " ".join(options.context)
        raise ValueError(f"--context is {given!r}; expected numbers of tokens, such as 128 1024") from None
    if options.json:
        _check_json(Path(options.json))
    from sentei import evaluate, recipe

    if options.domain:
        _evaluate_domain(options, recipe.find_model(options.model))
        if not options.data and not options.tasks:
            return 0
    result = evaluate.run(
        recipe.find_model(options.model),
        texts=options.data or (),
        contexts=contexts,
        text_field=options.text_field,
        add_bos=options.add_bos,
        stride=options.stride,
        max_blocks=options.max_blocks,
        tasks=options.tasks.split(",") if options.tasks else (),
        include_path=options.include_path,
        limit=options.limit,
        dtype=options.dtype,
        batch_size=options.batch_size,
        json_path=options.json,
        trust_remote_code=options.trust_remote_code,
    )
    print_measurements({str(options.model): result["measurements"]})
    if result["json"]:
        print(f"written to {result['json']}")
    return 0


def _check_json(file: Path) -> None:
    """Before an hour of measuring; `sentei.evaluate` looks at what is in a file that exists."""
    if file.is_dir() or not can_write(file):
        raise ValueError(f"cannot write {file}; give another file by --json")


def _evaluate_domain(options: argparse.Namespace, model: str) -> None:
    from sentei import evaluate
    from sentei.evaluate import domain

    measurements = []
    for file in options.domain:
        measurements += domain.run(
            model,
            file,
            template=options.template,
            seq_len=options.seq_len,
            dtype=options.dtype,
            batch_size=options.batch_size,
            limit=options.limit,
            trust_remote_code=options.trust_remote_code,
        )
    where = options.json or (Path(model) / "eval.json" if Path(model).is_dir() else None)
    if where is not None:
        evaluate.write_measurements(where, measurements)
    print_measurements({str(options.model): measurements})
    if where is not None:
        print(f"written to {where}")


def _bench(options: argparse.Namespace) -> int:
    from sentei import benchmark, recipe

    parent = recipe.find_model(options.against or recipe.parent_of(options.model, flag="--against"))
    names = ("prompt_tokens", "new_tokens", "batch_size", "rounds", "threads", "dtype", "trust_remote_code")
    settings = {name: getattr(options, name) for name in names}
    result = benchmark.run(options.model, parent, json_path=options.json, **settings)
    print_benchmark(result)
    return 0


def _unfold(options: argparse.Namespace) -> int:
    from sentei import checkpoint

    out, shared, independent = checkpoint.unfold(options.model, options.out, force=options.force)
    print(f"saved {out} without sharing: {independent / 1e6:.1f} MB instead of {shared / 1e6:.1f} MB")
    return 0


def _report(options: argparse.Namespace) -> int:
    from sentei import report

    page = report.write(options.model, options.children, options.out, force=options.force)
    print(f"written {page} and {page.with_suffix('.md')}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from sentei import recipe

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("run is for one process; give the stages to `accelerate launch` one by one, as compress")
    asked = recipe.load(options.recipe)
    if options.out:
        asked = dataclasses.replace(asked, out=options.out)
    if options.dry_run:
        for name, stage in recipe.check(asked, force=options.force).items():
            print(f"{name}\n{stage}")
        return 0
    with Progress() as report:
        result = recipe.run(asked, force=options.force, report=report)
    if not (Path(result["checkpoint"]) / "compression.json").exists():
        return _adapter(Path(result["checkpoint"]))
    record = json.loads((Path(result["checkpoint"]) / "compression.json").read_text(encoding="utf-8"))
    print(sizes(record["parent"], record["result"]))
    if "measurements" in result:
        print_measurements(result["measurements"])
    if "benchmark" in result:
        print_benchmark(result["benchmark"])
    for row in result.get("generations", []):
        print(f"\nprompt   {row['prompt']}\nparent   {row['parent']}\nsmall    {row['child']}")
    print(f"\nparent      {result['parent']}\ncheckpoint  {result['checkpoint']}")
    if "report" in result:
        print(f"report      {result['report']}  (open it in a browser)")
    for gate in result["gates"]:
        value = "not measured" if gate["value"] is None else f"{gate['value']:.4g}"
        print(f"{'passed' if gate['passed'] else 'FAILED'}  {gate['gate']}  ({value})")
    return 0 if all(gate["passed"] for gate in result["gates"]) else 1


def _export(options: argparse.Namespace) -> int:
    from sentei import checkpoint

    if options.to == "gguf":
        return _gguf(options)
    if options.outtype or options.out.endswith(".gguf"):
        raise ValueError("--outtype and a .gguf file go with --to gguf")
    if options.to != "dense":
        return _graph(options)
    if checkpoint.inspect(options.model, trust_remote_code=True).config.get("fold"):  # nothing of it is run
        return _unfold(options)
    print(f"written {checkpoint.export_dense(options.model, options.out, force=options.force)}")
    return 0


def _graph(options: argparse.Namespace) -> int:
    from sentei.export import graph

    settings = {name: getattr(options, name) for name in ("to", "force", "trust_remote_code")}
    found = graph.write(options.model, options.out, **settings)
    print(
        f"written {found['folder']}: {found['bytes'] / 1e6:.1f} MB in float32, run in {graph.RUNTIMES[options.to]}: "
        f"logits within {found['difference']:.2g} of torch's; transformers.exporters.ExportedModel loads it"
    )
    return 0


def _gguf(options: argparse.Namespace) -> int:
    from sentei.export import gguf

    settings = {name: getattr(options, name) for name in ("force", "trust_remote_code")}
    found = gguf.write(options.model, options.out, outtype=options.outtype or "f16", **settings)
    for note in found["notes"]:
        print(note)
    checked = "not run: pip install 'sentei[gguf]' to have it checked in llama.cpp"
    if found["difference"] is not None:
        checked = f"run in llama.cpp: log-probabilities within {found['difference']:.2g} of the same weights in torch"
    print(
        f"written {found['file']}: {found['bytes'] / 1e6:.1f} MB, architecture {found['architecture']}, "
        f"{found['outtype']} (likely tokens' log-probabilities change by up to {found['rounding']:.2g}); {checked}"
    )
    return 0


def _list_methods(options: argparse.Namespace) -> int:
    table = Table("method", "what it is", "paper", box=None, pad_edge=False)
    for row in methods():
        table.add_row(*row)
    Console().print(table)
    print("\n`sentei compress --method NAME --help` shows a method's fields")
    return 0


_COMMANDS = {
    "compress": _compress,
    "plan": _plan,
    "heal": _heal,
    "eval": _evaluate,
    "bench": _bench,
    "unfold": _unfold,
    "report": _report,
    "run": _run,
    "export": _export,
    "methods": _list_methods,
}
