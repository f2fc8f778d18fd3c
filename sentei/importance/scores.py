"""The scores themselves; see the table in `sentei.importance`.

Shape legend: U units, N blocks of text, B batch, T tokens, H hidden width, W inputs of a reading linear.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sentei import masks, structure
from sentei.importance.replay import Moments, Replay, Tick, no_tick
from sentei.structure import LayerSize, Units


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
    tick: Tick = no_tick,
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
def flap(model: nn.Module, units: Units, seen: dict[tuple[int, str], Moments]) -> Tensor:
    """FLAP's fluctuation metric: variance of x_j times |W[:, j]|^2, z-scored inside each layer and kind.

    Args:
        seen: (layer, kind) -> what the reading linears take in, from `moments`.
    """
    row = structure.family(model)

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
    tick: Tick = no_tick,
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
    model: nn.Module, units: Units, blocks_NT: Tensor, batch_size: int = 8, *, tick: Tick = no_tick
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
        batches = blocks_NT.split(batch_size)
        for number, ids_BT in enumerate(batches):
            tick("calibrating", number, len(batches))
            structure.run_layers(model, ids_BT)
            count += ids_BT.numel()
    return 1 - sums[units.layer_U, units.index_U] / count
