"""What each ingredient of the search is worth at equal forwards, and its rivals: random search and Bonsai's idea.

    python benchmarks/estimators.py --out results/estimators-smollm2.json --forwards 120 --sparsity 0.3 0.5 --seeds 3
    python benchmarks/estimators.py --out results/estimators-smollm2.json --markdown

A row is one way to spend `--forwards` forward passes of 1,024 tokens; evaluations on the validation text, by which each
way picks the best mask it has seen, come on top and are counted beside them. Way and rival are given the same number of
both, and new text in every step. All fill in the means of dropped units and have the same initial scores, the order of
units inside a layer. Slopes, random directions and random search begin at equal fractions in all layers; the ways over
units, and Bonsai, at the paper's start, which turns the scores of a layer into probabilities. Each is judged by the
perplexity of its mask on the test part of the text, which none of them has seen, with the means and after the
least-squares refit. Rows are appended as they are made; a second run makes the missing ones.

"bonsai" is written from the idea of arXiv 2402.05406: losses of random sub-models, drawn by the prior scores, are
regressed on which units they held, and units with the largest coefficients stay. "random search" sends a perturbed mask
against the best one so far, both on the same new batch.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import add, flags, printed, resumed, spread
from torch import Tensor

from sentei import checkpoint, data
from sentei.methods.policy_gradient import PolicyGradient
from sentei.methods.policy_gradient.levels import FAR, Allocation, Bits
from sentei.methods.policy_gradient.search import Search
from sentei.recipe import find_model

NOTHING = {"slope_sweeps": 0, "coarse_steps": 0, "steps": 0, "reward": "lm_loss"}


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
        "slopes of the divergence": {"slope_sweeps": sweeps, "reward": "kl"},
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
    if printed(args, markdown):
        return
    out = Path(args.out)
    model, tokenizer = checkpoint.load(find_model(args.model))
    text = data.load(args.data)
    unseen = data.blocks(text.test, tokenizer, 128, seed=1)[:32]
    made_with = {
        "model": Path(args.model).name, "text": Path(args.data).name, "forward": [args.batch, 128],
        "calibration": args.calibration, "granularity": args.granularity, "dtype": str(next(model.parameters()).dtype),
    }  # fmt: skip
    table = resumed(out, made_with)
    made = {(row["way"], row["sparsity"], row["seed"], row["asked_forwards"]) for row in table["rows"]}
    layers, kinds = model.config.num_hidden_layers, len(args.granularity.split("+"))
    for sparsity in args.sparsity:
        for way, fields in ways(args.forwards, layers, kinds).items():
            if args.ways and way not in args.ways:
                continue
            for seed in range(args.seeds):
                if (way, sparsity, seed, args.forwards) in made:
                    continue
                searched: dict[str, Any] = NOTHING | (fields if isinstance(fields, dict) else {})
                method = PolicyGradient(
                    sparsity=sparsity, granularity=args.granularity, compensate="mean", init="flap", seed=seed,
                    calibration_samples=args.calibration, batch_size=args.batch, **searched,
                )  # fmt: skip
                began = time.monotonic()
                run = method.start(model, tokenizer, text)
                if isinstance(fields, str):
                    keep_U, account = RIVALS[fields](method, run, args.forwards)
                else:
                    keep_U, account = method.choose(run)
                seconds = time.monotonic() - began
                row: dict[str, Any] = {"way": way, "sparsity": sparsity, "seed": seed, "asked_forwards": args.forwards}
                row |= {name: account[name] for name in ("forwards", "evaluations", "held_forwards")}
                row |= {"seconds": seconds, "perplexity": {}}
                for compensation in args.compensations:
                    attempt = replace(method, compensate=compensation)
                    again = attempt.start(copy.deepcopy(model), tokenizer, text)
                    again.fill = run.fill
                    attempt.cut(again, keep_U)
                    row["perplexity"][compensation] = math.exp(again.mean_loss(unseen))
                add(out, table, row)


@torch.inference_mode()
def random_search(method: PolicyGradient, run: Any, forwards: int) -> tuple[Tensor, dict[str, Any]]:
    """Perturbed masks, repaired to the budget, each against the best one so far on a new batch."""
    search = Search(method, run)
    allocation = Allocation(search)
    generator = torch.Generator().manual_seed(method.seed)
    fraction_P = allocation.fraction_P
    search._evaluate(allocation.keep(fraction_P), 0)
    for turn in range(forwards // 2):
        shift_P = 0.1 * torch.randn(len(allocation.pairs), generator=generator).double()
        other_P = allocation.within_budget(fraction_P + shift_P)
        if search.loss(allocation.keep(other_P), turn) < search.loss(allocation.keep(fraction_P), turn):
            fraction_P = other_P
        if (turn + 1) % method.eval_every == 0 or turn + 1 == forwards // 2:
            search._evaluate(allocation.keep(fraction_P), turn + 1)
    return search.best["keep"], search.account() | {"forwards": forwards // 2 * 2}


@torch.inference_mode()
def bonsai(method: PolicyGradient, run: Any, forwards: int, ridge: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
    """Losses of random sub-models, two on each batch, regressed on the runs of channels that they held.

    A batch's own level says nothing of the units and leaves the losses before the regression. What has been regressed
    so far is evaluated as often as the other ways are.
    """
    search = Search(method, run)
    bits = Bits(search, None)
    generator = torch.Generator().manual_seed(method.seed)
    held_KB, losses = [], []
    search._evaluate(bits.hard(), 0)
    for turn in range(forwards // 2):
        pair_KB = torch.rand(2, len(bits.s), generator=generator) < bits.s
        found = [search.loss(sample[bits.bit_U], turn) for sample in pair_KB]
        held_KB += [sample.double() for sample in pair_KB]
        losses += [loss - sum(found) / 2 for loss in found]
        if (turn + 1) % method.eval_every == 0 or turn + 1 == forwards // 2:
            x_KB = torch.stack(held_KB) - bits.s
            x_KB = (x_KB.unflatten(0, (-1, 2)) - x_KB.unflatten(0, (-1, 2)).mean(1, keepdim=True)).flatten(0, 1)
            y_K = torch.tensor(losses, dtype=torch.double)
            gram_KK = x_KB @ x_KB.T
            gram_KK += ridge * torch.eye(len(y_K), dtype=torch.double) * float(x_KB.square().sum(1).mean())
            gain_B = -x_KB.T @ torch.linalg.solve(gram_KK, y_K)  # what holding a bit takes off the loss
            prior_B = bits.s / bits.s.std()  # where the regression saw nothing the prior decides
            score_U = (gain_B / gain_B.std().clamp_min(1e-12) + prior_B)[bits.bit_U]
            search._evaluate(method.select(score_U, run.units, "global", tie_break_U=search.metric_U), turn + 1)
    return search.best["keep"], search.account() | {"forwards": forwards // 2 * 2}


RIVALS = {"random search": random_search, "bonsai": bonsai}


def markdown(table: dict[str, Any]) -> str:
    rows = table["rows"]
    part = "test" if all("evaluations" in row for row in rows) else "validation"  # of an earlier form of this script
    lines = [
        f"{table['model']}, {table['text']}; perplexity on 32 {part} blocks of 128 tokens, mean ± s.d. over seeds. "
        "Forwards are those of the search + those of its evaluations.",
        "",
        "| removed | way | forwards | with means | after the refit | s | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sparsity"], row["way"], row.get("asked_forwards", 0)), []).append(row)

    def cell(group: list[dict[str, Any]], key: str) -> str:
        return spread([row["perplexity"][key] for row in group if key in row["perplexity"]], count=False)

    for (sparsity, way, _), group in sorted(groups.items()):
        forwards, held = (statistics.mean(row.get(key) or 0 for row in group) for key in ("forwards", "held_forwards"))
        seconds = statistics.mean(row["seconds"] for row in group)
        lines.append(
            f"| {sparsity:.0%} | {way} | {forwards:.0f} + {held:.0f} | {cell(group, 'mean')} | "
            f"{cell(group, 'least-squares')} | {seconds:.0f} | {len(group)} |"
        )
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = flags(__doc__, "results/estimators-smollm2.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="../shared/data/wikitext-103-tok/valid.txt")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--granularity", default="channels")
    parser.add_argument("--forwards", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="blocks of 128 tokens in a forward")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--compensations", nargs="+", default=["mean", "least-squares"], help="to judge masks with")
    return parser.parse_args()


if __name__ == "__main__":
    main()
