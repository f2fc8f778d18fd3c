"""The command line: reads flags, calls `sentei.recipe` and the measuring rooms, prints. No torch before there is work.

A method's fields are flags of `compress`, `heal` and `plan`; they are read from its dataclass once the method is named.
Whatever is wrong with the input ends in one line on stderr and exit code 2; a recipe that misses a gate in exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

import sentei
from sentei.methods import METHODS

# Flags of compress and plan that are fields of most methods; shown by a help that does not know the method yet.
COMMON_FIELDS = {
    "sparsity": "fraction of the decoder-layer parameters to remove, between 0 and 1",
    "shape": "heterogeneous (layers differ in width), uniform (all alike) or padded (zero-filled to the widest)",
    "seed": "for every random choice",
}
SECONDS_BETWEEN_LINES = 5.0


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
        return _fail("stopped; no checkpoint was written. The same command goes on where this one was, if it had begun")
    except (ValueError, OSError, MemoryError) as error:
        if debug:
            raise
        return _fail(_message(error))
    except RuntimeError as error:
        if debug or "out of memory" not in str(error).lower():
            raise
        return _fail(f"out of memory; lower batch_size or use a smaller model ({_message(error)})")


def _fail(message: str) -> int:
    print(f"sentei: {message}", file=sys.stderr)
    return 2


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _command(arguments: list[str]) -> int:
    parser, commands = _parsers(arguments)
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in commands:
            parser.error(f"no command {arguments[0]!r}{_nearest(arguments[0], list(commands))}")
        _check_flags(commands[arguments[0]], arguments[1:])
    options = parser.parse_args(arguments)
    return options.run(options)


# ------------------------------------------------------------------------------------------------------------ parser


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest word, and leaves the exit to `main`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (`{self.prog} --help` tells more)")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _check_flags(command: _Parser, arguments: list[str]) -> None:
    """Before argparse does it: it would first miss the flag that was misspelt, and name no other."""
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in command.flags():
            command.error(f"no flag {flag}{_nearest(flag, command.flags())}")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _parsers(arguments: list[str]) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and that of each command; of the command in `arguments` it has the method's fields as flags."""
    parser = _Parser(prog="sentei", description="Prune language models into checkpoints that are really smaller.")
    parser.add_argument("--version", action="version", version=f"sentei {sentei.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    parsers: dict[str, _Parser] = {}

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, **options: Any) -> _Parser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", **options)
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parsers[name] = command
        return command

    fields_hint = "every field of a method is a flag: `sentei {} --method NAME --help` shows them\n\nmethods:\n{}"
    listed = "\n".join(f"  {name:18}{title}" for name, title, _ in _methods())
    method = _value_of("--method", arguments)
    for name, run, help in (
        ("compress", _compress, "prune a checkpoint by one method and save the smaller one"),
        ("plan", _plan, "say what compress would do, and refuse what it would refuse, without doing it"),
    ):
        command = add(name, run, help, epilog=fields_hint.format(name, listed))
        command.add_argument(
            "model", metavar="MODEL", help="folder, .gguf file, hub id, or smollm2 (the example model)"
        )
        command.add_argument("--method", required=True, metavar="NAME", help=", ".join(METHODS))
        _add_stage_flags(command, out_required=name == "compress")
        if arguments[:1] == [name]:
            _add_fields(command, method, COMMON_FIELDS)

    command = add("heal", _heal, "train a pruned checkpoint briefly against its dense parent")
    command.add_argument("model", metavar="DIR", help="folder that `sentei compress` wrote")
    _add_stage_flags(command, out_required=True)
    if arguments[:1] == ["heal"]:
        # The fields are read from the class, which imports torch; the bare help stays quick.
        _add_fields(command, "heal" if len(arguments) > 2 else None, {})
    command.epilog = (
        "`sentei compress --method heal --help` shows the fields of the training, all flags of this command too"
    )

    command = add("eval", _evaluate, "measure a saved checkpoint: perplexity, lm-eval tasks")
    command.add_argument("model", metavar="DIR", help="folder, .gguf file or hub id")
    command.add_argument("--data", action="append", metavar="TEXT", help="text to measure; may be given several times")
    command.add_argument("--context", default="128", metavar="N[,N]", help="tokens per window (128)")
    command.add_argument("--stride", type=int, metavar="N", help="overlap the windows; without it they do not")
    command.add_argument("--max-blocks", type=int, metavar="N", help="only the first N windows")
    command.add_argument("--tasks", metavar="A,B", help="lm-eval tasks (pip install 'sentei[eval]')")
    command.add_argument("--include-path", metavar="DIR", help="folder of task YAML of your own")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at once (8)")
    command.add_argument("--json", metavar="F", help="where to write (eval.json in the folder)")
    _add_load_flags(command)

    command = add("bench", _bench, "time and weigh a checkpoint against its dense parent, in turns")
    command.add_argument("model", metavar="DIR", help="folder that `sentei compress` wrote, or a .gguf file")
    command.add_argument(
        "--against", metavar="PARENT", help="the dense parent (default: the one recorded in the folder)"
    )
    for flag, default, help in (
        ("--prompt-tokens", 512, "tokens of the prompt"),
        ("--new-tokens", 32, "tokens generated"),
        ("--batch-size", 1, "prompts at once"),
        ("--rounds", 5, "measurements of each quantity"),
        ("--threads", None, "of torch"),
    ):
        command.add_argument(flag, type=int, default=default, metavar="N", help=f"{help} ({default or 'all cores'})")
    command.add_argument("--dtype", default="auto", help="computation: auto, float32, bfloat16, float16")
    command.add_argument("--json", metavar="F", help="where to write (bench.json in the folder)")

    command = add("report", _report, "one HTML page and a Markdown table of checkpoints beside their parent")
    command.add_argument("model", metavar="PARENT", help="the dense model")
    command.add_argument("children", nargs="+", metavar="DIR", help="folders that `sentei compress` wrote")
    command.add_argument(
        "--out", default="report.html", metavar="F", help="the page (report.html); the table lies beside it"
    )

    command = add("run", _run, "make every step of a recipe that is not there yet")
    command.add_argument("recipe", metavar="RECIPE", help="YAML file")
    command.add_argument("--out", metavar="DIR", help="in place of the recipe's")
    command.add_argument("--force", action="store_true", help="make every step again")

    add("methods", _list_methods, "name, paper and purpose of every method")
    return parser, parsers


