"""What a step of the search costs: masked, sliced and dense forwards in one interleaved run, and its peak memory.

    python benchmarks/search.py --model smollm2 --out results/search-cost.json

Time: forwards of one batch under random channel masks at several sparsities, each as a ratio to the dense forward of
the same round, next to the ideal (floating-point operations of what is kept, LM head included). Memory: peak resident
set of a process that loads the model and runs the forward of one batch, and of one that searches with that batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SPARSITIES = (0.1, 0.3, 0.5, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--out", default="results/search-cost.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--worker", choices=("inference", "search"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    result = {
        "model": Path(args.model).name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "time": times(args),
        "memory": memory(args),
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def times(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from sentei import checkpoint, data, masks, structure
    from sentei.distill import Distillation
    from sentei.train import causal_batch

    model, tokenizer = checkpoint.load(args.model)
    units = structure.units(model, "channels")
    head = model.get_output_embeddings().weight.numel()
    loss, rows = Distillation(), []
    blocks_NT = data.blocks(data.load(args.data).train, tokenizer, 128, num=max(args.batches))
    for batch in args.batches:
        inputs = causal_batch(blocks_NT[:batch])
        keeps = {}
        for sparsity in SPARSITIES:
            score_U = torch.rand(len(units), generator=torch.Generator().manual_seed(0))
            keeps[sparsity] = masks.select(score_U, units, masks.removal_target(units, sparsity), "layer")
        seconds: dict[Any, list[float]] = {}
        with torch.inference_mode():
            for _ in range(args.rounds + 1):  # the first round warms up
                for sparsity in (0.0, *SPARSITIES):
                    for way in ("masked", "sliced") if sparsity else ("dense",):
                        began = time.perf_counter()
                        if way == "dense":
                            loss(model, inputs)
                        else:
                            with getattr(masks, way)(model, units, keeps[sparsity]):
                                loss(model, inputs)
                        seconds.setdefault((way, sparsity), []).append(time.perf_counter() - began)
        dense = seconds.pop(("dense", 0.0))
        for (way, sparsity), taken in seconds.items():
            ratios = [a / b for a, b in zip(taken[1:], dense[1:], strict=True)]
            removed = units.removed_parameters(keeps[sparsity])
            ideal = (units.layer_parameters - removed + head) / (units.layer_parameters + head)
            rows.append(
                {
                    "tokens": batch * 128, "sparsity": sparsity, "way": way, "ideal": ideal,
                    "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                    "over_ideal": statistics.median(ratios) / ideal, "dense_seconds": statistics.median(dense[1:]),
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def memory(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for kind in ("inference", "search"):
        command = [sys.executable, __file__, "--worker", kind, "--model", args.model, "--data", args.data]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found | {"ratio": found["search"]["peak_mb"] / found["inference"]["peak_mb"]}


def worker(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from sentei import checkpoint, data
    from sentei.methods.policy_gradient import PolicyGradient

    model, tokenizer = checkpoint.load(args.model)
    text = data.load(args.data)
    Path("/proc/self/clear_refs").write_text("5")  # what loading needed for a moment does not count
    if args.worker == "inference":
        with torch.inference_mode():
            model(input_ids=data.blocks(text.train, tokenizer, 128, num=8), use_cache=False)
    else:
        method = PolicyGradient(sparsity=0.3, granularity="channels", coarse_steps=2, calibration_samples=16)
        method.choose(method.start(model, tokenizer, text))
    status = Path("/proc/self/status").read_text()
    return {"peak_mb": int(status.split("VmHWM:")[1].split()[0]) / 1024}


if __name__ == "__main__":
    main()
