"""Structural pruning learned from forward passes only, by policy gradient.

"Optimization-based Structural Pruning for Large Language Models without Back-Propagation", arXiv 2406.10576.

Every removable unit i has a keep-probability s_i; masks are sampled, the frozen model runs forward under them, and s
moves along a REINFORCE estimate under the parameter budget sum_i w_i s_i <= R. No gradient is taken, no weight changes.

1. Score the units once; that is the start                                              `_initial_metric`, `sigmap`
2. Coarse level (ours): each layer and kind has one keep-fraction, the order inside a
   layer is the initial one; the fractions follow an antithetic Gaussian estimate       `_Widths`
3. Fine level (the paper's): in each step, K masks m ~ Bernoulli(s) on one batch        `_Bits`
   a. losses L_k of the masked model, baseline d = moving average of their mean         `PolicyGradient._search`
   b. phi = (m - s) / sqrt(s (1 - s)),  g = sum_k (L_k - d) phi_k / (K - 1)             `estimate`
   c. s <- project(s - lr g) onto 0 <= s <= 1, sum w s <= R                             `project`
4. Keep the units with the highest s, exactly to the budget                             `masks.select`
5. Cut them out; removed units may leave their mean activation, or a refit              `Structural.cut`

Now and then the hard mask is evaluated on held-out text; the best one seen wins, the start included. The state is saved
every `save_every` steps, and randomness depends on (seed, step, sample) alone, so a resumed run continues exactly.

Shape legend: U units, K samples, P pairs of (layer, kind).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sentei import importance, masks, structure
from sentei.methods import option
from sentei.methods.structural import Run, Structural
from sentei.train import mix

ESTIMATORS = ("moving_average", "leave_one_out", "antithetic", "no_baseline")
INITS = ("wanda", "flap", "magnitude", "taylor", "block_influence", "random")

# The authors' own settings (their scripts for 7B models): single channels, two separate budgets, no coarse level.
PAPER: dict[str, Any] = {
    "coarse_steps": 0, "steps": 15_000, "lr": 2e-3, "budget": "family", "channel_group": 1, "compensate": "none",
    "calibration_seq_len": 1024, "eval_every": 1000, "save_every": 100,
}  # fmt: skip


@dataclass(frozen=True)
class PolicyGradient(Structural):
    """Learn which units to keep, from forward passes only."""

    paper: ClassVar[str] = "arXiv 2406.10576"

    preset: str = option("ours", "ours, or paper: the authors' settings (any field that is given still wins)")
    compensate: str = option(
        "auto",
        "none, mean or least-squares; auto: mean for heads and channels; unless none, the search fills in the means",
    )
    init: str = option(
        "auto", f"initial scores: {', '.join(INITS)}; auto: wanda, or block_influence for whole blocks", "authors' code"
    )
    budget: str = option("global", "global: all units compete; family: heads and channels lose the same fraction")
    coarse_steps: int = option(50, "antithetic pairs of the search over keep-fractions; 0 leaves it out")
    coarse_sigma: float = option(0.05, "standard deviation of the perturbed keep-fractions")
    coarse_lr: float = option(0.02, "typical move of a keep-fraction in one step, cosine to 0")
    steps: int = option(0, "steps of the search over units", "15,000 in the authors' scripts")
    samples: int = option(2, "masks per step, K", "authors' scripts")
    estimator: str = option("moving_average", f"one of {', '.join(ESTIMATORS)}", "moving_average: authors' code")
    baseline_window: int = option(5, "window T of the moving-average baseline", "authors' scripts")
    lr: float | None = option(None, "step size of s, cosine to 0; default 30 / steps", "2e-3 at 15,000 steps")
    batch_size: int = option(8, "blocks per forward", "authors' scripts")
    seq_len: int = option(128, "tokens per block", "authors' scripts")
    phi_eps: float = option(1e-7, "keeps phi finite at s = 0 and s = 1", "authors' code")
    channel_group: int = option(32, "channels that share one bit in the search over units; 1 in the authors' code")
    eval_every: int = option(10, "steps between evaluations of the hard mask on held-out text")
    eval_samples: int = option(16, "held-out blocks of those evaluations")
    save_every: int = option(10, "steps between saves of the state, when there is a work folder")
    keep_best: bool = option(True, "return the best hard mask evaluated, the start included, instead of the last")

    def __post_init__(self) -> None:
        if self.preset not in ("ours", "paper"):
            raise ValueError(f"preset is ours or paper; got {self.preset!r}")
        if self.preset == "paper":
            for name, value in PAPER.items():
                if getattr(self, name) == self.__dataclass_fields__[name].default:
                    object.__setattr__(self, name, value)

    def check(self) -> None:
        super().check()
        for name, value, known in (("estimator", self.estimator, ESTIMATORS), ("init", self.resolved_init, INITS)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}")
        if self.budget not in ("global", "family"):
            raise ValueError(f"budget is global or family; got {self.budget!r}")
        if self.samples < 2:
            raise ValueError("samples must be at least 2: the estimate divides by samples - 1")
        if self.estimator == "antithetic" and self.samples % 2:
            raise ValueError(f"antithetic needs an even number of samples; got {self.samples}")
        for name in ("batch_size", "seq_len", "channel_group", "eval_every", "eval_samples", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.whole != (self.resolved_init == "block_influence") and self.init != "random":
            raise ValueError(f"init={self.init} does not score {self.granularity}; block_influence scores whole blocks")
        if self.whole and not self.steps:
            raise ValueError(f"{self.granularity} have no widths to search over: give steps, for example 200")

    @property
    def resolved_init(self) -> str:
        return ("block_influence" if self.whole else "wanda") if self.init == "auto" else self.init

    @torch.inference_mode()
    def choose(self, run: Run) -> tuple[Tensor, dict[str, Any]]:
        search = _Search(self, run)
        keep_U = search.best_U() if search.remove > 0 else torch.ones(len(run.units), dtype=torch.bool)
        return keep_U, search.account()


def sigmap(metric: Tensor, ratio: float) -> Tensor:
    """The start of s: sigmoid of the z-scored metric, shifted to mean `ratio`, clamped to [0, 1] (authors' code)."""
    s = importance.standardised(metric.double()).sigmoid()
    return (s + ratio - s.mean()).clamp(0, 1)


def project(z: Tensor, weight: Tensor, budget: float) -> Tensor:
    """The point nearest to z with 0 <= s <= 1 and sum(weight * s) <= budget.

    It is clip(z - v weight, 0, 1) with v = 0 if that fits, else the v > 0 that spends the budget exactly: bisection,
    then a closed form on the coordinates strictly inside.

    Args:
        z, weight: [n] float64; weight positive.
        budget: in units of weight.
    """
    scale = weight.mean()
    w, budget = weight / scale, budget / float(scale)

    def spent(v: float) -> float:
        return float((w * (z - v * w).clamp(0, 1)).sum())

    if spent(0.0) <= budget:
        return z.clamp(0, 1)
    low, high = 0.0, float((z / w).max())
    for _ in range(64):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    y = z - high * w
    inside, full = (y > 0) & (y < 1), y >= 1
    if inside.any():
        v = float(((w * z)[inside].sum() + w[full].sum() - budget) / w[inside].square().sum())
        if low <= v and spent(v) <= budget:
            return (z - v * w).clamp(0, 1)
    return y.clamp(0, 1)


def estimate(
    name: str, bits_KU: Tensor, s_U: Tensor, losses_K: Tensor, baseline: float, window: int, eps: float = 1e-7
) -> Tensor:
    """The preconditioned REINFORCE estimate g of one step, by the named estimator.

    All have the same mean c sqrt(s (1 - s)) dE[L]/ds with c = (K - 1/T) / (K - 1), so one step size serves all. In
    "antithetic" samples 2j and 2j + 1 are a pair made from u and 1 - u, and the weight is DisARM's (arXiv 2006.10680).
    Samples whose loss is not finite are left out of the sum; the divisor stays.
    """
    count = len(losses_K)
    phi_KU = (bits_KU - s_U) / ((s_U + eps) * (1 - s_U + eps)).sqrt()
    c = (count - 1 / window) / (count - 1)
    finite = torch.isfinite(losses_K)
    losses_K = torch.where(finite, losses_K, torch.zeros_like(losses_K))
    if name == "antithetic":
        paired = (finite[0::2] & finite[1::2]).double()
        difference = (losses_K[0::2] - losses_K[1::2]) * paired
        spread = torch.maximum(s_U, 1 - s_U) / ((s_U + eps) * (1 - s_U + eps)).sqrt()
        pairs_KU = difference[:, None] * (bits_KU[0::2] - bits_KU[1::2]) * spread
        return 0.5 * c * pairs_KU.mean(0)
    if name == "leave_one_out":
        weight_K, factor = losses_K - losses_K[finite].mean(), c / (count - 1)
    elif name == "no_baseline":
        weight_K, factor = losses_K, (count - 1 / window) / count / (count - 1)
    else:
        weight_K, factor = losses_K - baseline, 1 / (count - 1)
    return factor * ((weight_K * finite)[:, None] * phi_KU).sum(0)


def _uniform(seed: int, step: int, sample: int, count: int) -> Tensor:
    """[count] float32 in (0, 1), odd multiples of 2^-24: u and 1 - u are both exact and never 0 or 1."""
    generator = torch.Generator().manual_seed(mix(seed, step, sample))
    return (2 * torch.randint(0, 2**23, (count,), generator=generator) + 1).float() / 2**24


class _Level(Protocol):
    """One level of the search: what is searched over, how it is sampled, and how a step's losses move it."""

    steps: int

    def sample(self, step: int) -> list[Tensor]: ...  # keep masks [U]
    def update(self, losses: list[float], step: int) -> dict[str, float]: ...  # figures for the log
    def hard(self) -> Tensor: ...  # the keep mask it stands for now
    def tensors(self) -> dict[str, Tensor]: ...  # its state, changed in place


class _Search:
    """Runs the levels, evaluates the hard mask now and then, logs, saves and resumes."""

    def __init__(self, method: PolicyGradient, run: Run):
        self.method, self.run, self.units, self.folder = method, run, run.units, run.workdir
        self.remove = masks.removal_target(run.units, method.sparsity)
        run.blocks(2 * method.batch_size, method.seq_len)  # refuses a text too short for two batches
        blocks_NT = run.blocks(None, method.seq_len)
        self.batches = blocks_NT[: len(blocks_NT) // method.batch_size * method.batch_size].split(method.batch_size)
        self.held = run.blocks(None, method.seq_len, "validation")[: method.eval_samples]
        if not len(self.held):
            raise ValueError(f"the validation text holds no block of {method.seq_len} tokens; give more text")
        self.metric_U = self._initial_metric()  # minutes of calibration: after what may be refused
        self.fill = run.fill if method.resolved_compensate != "none" else None
        self.history: list[dict[str, Any]] = []
        self.numbers: dict[str, Any] = {"level": 0, "step": 0, "forwards": 0, "skipped": 0}
        self.best: dict[str, Tensor] = {"keep": torch.ones(len(self.units), dtype=torch.bool)}

    def account(self) -> dict[str, Any]:
        """What the record says of the search."""
        names = ("start_loss", "best_loss", "best_step", "forwards", "skipped")
        found = {name: self.numbers.get(name) for name in names}
        return found | {"improved": bool(found["best_step"]), "history": self.history}

    def best_U(self) -> Tensor:
        """[U] bool: run all levels and return the mask to cut."""
        method = self.method
        widths = None if method.whole else _Widths(self)
        bits = _Bits(self)
        levels: list[_Level] = [level for level in (widths, bits) if level is not None and level.steps]
        if method.shape == "uniform":
            levels = [level for level in levels if level is bits]  # all layers are alike: nothing to allocate
        if not levels:
            return bits.hard()
        self._resume(levels)
        if "start_loss" not in self.numbers:
            self.numbers["start_loss"] = self._evaluate(levels[0].hard(), 0)
        for number in range(self.numbers["level"], len(levels)):
            level = levels[number]
            if number and not self.numbers["step"] and widths is not None:
                bits.start_from(widths)
            self._climb(level, levels, sum(before.steps for before in levels[:number]))
            self.numbers |= {"level": number + 1, "step": 0}
        return self.best["keep"] if method.keep_best else levels[-1].hard()

    def _climb(self, level: _Level, levels: list[_Level], offset: int) -> None:
        method, numbers, total = self.method, self.numbers, sum(each.steps for each in levels)
        broken = 0
        for step in range(numbers["step"], level.steps):
            began = time.monotonic()
            losses = [self._loss(keep_U, offset + step) for keep_U in level.sample(step)]
            finite = [loss for loss in losses if math.isfinite(loss)]
            numbers["forwards"] += len(losses)
            numbers["skipped"] += len(losses) - len(finite)
            broken = 0 if finite else broken + 1
            if broken == 20:
                raise ValueError("the loss was not finite in 20 steps in a row: try --dtype float32")
            shown = [loss if math.isfinite(loss) else None for loss in losses]  # JSON knows no NaN
            record: dict[str, Any] = {"step": offset + step + 1, "losses": shown}
            if finite:
                record |= level.update(losses, step)
            numbers["step"] = step + 1
            last = step + 1 == level.steps
            if last or (step + 1) % method.eval_every == 0:
                held_loss = self._evaluate(level.hard(), offset + step + 1)
                record["held_loss"] = held_loss if math.isfinite(held_loss) else None
            record["seconds"] = time.monotonic() - began
            self.history.append(record)
            if last or (step + 1) % method.save_every == 0:
                self._save(levels)
            message = f"loss {finite[0]:.3f}, best held-out {numbers['best_loss']:.3f}" if finite else "loss not finite"
            self.run.tick(f"searching: {message}", offset + step + 1, total)

    def _loss(self, keep_U: Tensor, step: int) -> float:
        run = self.run
        order = torch.randperm(
            len(self.batches), generator=torch.Generator().manual_seed(mix(self.method.seed, step // len(self.batches)))
        )
        batch = self.batches[int(order[step % len(self.batches)])]
        with masks.sliced(run.model, self.units, keep_U, self.fill):
            return float(run.loss(run.model, batch, step))

    def _evaluate(self, keep_U: Tensor, step: int) -> float:
        with masks.sliced(self.run.model, self.units, keep_U, self.fill):
            loss = self.run.mean_loss(self.held)
        if "best_loss" not in self.numbers:
            if not math.isfinite(loss):
                raise ValueError(
                    "the start's loss on held-out text is not finite; try --dtype float32 or less sparsity"
                )
            self.numbers["best_loss"] = math.inf
        if loss < self.numbers["best_loss"]:
            self.numbers |= {"best_loss": loss, "best_step": step}
            self.best["keep"] = keep_U
        return loss

    def _initial_metric(self) -> Tensor:
        """[U] float64, higher is better: the order inside a layer, and the start of s."""
        method, model, units = self.method, self.run.model, self.units
        init = method.resolved_init
        if init == "random":
            return torch.randn(len(units), generator=torch.Generator().manual_seed(method.seed)).double()
        if init == "magnitude":
            return importance.magnitude(model, units)
        calibration = self.run.calibration
        if init == "wanda":
            return importance.wanda(model, units, calibration, self.remove / units.total, tick=self.run.tick)
        if init == "flap":
            return importance.flap(model, units, calibration)
        if init == "taylor":
            with torch.inference_mode(False), torch.enable_grad():
                return importance.taylor(model, units, calibration.clone(), self.run.loss, tick=self.run.tick)
        return importance.block_influence(model, units, calibration)

    # --- saved state -------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {"fields": asdict(self.method), "units": len(self.units), "parameters": self.units.layer_parameters}

    def _save(self, levels: list[_Level]) -> None:
        """One file, written beside the old one and moved over it: a kill at any moment leaves a whole state."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": x for i, level in enumerate(levels) for name, x in level.tensors().items()}
        tensors["best"] = self.best["keep"]
        text = json.dumps({"identity": self._identity(), "numbers": self.numbers, "history": self.history})
        temporary = self.folder / "search.tmp"
        save_file({name: x.clone().contiguous() for name, x in tensors.items()}, temporary, metadata={"state": text})
        temporary.replace(self.folder / "search.safetensors")

    def _resume(self, levels: list[_Level]) -> None:
        file = None if self.folder is None else self.folder / "search.safetensors"
        if file is None or not file.exists():
            return
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            state = json.loads(opened.metadata()["state"])
        ours = json.loads(json.dumps(self._identity()))
        if state["identity"] != ours:
            theirs = state["identity"]
            differs = [key for key in ours["fields"] if theirs["fields"].get(key) != ours["fields"][key]]
            raise ValueError(
                f"{file} belongs to another run ({', '.join(differs) or 'another model'} differs); "
                "delete it to start afresh"
            )
        tensors = load_file(file)
        self.best["keep"] = tensors["best"]
        self.numbers, self.history = state["numbers"], state["history"]
        for i, level in enumerate(levels):
            for name, x in level.tensors().items():
                x.copy_(tensors[f"{i}.{name}"])


class _Widths:
    """Coarse level: one keep-fraction per layer and kind; inside a layer the best by the initial metric stay.

    With e ~ N(0, 1) per fraction, (L(f + sigma e) - L(f - sigma e)) e is, up to a factor, an unbiased estimate of the
    slope of the smoothed loss (parameter-exploring policy gradients, 10.1016/j.neunet.2009.12.004). The difference is
    divided by its own running size, so that `coarse_lr` is the typical move whatever the model and the budget.
    """

    def __init__(self, search: _Search):
        self.search, self.method, units = search, search.method, search.units
        self.steps = self.method.coarse_steps
        found = [(layer, kind) for layer in range(units.num_layers) for kind in units.granularity]
        self.pairs = [of for layer, kind in found if len(of := units.of(layer, kind))]
        self.weight_P = torch.tensor([float(units.cost_U[of].sum()) for of in self.pairs], dtype=torch.double)
        self.kind_P = torch.tensor([int(units.kind_U[of[0]]) for of in self.pairs])
        self.fraction_P = self._start()
        self.scale = torch.zeros(1, dtype=torch.double)
        self.rank_U = torch.zeros(len(units), dtype=torch.double)  # place in its layer, best first, in (0, 1)
        for of in self.pairs:
            order = of[search.metric_U[of].argsort(descending=True, stable=True)]
            self.rank_U[order] = (torch.arange(len(of), dtype=torch.double) + 0.5) / len(of)

    def _start(self) -> Tensor:
        """Under a global budget channels pay first: a KV group is too coarse a step to take from every layer."""
        budget = float(self.search.units.total - self.search.remove)
        ratio = budget / float(self.weight_P.sum())
        fraction_P = torch.full_like(self.weight_P, ratio)
        heads = self.kind_P == structure.KINDS.index("heads")
        if self.method.budget == "global" and heads.any() and not heads.all():
            left = (budget - float(self.weight_P[heads].sum())) / float(self.weight_P[~heads].sum())
            if left > 0.25 * ratio:
                fraction_P[heads], fraction_P[~heads] = 1.0, left
        return fraction_P

    def _within_budget(self, fraction_P: Tensor) -> Tensor:
        """Spend the budget exactly: raised beyond it, then projected back."""
        groups = [torch.ones_like(self.kind_P, dtype=torch.bool)]
        if self.method.budget == "family":
            groups = [self.kind_P == kind for kind in self.kind_P.unique()]
        share = 1 - self.search.remove / self.search.units.total
        out_P = fraction_P.clone()
        for inside in groups:
            w = self.weight_P[inside]
            raised = fraction_P[inside] + 2 * w / w.min()
            out_P[inside] = project(raised, w, share * float(w.sum()))
        return out_P

    def _noise(self, step: int) -> Tensor:
        u = [_uniform(self.method.seed, step, sample, len(self.pairs)).double() for sample in (0, 1)]
        return (-2 * u[0].log()).sqrt() * (2 * math.pi * u[1]).cos()

    def _keep(self, fraction_P: Tensor) -> Tensor:
        score_U = -self.rank_U
        for of, fraction in zip(self.pairs, fraction_P.tolist(), strict=True):
            score_U[of] += fraction
        scope = "global" if self.method.budget == "global" else "family"
        return self.method.select(score_U, self.search.units, scope)

    def sample(self, step: int) -> list[Tensor]:
        shift_P = self.method.coarse_sigma * self._noise(step)
        return [self._keep(self._within_budget(self.fraction_P + sign * shift_P)) for sign in (1, -1)]

    def update(self, losses: list[float], step: int) -> dict[str, float]:
        lr = self.method.coarse_lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        difference = losses[0] - losses[1]
        if not math.isfinite(difference):
            return {"lr": lr}
        scale = float(self.scale)
        self.scale.fill_(0.9 * scale + 0.1 * abs(difference) if scale else abs(difference))
        move = max(-2.0, min(2.0, difference / (float(self.scale) + 1e-12)))
        self.fraction_P.copy_(self._within_budget(self.fraction_P - lr * move * self._noise(step)))
        return {"lr": lr, "difference": difference}

    def hard(self) -> Tensor:
        return self._keep(self.fraction_P)

    def tensors(self) -> dict[str, Tensor]:
        return {"fraction": self.fraction_P, "scale": self.scale}


class _Bits:
    """Fine level, the paper's: a keep-probability per unit, or per run of `channel_group` like channels."""

    def __init__(self, search: _Search):
        self.search, self.method, units = search, search.method, search.units
        self.steps = self.method.steps
        self.bit_U = torch.zeros(len(units), dtype=torch.long)  # which bit a unit follows
        count = 0
        for layer in range(units.num_layers):
            for kind in units.granularity:
                of = units.of(layer, kind)
                order = of[search.metric_U[of].argsort(descending=True, stable=True)]
                size = self.method.channel_group if kind == "channels" else 1
                self.bit_U[order] = count + torch.arange(len(of)) // size
                count += math.ceil(len(of) / size)
        self.first = torch.zeros(count, dtype=torch.long).index_copy(
            0, self.bit_U.flip(0), torch.arange(len(units)).flip(0)
        )
        self.weight = torch.zeros(count, dtype=torch.double).index_add(0, self.bit_U, units.cost_U.double())
        size = torch.zeros(count, dtype=torch.double).index_add(
            0, self.bit_U, torch.ones(len(units), dtype=torch.double)
        )
        metric = torch.zeros(count, dtype=torch.double).index_add(0, self.bit_U, search.metric_U.double()) / size
        self.kind, self.layer = units.kind_U[self.first], units.layer_U[self.first]
        ratio = 1 - search.remove / units.total
        s = torch.zeros(count, dtype=torch.double)
        everything = [torch.ones(count, dtype=torch.bool)]
        for group in everything if self.method.whole else self._groups():  # one unit a layer has no spread of its own
            s[group] = sigmap(metric[group], ratio)
        self.s = self._within_budget(s)
        self.baseline = torch.full((1,), math.nan, dtype=torch.double)

    def _groups(self) -> list[Tensor]:
        key = self.layer * len(structure.KINDS) + self.kind
        return [key == value for value in key.unique()]

    def start_from(self, widths: _Widths) -> None:
        """Every layer's probabilities get the mean that the coarse level found for it."""
        for group, fraction in zip(self._groups(), self._fractions(widths), strict=True):
            metric = -widths.rank_U[self.first][group]
            self.s[group] = sigmap(metric, fraction)
        self.s.copy_(self._within_budget(self.s))

    def _fractions(self, widths: _Widths) -> list[float]:
        units = self.search.units
        key_P = torch.stack([units.layer_U[of[0]] * len(structure.KINDS) + units.kind_U[of[0]] for of in widths.pairs])
        return widths.fraction_P[key_P.argsort()].tolist()

    def _within_budget(self, z: Tensor) -> Tensor:
        share = 1 - self.search.remove / self.search.units.total
        if self.method.budget == "global":
            return project(z, self.weight, share * float(self.weight.sum()))
        out = z.clone()
        for kind in self.kind.unique():
            inside = self.kind == kind
            out[inside] = project(z[inside], self.weight[inside], share * float(self.weight[inside].sum()))
        return out

    def _bits(self, step: int) -> Tensor:
        count = len(self.s)
        if self.method.estimator == "antithetic":
            pairs = [_uniform(self.method.seed, step, k, count) for k in range(self.method.samples // 2)]
            u = torch.stack([each for u in pairs for each in (u, 1 - u)])
        else:
            u = torch.stack([_uniform(self.method.seed, step, k, count) for k in range(self.method.samples)])
        return u < self.s

    def sample(self, step: int) -> list[Tensor]:
        return list(self._bits(step)[:, self.bit_U])

    def update(self, losses: list[float], step: int) -> dict[str, float]:
        method = self.method
        losses_K = torch.tensor(losses, dtype=torch.double)
        mean = float(losses_K[torch.isfinite(losses_K)].mean())
        if math.isnan(float(self.baseline)):
            self.baseline.fill_(mean)
        window = method.baseline_window
        self.baseline.mul_(1 - 1 / window).add_(mean / window)  # updated before it is used, as in the authors' code
        bits_KU = self._bits(step).double()
        g = estimate(method.estimator, bits_KU, self.s, losses_K, float(self.baseline), window, method.phi_eps)
        lr = (method.lr or 30 / self.steps) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        self.s.copy_(self._within_budget(self.s - lr * g))
        kept = float((self.s * self.weight).sum() / self.weight.sum())
        undecided = float((4 * self.s * (1 - self.s)).mean())
        return {"lr": lr, "baseline": float(self.baseline), "kept": kept, "undecided": undecided}

    def hard(self) -> Tensor:
        scope = "global" if self.method.budget == "global" else "family"
        return self.method.select(self.s[self.bit_U], self.search.units, scope, tie_break_U=self.search.metric_U)

    def tensors(self) -> dict[str, Tensor]:
        return {"s": self.s, "baseline": self.baseline}
