"""Scores over units, and compensation of what was removed.

Every score is higher for a unit that matters more. Scores that need activations see them at the reading linears
(`o_proj`, `down_proj` and their like): column j of the input is what unit j feeds back into the residual stream.

=================  ==========================================================================  =====================
magnitude          mean |w| over all weights of the unit
wanda              |W| sqrt(sum of x^2), column mean; the pruned layer feeds the next          arXiv 2306.11695
flap               variance of x times squared column norm, z-scored per layer and kind        arXiv 2312.11983
taylor             |dL/dm| at m = 1, m a factor on the unit's output                           arXiv 2305.11627
block_influence    1 - cos(input, output) of a block                                           arXiv 2403.03853
=================  ==========================================================================  =====================

Shape legend: U units, N blocks of text, B batch, T tokens, H hidden width, W inputs of a reading linear, K kept inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sentei import masks, structure
from sentei.structure import Family, LayerSize, Units

Tick = Callable[[str, int, int], None]
"""Called as tick(what, done, of) while a long pass goes on."""


def _no_tick(what: str, done: int, of: int) -> None: ...


class _Stop(Exception):
    pass


class Replay:
    """Calibration text moving through the model one block at a time: only one layer's hidden states are held.

    `advance(i)` runs layer i on all batches and keeps the outputs; `watch(i, kind, see)` runs it, shows `see` what the
    reading linear takes in (as [tokens, W]) and forgets the outputs. Both run the layer as it is now, hooks included.
    """

    def __init__(self, model: nn.Module, blocks_NT: Tensor, batch_size: int = 8):
        self.row = structure.family(model)
        self.layers = structure.layers(model)
        self.hidden: list[Tensor] = []
        self._arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        base = structure.base_model(model)
        device = next(model.parameters()).device
        with torch.no_grad():
            for ids_BT in blocks_NT.split(batch_size):
                with ExitStack() as stack:
                    whole = (len(ids_BT), 0) not in self._arguments  # masks and positions depend on the shape only
                    for number, layer in enumerate(self.layers):
                        hook = self._capture(number, stop=not whole)
                        stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    with suppress(_Stop):
                        base(input_ids=ids_BT.to(device), **({"use_cache": False} if self.row.pre_norm else {}))

    def _capture(self, number: int, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if number == 0:
                self.hidden.append(hidden)
            self._arguments[len(hidden), number] = (args[1:], kwargs)
            if stop:
                raise _Stop

        return hook

    def _run(self, number: int, now: dict[str, Tensor] | None = None) -> Iterator[Tensor]:
        """`now`, if given, is told of each batch: kind -> [T, H] the stream that the sub-layer's output is added to."""
        with ExitStack() as stack, torch.no_grad():
            if now is not None:
                tell = lambda module, inputs: now.update(channels=inputs[0].flatten(0, 1))  # noqa: E731
                before_mlp = self.layers[number].get_submodule(self.row.mlp_norms[0])
                stack.callback(before_mlp.register_forward_pre_hook(tell).remove)
            for hidden in self.hidden:
                if now is not None:
                    now["heads"] = hidden.flatten(0, 1)
                args, kwargs = self._arguments[len(hidden), number]
                yield self.layers[number](hidden, *args, **kwargs)

    def advance(self, number: int) -> None:
        for i, output in enumerate(self._run(number)):
            self.hidden[i] = output

    def watch(
        self, number: int, see: dict[str, Callable[[Tensor], None]], now: dict[str, Tensor] | None = None
    ) -> None:
        with watching(self.layers[number], self.row, see):
            for _ in self._run(number, now):
                pass

    def streams(self, number: int) -> dict[str, Tensor]:
        """Advances; kind -> [tokens, H] the residual stream that the sub-layer's output was added to."""
        now: dict[str, Tensor] = {}
        found: dict[str, list[Tensor]] = {"heads": [], "channels": []}
        for i, output in enumerate(self._run(number, now)):
            self.hidden[i] = output
            for kind, of in found.items():
                of.append(now[kind])
        return {kind: torch.cat(of) for kind, of in found.items()}


def takes_correction(row: Family) -> bool:
    """Does a sub-layer's output go into the residual stream as it is? Not where a norm comes in between."""
    return len(row.mlp_norms) == 1


