"""Run a model as if units were gone, and choose which ones go under a parameter budget.

Shape legend: U units, L layers, W input width of a reading linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.structure import KINDS, SUBLAYERS, Units

Fill = dict[tuple[int, str], Tensor]
"""(layer, kind) -> [W]: what each input column of a reading linear contributes once its unit is dropped."""


@contextmanager
def masked(model: nn.Module, units: Units, keep_U: Tensor, fill: Fill | None = None) -> Iterator[None]:
    """Inside the block the model runs as if the dropped units were cut out; afterwards no trace is left.

    Dropped heads and channels become zero (or their `fill`) where the reading linear takes them in; a dropped sub-layer
    adds exactly nothing, bias included; a dropped block passes its input on.

    Args:
        keep_U: [U] bool, True keeps.
        fill: mean activations that stand in for dropped columns.
    """
    row = structure.family(model)
    with ExitStack() as stack:
        for number, layer in enumerate(structure.layers(model)):
            for kind in units.granularity:
                of = units.of(number, kind)
                gone = ~keep_U[of]
                if not gone.any():
                    continue
                if kind == "layers":
                    stack.enter_context(_replaced_forward(layer, _pass_on))
                elif kind == "sublayers":
                    for index in units.index_U[of][gone].tolist():
                        linear = structure.reader(
                            layer, row, "heads" if SUBLAYERS[index] == "attention" else "channels"
                        )
                        assert linear is not None
                        stack.callback(linear.register_forward_hook(_zero_output).remove)
                else:
                    linear = structure.reader(layer, row, kind)
                    assert linear is not None
                    size = structure.sizes_of(layer, row)
                    mask_W = torch.ones(linear.in_features)
                    mask_W[structure.columns(size, kind, units.index_U[of][gone])] = 0
                    hook = _mask_input(mask_W.to(linear.weight), (fill or {}).get((number, kind)))
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield


def _mask_input(mask_W: Tensor, fill_W: Tensor | None) -> Callable[..., Any]:
    if fill_W is None:
        return lambda module, inputs: (inputs[0] * mask_W,)
    constant_W = (1 - mask_W) * fill_W.to(mask_W)
    return lambda module, inputs: (torch.addcmul(constant_W, inputs[0], mask_W),)


def _zero_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")  # of another mask around this one
    module.forward = forward  # shadows the class's method; deleting it brings that back
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@torch.no_grad()
def layer_inputs(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What each layer takes in, [B, T, H], while `run()` runs the model on one batch."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for layer in structure.layers(model):

            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found.append(args[0] if args else kwargs["hidden_states"])

            stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        run()
    return found


@contextmanager
def starting_at(model: nn.Module, number: int, hidden_BTH: Tensor) -> Iterator[None]:
    """Inside the block layers before `number` do nothing and that layer takes `hidden_BTH`, whatever comes to it.

    The rest is the model itself, its loss included: what layers before a change compute need be computed once only.
    For a forward on the batch that `hidden_BTH` comes from (`layer_inputs`), without a cache.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((hidden_BTH, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden_BTH})

    with ExitStack() as stack:
        for layer in structure.layers(model)[:number]:
            stack.enter_context(_replaced_forward(layer, _pass_on))
        layer = structure.layers(model)[number]
        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


