"""What is left makes up for what goes: mean activations as biases, and a least-squares refit of the reading linears.

Shape legend: U units, N blocks of text, T tokens, H hidden width, W inputs of a reading linear, K kept, D dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sentei import masks, structure
from sentei.importance.replay import Moments, Replay, Tick, no_tick
from sentei.structure import Family, Units


def takes_correction(row: Family) -> bool:
    """Does a sub-layer's output go into the residual stream as it is? Not where a norm comes in between."""
    return len(row.mlp_norms) == 1


def relative_weight(stream_TH: Tensor) -> Tensor:
    """[T, 1] by which a token's squared error counts in units of its residual stream, as the next norm takes it."""
    return stream_TH.float().square().mean(1, keepdim=True).clamp_min(1e-12).reciprocal()


def mean_fill(seen: dict[tuple[int, str], Moments]) -> masks.Fill:
    """(layer, kind) -> mean activation of each input column, from `moments` of the dense model: for masked forwards."""
    return {key: of.mean_W.float() for key, of in seen.items()}


@torch.no_grad()
def mean_bias(model: nn.Module, units: Units, keep_U: Tensor, fill: masks.Fill) -> dict[tuple[int, str], Tensor]:
    """The biases by which a cut model does what masking with `fill` does: W[:, dropped] @ mean[dropped], each [H]."""
    row = structure.family(model)
    bias: dict[tuple[int, str], Tensor] = {}
    for number, layer in enumerate(structure.layers(model)):
        for kind in units.granularity:
            columns_K = _dropped_columns(layer, row, units, keep_U, number, kind)
            linear = structure.reader(layer, row, kind)
            if linear is not None and len(columns_K):
                weight_HK = linear.weight[:, columns_K.to(linear.weight.device)].float()
                bias[number, kind] = weight_HK @ fill[number, kind].to(weight_HK)[columns_K.to(weight_HK.device)]
    return bias


def _dropped_columns(layer: nn.Module, row: Family, units: Units, keep_U: Tensor, number: int, kind: str) -> Tensor:
    of = units.of(number, kind)
    return structure.columns(structure.sizes_of(layer, row), kind, units.index_U[of][~keep_U[of]])