def _add_stage_flags(command: _Parser, out_required: bool) -> None:
    command.add_argument("--data", metavar="TEXT", help="file, folder, dataset or mixture a=0.7,b=0.3 (python-docs)")
    command.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet (text)")
    command.add_argument("--out", required=out_required, metavar="DIR", help="the new folder")
    command.add_argument("--teacher", metavar="PARENT", help="methods that learn from the dense parent: where it is")
    command.add_argument("--force", action="store_true", help="replace the folder")
    _add_load_flags(command)


def _add_load_flags(command: _Parser) -> None:
    command.add_argument("--dtype", default="auto", help="computation: auto, float32, bfloat16, float16")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that a foreign checkpoint brings along"
    )


def _add_fields(command: _Parser, method: str | None, common: dict[str, str]) -> None:
    """The method's fields as flags --like-this or --like_this. Values stay text: `recipe` converts and checks them."""
    group = command.add_argument_group(f"fields of {method}" if method else "fields")
    for name, help in common.items() if method is None else _described(method):
        flag = f"--{name.replace('_', '-')}"
        help = help.replace("%", "%%")
        group.add_argument(flag, dest=f"field:{name}", default=argparse.SUPPRESS, metavar="X", help=help)


def _described(method: str) -> list[tuple[str, str]]:
    from sentei import recipe

    described = []
    for name, (item, _) in recipe.method_fields(method).items():
        source = f" [{item.metadata['source']}]" if item.metadata.get("source") else ""
        described.append((name, f"{item.metadata.get('help', '')} ({item.default}){source}"))
    return described


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for number, word in enumerate(arguments):
        if word == flag:
            return arguments[number + 1] if number + 1 < len(arguments) else None
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _methods() -> list[tuple[str, str, str]]:
    """(name, first sentence of its file, paper) read from the source: importing the methods would import torch."""
    found = []
    for name, place in METHODS.items():
        spec = importlib.util.find_spec(place.partition(":")[0])
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else "")
        words = " ".join((ast.get_docstring(tree) or "").split())
        paper = re.search(r"arXiv \d{4}\.\d{5}", words)
        for node in ast.walk(tree):  # the class may say it better
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "paper" and node.value:
                paper = re.match(".*", ast.literal_eval(node.value))
        found.append((name, words.partition(". ")[0].rstrip("."), paper.group() if paper else ""))
    return found