def removal_target(units: Units, sparsity: float) -> int:
    """Parameters to remove: `sparsity` of all decoder-layer parameters.

    Raises:
        ValueError: outside [0, 1), or more than these units hold.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction of decoder-layer parameters removed, in [0, 1); got {sparsity}")
    target = sparsity * units.layer_parameters
    if target > units.total:
        raise ValueError(
            f"sparsity {sparsity} asks for {target:,.0f} parameters, but all {'+'.join(units.granularity)} together "
            f"hold {units.total:,} ({units.total / units.layer_parameters:.1%}); lower it or change the granularity"
        )
    return int(target + 0.5)


def select(
    score_U: Tensor,
    units: Units,
    remove: int,
    scope: str = "global",
    *,
    tie_break_U: Tensor | None = None,
    uniform: bool = False,
    round_to: int = 1,
) -> Tensor:
    """Keep the best units while at least `remove` parameters go: exact to within one unit.

    Args:
        score_U: [U], higher stays. Ties: `tie_break_U` descending, then layer and index ascending.
        remove: parameters to remove, from `removal_target`.
        scope: "global": units of all kinds and layers compete; "family": each kind loses the same fraction of its own;
            "layer": each layer and kind does, as closely as whole units allow (the remainder goes to the best scores).
        uniform: every layer keeps the same number of units of a kind, so that stock model classes can hold it.
        round_to: channels are kept in multiples of this.
    Returns:
        keep_U: [U] bool.
    Raises:
        ValueError: the budget or the shape cannot be had.
    """
    if not bool(torch.isfinite(score_U).all()):
        raise ValueError("a unit's score is not finite; the calibration forward overflowed: try dtype float32")
    if remove <= 0:
        return torch.ones(len(units), dtype=torch.bool)
    order = _order(score_U, units, tie_break_U)
    if uniform:
        return _select_uniform(order, units, remove, round_to)
    fraction = min(1.0, remove / units.total)
    if scope == "global":
        keep_U = _fill(order, units, units.total - remove)
    elif scope in ("family", "layer"):
        group_U = units.kind_U if scope == "family" else units.kind_U * units.num_layers + units.layer_U
        keep_U = torch.zeros(len(units), dtype=torch.bool)
        for group in group_U.unique():
            inside = order[group_U[order] == group]
            budget = int((1 - fraction) * int(units.cost_U[inside].sum()) + 1e-6)
            keep_U |= _fill(inside, units, budget)
        # Whole units leave a remainder in every group: give it back to the best of what was dropped next to the border.
        keep_U = _fill(_border(order, group_U, keep_U), units, units.total - remove, keep_U)
    else:
        raise ValueError(f"scope is global, family or layer; got {scope!r}")
    if round_to > 1:
        keep_U = _round_channels(order, units, keep_U, units.total - remove, round_to)
    return keep_U


def _order(score_U: Tensor, units: Units, tie_break_U: Tensor | None) -> Tensor:
    """Units from best to worst; stable sorts from the least important key to the most important one."""
    order = torch.arange(len(units))  # already by layer, kind, index
    for key_U in (tie_break_U, score_U):
        if key_U is not None:
            order = order[torch.sort(key_U.double().cpu()[order], descending=True, stable=True).indices]
    return order


def _fill(order: Tensor, units: Units, budget: int, keep_U: Tensor | None = None) -> Tensor:
    """Take units in order while they fit the parameter budget; one that does not fit is skipped."""
    keep_U = torch.zeros(len(units), dtype=torch.bool) if keep_U is None else keep_U.clone()
    left = budget - int(units.cost_U[keep_U].sum())
    costs = units.cost_U[order]
    cheapest = int(units.cost_U.min())
    fits = int((costs.cumsum(0) <= left).sum())  # the run that fits as a whole, without a loop
    keep_U[order[:fits]] = True
    left -= int(costs[:fits].sum())
    for unit, cost in zip(order[fits:].tolist(), costs[fits:].tolist(), strict=True):
        if left < cheapest:
            break
        if cost <= left:
            keep_U[unit] = True
            left -= cost
    return keep_U


def _border(order: Tensor, group_U: Tensor, keep_U: Tensor) -> Tensor:
    """The best dropped unit of every group, best first."""
    dropped = order[~keep_U[order]]
    groups = group_U[dropped].tolist()
    first = {group: i for i, group in reversed(list(enumerate(groups)))}
    return dropped[sorted(first.values())]


def _select_uniform(order: Tensor, units: Units, remove: int, round_to: int) -> Tensor:
    if not set(units.granularity) <= {"heads", "channels"}:
        raise ValueError("shape=uniform is for heads and channels; whole blocks and sub-layers need no such shape")
    counts = {k: {len(units.of(layer, k)) for layer in range(units.num_layers)} for k in units.granularity}
    if uneven := [kind for kind, found in counts.items() if len(found) > 1]:
        raise ValueError(f"shape=uniform needs layers of equal size; {uneven[0]} differ already: use heterogeneous")
    fraction = remove / units.total
    keep: dict[str, int] = {}
    budget = units.total - remove
    for kind in ("heads", "channels"):
        if kind not in units.granularity:
            continue
        cost = int(units.cost_U[units.of(0, kind)[0]]) * units.num_layers
        count = counts[kind].copy().pop()
        if kind == "heads" and "channels" in units.granularity:
            keep[kind] = max(1, round((1 - fraction) * count))  # channels make up for the coarse step
        else:
            keep[kind] = min(count, budget // cost)
            if kind == "heads":
                keep[kind] = count - _whole_steps(remove, cost, units)
            else:
                keep[kind] -= keep[kind] % round_to
        budget -= keep[kind] * cost
        if keep[kind] < 1:
            step = cost / units.layer_parameters
            raise ValueError(
                f"shape=uniform cannot remove {remove:,} parameters: no {kind} would be left; one of {count} {kind} in "
                f"every layer is {step:.1%}. Lower the sparsity or use shape=heterogeneous"
            )
    keep_U = torch.zeros(len(units), dtype=torch.bool)
    for layer in range(units.num_layers):
        for kind, count in keep.items():
            inside = order[(units.layer_U[order] == layer) & (units.kind_U[order] == KINDS.index(kind))]
            keep_U[inside[:count]] = True
    return keep_U


def _whole_steps(remove: int, cost: int, units: Units) -> int:
    """Units that go from every layer alike; half a percent of the layers is as near as a fraction need be."""
    step, asked = cost / units.layer_parameters, remove / units.layer_parameters
    steps = round(asked / step)
    if abs(steps * step - asked) > 0.005:
        below, above = int(asked / step), int(asked / step) + 1
        near = [f"{count * step:.3f}" for count in (below, above) if 0 < count * cost < units.total]
        raise ValueError(
            f"shape=uniform takes as many heads from every layer, {step:.1%} of the layer parameters at a time, and "
            f"sparsity {asked:.3f} is between; nearest possible: {' or '.join(near) or 'none'}. Or use heterogeneous"
        )
    return steps


def _round_channels(order: Tensor, units: Units, keep_U: Tensor, budget: int, round_to: int) -> Tensor:
    """Round each layer's channels down, then give whole runs back, best score of the next run first, while they fit."""
    keep_U = keep_U.clone()
    channels = order[units.kind_U[order] == KINDS.index("channels")]
    rank_U = torch.empty(len(units), dtype=torch.long)
    rank_U[order] = torch.arange(len(units))
    runs: list[tuple[float, Tensor]] = []
    for layer in range(units.num_layers):
        inside = channels[units.layer_U[channels] == layer]
        if len(inside) and len(inside) < round_to:
            raise ValueError(f"round_to {round_to} is more than the {len(inside)} channels of layer {layer}")
        count = int(keep_U[inside].sum())
        floor = count - count % round_to
        keep_U[inside] = False
        keep_U[inside[:floor]] = True
        whole = inside[floor : len(inside) - (len(inside) - floor) % round_to].view(-1, round_to)
        runs += zip(rank_U[whole].double().mean(1).tolist(), whole, strict=True)
    left = budget - int(units.cost_U[keep_U].sum())
    for _, run in sorted(runs, key=lambda pair: pair[0]):
        if int(units.cost_U[run].sum()) > left:
            break  # a later, worse run must not overtake
        keep_U[run] = True
        left -= int(units.cost_U[run].sum())
    return keep_U