@contextmanager
def watching(layer: nn.Module, row: Family, see: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Shows `see[kind]` the input of that reading linear, flattened to [tokens, W], each time the layer runs."""
    with ExitStack() as stack:
        for kind, look in see.items():
            linear = structure.reader(layer, row, kind)
            if linear is not None:

                def hook(module: nn.Module, inputs: tuple[Tensor], look: Callable[[Tensor], None] = look) -> None:
                    look(inputs[0].detach().flatten(0, -2))

                stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield


class Moments:
    """Running sums of a reading linear's inputs, in float64: mean and variance per column, and the mean of squares."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_W = self.square_W = torch.zeros(())

    def __call__(self, x_TW: Tensor) -> None:
        x_TW = x_TW.float()
        self.count += len(x_TW)
        self.sum_W = self.sum_W + x_TW.sum(0).double().cpu()
        self.square_W = self.square_W + x_TW.square().sum(0).double().cpu()

    @property
    def mean_W(self) -> Tensor:
        return self.sum_W / self.count

    @property
    def variance_W(self) -> Tensor:
        return (self.square_W / self.count - self.mean_W.square()).clamp_min(0)


@torch.no_grad()
def moments(
    model: nn.Module, blocks_NT: Tensor, kinds: tuple[str, ...], batch_size: int = 8, tick: Tick = _no_tick
) -> dict[Any, Moments]:
    """(layer, kind) -> moments of the reading linears' inputs, from one pass over the text."""
    row = structure.family(model)
    found: dict[Any, Moments] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(structure.layers(model)):
            see = {kind: Moments() for kind in kinds if structure.reader(layer, row, kind) is not None}
            found |= {(number, kind): seen for kind, seen in see.items()}
            stack.enter_context(watching(layer, row, see))  # pyright: ignore[reportArgumentType]
        base, device = structure.base_model(model), next(model.parameters()).device
        batches = blocks_NT.split(batch_size)
        for number, ids_BT in enumerate(batches):
            tick("calibrating", number, len(batches))
            base(input_ids=ids_BT.to(device))
    return found


def per_unit(metric_W: Tensor, size: LayerSize, kind: str) -> Tensor:
    """Input columns -> units: a channel is its column, a KV group the mean over its heads of their sums."""
    if kind == "channels":
        return metric_W
    return metric_W.view(size.num_kv_heads, size.group_size, size.head_dim).sum(2).mean(1)


def _by_layer(model: nn.Module, units: Units, score: Callable[[nn.Module, int, str, LayerSize], Tensor]) -> Tensor:
    """Fills a [U] score from a function of (layer module, number, kind, size) that returns one layer's units."""
    row = structure.family(model)
    score_U = torch.zeros(len(units), dtype=torch.double)
    for number, layer in enumerate(structure.layers(model)):
        for kind in units.granularity:
            if len(of := units.of(number, kind)):
                score_U[of] = score(layer, number, kind, structure.sizes_of(layer, row)).double().cpu()
    return score_U


@torch.no_grad()
def magnitude(model: nn.Module, units: Units) -> Tensor:
    """Mean |w| over the unit's weights, biases left out."""
    row = structure.family(model)

    def score(layer: nn.Module, number: int, kind: str, size: LayerSize) -> Tensor:
        linear = structure.reader(layer, row, kind)
        assert linear is not None
        if kind == "channels":
            rows = [structure.part(layer, path).weight.float().abs().sum(1) for path in row.up]
            rows = list(rows[0].chunk(2)) if row.fused_up else rows
            columns = linear.weight.float().abs().sum(0)
            return (torch.stack([*rows, columns]).sum(0)) / (len(rows) * linear.out_features + linear.out_features)
        groups = size.num_kv_heads
        total = linear.weight.float().abs().sum(0).view(groups, -1).sum(1)
        if row.fused_qkv:
            widths = [size.num_heads * size.head_dim] + [groups * size.head_dim] * 2
            parts = structure.part(layer, row.query).weight.split(widths)
        else:
            parts = [structure.part(layer, path).weight for path in (row.query, row.key, row.value)]
        for weight in parts:
            total = total + weight.float().abs().sum(1).view(groups, -1).sum(1)
        return total / ((2 * size.group_size + 2) * size.head_dim * linear.out_features)

    return _by_layer(model, units, score)


@torch.no_grad()
def wanda(
    model: nn.Module,
    units: Units,
    blocks_NT: Tensor,
    sparsity: float,
    *,
    sequential: bool = True,
    tick: Tick = _no_tick,
) -> Tensor:
    """Wanda for structures ("Wanda-sp").

    Column metric: mean over outputs of |W| times sqrt(mean over sequences of the sum over tokens of x^2).

    Args:
        blocks_NT: calibration token ids.
        sparsity: fraction of each layer and kind that is masked before the next layer sees its input.
        sequential: feed the pruned layer's output forward (the paper's way), not the dense one's.
    """
    row = structure.family(model)
    replay = Replay(model, blocks_NT)
    score_U = torch.zeros(len(units), dtype=torch.double)
    for number, layer in enumerate(replay.layers):
        tick("calibrating", number, len(replay.layers))
        see = {kind: Moments() for kind in units.granularity}
        replay.watch(number, see)  # pyright: ignore[reportArgumentType]
        keep_U = torch.ones(len(units), dtype=torch.bool)
        for kind, seen in see.items():
            linear, of = structure.reader(layer, row, kind), units.of(number, kind)
            if linear is None or not len(of):
                continue
            norm_W = (seen.square_W / len(blocks_NT)).sqrt()
            metric_W = linear.weight.float().abs().mean(0).double().cpu() * norm_W
            score_U[of] = per_unit(metric_W, structure.sizes_of(layer, row), kind)
            worst = score_U[of].argsort()[: round(sparsity * len(of))]
            keep_U[of[worst]] = not sequential
        with masks.masked(model, units, keep_U):
            replay.advance(number)
    return score_U


@torch.no_grad()
def flap(model: nn.Module, units: Units, blocks_NT: Tensor, *, tick: Tick = _no_tick) -> Tensor:
    """FLAP's fluctuation metric: variance of x_j times |W[:, j]|^2, z-scored inside each layer and kind."""
    row = structure.family(model)
    seen = moments(model, blocks_NT, units.granularity, tick=tick)

    def score(layer: nn.Module, number: int, kind: str, size: LayerSize) -> Tensor:
        linear = structure.reader(layer, row, kind)
        assert linear is not None
        metric_W = seen[number, kind].variance_W * linear.weight.float().square().sum(0).double().cpu()
        return standardised(per_unit(metric_W, size, kind))

    return _by_layer(model, units, score)


def standardised(x: Tensor) -> Tensor:
    """(x - mean) / standard deviation; zeros where all are equal or there is one only."""
    if len(x) < 2:
        return torch.zeros_like(x)
    return (x - x.mean()) / (x.std() + 1e-8)


def taylor(
    model: nn.Module,
    units: Units,
    blocks_NT: Tensor,
    loss: Callable[[nn.Module, Tensor], Tensor],
    *,
    batch_size: int = 4,
    tick: Tick = _no_tick,
) -> Tensor:
    """First-order Taylor: mean over batches of |dL/dm|, m a factor on what the unit feeds its reading linear.

    The one score here that needs a backward pass; only the factors take gradients.

    Args:
        loss: (model, ids [B, T]) -> scalar.
    """
    row = structure.family(model)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    factors: dict[tuple[int, str], Tensor] = {}
    total_U = torch.zeros(len(units), dtype=torch.double)
    with ExitStack() as stack:
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for number, layer in enumerate(structure.layers(model)):
            for kind in units.granularity:
                linear = structure.reader(layer, row, kind)
                if linear is not None:
                    factor = torch.ones(linear.in_features, device=linear.weight.device, requires_grad=True)
                    factors[number, kind] = factor

                    def hook(module: nn.Module, inputs: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
                        return (inputs[0] * factor.to(inputs[0].dtype),)

                    stack.callback(linear.register_forward_pre_hook(hook).remove)
        batches = blocks_NT.split(batch_size)
        for done, ids_BT in enumerate(batches):
            tick("gradients", done, len(batches))
            gradients = torch.autograd.grad(loss(model, ids_BT), list(factors.values()))
            by_layer = dict(zip(factors, gradients, strict=True))

            def score(layer: nn.Module, number: int, kind: str, size: LayerSize, by_layer: dict = by_layer) -> Tensor:
                gradient_W = by_layer[number, kind]
                return gradient_W.view(size.num_kv_heads if kind == "heads" else len(gradient_W), -1).sum(1).abs()

            total_U += _by_layer(model, units, score) / len(batches)
    return total_U


@torch.no_grad()
def block_influence(
    model: nn.Module, units: Units, blocks_NT: Tensor, batch_size: int = 8, *, tick: Tick = _no_tick
) -> Tensor:
    """1 - mean cosine between the residual stream before and after a block or sub-layer.

    Measured at the blocks themselves: the model's own last hidden state has already passed the final norm.
    """
    row = structure.family(model)
    streams: dict[int, dict[str, Tensor]] = {number: {} for number in range(units.num_layers)}
    sums, count = torch.zeros(units.num_layers, 2, dtype=torch.double), 0
    middle_path = row.mlp_norms[0] if row.pre_norm else row.up[0]
    with ExitStack() as stack:
        for number, layer in enumerate(structure.layers(model)):

            def before(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                streams[number]["in"] = args[0] if args else kwargs["hidden_states"]

            def middle(module: nn.Module, args: Any, number: int = number) -> None:
                streams[number]["mid"] = args[0]

            def after(module: nn.Module, args: Any, output: Tensor, number: int = number) -> None:
                stream = streams[number] | {"out": output}
                ends = (("in", "mid"), ("mid", "out")) if "sublayers" in units.granularity else (("in", "out"),)
                for i, (a, b) in enumerate(ends):
                    cosine = nn.functional.cosine_similarity(stream[a].float(), stream[b].float(), dim=-1)
                    sums[number, i] += cosine.double().sum().cpu()
                streams[number] = {}

            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.get_submodule(middle_path).register_forward_pre_hook(middle).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        base, device = structure.base_model(model), next(model.parameters()).device
        batches = blocks_NT.split(batch_size)
        for number, ids_BT in enumerate(batches):
            tick("calibrating", number, len(batches))
            base(input_ids=ids_BT.to(device))
            count += ids_BT.numel()
    return 1 - sums[units.layer_U, units.index_U] / count


# --- compensation ------------------------------------------------------------------------------------------------


def mean_fill(model: nn.Module, units: Units, blocks_NT: Tensor, *, tick: Tick = _no_tick) -> masks.Fill:
    """(layer, kind) -> mean activation of each input column, measured on the dense model: for masked forwards."""
    found = moments(model, blocks_NT, units.granularity, tick=tick)
    return {key: seen.mean_W.float() for key, seen in found.items()}


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


class _Second:
    """First and second moments of a reading linear's inputs, in float64; of an error beside them, if there is one.

    Args:
        error: called with the tokens of a batch, as a slice; [T, H] what the output should be moved by there.
    """

    def __init__(self, width: int, error: Callable[[slice], Tensor] | None = None):
        self.count = 0
        self.xx = torch.zeros(width, width, dtype=torch.double)
        self.x = torch.zeros(width, dtype=torch.double)
        self.error = error
        self.e = self.ex = torch.zeros(())

    def __call__(self, x_TW: Tensor) -> None:
        x_TW = x_TW.float()
        if self.error is not None:
            error_TH = self.error(slice(self.count, self.count + len(x_TW))).to(x_TW)
            self.ex = self.ex + (error_TH.T @ x_TW).double().cpu()
            self.e = self.e + error_TH.sum(0).double().cpu()
        self.count += len(x_TW)
        self.xx += (x_TW.T @ x_TW).double().cpu()
        self.x += x_TW.sum(0).double().cpu()


@torch.no_grad()
def refit(
    model: nn.Module,
    units: Units,
    keep_U: Tensor,
    blocks_NT: Tensor,
    *,
    ridge: float = 0.1,
    correction: float = 0.0,
    with_bias: bool = True,
    batch_size: int = 8,
    tick: Tick = _no_tick,
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

                seen = _Second(linear.in_features, lack if streams else None)
                replay.watch(number, {kind: seen}, now if streams else None)
                kept_W = torch.ones(linear.in_features, dtype=torch.bool)
                kept_W[dropped_K] = False
                weight_HW, shift_H = _solve(linear.weight, kept_W, seen, ridge, with_bias)
                linear.weight.copy_(weight_HW)
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


def _solve(weight_HW: Tensor, kept_W: Tensor, seen: _Second, ridge: float, with_bias: bool) -> tuple[Tensor, Tensor]:
    """The refitted weight, zero in dropped columns, and the bias that goes with it."""
    old_HW = weight_HW.double().cpu()
    mean_W = seen.x / seen.count * with_bias
    covariance = seen.xx / seen.count - torch.outer(mean_W, mean_W)
    wanted_HW, wanted_H = old_HW @ covariance, old_HW @ mean_W  # covariance of what is asked for, with x; its mean
    if seen.error is not None:
        mean_H = seen.e / seen.count
        wanted_HW = wanted_HW + seen.ex / seen.count - torch.outer(mean_H, mean_W)
        wanted_H = wanted_H + mean_H
    inside = covariance[kept_W][:, kept_W]
    new_HW = torch.zeros_like(old_HW)
    if kept_W.any():
        damping = max(ridge, 1e-9) * inside.diagonal().mean().clamp_min(1e-12)
        left = inside + damping * torch.eye(len(inside), dtype=torch.double)
        right = wanted_HW[:, kept_W] + damping * old_HW[:, kept_W]
        new_HW[:, kept_W] = torch.linalg.solve(left, right.T).T
    return new_HW, wanted_H - new_HW @ mean_W
