"""The six criteria: what is measured of each unit while a round trains, and how measurements become percentiles.

Every criterion is a mean over the unit's weights, so that a unit's size does not matter, and each of its matrices
counts relative to the same role in the other units: lora_A is large from the start, lora_B begins at 0, and without
this the one would drown the other. Weights count in units of their matrix's first standard deviation, where it has
one: lora_A starts the smaller the wider its input is, and widths differ in a pruned model. Gradients are taken per
optimiser step, before clipping; their absolute values are averaged over steps, so that steps of opposite sign do not
cancel. Biases are trained but not scored.

Legend: U units, S criteria; d is a score turned so that larger means "rather remove it".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sentei import adapters
from sentei.adapters import Bottleneck, Unit

CRITERIA = ("weight", "zeros", "threshold", "activation", "sensitivity", "gradient")
THRESHOLDS = {"relative": 0.05, "absolute": 1e-6}  # by mode; of the criterion "threshold"
_SPREAD = 1e-12  # of the largest value: less is no difference


class Recorder:
    """Measures living units during a round; `close()` takes its hooks out.

    Call `begin(mask)` before each forward, `gradients()` after each backward pass of a whole step.
    """

    def __init__(self, model: nn.Module, living: Sequence[Unit], *, init: str, threshold: float, threshold_mode: str):
        self.model, self.living, self.init = model, living, init
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.scoring = False
        self.steps = self.skipped = 0
        self._mask_BT: Tensor | None = None
        self._matrices = {unit.id: adapters.matrices(model, unit) for unit in living}
        # Standard deviation of each matrix at the start; 1 for those that start at 0.
        self._first = {u.id: [math.sqrt(v) or 1.0 for v in adapters.init_variances(u, init)] for u in living}
        # Sums start at 0 for every unit and every round.
        self._gradient = {unit.id: [0.0] * len(self._matrices[unit.id]) for unit in living}
        self._sensitivity = {unit.id: [0.0] * len(self._matrices[unit.id]) for unit in living}
        self._activation = {unit.id: [0.0] * len(unit.modules) for unit in living}
        self._forwards = {unit.id: [0] * len(unit.modules) for unit in living}
        self._seen: list[tuple[str, int, float]] = []  # activations of the step that is under way
        self._host_mean = dict.fromkeys((name for unit in living for name in unit.modules), 0.0)
        self._hooks: list[Any] = []
        for unit in living:
            for place, module in enumerate(adapters.modules(model, unit)):
                self._watch(unit, place, module)

    def begin(self, mask_BT: Tensor | None) -> None:
        """The attention mask of the coming forward: padding is not measured."""
        self._mask_BT = mask_BT

    def gradients(self) -> None:
        """One optimiser step's gradients, accumulated and reduced, before clipping and before the step."""
        if not self.scoring:
            return
        seen, self._seen = self._seen, []
        means: dict[str, tuple[list[float], list[float]]] = {}
        for unit in self.living:
            gradient, sensitivity = [], []
            for role, weight in self._matrices[unit.id]:
                g = unit.own(role, torch.zeros_like(weight) if weight.grad is None else weight.grad)
                gradient.append(float(g.abs().mean()))
                sensitivity.append(float((unit.own(role, weight.detach()) * g).abs().mean()))
            means[unit.id] = gradient, sensitivity
        if not all(math.isfinite(x) for pair in means.values() for values in pair for x in values):
            self.skipped += 1
            return
        self.steps += 1
        for name, place, activation in seen:
            self._activation[name][place] += activation
            self._forwards[name][place] += 1
        for name, (gradient, sensitivity) in means.items():
            self._gradient[name] = [a + b for a, b in zip(self._gradient[name], gradient, strict=True)]
            self._sensitivity[name] = [a + b for a, b in zip(self._sensitivity[name], sensitivity, strict=True)]

    @torch.no_grad()
    def scores(self) -> dict[str, dict[str, float]]:
        """Criterion -> unit id -> score, as of now. ValueError where too few steps were finite."""
        seen = self.steps + self.skipped
        if self.skipped > 0.1 * seen:
            raise ValueError(f"the loss was not finite in {self.skipped} of {seen} batches; lower lr or use bf16")
        if self.steps < 2:
            raise ValueError(f"scores need at least 2 batches, there was {self.steps}; give more rows or more steps")
        activation = self._reduced_activation()
        weight, zeros, gradient, sensitivity = {}, {}, {}, {}
        for unit in self.living:
            values = [unit.own(role, weights.detach()).double() for role, weights in self._matrices[unit.id]]
            first = self._first[unit.id]
            weight[unit.id] = [float((w / std).square().mean()) for w, std in zip(values, first, strict=True)]
            zeros[unit.id] = sum(float((value != 0).double().mean()) for value in values) / len(values)
            gradient[unit.id] = [x / self.steps for x in self._gradient[unit.id]]
            means = zip(self._sensitivity[unit.id], first, strict=True)
            sensitivity[unit.id] = [x / self.steps / std for x, std in means]
        roles = {unit.id: [role for role, _ in self._matrices[unit.id]] for unit in self.living}
        return {
            "weight": relative(weight, roles, self.living),
            "zeros": zeros,
            "threshold": self._below_threshold(),
            "activation": activation,
            "sensitivity": relative(sensitivity, roles, self.living),
            "gradient": relative(gradient, roles, self.living),
        }

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self.model.modules():
            if isinstance(module, Bottleneck):
                module.watch = None

    def _watch(self, unit: Unit, place: int, module: Any) -> None:
        def add(added: Tensor, host_mean: float) -> None:
            if self.scoring and host_mean > 0:
                self._seen.append((unit.id, place, self._mean(added) / host_mean))

        if isinstance(module, Bottleneck):
            module.watch = lambda added, host: add(added, self._mean(host) if self.scoring else 0.0)
            return
        name, scaling, output_ranks = unit.modules[place], module.scaling["default"], module.r["default"]

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if self.scoring:
                self._host_mean[name] = self._mean(output.detach())

        def product(up: nn.Module, inputs: Any, output: Tensor) -> None:
            if not self.scoring:
                return
            if (unit.start, unit.rank) != (0, output_ranks):  # a slice's part of the product
                inner_BTr = inputs[0].detach()[..., unit.start : unit.rank]
                output = nn.functional.linear(inner_BTr, unit.own("up.B", up.weight.detach()))
            # Of noise, a sum over ranks grows with the root of their number, and the narrow slices would all go first.
            add(scaling * output.detach(), self._host_mean[name] * math.sqrt(unit.rank - unit.start))

        self._hooks.append(module.base_layer.register_forward_hook(keep))
        self._hooks.append(module.lora_B["default"].register_forward_hook(product))

    def _mean(self, output_BTH: Tensor) -> float:
        """Mean absolute value over what is not padding."""
        size_BT = output_BTH.float().abs().mean(-1)
        mask_BT = self._mask_BT
        if mask_BT is None or mask_BT.shape != size_BT.shape:
            return float(size_BT.mean())
        return float((size_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1))

    def _reduced_activation(self) -> dict[str, float]:
        """Mean over a unit's modules; over all processes where there are several."""
        means = torch.tensor(
            [
                sum(
                    total / max(count, 1)
                    for total, count in zip(self._activation[u.id], self._forwards[u.id], strict=True)
                )
                / len(u.modules)
                for u in self.living
            ],
            dtype=torch.float64,
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = next(self.model.parameters()).device
            means = means.to(device, torch.float32)
            torch.distributed.all_reduce(means)
            means = means.cpu().double() / torch.distributed.get_world_size()
        return dict(zip((unit.id for unit in self.living), means.tolist(), strict=True))

    def _below_threshold(self) -> dict[str, float]:
        relative_to_role = self.threshold_mode == "relative"
        sizes: dict[str, list[tuple[str, Tensor]]] = {}
        squares: dict[tuple[str, str], list[float]] = {}
        for unit in self.living:
            sizes[unit.id] = []
            for (role, weights), first in zip(self._matrices[unit.id], self._first[unit.id], strict=True):
                size = unit.own(role, weights.detach()).double().abs() / (first if relative_to_role else 1.0)
                sizes[unit.id].append((role, size))
                squares.setdefault((unit.kind, role), []).append(float(size.square().mean()))
        limits = {
            key: self.threshold * (math.sqrt(sum(of_role) / len(of_role)) if relative_to_role else 1.0)
            for key, of_role in squares.items()
        }
        below = {}
        for unit in self.living:
            shares = [float((size < limits[unit.kind, role]).double().mean()) for role, size in sizes[unit.id]]
            below[unit.id] = sum(shares) / len(shares)
        return below


def relative(
    means: Mapping[str, Sequence[float]], roles: Mapping[str, Sequence[str]], living: Sequence[Unit]
) -> dict[str, float]:
    """Score of each unit: the mean of its matrices' values, each divided by the mean of its role among the kind.

    A role whose mean is 0 says nothing and is left out; a unit without any other role scores 0.
    """
    of_role: dict[tuple[str, str], list[float]] = {}
    for unit in living:
        for role, value in zip(roles[unit.id], means[unit.id], strict=True):
            of_role.setdefault((unit.kind, role), []).append(value)
    mean_of = {key: sum(values) / len(values) for key, values in of_role.items()}
    scores = {}
    for unit in living:
        parts = [
            value / mean_of[unit.kind, role]
            for role, value in zip(roles[unit.id], means[unit.id], strict=True)
            if mean_of[unit.kind, role]
        ]
        scores[unit.id] = sum(parts) / len(parts) if parts else 0.0
    return scores


def prunability(criterion: str, score: float) -> float:
    """d: few weights near 0 speak for a unit; of everything else much does."""
    return score if criterion == "threshold" else -score


def percentiles(values: Sequence[float]) -> list[float]:
    """(average rank - 1/2) / N of each value, in (0, 1); equal values share theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = ((start + end) / 2 + 0.5) / len(values)
        start = end + 1
    return found


def abstains(values: Sequence[float]) -> bool:
    """Does a criterion tell these units apart?"""
    return max(values) - min(values) <= _SPREAD * max(abs(value) for value in values)