@contextmanager
def sliced(model: nn.Module, units: Units, keep_U: Tensor, fill: Fill | None = None) -> Iterator[None]:
    """Like `masked`, but the linears run on the kept rows and columns only: less work instead of multiplying by zero.

    Each linear gathers its kept weights when it runs and forgets them, so one linear's copy is the peak. Pays when a
    forward has more than a few hundred tokens. An attention or MLP of which nothing is left is not run at all (with
    norms before it: behind it, a norm belongs to the other branch too). Not for generation: a KV cache made here fits
    no other mask.
    """
    row = structure.family(model)
    cut_kinds = [kind for kind in units.granularity if kind == "channels" or (kind == "heads" and not row.fused_qkv)]
    rest_U = keep_U.clone()  # what slicing does not cover goes through masks
    spans = _spans(units)
    with ExitStack() as stack:
        for number, layer in enumerate(structure.layers(model)):
            if row.pre_norm and (span := spans.get((number, "sublayers"))):
                for index in units.index_U[span][~keep_U[span]].tolist():
                    attention = SUBLAYERS[index] == "attention"
                    branch = structure.part(layer, row.attention if attention else row.mlp)
                    stack.enter_context(_replaced_forward(branch, _constant(attention, None)))
                rest_U[span] = True
            for kind in cut_kinds:
                if (span := spans.get((number, kind))) is None:
                    continue
                kept = units.index_U[span][keep_U[span]]
                rest_U[span] = True
                if len(kept) == span.stop - span.start:
                    continue
                size = structure.sizes_of(layer, row)
                reader = structure.reader(layer, row, kind)
                assert reader is not None
                device = reader.weight.device
                columns_K = structure.columns(size, kind, kept).to(device)
                bias_H = reader.bias
                if fill is not None and (fill_W := fill.get((number, kind))) is not None:
                    dropped_W = fill_W.to(reader.weight).index_fill(0, columns_K, 0)
                    constant_H = reader.weight @ dropped_W
                    bias_H = constant_H if bias_H is None else bias_H + constant_H
                if row.pre_norm and not len(kept):
                    branch = structure.part(layer, row.attention if kind == "heads" else row.mlp)
                    stack.enter_context(_replaced_forward(branch, _constant(kind == "heads", bias_H)))
                    continue
                if kind == "channels":
                    rows_K = torch.cat([columns_K, columns_K + reader.in_features]) if row.fused_up else columns_K
                    writers = dict.fromkeys(row.up, rows_K)
                else:
                    kv_rows_K = (kept[:, None] * size.head_dim + torch.arange(size.head_dim)).flatten().to(device)
                    writers = {row.query: columns_K, row.key: kv_rows_K, row.value: kv_rows_K}
                for path, rows_K in writers.items():
                    linear = structure.part(layer, path)
                    stack.enter_context(_replaced_forward(linear, _on_rows(linear, rows_K)))
                stack.enter_context(_replaced_forward(reader, _on_columns(reader, columns_K, bias_H)))
        if not bool(rest_U.all()):
            stack.enter_context(masked(model, units, rest_U, fill))
        yield


