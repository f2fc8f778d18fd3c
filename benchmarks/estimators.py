"""What each ingredient of the search is worth at equal forwards, and its rivals: random search and Bonsai's idea.

    python benchmarks/estimators.py --out results/estimators-smollm2.json --forwards 120 --sparsity 0.3 0.5 --seeds 3
    python benchmarks/estimators.py --out results/estimators-smollm2.json --markdown

A row is one way to spend `--forwards` forward passes of 1,024 tokens. All start from the same scores, fill in the means
of dropped units and are judged by the perplexity of the resulting mask on held-out calibration text, with the means and
after the least-squares refit. Rows are appended as they are made; a second run makes the missing ones.

"bonsai" is written from the idea of arXiv 2402.05406: losses of random sub-models, drawn by the prior scores, are
regressed on which units they held, and units with the largest coefficients stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import spread, write
from torch import Tensor

from sentei import checkpoint, data
from sentei.methods.policy_gradient import PolicyGradient
from sentei.methods.policy_gradient.levels import FAR, Allocation, Bits
from sentei.methods.policy_gradient.search import Search

NOTHING = {"slope_sweeps": 0, "coarse_steps": 0, "steps": 0}


def ways(forwards: int, layers: int, kinds: int) -> dict[str, dict[str, Any] | str]:
    """Settings that spend about `forwards` forwards; a name stands for a rival below."""
    sweep = 2 + kinds * ((layers + 1) / 2 + len(FAR))
    sweeps = max(1, round(forwards / sweep))
    half = max(1, round(forwards / 2 / sweep))
    rest = max(1, round((forwards - half * sweep) / 2))
    found: dict[str, dict[str, Any] | str] = {
        "start (no search)": {},
        "slopes": {"slope_sweeps": sweeps},
        "slopes, one sweep": {"slope_sweeps": 1},
        "random directions": {"coarse_steps": forwards // 2},
        "slopes, then random directions": {"slope_sweeps": half, "coarse_steps": rest},
        "random search": "random search",
        "bonsai": "bonsai",
    }
    for estimator, samples in (
        ("moving_average", 2), ("leave_one_out", 2), ("leave_one_out", 4), ("leave_one_out", 8), ("antithetic", 2),
        ("antithetic", 4), ("no_baseline", 2),
    ):  # fmt: skip
        fields = {"steps": forwards // samples, "estimator": estimator, "samples": samples}
        found[f"units, {estimator}, K={samples}"] = fields
    found["units, single channels"] = {"steps": forwards // 2, "channel_group": 1}
    return found


def main() -> None:
    args = arguments()
    out = Path(args.out)
    table = json.loads(out.read_text()) if out.exists() else {"rows": []}
    if args.markdown:
        print(markdown(table))
        return
    model, tokenizer = checkpoint.load(args.model)
    text = data.load(args.data)
    held = data.blocks(text.validation, tokenizer, 128, seed=1)[:32]
    table |= {"model": Path(args.model).name, "text": Path(args.data).name, "forward": [args.batch, 128]}
    made = {(row["way"], row["sparsity"], row["seed"], row["asked_forwards"]) for row in table["rows"]}
    layers, kinds = model.config.num_hidden_layers, len(args.granularity.split("+"))
    for sparsity in args.sparsity:
        for way, fields in ways(args.forwards, layers, kinds).items():
            if args.ways and way not in args.ways:
                continue
            for seed in range(args.seeds):
                if (way, sparsity, seed, args.forwards) in made:
                    continue
                method = PolicyGradient(
                    sparsity=sparsity, granularity=args.granularity, compensate="mean", seed=seed,
                    calibration_samples=args.calibration, batch_size=args.batch,
                    **NOTHING | (fields if isinstance(fields, dict) else {}),
                )  # fmt: skip
                began = time.monotonic()
                run = method.start(model, tokenizer, text)
                if isinstance(fields, str):
                    keep_U, account = RIVALS[fields](method, run, args.forwards), {"forwards": args.forwards}
                else:
                    keep_U, account = method.choose(run)
                seconds = time.monotonic() - began
                row: dict[str, Any] = {"way": way, "sparsity": sparsity, "seed": seed, "asked_forwards": args.forwards}
                row |= {"forwards": account.get("forwards"), "seconds": seconds, "perplexity": {}}
                for compensation in ("mean", "least-squares"):
                    attempt = replace(method, compensate=compensation)
                    again = attempt.start(copy.deepcopy(model), tokenizer, text)
                    attempt.cut(again, keep_U)
                    row["perplexity"][compensation] = math.exp(again.mean_loss(held))
                table["rows"].append(row)
                write(out, table)
                print(json.dumps(row), flush=True)


@torch.inference_mode()
def random_search(method: PolicyGradient, run: Any, forwards: int) -> Tensor:
    """Perturbed starts, repaired to the budget; the one with the lowest loss on one and the same batch wins."""
    search = Search(method, run)
    allocation = Allocation(search)
    generator = torch.Generator().manual_seed(method.seed)
    best, lowest = allocation.hard(), math.inf
    for trial in range(forwards):
        shift_P = torch.randn(len(allocation.pairs), generator=generator).double() * (0.1 if trial else 0.0)
        keep_U = allocation.keep(allocation.within_budget(allocation.fraction_P + shift_P))
        loss = search.loss(keep_U, 0)
        if loss < lowest:
            best, lowest = keep_U, loss
    return best


@torch.inference_mode()
def bonsai(method: PolicyGradient, run: Any, forwards: int, ridge: float = 1.0) -> Tensor:
    """Losses of random sub-models on one batch, regressed on the runs of channels that they held."""
    search = Search(method, run)
    bits = Bits(search, None)
    generator = torch.Generator().manual_seed(method.seed)
    held_KB, losses = [], []
    for _ in range(forwards):
        sample = (torch.rand(len(bits.s), generator=generator) < bits.s).double()
        held_KB.append(sample)
        losses.append(search.loss(sample.bool()[bits.bit_U], 0))
    x_KB = torch.stack(held_KB) - bits.s
    y_K = torch.tensor(losses, dtype=torch.double)
    gram_KK = x_KB @ x_KB.T + ridge * torch.eye(forwards, dtype=torch.double) * float(x_KB.square().sum(1).mean())
    gain_B = -x_KB.T @ torch.linalg.solve(gram_KK, y_K - y_K.mean())  # what holding a bit takes off the loss
    prior_B = bits.s / bits.s.std()  # where the regression saw nothing the prior decides
    score_B = gain_B / gain_B.std().clamp_min(1e-12) + prior_B
    return method.select(score_B[bits.bit_U], run.units, "global", tie_break_U=search.metric_U)


RIVALS = {"random search": random_search, "bonsai": bonsai}


def markdown(table: dict[str, Any]) -> str:
    rows = table["rows"]
    lines = [
        f"{table['model']}, {table['text']}; perplexity on 32 held-out blocks of 128 tokens, mean ± s.d. over seeds.",
        "",
        "| removed | way | forwards | with means | after the refit | s | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sparsity"], row["way"]), []).append(row)

    def cell(group: list[dict[str, Any]], key: str) -> str:
        return spread([row["perplexity"][key] for row in group], count=False)

    for (sparsity, way), group in sorted(groups.items()):
        forwards = statistics.mean(row["forwards"] or 0 for row in group)
        seconds = statistics.mean(row["seconds"] for row in group)
        lines.append(
            f"| {sparsity:.0%} | {way} | {forwards:.0f} | {cell(group, 'mean')} | {cell(group, 'least-squares')} | "
            f"{seconds:.0f} | {len(group)} |"
        )
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", default="results/estimators-smollm2.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of an existing file and stop")
    parser.add_argument("--data", default="../shared/data/wikitext-103-tok/valid.txt")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--granularity", default="channels")
    parser.add_argument("--forwards", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="blocks of 128 tokens in a forward")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    main()
