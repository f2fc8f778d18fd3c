"""Which units go: each score ranks them all, the first one decides, and every one is judged on the same held-out text.

What the first one drops may then be exchanged, unit for unit, by measuring (`sentei.greedy.exchange`).

gates            trained together under the budget, see gates.py
block_influence  1 - mean cosine of what goes into a block and what comes out (ShortGPT), one pass
greedy           drop the unit whose absence costs the least, measure all the others again, and so on (SLEB)
taylor           -dL/dg at open gates: the first-order guess for each unit alone
random           to know what a score is worth

Shape legend: U units, F units that may go, N blocks of text, T tokens.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sentei import importance, masks, structure
from sentei.distill import Distillation
from sentei.greedy import exchange, greedy
from sentei.methods.fold_gpt import gates, states
from sentei.structure import Units
from sentei.train import shuffled

if TYPE_CHECKING:
    from sentei.methods.fold_gpt import FoldGPT, FoldRun

SCORES = ("gates", "block_influence", "greedy", "taylor", "random")
POLARISED = 0.8  # of the gates should end outside [0.05, 0.95]


def choose(run: FoldRun) -> tuple[Tensor, dict[str, Any]]:
    """The units to keep, and a row for each score: what it drops, and at what loss. The first row's are those kept."""
    method, units, target = run.method, run.units, masks.removal_target(run.units, run.method.sparsity)
    if not target:
        return torch.ones(len(units), dtype=torch.bool), {"scores": []}
    rows: list[dict[str, Any]] = []
    ranks: list[Tensor] = []
    account: dict[str, Any] = {}
    dense_loss = run.mean_loss(run.held, method.batch_size)

    def judge(name: str, keep_U: Tensor, tokens: int, seconds: float) -> None:
        with masks.masked(run.model, units, keep_U):
            loss = run.mean_loss(run.held, method.batch_size)
        gone = ~keep_U
        rows.append(
            {
                "score": name,
                "dropped": _described(units, gone),
                "held_loss": loss,
                "held_loss_dense": dense_loss,
                "tokens": tokens,
                "seconds": seconds,
                "rank_correlation": _spearman(ranks[-1], ranks[0]),
                "overlap": float((gone & ~chosen_U).sum() / (gone | ~chosen_U).sum()),
                "values": [round(value, 6) for value in ranks[-1].tolist()],
            }
        )
        if run.report is not None:
            run.report({"message": f"{name} drops {rows[-1]['dropped']}: held-out loss {loss:.3f}"})

    for name in method.score:
        began = time.monotonic()
        keep_U, score_U, tokens, more = _rank(name, run, target)
        seconds = time.monotonic() - began
        account |= more
        ranks.append(score_U)
        if len(ranks) == 1:
            chosen_U = keep_U
            if method.exchange:
                chosen_U, passes, account["exchange"] = _exchanged(run, keep_U, target)
                passed = tokens + int(passes * run.calibration.numel())
                judge(f"{name}, exchanged", chosen_U, passed, time.monotonic() - began)
        judge(name, keep_U, tokens, seconds)
    return chosen_U, account | {"scores": rows}


def _exchanged(run: FoldRun, keep_U: Tensor, target: int) -> tuple[Tensor, float, list[dict[str, Any]]]:
    """keep_U after the exchange, forward passes over the calibration text, and the trials."""
    method, units = run.method, run.units
    found_U, log = exchange(
        run.model, units, run.calibration, run.loss, target, keep_U, trials=method.exchange,
        protected_U=protected(method, units), batch_size=method.batch_size, tick=run.tick,
    )  # fmt: skip
    gone, kept = int((~keep_U).sum()), int(keep_U.sum())
    sweeps = sum(trial.get("kept", True) for trial in log)  # over what is gone: at the start and after each exchange
    return found_U, 1 + sweeps * (1 + gone / 2) + (len(log) - 1) * (1 + kept / 2), log


def protected(method: FoldGPT, units: Units) -> Tensor:
    """[U] bool: at the ends of the model, where nothing may go."""
    return (units.layer_U < method.protect_first) | (units.layer_U >= units.num_layers - method.protect_last)