@contextmanager
def column_major(model: nn.Module, units: Units) -> Iterator[None]:
    """Inside, the weights that `sliced` gathers columns of lie in memory column by column: the same values and bytes.

    A column is then copied as a whole: 900 of 1,536 columns of 576 bf16 numbers take 0.03 ms on a CPU in place of 1.6.
    Not to be entered in inference mode, whose tensors a training could not use later.
    """
    row = structure.family(model)
    kinds = [kind for kind in ("heads", "channels") if kind in units.granularity]
    found = [structure.reader(layer, row, kind) for layer in structure.layers(model) for kind in kinds]
    linears = [linear for linear in found if linear is not None and linear.weight.device.type == "cpu"]
    try:
        for linear in linears:
            linear.weight.data = linear.weight.data.t().contiguous().t()
        yield
    finally:
        for linear in linears:
            linear.weight.data = linear.weight.data.contiguous()


def _spans(units: Units) -> dict[tuple[int, str], slice]:
    """(layer, kind) -> where its units lie: `Units.of` for all pairs in one pass."""
    key_U = units.layer_U * len(KINDS) + units.kind_U
    keys, counts = torch.unique_consecutive(key_U, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return {
        (key // len(KINDS), KINDS[key % len(KINDS)]): slice(start, end)
        for key, start, end in zip(keys.tolist(), [0, *ends], ends, strict=False)
    }


def _constant(attention: bool, bias_H: Tensor | None) -> Callable[..., Any]:
    """The forward of an attention (which gives its weights too) or MLP that adds nothing, or its bias."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = torch.zeros_like(hidden_states) if bias_H is None else bias_H.expand_as(hidden_states)
        return (out, None) if attention else out

    return forward


def _on_rows(linear: nn.Linear, rows_K: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.index_select(0, rows_K)
        return nn.functional.linear(x, linear.weight.index_select(0, rows_K), bias)

    return forward


def _on_columns(linear: nn.Linear, columns_K: Tensor, bias_H: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x, linear.weight.t().index_select(0, columns_K).t(), bias_H)