# ---------------------------------------------------------------------------------------------------------- commands


def _stage(options: argparse.Namespace) -> dict[str, Any]:
    fields = {key.partition(":")[2]: value for key, value in vars(options).items() if key.startswith("field:")}
    names = ("data", "text_field", "out", "teacher", "force", "dtype", "trust_remote_code")
    return {name: getattr(options, name) for name in names} | fields


def _compress(options: argparse.Namespace, method: str | None = None) -> int:
    from sentei import recipe

    with Progress() as report:
        out = recipe.compress(options.model, method=method or options.method, report=report, **_stage(options))
    record = json.loads((out / "compression.json").read_text(encoding="utf-8"))
    print(_sizes(record["parent"], record["result"]))
    print(f"saved {out}  (recipe.yaml makes it again; next: sentei eval {out} --data TEXT; sentei bench {out})")
    return 0


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
    if not options.data and not options.tasks:
        raise ValueError("nothing to measure; give --data TEXT (python-docs is always there) or --tasks NAMES")
    try:
        contexts = [int(context) for context in options.context.split(",")]
    except ValueError:
        raise ValueError(
            f"--context is {options.context!r}; expected a number of tokens, or several: 128,1024"
        ) from None
    from sentei import evaluate, recipe

    result = evaluate.run(
        recipe.find_model(options.model),
        texts=options.data or (),
        contexts=contexts,
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
    _print_measurements({str(options.model): result["measurements"]})
    if result["json"]:
        print(f"written to {result['json']}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from sentei import benchmark, recipe

    parent = recipe.find_model(options.against or recipe.parent_of(options.model, flag="--against"))
    names = ("prompt_tokens", "new_tokens", "batch_size", "rounds", "threads", "dtype")
    settings = {name: getattr(options, name) for name in names}
    result = benchmark.run(options.model, parent, json_path=options.json, **settings)
    _print_benchmark(result)
    return 0


def _report(options: argparse.Namespace) -> int:
    from sentei import report

    page = report.write(options.model, options.children, options.out)
    print(f"written {page} and {page.with_suffix('.md')}")
    return 0


def _run(options: argparse.Namespace) -> int:
    import dataclasses

    from sentei import recipe

    asked = recipe.load(options.recipe)
    if options.out:
        asked = dataclasses.replace(asked, out=options.out)
    with Progress() as report:
        result = recipe.run(asked, force=options.force, report=report)
    record = json.loads((Path(result["checkpoint"]) / "compression.json").read_text(encoding="utf-8"))
    print(_sizes(record["parent"], record["result"]))
    if "measurements" in result:
        _print_measurements(result["measurements"])
    if "benchmark" in result:
        _print_benchmark(result["benchmark"])
    for row in result.get("generations", []):
        print(f"\nprompt   {row['prompt']}\nparent   {row['parent']}\nsmall    {row['child']}")
    print(f"\nparent      {result['parent']}\ncheckpoint  {result['checkpoint']}")
    if "report" in result:
        print(f"report      {result['report']}  (open it in a browser)")
    for gate in result["gates"]:
        value = "not measured" if gate["value"] is None else f"{gate['value']:.4g}"
        print(f"{'passed' if gate['passed'] else 'FAILED'}  {gate['gate']}  ({value})")
    return 0 if all(gate["passed"] for gate in result["gates"]) else 1


def _list_methods(options: argparse.Namespace) -> int:
    table = Table("method", "what it is", "paper", box=None, pad_edge=False)
    for row in _methods():
        table.add_row(*row)
    Console().print(table)
    print("\n`sentei compress --method NAME --help` shows a method's fields")
    return 0


# ---------------------------------------------------------------------------------------------------------- printing


def _sizes(parent: dict[str, Any], child: dict[str, Any]) -> str:
    lines = []
    for name, what, unit, scale in (
        ("parameters", "parameters", "M", 1e6),
        ("of the layers", "layer_parameters", "M", 1e6),
        ("weights on disk", "bytes", "MB", 1e6),
    ):
        before, after = parent[what], child[what]
        lines.append(
            f"{name:16}{before / scale:9.1f} {unit} -> {after / scale:.1f} {unit}  ({after / before - 1:+.1%})"
        )
    return "\n".join(lines)


def _print_measurements(measurements: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("model", "measured on", "metric", "value", box=None, pad_edge=False)
    for model, rows in measurements.items():
        for row in rows:
            context = f", context {row['context']}" if row.get("context") else ""
            table.add_row(model, f"{row['dataset']}{context}", row["metric"], f"{row['value']:.4g}")
    Console().print(table)


def _print_benchmark(result: dict[str, Any]) -> None:
    table = Table("", "parent", "small", "ratio", box=None, pad_edge=False)
    parent, child, ideal = result["parent"], result["child"], result["ideal"]
    for name, quantity in (("prefill", "tokens/s"), ("decode", "tokens/s")):
        key = f"{name}_tokens_per_second"
        if key in child:
            values = [f"{side[key]['median']:.1f}" for side in (parent, child)]
            table.add_row(
                f"{name} {quantity}", *values, f"{result[f'speedup_{name}']:.2f} (ideal {ideal['speedup']:.2f})"
            )
    if "first_token_seconds" in child:
        values = [f"{1000 * side['first_token_seconds']['median']:.0f}" for side in (parent, child)]
        table.add_row("first token ms", *values, f"{result['speedup_first_token']:.2f}")
    values = [f"{side['memory']['peak_bytes'] / 1e6:.0f}" for side in (parent, child)]
    table.add_row("peak memory MB", *values, f"{result['ratios']['peak_memory']:.2f}")
    Console().print(table)


class Progress:
    """Draws what the work reports on stderr: a bar with the time left on a terminal, else a line every few seconds.

    An event with a message alone is a line. With "step" and "of" it moves a bar; another "of" or an earlier step begins
    a new one.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: RichProgress | None = None
        self.of = self.step = 0
        self.started = self.printed = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def __call__(self, event: dict[str, Any]) -> None:
        message = str(event.get("message", ""))
        if not event.get("of"):
            self._close()
            self.console.print(message, markup=False, soft_wrap=True)
            return
        step, of = event["step"], event["of"]
        if of != self.of or step < self.step:
            self._close()
            self.started, self.of = time.monotonic(), of
        self.step = step
        if self.console.is_terminal:
            self._draw(step, of, message)
        elif time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            spent = self.printed - self.started
            left = f", {spent / step * (of - step):.0f} s left" if step and spent > 1 else ""
            self.console.print(f"{step}/{of} {message}{left}", markup=False, soft_wrap=True)

    def _draw(self, step: int, of: int, message: str) -> None:
        if self.bar is None:
            columns = (
                BarColumn(20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*columns, TextColumn("{task.description}", markup=False), console=self.console)
            self.bar.start()
            self.bar.add_task(message, total=of)
        self.bar.update(self.bar.task_ids[0], completed=step, description=message)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.of, self.step = None, 0, 0


if __name__ == "__main__":
    sys.exit(main())
