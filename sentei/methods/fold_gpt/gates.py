"""Gates that polarise under a budget: which blocks the model can do without, together and not one by one.

    g = a^2 / (a^2 + eps)        in [0, 1), the smoothed-L0 gate of arXiv 2109.02220
    h <- lerp(h, B(h), g)        g = 1 is the dense model, g = 0 the model without the block, both to the bit
    C(g) = sum c g / P           the part of the prunable parameters (or operations) that stays
    loss = CE + n (lambda1 (C - kappa_t) + lambda2 (C - kappa_t)^2)                    n gates, weights frozen

In the first half of the steps the budget kappa_t falls from 1 to its end; in the second eps_t falls, and gates that are
small already are pressed hardest (dg/da peaks at g = 1/4) while the others go to 1. Annealing eps from the first step
would open gates before the budget closes any.

Shape legend: U units, B batch, T tokens, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.atomic import replacing
from sentei.importance import Tick
from sentei.structure import SUBLAYERS, Units

SMALLEST = 0.01  # |a| in units of sqrt(eps), g of 1e-4: a gate at 0 has no gradient


@dataclass(frozen=True)
class Schedule:
    """Hyper-parameters of the gates; the fields of `FoldGPT` that begin with gate_ explain them."""

    steps: int = 200
    lr: float = 0.1
    eps: float = 0.02
    eps_end: float = 0.0005
    init: float = 0.98
    dual_init: float = 0.0
    dual_lr: float = 0.3
    quad: float = 10.0

    def eps_at(self, step: int) -> float:
        """eps of step 0, 1, ...: constant in the first half, then geometric to `eps_end` at the last."""
        half = self.steps / 2
        progress = max(0.0, (step + 1 - half) / max(1.0, self.steps - half))
        return self.eps * (self.eps_end / self.eps) ** progress

    def kappa_at(self, step: int, remove: float) -> float:
        """The budget of step 0, 1, ...: falls linearly to 1 - remove at half of the steps."""
        return 1 - remove * min(1.0, (step + 1) / max(1.0, self.steps / 2))


def gate(a_U: Tensor, eps: float) -> Tensor:
    """a^2 / (a^2 + eps)."""
    square_U = a_U.square()
    return square_U / (square_U + eps)


def start(init: float, eps: float) -> float:
    """The a at which a gate is `init`."""
    return math.sqrt(eps * init / (1 - init))


def penalty(kept: Tensor | float, kappa: float, dual: float, quad: float, count: int) -> Any:
    """n (lambda1 (C - kappa) + lambda2 (C - kappa)^2): without n the budget would weigh less with more gates."""
    return count * (dual * (kept - kappa) + quad * (kept - kappa) ** 2)


def polarised(g_U: Tensor) -> float:
    """Fraction of gates outside [0.05, 0.95]."""
    return float(((g_U < 0.05) | (g_U > 0.95)).double().mean())


@contextmanager
def gated(model: nn.Module, units: Units, current: Callable[[], Tensor]) -> Iterator[None]:
    """Inside the block every unit's contribution to the residual stream is multiplied by its gate.

    Forward hooks, which act under gradient checkpointing too. A sub-layer is gated where its output enters the residual
    stream: after a post-norm, which would undo a factor before it.

    Args:
        current: () -> [U] gates, asked in every forward.
    """
    row = structure.family(model)
    with ExitStack() as stack:
        for number, layer in enumerate(structure.layers(model)):
            for kind in units.granularity:
                of = units.of(number, kind)
                for unit, index in zip(of.tolist(), units.index_U[of].tolist(), strict=True):
                    if kind == "layers":
                        hook = layer.register_forward_hook(_between(current, unit), with_kwargs=True)
                    else:
                        norms = row.attention_norms if SUBLAYERS[index] == "attention" else row.mlp_norms
                        source = structure.reader(layer, row, ("heads", "channels")[index])
                        if len(norms) > 1:
                            source = layer.get_submodule(norms[-1])
                        assert source is not None
                        hook = source.register_forward_hook(_times(current, unit))
                    stack.callback(hook.remove)
        yield


def _between(current: Callable[[], Tensor], unit: int) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        hidden_BTH = args[0] if args else kwargs["hidden_states"]
        return torch.lerp(hidden_BTH, output, current()[unit].to(output))  # exact at both ends, h + g (B - h) is not

    return hook


def _times(current: Callable[[], Tensor], unit: int) -> Callable[..., Tensor]:
    return lambda module, inputs, output: output * current()[unit].to(output)


@torch.enable_grad()
def one_shot(model: nn.Module, units: Units, batches: list[Tensor], loss: Callable[..., Tensor]) -> Tensor:
    """-dL/dg at g = 1, [U]: the first-order guess of what closing each gate alone would cost ("Taylor")."""
    g_U = torch.ones(len(units), dtype=torch.double, requires_grad=True)
    score_U = torch.zeros(len(units), dtype=torch.double)
    with frozen(model), gated(model, units, lambda: g_U):
        for number, ids_BT in enumerate(batches):
            score_U -= torch.autograd.grad(loss(model, ids_BT, number), g_U)[0] / len(batches)
    return score_U


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter takes a gradient."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


class Gates:
    """The state of one training of gates; `run` goes on where a stopped one was.

    Args:
        share_U: [U] part of the prunable parameters (or operations) of each gate.
        remove: the part that is to go.
        loss: (g [U], step) -> scalar to differentiate.
        file: the state is kept here, and a run found here is continued.
        identity: JSON-able; what must be equal for a state to belong to this run.
    """

    def __init__(
        self,
        share_U: Tensor,
        remove: float,
        schedule: Schedule,
        loss: Callable[[Tensor, int], Tensor],
        *,
        file: Path | None = None,
        identity: Any = None,
        save_every: int = 10,
    ):
        self.share_U, self.remove, self.schedule, self.loss = share_U.double(), remove, schedule, loss
        self.file, self.identity, self.save_every = file, repr(identity), save_every
        first = start(schedule.init, schedule.eps)
        self.a_U = torch.full((len(share_U),), first, dtype=torch.double, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.a_U], lr=1.0)
        self.step, self.dual = 0, schedule.dual_init
        self.tail_U = torch.zeros(len(share_U), dtype=torch.double)  # sum of the gates over the last fifth
        self.history: list[dict[str, Any]] = []

    def run(self, tick: Tick | None = None) -> Tensor:
        """Train to the end; [U] the mean gate over the last fifth of the steps: the higher, the more it is needed."""
        self._restore()
        steps = self.schedule.steps
        while self.step < steps:
            self._advance()
            if self.file is not None and (self.step == steps or self.step % self.save_every == 0):
                self._save()
            if tick is not None:
                last = self.history[-1]
                tick(
                    f"gates: loss {last['loss']:.3f}, kept {last['kept']:.3f} of {last['budget']:.3f}", self.step, steps
                )
        return self.tail_U / self._tail_length()

    def _tail_length(self) -> int:
        return max(1, self.schedule.steps // 5)

    def _advance(self) -> None:
        schedule, step = self.schedule, self.step
        eps, kappa = schedule.eps_at(step), schedule.kappa_at(step, self.remove)
        g_U = gate(self.a_U, eps)
        task = self.loss(g_U, step)
        kept = 1 - (self.share_U * (1 - g_U)).sum()
        total = task.double() + penalty(kept, kappa, self.dual, schedule.quad, len(g_U))
        if not bool(torch.isfinite(total)):
            raise ValueError(f"the loss with gates is not finite in step {step + 1}: try --dtype float32")
        (self.a_U.grad,) = torch.autograd.grad(total, self.a_U)
        self.optimizer.param_groups[0]["lr"] = schedule.lr * math.sqrt(eps)
        self.optimizer.step()
        self.a_U.grad = None
        with torch.no_grad():  # the sign of a means nothing
            floor = SMALLEST * math.sqrt(eps)
            self.a_U.copy_(torch.where(self.a_U.abs() < floor, self.a_U.sign().add(0.5).sign() * floor, self.a_U))
        excess = float(kept.detach()) - kappa
        self.dual += schedule.dual_lr * excess
        if step >= schedule.steps - self._tail_length():
            self.tail_U += g_U.detach()
        self.step += 1
        gates = [round(value, 4) for value in g_U.detach().tolist()]
        figures = {"loss": float(task.detach()), "kept": kappa + excess, "budget": kappa, "dual": self.dual, "eps": eps}
        self.history.append({"step": self.step, **figures, "gates": gates})

    def _save(self) -> None:
        assert self.file is not None
        state = {
            "identity": self.identity, "a": self.a_U.detach(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "dual": self.dual, "tail": self.tail_U, "history": self.history,
        }  # fmt: skip
        with replacing(self.file) as part:
            torch.save(state, part)

    def _restore(self) -> None:
        if self.file is None or not self.file.exists():
            return
        state = torch.load(self.file, weights_only=True)
        if state["identity"] != self.identity:
            raise ValueError(f"{self.file} belongs to another run; delete it or use another folder")
        with torch.no_grad():
            self.a_U.copy_(state["a"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.dual, self.tail_U, self.history = (state[k] for k in ("step", "dual", "tail", "history"))
