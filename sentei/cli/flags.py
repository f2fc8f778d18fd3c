"""Every command's flags. A method's fields are flags too, read from its dataclass once the method is named."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import sentei
from sentei.methods import METHODS

# Flags of compress and plan that are fields of most methods; shown by a help that does not know the method yet.
COMMON_FIELDS = {
    "sparsity": "fraction of the decoder-layer parameters to remove, between 0 and 1",
    "shape": "heterogeneous (layers differ in width), uniform (all alike) or padded (zero-filled to the widest)",
    "seed": "for every random choice",
}
Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest word, and leaves the exit to `main`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (`{self.prog} --help` tells more)")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def check_flags(command: Parser, arguments: list[str]) -> None:
    """Before argparse does it: it would first miss the flag that was misspelt, and name no other."""
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in command.flags():
            command.error(f"no flag {flag}{nearest(flag, command.flags())}")


def nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def parsers(arguments: list[str], run: Mapping[str, Command]) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each command; of the command in `arguments` it has the method's fields as flags."""
    parser = Parser(prog="sentei", description="Prune language models into checkpoints that are really smaller.")
    parser.add_argument("--version", action="version", version=f"sentei {sentei.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    made: dict[str, Parser] = {}

    def add(name: str, help: str, **options: Any) -> Parser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", **options)
        command.set_defaults(run=run[name])
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made[name] = command
        return command

    fields_hint = "every field of a method is a flag: `sentei {} --method NAME --help` shows them\n\nmethods:\n{}"
    width = max(map(len, METHODS)) + 2
    listed = "\n".join(f"  {name:{width}}{title}" for name, title, _ in methods())
    method = _value_of("--method", arguments)
    for name, help in (
        ("compress", "prune a checkpoint by one method and save the smaller one"),
        ("plan", "say what compress would do, and refuse what it would refuse, without doing it"),
    ):
        command = add(name, help, epilog=fields_hint.format(name, listed))
        command.add_argument(
            "model", metavar="MODEL", help="folder, .gguf file, hub id, or smollm2 (the example model)"
        )
        command.add_argument("--method", required=True, metavar="NAME", help=", ".join(METHODS))
        _add_stage_flags(command, out_required=name == "compress")
        if arguments[:1] == [name]:
            _add_fields(command, method, COMMON_FIELDS)

    command = add("heal", "train a pruned checkpoint briefly against its dense parent")
    command.add_argument("model", metavar="DIR", help="folder that `sentei compress` wrote")
    _add_stage_flags(command, out_required=True)
    if arguments[:1] == ["heal"]:
        # The fields are read from the class, which imports torch; the bare help stays quick.
        _add_fields(command, "heal" if len(arguments) > 2 else None, {})
    command.epilog = (
        "`sentei compress --method heal --help` shows the fields of the training, all flags of this command too"
    )

    command = add("eval", "measure a saved checkpoint: perplexity, lm-eval tasks")
    command.add_argument("model", metavar="DIR", help="folder, .gguf file or hub id")
    command.add_argument("--data", action="append", metavar="TEXT", help="text to measure; may be given several times")
    command.add_argument(
        "--context", nargs="+", default=["128"], metavar="N", help="tokens per window, several too (128)"
    )
    command.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet (text)")
    command.add_argument(
        "--add-bos", action=argparse.BooleanOptionalAction, help="BOS before every window (as the tokenizer does)"
    )
    command.add_argument("--stride", type=int, metavar="N", help="overlap the windows; without it they do not")
    command.add_argument("--max-blocks", type=int, metavar="N", help="only the first N windows")
    command.add_argument("--tasks", metavar="A,B", help="lm-eval tasks (pip install 'sentei[eval]')")
    command.add_argument(
        "--domain", action="append", metavar="FILE", help="test rows: choices, prompts with responses, summaries"
    )
    command.add_argument("--template", metavar="NAME", help="of --domain: plain or chat (as it was tuned, else plain)")
    command.add_argument(
        "--seq-len", type=int, metavar="N", help="of --domain: tokens per row (as it was tuned, else 512)"
    )
    command.add_argument("--include-path", metavar="DIR", help="folder of task YAML of your own")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at once (8)")
    command.add_argument("--json", metavar="F", help="where to write (eval.json in the folder)")
    _add_load_flags(command)

    command = add("bench", "time and weigh a checkpoint against its dense parent, in turns")
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
    command.add_argument("--json", metavar="F", help="where to write (bench.json in the folder)")
    _add_load_flags(command)

    command = add("unfold", "write a folded checkpoint with independent layers, for runtimes that cannot share weights")
    command.add_argument("model", metavar="DIR", help="folder whose layers share weights")
    command.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    command.add_argument("--force", action="store_true", help="replace the folder")

    command = add("report", "one HTML page and a Markdown table of checkpoints beside their parent")
    command.add_argument("model", metavar="PARENT", help="the dense model")
    command.add_argument("children", nargs="+", metavar="DIR", help="folders that `sentei compress` wrote")
    command.add_argument(
        "--out", default="report.html", metavar="F", help="the page (report.html); the table lies beside it"
    )
    command.add_argument("--force", action="store_true", help="replace an older page and table")

    command = add("run", "make every step of a recipe that is not there yet")
    command.add_argument("recipe", metavar="RECIPE", help="YAML file")
    command.add_argument("--dry-run", action="store_true", help="check every stage and its data, make nothing")
    command.add_argument("--out", metavar="DIR", help="in place of the recipe's")
    command.add_argument("--force", action="store_true", help="make every step again")

    command = add("export", "write a checkpoint for another runtime: GGUF, ONNX, OpenVINO, or plain tensors")
    command.add_argument("model", metavar="DIR", help="checkpoint folder")
    command.add_argument(
        "--to", choices=["dense", "gguf", "onnx", "openvino"], default="dense",
        help="gguf: a file for llama.cpp; onnx, openvino: a graph in float32; dense: sparse containers with all zeros, "
        "shared blocks each (dense)",
    )  # fmt: skip
    command.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "q4_0"], help="gguf: of matrices (f16)")
    command.add_argument("--out", required=True, metavar="PATH", help="the new folder, or .gguf file")
    command.add_argument("--force", action="store_true", help="replace it")
    _add_trust_flag(command)

    add("methods", "name, paper and purpose of every method")
    return parser, made


def _add_stage_flags(command: Parser, out_required: bool) -> None:
    command.add_argument("--data", metavar="TEXT", help="file, folder, dataset or mixture a=0.7,b=0.3 (python-docs)")
    command.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet (text)")
    command.add_argument("--out", required=out_required, metavar="DIR", help="the new folder")
    command.add_argument("--teacher", metavar="PARENT", help="methods that learn from the dense parent: where it is")
    command.add_argument("--force", action="store_true", help="replace the folder")
    command.add_argument("--device-map", metavar="MAP", help="auto: the layers over several devices, where it can")
    _add_load_flags(command)


def _add_load_flags(command: Parser) -> None:
    command.add_argument("--dtype", default="auto", help="computation: auto, float32, bfloat16, float16")
    _add_trust_flag(command)


def _add_trust_flag(command: Parser) -> None:
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that a foreign checkpoint brings along"
    )


def _add_fields(command: Parser, method: str | None, common: dict[str, str]) -> None:
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


def methods() -> list[tuple[str, str, str]]:
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