class SecondMoments:
    """First and second moments of a linear's inputs, in float64; of an error beside them, if there is one.

    Args:
        error: called with the tokens of a batch, as a slice; [T, H] what the output should be moved by there.
    """

    def __init__(self, width: int, error: Callable[[slice], Tensor] | None = None):
        self.count, self.total = 0, 0.0
        self._upper = torch.zeros(width, width, dtype=torch.double)
        self.x = torch.zeros(width, dtype=torch.double)
        self.error = error
        self.e = self.ex = torch.zeros(())

    def __call__(self, x_TW: Tensor, weight_T1: Tensor | float = 1.0) -> None:
        """Add a batch; a token counts `weight_T1` times."""
        x_TW = x_TW.float()
        weighted_TW = x_TW * weight_T1
        if self.error is not None:
            error_TH = self.error(slice(self.count, self.count + len(x_TW))).to(x_TW)
            self.ex = self.ex + (error_TH.T @ weighted_TW).double().cpu()
            self.e = self.e + (error_TH * weight_T1).sum(0).double().cpu()
        self.count += len(x_TW)
        self.total += float(torch.as_tensor(weight_T1).double().expand(len(x_TW), 1).sum())
        for start in range(0, len(self.x), 384):  # below the diagonal is its mirror
            part = slice(start, start + 384)
            self._upper[part, start:] += (x_TW[:, part].T @ weighted_TW[:, start:]).double().cpu()
        self.x += weighted_TW.sum(0).double().cpu()

    @property
    def xx(self) -> Tensor:
        """[W, W] the sum of x x^T, by weight."""
        return self._upper.triu() + self._upper.triu(1).T

    def normal_equations(self, old_HW: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What W' of min |W x + e - W' x - b|^2 solves: W' covariance [W, W] = wanted [H, W].

        Without a bias moments stand for the covariance. The bias is wanted_mean [H] - W' mean [W].

        Args:
            old_HW: W, in float64 on the CPU.
        Returns:
            (covariance, wanted, mean, wanted_mean).
        """
        mean_W = self.x / self.total * with_bias
        covariance = self.xx / self.total - torch.outer(mean_W, mean_W)
        wanted_HW, wanted_H = old_HW @ covariance, old_HW @ mean_W
        if self.error is not None:
            mean_H = self.e / self.total
            wanted_HW = wanted_HW + self.ex / self.total - torch.outer(mean_H, mean_W)
            wanted_H = wanted_H + mean_H
        return covariance, wanted_HW, mean_W, wanted_H


@torch.no_grad()
def refit(
    model: nn.Module,
    units: Units,
    keep_U: Tensor,
    blocks_NT: Tensor,
    *,
    ridge: float = 0.1,
    correction: float = 0.0,
    relative: bool = True,
    with_bias: bool = True,
    batch_size: int = 8,
    tick: Tick = no_tick,
) -> dict[tuple[int, str], Tensor]:
    """Least-squares refit of the reading linears on calibration activations, layer by layer and without gradients.

    The text flows through the model as it is pruned and refitted so far. At each reading linear that lost inputs the
    kept columns get new weights, and the linear a bias, so that it comes closest to what it made of all its inputs:
    min |W x + c e - W' x_K - b|^2 + ridge * mean(diag) |W' - W_K|^2. Weights are changed in place.

    e is what the residual stream lacks there, in comparison with the dense model's, after all that was done to the
    layers below, and c the share of it that this linear is asked to make good. A share of 1 on 8,192 tokens asks for
    what the kept inputs do not know, and was worse on held-out text than none; 0.3 on 16,384 was better (LOG.md).

    Args:
        ridge: pull towards the old weights, in units of the mean variance of the inputs.
        correction: c, for decoders that add a sub-layer's output to the stream as it is. Not 0: the text goes
            through the dense model too.
        relative: a token's error counts in units of what its residual stream is after the addition, for the same
            decoders: a norm divides by that before anything is made of the stream. Otherwise the few tokens whose
            stream is a hundred times as long as all others' (mostly the first: arXiv 2402.17762) can take the whole
            fit.
        with_bias: False where the target format has no bias.
    Returns:
        (layer, kind) -> [H] bias to add when the units are removed.
    Raises:
        ValueError: see `check_refit_tokens`.
    """
    row = structure.family(model)
    check_refit_tokens(model, units, blocks_NT.numel())
    replay = Replay(model, blocks_NT, batch_size)
    dense = Replay(model, blocks_NT, batch_size) if correction and takes_correction(row) else None
    relative = relative and takes_correction(row)
    now: dict[str, Tensor] = {}
    bias: dict[tuple[int, str], Tensor] = {}
    for number, layer in enumerate(replay.layers):
        tick("refitting", number, len(replay.layers))
        streams = {} if dense is None else dense.streams(number)
        with ExitStack() as stack:
            for kind in ("heads", "channels"):
                linear = structure.reader(layer, row, kind)
                if kind not in units.granularity or linear is None or not linear.in_features:
                    continue
                dropped_K = _dropped_columns(layer, row, units, keep_U, number, kind)
                if not len(dropped_K):
                    continue

                def lack(of: slice, kind: str = kind, there: dict[str, Tensor] = streams) -> Tensor:
                    return correction * (there[kind][of] - now[kind])

                def stream(kind: str = kind) -> Tensor:
                    return now[kind]

                reading = _Reading(linear, dropped_K, lack if streams else None, stream if relative else None)
                replay.watch(number, {kind: reading}, now if streams or relative else None)
                shift_H = reading.solve(ridge, with_bias)
                if with_bias:
                    bias[number, kind] = shift_H.to(linear.weight)
                    add = lambda module, x, y, shift=bias[number, kind]: y + shift  # noqa: E731
                    stack.callback(linear.register_forward_hook(add).remove)
            replay.advance(number)
    return bias


def refit_tokens(model: nn.Module, units: Units) -> int:
    """Twice the width of the widest reading linear: with fewer tokens the refit would fit noise."""
    widths = [(size.intermediate_size, size.num_heads * size.head_dim) for size in structure.sizes(model)]
    cut = [kind in units.granularity for kind in ("channels", "heads")]
    return 2 * max((width for each in widths for width, is_cut in zip(each, cut, strict=True) if is_cut), default=0)


def check_refit_tokens(model: nn.Module, units: Units, tokens: int) -> None:
    """Raises ValueError for fewer tokens than the refit needs."""
    needed = refit_tokens(model, units)
    if tokens < needed:
        raise ValueError(
            f"least-squares needs at least {needed:,} calibration tokens for linears of width {needed // 2}; "
            f"got {tokens:,}: raise calibration_samples, give more text or use compensate=mean"
        )


class _Reading:
    """A linear that is to read its kept inputs alone: what they know of all that it gave, and of what it lacks."""

    def __init__(
        self,
        linear: nn.Linear,
        dropped_D: Tensor,
        lack: Callable[[slice], Tensor] | None,
        stream: Callable[[], Tensor] | None = None,
    ):
        self.linear, self.dropped_D = linear, dropped_D.to(linear.weight.device)
        self.lack, self.stream = lack, stream
        kept_W = torch.ones(linear.in_features, dtype=torch.bool, device=linear.weight.device)
        kept_W[self.dropped_D] = False
        self.kept_K = kept_W.nonzero().flatten()
        self.given_TH = torch.zeros(())
        self.seen = SecondMoments(len(self.kept_K), self._missing)

    def __call__(self, x_TW: Tensor) -> None:
        self.given_TH = x_TW[:, self.dropped_D].float() @ self.linear.weight[:, self.dropped_D].float().T
        weight_T1: Tensor | float = 1.0
        if self.stream is not None:
            weight_T1 = relative_weight(self.stream() + F.linear(x_TW, self.linear.weight, self.linear.bias))
        self.seen(x_TW[:, self.kept_K], weight_T1)

    def _missing(self, of: slice) -> Tensor:
        return self.given_TH if self.lack is None else self.given_TH + self.lack(of)

    def solve(self, ridge: float, with_bias: bool) -> Tensor:
        """Refit the weight in place, zero in dropped columns; returns the bias [H] that goes with it."""
        old_HK = self.linear.weight[:, self.kept_K].double().cpu()
        covariance, wanted_HK, mean_K, wanted_H = self.seen.normal_equations(old_HK, with_bias)
        new_HK = old_HK
        if len(self.kept_K):
            damping = max(ridge, 1e-9) * covariance.diagonal().mean().clamp_min(1e-12)
            left = covariance + damping * torch.eye(len(covariance), dtype=torch.double)
            new_HK = torch.linalg.solve(left, (wanted_HK + damping * old_HK).T).T
        self.linear.weight[:, self.dropped_D] = 0.0
        self.linear.weight[:, self.kept_K] = new_HK.to(self.linear.weight)
        return wanted_H - new_HK @ mean_K