def _rank(name: str, run: FoldRun, target: int) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """keep_U, score_U (higher stays), tokens seen, and what else is to be recorded."""
    method, model, units, calibration = run.method, run.model, run.units, run.calibration
    protected_U, tie_U, more = protected(method, units), None, {}
    tokens = calibration.numel()
    if name == "greedy":
        keep_U, order = greedy(
            model, units, calibration, run.loss, target, protected_U=protected_U, batch_size=method.batch_size,
            tick=run.tick,
        )  # fmt: skip
        score_U = torch.full((len(units),), float(len(order)), dtype=torch.double)
        for rank, entry in enumerate(order):
            score_U[int(entry["unit"])] = rank
        passes = sum((len(units) - rank) / 2 + 1 for rank in range(len(order)))
        return keep_U, score_U, int(passes * tokens), {"greedy": order}
    if name == "gates":
        score_U, tie_U, tokens, more = _learn_gates(run, target)
    elif name == "taylor":
        score_U = gates.one_shot(model, units, list(calibration.split(method.batch_size)), run.loss)
    elif name == "block_influence":
        score_U = importance.block_influence(model, units, calibration)
    else:
        score_U, tokens = torch.rand(len(units), generator=torch.Generator().manual_seed(method.seed)).double(), 0
    stays_U = score_U.double().clone()
    stays_U[protected_U] = float(stays_U.max()) + 1
    return masks.select(stays_U, units, target, "global", tie_break_U=tie_U), score_U, tokens, more


def _learn_gates(run: FoldRun, target: int) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Score and tie-break [U], tokens seen, and the account of the training."""
    method, model, units = run.method, run.model, run.units
    free = (~protected(method, units)).nonzero().flatten()
    cost_U = units.cost_U.double() if method.gate_cost == "params" else _operations(run)
    total = units.layer_parameters if method.gate_cost == "params" else float(cost_U.sum())
    blocks_NT = run.texts["gates"].to(next(model.parameters()).device)
    batches = shuffled(blocks_NT, method.gate_batch, seed=method.seed)
    schedule = _schedule(method)
    current: dict[str, Tensor] = {}

    def loss(g_F: Tensor, step: int) -> Tensor:
        current["g"] = torch.ones(len(units), dtype=torch.double).index_copy(0, free, g_F)
        return Distillation()(model, batches(step))["loss"]

    trained = gates.Gates(
        cost_U[free] / total, target / units.layer_parameters, schedule, loss,
        file=run.workdir / "gates.pt" if run.workdir else None, identity=states.of_gates(run),
        save_every=method.save_every,
    )  # fmt: skip
    with gates.frozen(model), gates.gated(model, units, lambda: current["g"]):
        mean_F = trained.run(run.tick)
    score_U = torch.ones(len(units), dtype=torch.double).index_copy(0, free, mean_F)
    a_U = torch.full((len(units),), math.inf, dtype=torch.double).index_copy(0, free, trained.a_U.detach().abs())
    decided = gates.polarised(gates.gate(trained.a_U.detach(), schedule.eps_at(method.gate_steps - 1)))
    more: dict[str, Any] = {"gates": trained.history, "gates_polarised": decided}
    if decided < POLARISED:
        said = f"gates did not polarise: {1 - decided:.0%} are undecided; give more gate_steps"
        more["warnings"] = [said]
        if run.report is not None:
            run.report({"message": said})
    return score_U, a_U, method.gate_steps * method.gate_batch * method.calibration_seq_len, more


def _schedule(method: FoldGPT) -> gates.Schedule:
    names = ("steps", "lr", "eps", "eps_end", "init", "dual_init", "dual_lr", "quad")
    given: dict[str, Any] = {name: getattr(method, f"gate_{name}") for name in names}
    given["lr"] = method.gate_lr or 20 / method.gate_steps
    return gates.Schedule(**given)


def _operations(run: FoldRun) -> Tensor:
    """Multiplications per token of each unit: its weights, and attention over half the context on average."""
    model, units = run.model, run.units
    flops_U = torch.zeros(len(units), dtype=torch.double)
    sizes = structure.sizes(model)
    for unit, (layer, index) in enumerate(zip(units.layer_U.tolist(), units.index_U.tolist(), strict=True)):
        attends = "layers" in units.granularity or index == 0
        heads = sizes[layer].num_heads * sizes[layer].head_dim if attends else 0
        flops_U[unit] = float(units.cost_U[unit]) + run.method.calibration_seq_len * heads
    return flops_U


def _described(units: Units, gone_U: Tensor) -> str:
    """Dropped units as their numbers in the dense model, counted from 0: "3, 7" or "3 mlp, 7 attention"."""
    words = []
    for layer, index in zip(units.layer_U[gone_U].tolist(), units.index_U[gone_U].tolist(), strict=True):
        part = f" {structure.SUBLAYERS[index]}" if "sublayers" in units.granularity else ""
        words.append(f"{layer}{part}")
    return ", ".join(words)


def _spearman(a_U: Tensor, b_U: Tensor) -> float | None:
    """Rank correlation, ties at their mean rank; None where one of them is constant."""

    def ranks(x_U: Tensor) -> Tensor:
        return ((x_U[:, None] > x_U).sum(1) + 0.5 * ((x_U[:, None] == x_U).sum(1) - 1)).double()

    both = torch.stack([ranks(a_U), ranks(b_U)])
    value = float(torch.corrcoef(both)[0, 1])
    return value if math.isfinite(value) else None
