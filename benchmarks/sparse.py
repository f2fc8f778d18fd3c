"""Is a sparse int8 model faster? Measured in the runtimes themselves, in interleaved rounds; nothing is promised.

    python benchmarks/sparse.py --dense DENSE --sparse INT8 --out results/prune-once-speed.json
    python benchmarks/sparse.py --out results/prune-once-speed.json --markdown

DENSE is a fine-tuned dense checkpoint, INT8 a folder that `prune_once_quantise` wrote for the same task (its IR lies in
openvino/). Whole models run in OpenVINO: dense fp32, dense with bf16 allowed, dense int8 (NNCF, calibrated on random
tokens: speed does not depend on what they are), sparse int8, and the same with OpenVINO's sparse-weights option. For a
1x4 pattern each linear's shape is also timed in torch: fp32, dense int8 (fbgemm) and the 1x4 kernel, after its outputs
were compared with integer arithmetic. A ratio counts as faster or slower only where the p10-p90 ranges do not overlap.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import flags, printed, resumed, write
from torch import Tensor, nn

from sentei import checkpoint, structure
from sentei.checkpoint import sparse
from sentei.export import openvino
from sentei.methods.prune_once.quantise import nncf_arguments

OPTION = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}


def main() -> None:
    args = arguments()
    if printed(args, markdown):
        return
    out = Path(args.out)
    asked = {"rounds": args.rounds, "dense": str(args.dense), "sparse": str(args.sparse)}
    table = resumed(out, asked, models=[], layers=[]) | {
        "cpu": cpu(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
    }

    made: dict[str, Any] = {}
    for threads in args.threads:
        for length in args.lengths:
            key = {"threads": threads, "length": length, "batch": args.batch}
            if any(key.items() <= row.items() for row in table["models"]):
                continue
            made = made or models(args)
            config = made["model"].config
            table["model"] = f"{config.architectures[0]}, {config.num_hidden_layers} layers of {config.hidden_size}"
            table["precision"] = {
                name: {"INFERENCE_PRECISION_HINT": of[1], **of[2]} for name, of in made.items() if name != "model"
            }
            table["models"].append(key | time_models(made, args, threads, length))
            write(out, table)
            print(key, {name: f"{1000 * t['median']:.2f} ms" for name, t in table["models"][-1]["seconds"].items()})
            if args.no_layers:
                continue
            table["layers"] += [key | row for row in time_layers(args, threads, length)]
            write(out, table)


# --- whole models -------------------------------------------------------------------------------------------------


def models(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> (IR, precision, options). The int8 rivals come from the same NNCF, its same settings, and runtime."""
    fields = json.loads((Path(args.sparse) / "compression.json").read_text())["stages"][-1]["fields"]
    same = nncf_arguments(*(fields[name] for name in ("scheme", "scope", "fast_path")))  # and no telemetry from here
    import nncf

    dense, _ = checkpoint.load(args.dense, dtype="float32")
    causal = structure.is_causal(dense)
    batch = inputs(dense, 2, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = nncf.quantize(
            copy.deepcopy(dense),
            nncf.Dataset([inputs(dense, 2, 32, seed) for seed in range(8)]),
            subset_size=8,
            **same,
        )
        plain, int8 = (openvino.convert(model, batch, causal=causal) for model in (dense, quantised))
    small = Path(args.sparse) / "openvino" / openvino.MODEL
    if not small.is_file():
        raise SystemExit(f"{args.sparse} has no openvino/{openvino.MODEL}: it was quantised without a runtime")
    return {
        "dense fp32": (plain, "f32", {}),
        "dense bf16": (plain, "bf16", {}),
        "dense int8": (int8, "f32", {}),
        "sparse int8": (small, "f32", {}),
        "sparse int8, option": (small, "f32", OPTION),
        "model": dense,
    }


def time_models(made: dict[str, Any], args: argparse.Namespace, threads: int, length: int) -> dict[str, Any]:
    batch = inputs(made["model"], args.batch, length)
    runs: dict[str, Callable[[], Any]] = {}
    refused = {}
    for name, (ir, precision, options) in ((k, v) for k, v in made.items() if k != "model"):
        try:
            run = openvino.runner(ir, precision=precision, threads=threads, options=options)
        except RuntimeError as error:  # the plugin refuses bf16 without the instructions, or the option
            refused[name] = str(error).splitlines()[0][:200]
            continue
        runs[name] = lambda run=run: run(batch)
    return {"seconds": interleaved(runs, args.rounds), "not available": refused}


def inputs(model: nn.Module, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        made["token_type_ids"] = torch.zeros_like(ids)
    return made


# --- single linears in torch ---------------------------------------------------------------------------------------


def time_layers(args: argparse.Namespace, threads: int, length: int) -> list[dict[str, Any]]:
    """A row per distinct shape of a 1x4 matrix; nothing for other patterns."""
    codes = sparse.read_codes(Path(args.sparse) / sparse.FILE)
    shapes: dict[tuple[int, int], Tensor] = {}
    for code, scale in codes.values():
        if scale is None or code.ndim != 2 or code.shape[1] % 4 or float((code == 0).float().mean()) < 0.3:
            continue
        if set((code.reshape(-1, 4) != 0).any(1).tolist()) == {True, False} and is_blocks(code):
            shapes.setdefault(tuple(code.shape), code)  # pyright: ignore[reportArgumentType]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = [one_layer(code, length * args.batch, args.rounds) for code in shapes.values()]
    torch.set_num_threads(before)
    return rows


def is_blocks(code: Tensor) -> bool:
    """Do the zeros come in fours, as far as codes tell (a kept weight may round to 0)?"""
    some = (code.reshape(-1, 4) != 0).sum(1)
    return float((some[some > 0] == 4).float().mean()) > 0.8


def one_layer(code: Tensor, tokens: int, rounds: int) -> dict[str, Any]:
    outputs, width = code.shape
    safe = int(code.abs().max()) <= 64
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(tokens, width, generator=generator)
    weight = torch._make_per_channel_quantized_tensor(
        code, torch.full((outputs,), 0.01, dtype=torch.float64), torch.zeros(outputs, dtype=torch.long), 0
    )
    torch.backends.quantized.engine = "fbgemm"
    bias = torch.zeros(outputs)
    x_codes = torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8)
    exact = x_codes.int_repr().long() @ code.long().T
    out_scale = float(exact.abs().max()) * 0.01 / 255 / 127
    small = torch.ops.sparse.qlinear_prepack(weight, bias, 1, 4)
    dense = torch.ops.quantized.linear_prepack(weight, bias)
    runs: dict[str, Callable[[], Any]] = {
        "torch fp32": lambda: nn.functional.linear(x, code.float() * 0.01),
        "torch int8": lambda: torch.ops.quantized.linear(x_codes, dense, out_scale, 128),
        "torch 1x4": lambda: torch.ops.sparse.qlinear(x_codes, small, out_scale, 128),
    }
    weight_f = code.float() * 0.01
    runs["torch fp32"] = lambda: nn.functional.linear(x, weight_f)
    wanted = (exact.double() * (0.01 / 255) / out_scale + 128).round().clamp(0, 255)
    wrong = (runs["torch 1x4"]().int_repr().double() - wanted).abs().max()
    seconds = interleaved(runs, rounds)
    return {
        "shape": [outputs, width], "zeros": float((code == 0).float().mean()), "codes <= 64": safe,
        "largest error, steps": float(wrong), "seconds": seconds,
    }  # fmt: skip


# --- timing --------------------------------------------------------------------------------------------------------


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Every run once a round, in turn; seconds as median, p10 and p90 after a warm-up."""
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    found = {}
    for name, of in times.items():
        cuts = statistics.quantiles(of, n=10)
        found[name] = {"median": statistics.median(of), "p10": cuts[0], "p90": cuts[-1]}
    return found


def verdict(mine: dict[str, float], other: dict[str, float]) -> str:
    """How much faster than the named rival, or that it is within noise."""
    ratio = other["median"] / mine["median"]
    if mine["p10"] <= other["p90"] and other["p10"] <= mine["p90"]:
        return f"{ratio:.2f}x, within noise"
    return f"{ratio:.2f}x {'faster' if ratio > 1 else 'slower'}"


def cpu() -> dict[str, Any]:
    able = {name: bool(value) for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool)}
    return {"capabilities": sorted(name for name, value in able.items() if value)}


def markdown(table: dict[str, Any]) -> str:
    wide = ", ".join(name for name in table["cpu"]["capabilities"] if name.startswith(("avx", "amx")))
    lines = [
        f"**Does sparse int8 run faster?** {table['model']}; {table['machine']}, {wide}; medians of {table['rounds']} "
        "rounds in turns. Whole models in OpenVINO, single linears in torch.",
        "",
    ]
    names = list(dict.fromkeys(name for row in table["models"] for name in row["seconds"]))
    head = ["threads", "tokens", *(f"{name}, ms" for name in names), "sparse int8 against dense int8"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(table["models"], key=lambda row: (row["threads"], row["length"])):
        seconds = row["seconds"]
        cells = [f"{1000 * seconds[name]['median']:.2f}" if name in seconds else "not available" for name in names]
        judged = verdict(seconds["sparse int8"], seconds["dense int8"])
        lines.append(f"| {row['threads']} | {row['length']} | " + " | ".join(cells) + f" | {judged} |")
    if table["layers"]:
        head = ["one linear", "threads", "tokens", "zeros", "fp32, us", "int8, us", "1x4, us", "1x4 against int8"]
        lines += ["", "| " + " | ".join([*head, "error, steps"]) + " |", "|---" * 9 + "|"]
        for row in table["layers"]:
            us = {name: 1e6 * times["median"] for name, times in row["seconds"].items()}
            judged = verdict(row["seconds"]["torch 1x4"], row["seconds"]["torch int8"])
            shape = "x".join(map(str, row["shape"]))
            lines.append(
                f"| {shape} | {row['threads']} | {row['length']} | {row['zeros']:.0%} | {us['torch fp32']:.0f} | "
                f"{us['torch int8']:.0f} | {us['torch 1x4']:.0f} | {judged} | {row['largest error, steps']:.0f} |"
            )
        lines += ["", *wins(table["layers"])]
    return "\n".join(lines)


def wins(layers: list[dict[str, Any]]) -> list[str]:
    """Where the 1x4 kernel is faster than each rival, beyond noise."""
    lines = []
    for rival in ("torch int8", "torch fp32"):
        judged = [(row, verdict(row["seconds"]["torch 1x4"], row["seconds"][rival])) for row in layers]
        where = [
            f"{'x'.join(map(str, row['shape']))} at {row['length'] * row['batch']} tokens, {row['threads']} threads "
            f"({said.split()[0]})"
            for row, said in judged
            if said.endswith("faster")
        ]
        slower = sum(said.endswith("slower") for _, said in judged)
        lines.append(
            f"1x4 against {rival}: faster in {len(where)} of {len(layers)}, slower in {slower}, the rest within noise"
            + (f". Faster: {'; '.join(where)}" if where else "")
        )
    return lines


def arguments() -> argparse.Namespace:
    parser = flags(__doc__)
    parser.add_argument("--dense", help="folder of the dense task model")
    parser.add_argument("--sparse", help="folder that prune_once_quantise wrote")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 32, 128, 384])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-layers", action="store_true", help="whole models only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
