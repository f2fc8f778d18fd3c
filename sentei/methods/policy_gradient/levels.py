"""The levels of the search, from coarse to fine: what is searched over, how it is sampled, how losses move it.

`Drops` decides what goes as a whole, `Slopes` and `Widths` search one keep-fraction per layer and kind (`Allocation`),
`Bits` one probability per unit.

Shape legend: U units, K samples, P pairs of (layer, kind).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sentei import masks, structure
from sentei.methods.policy_gradient.estimate import estimate, project, shift, sigmap, uniform

if TYPE_CHECKING:
    from sentei.methods.policy_gradient.search import Search


FAR = (1.0, 0.5, 0.25)  # how much of the way to the allocation that slopes propose is tried
FLOOR = 0.3  # of the mean slope per parameter
UNDECIDED = 0.1  # the search over units begins with this part of a layer, on either side of its border, between 0 and 1


class Level(Protocol):
    """One level of the search.

    `measure` runs the forwards of a step on this process's batch and returns their losses; `update` moves the level's
    tensors by them, the same on every process, and returns figures for the log.
    """

    steps: int
    parts: int  # of a step, that a progress bar counts
    forwards: float  # of the whole model, that a step costs
    judges: bool  # on a batch of its own, what a step proposes; and each step is evaluated

    def measure(self, step: int, turn: int) -> list[float]: ...
    def update(self, losses: list[float], step: int) -> dict[str, float]: ...
    def hard(self) -> Tensor: ...  # the keep mask [U] it stands for now
    def tensors(self) -> dict[str, Tensor]: ...  # its state, changed in place


class Allocation:
    """One keep-fraction per layer and kind; inside a layer the best units by the initial metric stay."""

    def __init__(self, search: Search):
        self.search, self.method, units = search, search.method, search.units
        found = [(layer, kind) for layer in range(units.num_layers) for kind in units.granularity]
        self.pairs = [of for layer, kind in found if len(of := units.of(layer, kind))]
        self.weight_P = torch.tensor([float(units.cost_U[of].sum()) for of in self.pairs], dtype=torch.double)
        self.kind_P = torch.tensor([int(units.kind_U[of[0]]) for of in self.pairs])
        self.layer_P = torch.tensor([int(units.layer_U[of[0]]) for of in self.pairs])
        self.rank_U = torch.zeros(len(units), dtype=torch.double)  # place in its layer, best first, in (0, 1)
        for of in self.pairs:
            order = of[search.metric_U[of].argsort(descending=True, stable=True)]
            self.rank_U[order] = (torch.arange(len(of), dtype=torch.double) + 0.5) / len(of)
        self.share = 1 - search.remove / units.total
        self.alive_P = torch.ones(len(self.pairs), dtype=torch.bool)  # what is dropped as a whole stays at 0
        self.fraction_P = self._start()

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

    def within_budget(self, fraction_P: Tensor) -> Tensor:
        """The nearest fractions that spend the budget exactly: raised beyond it, then projected back."""
        out_P = torch.where(self.alive_P, fraction_P, 0.0)
        for group in self.budgets():
            inside = group & self.alive_P
            if not inside.any():
                continue
            w = self.weight_P[inside]
            raised = fraction_P[inside] + 2 * w / w.min()
            out_P[inside] = project(raised, w, self.share * float(self.weight_P[group].sum()))
        return out_P

    def shifted(self, fraction_P: Tensor, free_P: Tensor) -> Tensor:
        """Free fractions moved up or down by the same amount, and clipped, until all together spend the budget."""
        out_P = torch.where(self.alive_P, fraction_P, 0.0)
        for group in self.budgets():
            budget = self.share * float(self.weight_P[group].sum())
            budget -= float((self.weight_P * out_P)[group & ~free_P].sum())
            inside = group & free_P & self.alive_P
            if not inside.any():
                continue
            out_P[inside] = shift(fraction_P[inside], self.weight_P[inside], budget)
        return out_P

    def budgets(self) -> list[Tensor]:
        """[P] bool for each budget: which fractions share it."""
        if self.method.budget == "family":
            return [self.kind_P == kind for kind in self.kind_P.unique()]
        return [torch.ones_like(self.kind_P, dtype=torch.bool)]

    def keep(self, fraction_P: Tensor) -> Tensor:
        """[U] bool: the mask of these fractions, exactly to the budget."""
        score_U = -self.rank_U
        for of, fraction, alive in zip(self.pairs, fraction_P.tolist(), self.alive_P.tolist(), strict=True):
            score_U[of] += fraction if alive else -2.0
        scope = "global" if self.method.budget == "global" else "family"
        return self.method.select(score_U, self.search.units, scope)

    def hard(self) -> Tensor:
        return self.keep(self.fraction_P)


class Drops:
    """Which sub-layers or blocks go as a whole, inside the same budget as heads and channels.

    Each is dropped alone from the dense model, everything below it run only once: a sweep over all of them costs about
    half as many forwards. In the order of what their loss is per parameter, masks without the first 1, 2, 3, 4, 6, 8,
    ... of them, where the others share what the budget leaves, are judged on text that the sweep has not seen; so is
    the mask that drops none.
    """

    judges = True

    def __init__(self, search: Search, allocation: Allocation):
        self.search, self.allocation = search, allocation
        self.steps = int(search.method.whole_units is not None)
        number_P = allocation.layer_P if search.method.whole_units == "layers" else torch.arange(len(allocation.pairs))
        self.groups = [number_P == number for number in number_P.unique()]
        self.parts = len(self.groups)
        counts = {0, *(2**i for i in range(16)), *(3 * 2**i for i in range(16))}
        self.counts = sorted(count for count in counts if count < len(self.groups))
        self.sweep = 1 + sum(search.cost_from(int(allocation.layer_P[group].min())) for group in self.groups)
        self.forwards = self.sweep + len(self.counts)
        self.order: list[int] = []

    def measure(self, step: int, turn: int) -> list[float]:
        search, allocation = self.search, self.allocation
        search.ask_dense(turn, -1 - turn)
        dense_U = torch.ones(len(search.units), dtype=torch.bool)
        losses: list[float] = []
        inputs = masks.layer_inputs(search.run.model, lambda: losses.append(search.loss(dense_U, turn)))
        for number, group in enumerate(self.groups):
            without_U = dense_U.clone()
            for pair in group.nonzero().flatten().tolist():
                without_U[allocation.pairs[pair]] = False
            with search.from_layer(int(allocation.layer_P[group].min()), inputs):
                losses.append(search.loss(without_U, turn))
            search.tick("searching: whole units", number)
        del inputs  # of every layer: held no longer than needed
        rise = torch.tensor([loss - losses[0] for loss in losses[1:]], dtype=torch.double)
        rise /= torch.tensor([float(allocation.weight_P[group].sum()) for group in self.groups])
        self.order = search.mean(torch.where(torch.isfinite(rise), rise, math.inf)).argsort(stable=True).tolist()
        self.counts = [count for count in self.counts if self._affordable(self._alive(count))]
        self.forwards = self.sweep + len(self.counts)
        return losses + [self._judged(count, -1 - turn) for count in self.counts]

    def _judged(self, count: int, turn: int) -> float:
        before_P = self.allocation.alive_P.clone()
        self.allocation.alive_P.copy_(self._alive(count))
        try:
            return self.search.loss(self.allocation.keep(self._shared_out()), turn)
        finally:
            self.allocation.alive_P.copy_(before_P)

    def _alive(self, count: int) -> Tensor:
        alive_P = torch.ones_like(self.allocation.alive_P)
        for group in self.order[:count]:
            alive_P &= ~self.groups[group]
        return alive_P

    def _affordable(self, alive_P: Tensor) -> bool:
        """No more is dropped than the budget asks for."""
        allocation = self.allocation
        return all(
            float(allocation.weight_P[group & ~alive_P].sum())
            <= (1 - allocation.share) * float(allocation.weight_P[group].sum())
            for group in allocation.budgets()
        )

    def _shared_out(self) -> Tensor:
        return self.allocation.shifted(self.allocation.fraction_P, self.allocation.alive_P)

    def update(self, losses: list[float], step: int) -> dict[str, float]:
        tried = torch.tensor(losses[1 + len(self.groups) :], dtype=torch.double)
        tried = self.search.mean(torch.where(torch.isfinite(tried), tried, 1e9))
        best = int(tried.argmin())
        self.allocation.alive_P.copy_(self._alive(self.counts[best]))
        self.allocation.fraction_P.copy_(self._shared_out())
        return {"dropped": self.counts[best], "gain": float(tried[0] - tried[best])}

    def hard(self) -> Tensor:
        return self.allocation.hard()

    def tensors(self) -> dict[str, Tensor]:
        return {"alive": self.allocation.alive_P, "fraction": self.allocation.fraction_P}


class Slopes:
    """Slopes one by one: how the loss answers when a single fraction gives way, everything below it run only once.

    A random direction mixes the effects of all fractions; here they come apart, and a forward starts at the layer that
    changes, so that a sweep over P fractions costs about P / 2 forwards. Taking the loss as a sum of
    a_p exp(-rate f_p), each measured slope gives one estimate of a_p wherever f_p stood, and the estimates of all
    sweeps are averaged. The allocation that this model says is best has equal slopes per parameter:
    f_p = (log(a_p / w_p) - v) / rate, with v from the budget. How far to go there, and whether heads go along, the
    losses of a few masks on the way decide, staying put among them: slopes are noisy and effects do not quite add up.
    """

    judges = True

    def __init__(self, search: Search, allocation: Allocation):
        self.search, self.method, self.allocation = search, search.method, allocation
        self.steps, self.parts = self.method.slope_sweeps, len(allocation.pairs)
        self.sum_P = torch.zeros(len(allocation.pairs), dtype=torch.double)
        self.count = torch.zeros(1, dtype=torch.double)
        sizes_P = torch.tensor([len(of) for of in allocation.pairs], dtype=torch.double)
        self.delta_P = torch.clamp(1 / sizes_P, min=self.method.slope_delta)  # at least one unit
        heads_P = allocation.kind_P == structure.KINDS.index("heads")
        self.free = [torch.ones_like(heads_P)] if heads_P.all() or not heads_P.any() else [~heads_P, heads_P >= 0]
        self.forwards = 2 + sum(map(search.cost_from, allocation.layer_P.tolist())) + len(FAR) * len(self.free)
        self.sample_P, self.ways = self.sum_P, [allocation.fraction_P]  # of the step under way

    def measure(self, step: int, turn: int) -> list[float]:
        """The batch's loss as it is and with each fraction lowered alone; another batch's, with what is proposed."""
        search, allocation = self.search, self.allocation
        search.ask_dense(turn, -1 - turn)
        keep_U = self.hard()
        losses: list[float] = []
        inputs = masks.layer_inputs(search.run.model, lambda: losses.append(search.loss(keep_U, turn)))
        for pair, of in enumerate(allocation.pairs):
            less_U = keep_U.clone()
            kept = of[keep_U[of]]
            worst_first = kept[allocation.rank_U[kept].argsort(descending=True)]
            less_U[worst_first[: round(float(self.delta_P[pair]) * len(of))]] = False
            with search.from_layer(int(allocation.layer_P[pair]), inputs):
                losses.append(search.loss(less_U, turn))
            search.tick("searching: slopes", step * self.parts + pair)
        del inputs  # of every layer: held no longer than needed
        self._propose(losses)
        # Judged on text that the slopes have not seen: they fit their own batch far better than any other.
        return losses + [search.loss(allocation.keep(way_P), -1 - turn) for way_P in self.ways]

    def _propose(self, losses: list[float]) -> None:
        allocation, rate = self.allocation, self.method.slope_rate
        losses_P = torch.tensor(losses[1:], dtype=torch.double)
        kept_P = self._kept_fraction()
        taken_P = torch.minimum(self.delta_P, kept_P)  # a pair with nothing left has no slope: it counts as flat
        slope_P = torch.where(taken_P > 0, (losses_P - losses[0]) / taken_P.clamp_min(1e-9), 0.0)
        finite_P = torch.isfinite(slope_P)  # a model that breaks when a layer gives way needs that layer most
        slope_P = torch.where(finite_P, slope_P, slope_P[finite_P].max() if finite_P.any() else 0.0)
        self.sample_P = self.search.mean(slope_P / allocation.weight_P * torch.exp(rate * (kept_P - taken_P / 2)))
        mean_P = (self.sum_P + self.sample_P) / (self.count + 1)
        # A slope may come out near zero or negative by chance: no layer is taken for worth less than this.
        log_P = mean_P.clamp_min(float(FLOOR * mean_P.clamp_min(0).mean()) + 1e-300).log()
        now_P = allocation.fraction_P.clone()
        self.ways = [now_P]
        for free_P in self.free:
            goal_P = allocation.shifted(torch.where(free_P, log_P / rate, now_P), free_P)
            self.ways += [now_P + far * (goal_P - now_P) for far in FAR]

    def update(self, losses: list[float], step: int) -> dict[str, float]:
        tried = torch.tensor(losses[1 + len(self.allocation.pairs) :], dtype=torch.double)
        tried = self.search.mean(torch.where(torch.isfinite(tried), tried, 1e9))
        best = int(tried.argmin())
        self.sum_P += self.sample_P
        self.count += 1
        self.allocation.fraction_P.copy_(self.ways[best])
        return {"way": best, "gain": float(tried[0] - tried[best])}

    def _kept_fraction(self) -> Tensor:
        keep_U = self.hard()
        return torch.tensor([float(keep_U[of].double().mean()) for of in self.allocation.pairs], dtype=torch.double)

    def hard(self) -> Tensor:
        return self.allocation.hard()

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum_P, "count": self.count, "fraction": self.allocation.fraction_P}


class Widths:
    """All keep-fractions at once, along random directions.

    With e ~ N(0, 1) per fraction, (L(f + sigma e) - L(f - sigma e)) e is, up to a factor, an unbiased estimate of the
    slope of the smoothed loss (parameter-exploring policy gradients, 10.1016/j.neunet.2009.12.004). The difference is
    divided by its own running size, so that `coarse_lr` is the typical move whatever the model and the budget.
    """

    judges = False
    parts = 1

    def __init__(self, search: Search, allocation: Allocation):
        self.search, self.method, self.allocation = search, search.method, allocation
        self.steps, self.forwards = self.method.coarse_steps, 2.0
        self.scale = torch.zeros(1, dtype=torch.double)

    def _noise(self, step: int) -> Tensor:
        """[P] standard normal, of this process and step."""
        number, count = step * self.search.ranks + self.search.rank, len(self.allocation.pairs)
        u = [uniform(self.method.seed, number, sample, count).double() for sample in (0, 1)]
        return (-2 * u[0].log()).sqrt() * (2 * math.pi * u[1]).cos()

    def sample(self, step: int) -> list[Tensor]:
        allocation = self.allocation
        shift_P = self.method.coarse_sigma * self._noise(step)
        return [allocation.keep(allocation.within_budget(allocation.fraction_P + sign * shift_P)) for sign in (1, -1)]

    def measure(self, step: int, turn: int) -> list[float]:
        self.search.ask_dense(turn)
        return [self.search.loss(keep_U, turn) for keep_U in self.sample(step)]

    def update(self, losses: list[float], step: int) -> dict[str, float]:
        lr = self.method.coarse_lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        difference = losses[0] - losses[1]
        difference = difference if math.isfinite(difference) else 0.0
        size = float(self.search.mean(torch.tensor([abs(difference)], dtype=torch.double)))
        scale = float(self.scale)
        self.scale.fill_(0.9 * scale + 0.1 * size if scale and size else scale or size)
        move = max(-2.0, min(2.0, difference / (float(self.scale) + 1e-12)))
        move_P = self.search.mean(move * self._noise(step))
        fraction_P = self.allocation.fraction_P
        fraction_P.copy_(self.allocation.within_budget(fraction_P - lr * move_P))
        return {"lr": lr, "difference": difference}

    def hard(self) -> Tensor:
        return self.allocation.hard()

    def tensors(self) -> dict[str, Tensor]:
        return {"fraction": self.allocation.fraction_P, "scale": self.scale}


class Bits:
    """Fine level, the paper's: a keep-probability per unit, or per run of `channel_group` like channels."""

    judges = False
    parts = 1

    def __init__(self, search: Search, allocation: Allocation | None):
        self.search, self.method, units = search, search.method, search.units
        self.allocation = allocation
        self.steps, self.forwards = self.method.steps, float(self.method.samples)
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
        self.s = torch.zeros(count, dtype=torch.double)
        everything = [torch.ones(count, dtype=torch.bool)]
        for group in everything if self.method.whole else self._groups():  # one unit a layer has no spread of its own
            self.s[group] = sigmap(metric[group], ratio)
        self.budgets = self._budgets(ratio)
        self.s = self._within_budget(self.s)
        self.baseline = torch.full((1,), math.nan, dtype=torch.double)
        self.spread = torch.zeros(1, dtype=torch.double)  # of the losses of one batch's masks, running mean

    def _groups(self) -> list[Tensor]:
        """[bits] bool for each pair of layer and kind."""
        key = self.layer * len(structure.KINDS) + self.kind
        return [key == value for value in key.unique()]

    def _budgets(self, ratio: float) -> list[tuple[Tensor, float]]:
        """Which bits share a budget, [bits] bool, and how many parameters it is."""
        if self.method.shape == "uniform":  # all layers end alike: each keeps, of each kind, what whole units allow
            kept_U = self.search.units.cost_U.double() * self.hard()
            kept = torch.zeros_like(self.s).index_add(0, self.bit_U, kept_U)
            return [(group, float(kept[group].sum())) for group in self._groups()]
        if self.method.budget == "global":
            return [(torch.ones_like(self.kind, dtype=torch.bool), ratio * float(self.weight.sum()))]
        groups = [self.kind == kind for kind in self.kind.unique()]
        return [(group, ratio * float(self.weight[group].sum())) for group in groups]

    def start_from_allocation(self) -> None:
        """Begin where the coarse levels ended: the units on the border of a layer are open, all others decided.

        A unit at the border has s = 1/2 in every layer, and s rises by the same slope towards the better ones, so that
        the units with the highest s are the allocation's.
        """
        assert self.allocation is not None
        rank = torch.zeros_like(self.s).index_add(0, self.bit_U, self.allocation.rank_U) / self.bit_U.bincount()
        fraction = torch.zeros_like(self.s)
        for group, its in zip(self._groups(), self._per_group(self.allocation.fraction_P).tolist(), strict=True):
            fraction[group] = its
        z = 0.5 + 0.5 * (fraction - rank) / UNDECIDED
        self.s.zero_()
        for group, budget in self.budgets:
            inside = group & ~self._dropped()
            if inside.any():
                self.s[inside] = shift(z[inside], self.weight[inside], budget)

    def _per_group(self, x_P: Tensor) -> Tensor:
        assert self.allocation is not None
        return x_P[(self.allocation.layer_P * len(structure.KINDS) + self.allocation.kind_P).argsort()]

    def _dropped(self) -> Tensor:
        """[bits] bool: what has gone as a whole and stays away."""
        dropped = torch.zeros(len(self.first), dtype=torch.bool)
        if self.allocation is not None and not self.allocation.alive_P.all():
            for group, alive in zip(self._groups(), self._per_group(self.allocation.alive_P).tolist(), strict=True):
                dropped[group] = not alive
        return dropped

    def _within_budget(self, z: Tensor, floor: float = 0.0) -> Tensor:
        out, alive = torch.zeros_like(z), ~self._dropped()
        for group, budget in self.budgets:
            inside = group & alive
            if inside.any():
                weight = self.weight[inside]
                out[inside] = project(z[inside], weight, budget, min(floor, 0.5 * budget / float(weight.sum())))
        return out

    def _bits(self, step: int) -> Tensor:
        """[K, bits] the masks of this process and step."""
        number, count = step * self.search.ranks + self.search.rank, len(self.s)
        if self.method.estimator == "antithetic":
            pairs = [uniform(self.method.seed, number, k, count) for k in range(self.method.samples // 2)]
            u = torch.stack([each for u in pairs for each in (u, 1 - u)])
        else:
            u = torch.stack([uniform(self.method.seed, number, k, count) for k in range(self.method.samples)])
        return u < self.s

    def measure(self, step: int, turn: int) -> list[float]:
        self.search.ask_dense(turn)
        return [self.search.loss(bits_U, turn) for bits_U in self._bits(step)[:, self.bit_U]]

    def update(self, losses: list[float], step: int) -> dict[str, float]:
        method = self.method
        losses_K = torch.tensor(losses, dtype=torch.double)
        finite_K = losses_K[torch.isfinite(losses_K)]
        # Mean loss and whether there is one, over all processes: a common baseline.
        told = torch.tensor([float(finite_K.mean()) if len(finite_K) else 0.0, float(len(finite_K) > 0)])
        total, share = self.search.mean(told.double()).tolist()
        if share:
            mean, window = total / share, method.baseline_window
            if math.isnan(float(self.baseline)):
                self.baseline.fill_(mean)
            self.baseline.mul_(1 - 1 / window).add_(mean / window)  # updated before it is used, as in the authors' code
        spread = float(finite_K.std()) if len(finite_K) > 1 else 0.0
        spread = float(self.search.mean(torch.tensor([spread], dtype=torch.double)))
        self.spread.mul_(0.99).add_(0.01 * spread) if float(self.spread) else self.spread.fill_(spread)
        scale = 1.0  # a reward of any size moves s as far as a loss whose masks differ by 0.1 nats
        if method.resolved_reward_scale == "std" and float(self.spread):
            scale = 0.1 / float(self.spread)
        bits_KU = self._bits(step).double()
        g = estimate(
            method.estimator, bits_KU, self.s, losses_K * scale, float(self.baseline) * scale,
            method.baseline_window, method.phi_eps,
        ) if len(finite_K) else torch.zeros_like(self.s)  # fmt: skip
        lr = (method.lr or 30 / self.steps) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        floor = method.score_floor * (1 - (step + 1) / self.steps)
        self.s.copy_(self._within_budget(self.s - lr * self.search.mean(g), floor))
        return {
            "lr": lr, "baseline": float(self.baseline), "mask_spread": spread,
            "kept": float((self.s * self.weight).sum() / self.weight.sum()),
            "undecided": float((4 * self.s * (1 - self.s)).mean()),
            "at_floor": int((self.s <= floor).sum()), "at_one": int((self.s == 1).sum()),
        }  # fmt: skip

    def hard(self) -> Tensor:
        scope = "global" if self.method.budget == "global" else "family"
        score = self.s - 2.0 * self._dropped()
        return self.method.select(score[self.bit_U], self.search.units, scope, tie_break_U=self.search.metric_U)

    def tensors(self) -> dict[str, Tensor]:
        return {"s": self.s, "baseline": self.baseline, "spread": self.spread}
