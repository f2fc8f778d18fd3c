"""What a step of the search costs: masked, sliced and dense forwards in one interleaved run, and its peak memory.

    python benchmarks/search.py --model smollm2 --out results/search-cost.json
    python benchmarks/search.py --model smollm2 --processes 2 --out results/search-processes.json
    python benchmarks/search.py --scaling --out results/search-scaling.json

Time, each as a ratio to the dense forward of the same round, next to the ideal (floating-point operations of what is
kept, LM head included): "masked" and "sliced" are the forward of one batch under the mask that a step samples, with the
means of dropped channels filled in; "step" is a whole step along random directions, sampling and update included, led
by the loss, "step, kl" one led by the divergence, for which the dense model is asked too, and "sweep" one of slopes of
the divergence, the default; each per sampled mask. Memory: peak resident set of a process that loads the model
and runs the forward of one batch, and of one that searches with that batch, several of each. With --processes the time
of as many sampled masks by one process and by several (gloo, one thread each) is measured instead; with --scaling a
step of random Llama models of several widths and batches, which should take as long as their parameters, LM head
included, times their tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tables

if TYPE_CHECKING:
    from sentei.methods.policy_gradient.levels import Widths

SPARSITIES = (0.1, 0.2, 0.3, 0.5, 0.7)
SCALING = ((512, 8), (768, 8), (1024, 8), (768, 2), (768, 4), (768, 16))  # hidden width, blocks of 128 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--out", default="results/search-cost.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's, if the machine is quick in it), ...")
    parser.add_argument("--memory-runs", type=int, default=3, help="pairs of processes for the peak memory")
    parser.add_argument("--processes", type=int, help="measure the speed-up of this many instead")
    parser.add_argument("--steps", type=int, default=12, help="of one process, for --processes")
    parser.add_argument("--scaling", action="store_true", help="measure random models of several widths instead")
    parser.add_argument("--worker", choices=("inference", "search", "steps"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(steps(args) if args.worker == "steps" else worker(args)))
        return
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "dtype": args.dtype,
    }
    if args.processes:
        result["processes"] = speed_up(args)
    elif args.scaling:
        result |= {"model": "random Llama, 12 layers", "scaling": scaling(args)}
    else:
        result |= {"time": times(args), "memory": memory(args)}
    tables.write(Path(args.out), result)
    print(json.dumps(result, indent=1))


def loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from sentei import checkpoint
    from sentei.recipe import find_model

    return checkpoint.load(find_model(args.model), dtype=args.dtype)


def level_of(model: Any, tokenizer: Any, text: Any, **fields: Any) -> Widths:
    """The search over the widths of a model, ready for its first step."""
    from sentei.methods.policy_gradient import PolicyGradient
    from sentei.methods.policy_gradient.levels import Allocation, Widths
    from sentei.methods.policy_gradient.search import Search

    method = PolicyGradient(granularity="channels", calibration_samples=16, **fields)
    search = Search(method, method.start(model, tokenizer, text))
    return Widths(search, Allocation(search))


def times(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from sentei import data

    model, tokenizer = loaded(args)
    text, head, rows = data.load(args.data), model.get_output_embeddings().weight.numel(), []
    for batch in args.batches:
        levels: dict[float, dict[str, Widths]] = {}
        taken: dict[Any, list[float]] = {}
        with torch.inference_mode():
            for sparsity in SPARSITIES:
                fields = {"sparsity": sparsity, "batch_size": batch, "coarse_steps": args.rounds + 1}
                rewards = ("lm_loss", "kl")
                levels[sparsity] = {of: level_of(model, tokenizer, text, reward=of, **fields) for of in rewards}
            for turn in range(args.rounds + 1):  # the first round warms up
                for sparsity, of in levels.items():
                    for way, seconds in one_round(of, turn, dense=sparsity == SPARSITIES[0]).items():
                        taken.setdefault((way, sparsity), []).append(seconds)
        dense = taken.pop(("dense", SPARSITIES[0]))
        for (way, sparsity), seconds in taken.items():
            ratios = [a / b for a, b in zip(seconds[1:], dense[1:], strict=True)]
            search = levels[sparsity]["kl"].search
            whole = search.units.layer_parameters + head
            ideal = (whole - search.remove) / whole
            rows.append(
                {
                    "tokens": batch * 128, "sparsity": sparsity, "way": way, "ideal": ideal,
                    "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                    "over_ideal": statistics.median(ratios) / ideal, "dense_seconds": statistics.median(dense[1:]),
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def one_round(levels: dict[str, Widths], turn: int, dense: bool) -> dict[str, float]:
    """Seconds of a forward in each way, and of a step for each of its masks."""
    from sentei import masks
    from sentei.methods.policy_gradient.levels import Slopes

    by_loss, by_kl = levels["lm_loss"], levels["kl"]
    search, keep_U = by_loss.search, by_loss.sample(turn)[0]
    model, ids = search.run.model, search.batch(turn)
    ways = {"dense": nullcontext()} if dense else {}
    for way in ("masked", "sliced"):
        ways[way] = getattr(masks, way)(model, search.units, keep_U, search.fill)
    found = {}
    for way, context in ways.items():
        began = time.perf_counter()
        with context:
            float(search.run.loss(model, ids, turn))
        found[way] = time.perf_counter() - began
    sweep = Slopes(by_kl.search, by_kl.allocation)
    for way, of in (("step", by_loss), ("step, kl", by_kl), ("sweep", sweep)):
        began = time.perf_counter()
        losses = of.measure(turn, turn)
        of.update(losses, turn)
        found[way] = (time.perf_counter() - began) / len(losses)
    return found


def speed_up(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the same number of sampled masks by one process and by several, in turns."""
    found: dict[int, list[float]] = {1: [], args.processes: []}
    for _ in range(args.rounds):
        for count, seconds in found.items():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            command = [sys.executable, __file__, "--worker", "steps", "--model", args.model, "--data", args.data]
            command += ["--dtype", args.dtype, "--steps", str(args.steps // count)]
            workers = []
            for rank in map(str, range(count)):
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
                where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
                environment = {**os.environ, **(where if count > 1 else {"OMP_NUM_THREADS": "1"})}
                workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            said = [process.communicate()[0] for process in workers]
            seconds.append(max(json.loads(line)["seconds"] for line in said))
    ratios = [one / several for one, several in zip(*found.values(), strict=True)]
    return {
        "count": args.processes, "masks": 2 * args.steps, "seconds": {str(n): its for n, its in found.items()},
        "speed_up": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
    }  # fmt: skip


def steps(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of some steps in this process, alone or one of several."""
    import torch

    from sentei import data

    with torch.inference_mode():
        level = level_of(*loaded(args), data.load(args.data), coarse_steps=args.steps + 1)
        level.update(level.measure(0, 0), 0)  # warms up
        level.search.processes.wait_for_everyone()
        began = time.perf_counter()
        for step in range(1, args.steps + 1):
            level.update(level.measure(step, step), step)
        return {"seconds": time.perf_counter() - began}


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step for each of its two masks, all sizes in turns, and how far from linear each size is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sentei import data

    (_, tokenizer), text = loaded(args), data.load(args.data)
    models: dict[int, Any] = {}
    for hidden in {hidden: None for hidden, _ in SCALING}:
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
        config = LlamaConfig(num_hidden_layers=12, vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
        models[hidden] = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        fields = {"coarse_steps": args.rounds + 1, "sparsity": 0.3}
        levels = {
            (hidden, batch): level_of(models[hidden], tokenizer, text, batch_size=batch, **fields)
            for hidden, batch in SCALING
        }
        taken: dict[tuple[int, int], list[float]] = {size: [] for size in SCALING}
        for turn in range(args.rounds + 1):
            for size, level in levels.items():
                began = time.perf_counter()
                level.update(level.measure(turn, turn), turn)
                taken[size].append((time.perf_counter() - began) / 2)
    rows = []
    for hidden, batch in SCALING:
        parameters, tokens = sum(weight.numel() for weight in models[hidden].parameters()), batch * 128
        seconds = statistics.median(taken[hidden, batch][1:])  # the first warms up
        each = seconds / parameters / tokens
        rows.append({"hidden": hidden, "parameters": parameters, "tokens": tokens, "seconds": seconds, "each": each})
        rows[-1]["of_linear"] = each / rows[0].get("each", each)
    return rows


def memory(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[float]] = {"inference": [], "search": []}
    for _ in range(args.memory_runs):
        for kind, peaks in found.items():
            command = [sys.executable, __file__, "--worker", kind, "--model", args.model, "--data", args.data]
            command += ["--dtype", args.dtype]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks.append(json.loads(said)["peak_mb"])
    ratios = [search / inference for inference, search in zip(*found.values(), strict=True)]
    return {"peak_mb": found, "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def worker(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from sentei import data
    from sentei.methods.policy_gradient import PolicyGradient

    model, tokenizer = loaded(args)
    text = data.load(args.data)
    tables.reset_peak()  # what loading needed for a moment does not count
    if args.worker == "inference":
        with torch.inference_mode():
            model(input_ids=data.blocks(text.train, tokenizer, 128, num=8), use_cache=False)
    else:
        method = PolicyGradient(
            sparsity=0.3, granularity="channels", slope_sweeps=1, coarse_steps=2, calibration_samples=16
        )
        method.choose(method.start(model, tokenizer, text))
    return {"peak_mb": tables.peak()}


if __name__ == "__main__":
    main()
