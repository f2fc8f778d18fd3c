"""Which unit owns which row: adapters, mask hooks, the lasso and the exact zeros, all from one table.

Shape legend: U units, R rows of a linear's output or columns of its input, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sentei import head_dims, structure
from sentei.masks import Fill
from sentei.structure import Units
from sentei.train import evaluating

SPACES = ("groups+channels", "head-dims+channels")


def units_of(model: nn.Module, space: str) -> Units:
    """The removable units of a space.

    Raises:
        ValueError: an architecture without separate projections and a gated MLP.
    """
    refuse(model)
    return head_dims.units(model) if space == "head-dims+channels" else structure.units(model, "heads+channels")


def remove(model: nn.Module, units: Units, keep_U: Tensor) -> None:
    """Cut the dropped units out of a plain model (adapters merged)."""
    if "qk_pairs" in units.granularity:
        head_dims.remove(model, units, keep_U)
    else:
        structure.remove(model, units, keep_U)


def refuse(model: nn.Module) -> None:
    """Models whose rows cannot be masked, merged or cut.

    Raises:
        ValueError: what was found and what would do.
    """
    row = structure.family(model)
    found = None
    if not row.pre_norm:
        found = "an encoder's attention"
    elif row.fused_qkv:
        found = "fused qkv_proj"
    elif row.fused_up:
        found = "fused gate_up_proj"
    elif len(row.up) != 2:
        found = "an MLP without a gate"
    if found:
        raise ValueError(f"ATP needs separate q/k/v/o and gated MLP projections; this model has {found}")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the base model carries adapters already (LoRA or another, merged or not); merge and unload them first: "
            "ATP trains plain LoRA of its own"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            bits = "4-bit" if parameter.dtype == torch.uint8 else str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"ATP cuts and merges weights: load the base in bf16 or fp32 (found {bits}, {name})")


@dataclass(frozen=True)
class Row:
    """The rows of one linear that belong to units.

    Attributes:
        side: "out", rows of the output (B of its adapter); "in", columns of the input (A of its adapter).
        unit_R: the unit that owns each row.
    """

    name: str
    layer: int
    side: str
    unit_R: Tensor


def wire(model: nn.Module, units: Units) -> list[Row]:
    """Every linear of every layer, and the unit that owns each of its rows (q, k, v, gate, up) or columns (o, down)."""
    row = structure.family(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list[Row] = []

    def add(layer: nn.Module, number: int, path: str, side: str, unit_R: Tensor) -> None:
        found.append(Row(names[id(structure.part(layer, path))], number, side, unit_R))

    for number, layer in enumerate(structure.layers(model)):
        size = structure.sizes_of(layer, row)
        if size.num_heads:
            inner, group = size.head_dim, size.group_size
            if "heads" in units.granularity:
                of = units.of(number, "heads")
                queries, keys = of.repeat_interleave(group * inner), of.repeat_interleave(inner)
                values, outputs = keys, queries
            else:
                pairs, dims = units.of(number, "qk_pairs"), units.of(number, "v_dims")
                queries, keys = pairs.repeat(2 * size.num_heads), pairs.repeat(2 * size.num_kv_heads)
                values, outputs = dims.repeat(size.num_kv_heads), dims.repeat(size.num_heads)
            add(layer, number, row.query, "out", queries)
            add(layer, number, row.key, "out", keys)
            add(layer, number, row.value, "out", values)
            add(layer, number, row.output, "in", outputs)
        if size.intermediate_size:
            of = units.of(number, "channels")
            for path in row.up:
                add(layer, number, path, "out", of)
            add(layer, number, row.down, "in", of)
    return found


def add_adapter(model: nn.Module, rows: list[Row], name: str, *, rank: int, alpha: int) -> None:
    """A second, frozen adapter of the same shape, not active."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for row in rows:
        wrapped = adapter(model, row)
        wrapped.update_layer(name, rank, lora_alpha=alpha, config=LoraConfig(r=rank, lora_alpha=alpha, bias="none"))
        wrapped.set_adapter("default")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)


@contextmanager
def with_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside the block this adapter computes, or none; afterwards "default" again, unless none did before."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    trained = {p: p.requires_grad for p in model.parameters()}
    silent = any(layer.disable_adapters for layer in layers)
    try:
        for layer in layers:
            layer.enable_adapters(False) if name is None else layer.set_adapter(name)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(not silent) if name is None else layer.set_adapter("default")
        for parameter, requires in trained.items():
            parameter.requires_grad_(requires)


def adapter(model: nn.Module, row: Row) -> LoraLinear:
    wrapped = model.get_submodule(row.name)
    assert isinstance(wrapped, LoraLinear)
    return wrapped


def base_of(wrapped: LoraLinear) -> nn.Linear:
    linear = wrapped.get_base_layer()
    assert isinstance(linear, nn.Linear)
    return linear


class MaskBook:
    """Mode and mask of a model's forward passes, through hooks on its (adapted) linears.

    "off": the dense model. "base": the frozen output of q, k, v, gate and up is masked, the adapters are free. "full":
    base and adapters are masked, as if the units were gone: where o_proj and down_proj read them; inside heads at the
    outputs of q, k and v, before norms and rotation. The mode is never read from `module.training`, so that masks and
    dropout are independent; only `using` sets it.
    """

    def __init__(self, model: nn.Module, units: Units, rows: list[Row]):
        self.mode = "off"
        self.mask_U: Tensor = torch.ones(len(units))
        self.fill: Fill = {}
        self._handles: list[Any] = []
        device = next(model.parameters()).device
        family = structure.family(model)
        whole_heads = "heads" in units.granularity
        for row in rows:
            linear, unit_R = model.get_submodule(row.name), row.unit_R.to(device)
            base = linear.get_base_layer() if isinstance(linear, LoraLinear) else linear
            if row.side == "out":
                self._handles.append(base.register_forward_hook(self._output_hook("base", unit_R)))
                inside = not whole_heads and row.name.endswith((family.query, family.key, family.value))
                if inside:
                    self._handles.append(linear.register_forward_hook(self._output_hook("full", unit_R)))
            elif row.name.endswith(family.down):
                # The paper's code masks gate and up alike, so their product carries the square.
                hook = self._input_hook((row.layer, "channels"), unit_R, square=True)
                self._handles.append(linear.register_forward_pre_hook(hook))
            elif whole_heads:
                hook = self._input_hook((row.layer, "heads"), unit_R, square=False)
                self._handles.append(linear.register_forward_pre_hook(hook))

    def _output_hook(self, mode: str, unit_R: Tensor) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            return output * self.mask_U[unit_R].to(output.dtype) if self.mode == mode else None

        return hook

    def _input_hook(self, place: tuple[int, str], unit_R: Tensor, square: bool) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            if self.mode != "full":
                return None
            mask_R = self.mask_U[unit_R].square() if square else self.mask_U[unit_R]
            masked = inputs[0] * mask_R.to(inputs[0].dtype)
            if place in self.fill:
                masked = masked + ((1 - mask_R) * self.fill[place].to(mask_R)).to(masked.dtype)
            return (masked,)

        return hook

    @contextmanager
    def using(self, mode: str, mask_U: Tensor | None = None, fill: Fill | None = None) -> Iterator[None]:
        """Forward *and backward* passes inside the block use this mode (checkpointing runs layers again in backward).

        Args:
            mode: "off", "base" or "full".
            mask_U: [U] on the model's device, bool, hard or soft; may carry gradients.
            fill: "full", whole heads: what stands in for what is masked; zero without it.
        """
        assert mode in ("off", "base", "full")
        before = self.mode, self.mask_U, self.fill
        self.mode, self.fill = mode, fill or {}
        if mask_U is not None:
            self.mask_U = mask_U.float() if mask_U.dtype == torch.bool else mask_U
        try:
            yield
        finally:
            self.mode, self.mask_U, self.fill = before

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def probe(model: nn.Module, units: Units, rows: list[Row], book: MaskBook, ids_BT: Tensor) -> None:
    """Mask units of each kind in the first, middle and last layer, and compare with their rows zeroed by hand.

    To be called while B is zero: then both modes, "full" and "base", must agree with the zeroed rows.

    Raises:
        ValueError: a hook had no effect: something runs instead of the linears.
    """
    base, last = structure.base_model(model), units.num_layers - 1
    device = next(model.parameters()).device

    def hidden() -> Tensor:
        with evaluating(model):
            return base(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state.float()

    dense = hidden()
    for layer in sorted({0, last // 2, last}):
        for kind in units.granularity:
            of = units.of(layer, kind)
            if not len(of):
                continue
            masked_U = torch.zeros(len(units), dtype=torch.bool)
            masked_U[of[::2]] = True  # one unit alone may weigh less than the rounding of bf16
            touched: list[tuple[Tensor, Tensor]] = []
            for row in rows:
                mine_R = masked_U[row.unit_R].to(device)
                if row.layer == layer and row.side == "out" and bool(mine_R.any()):
                    linear = base_of(adapter(model, row))
                    for tensor in (linear.weight, linear.bias):
                        if tensor is not None:
                            touched.append((tensor, tensor.clone()))
                            tensor[mine_R] = 0
            expected = hidden()
            for tensor, old in touched:
                tensor.copy_(old)
            effect = float((expected - dense).abs().max())
            for mode in ("full", "base"):
                with book.using(mode, (~masked_U).to(device)):
                    wrong = float((hidden() - expected).abs().max())
                if wrong > 0.1 * effect:
                    raise ValueError(
                        f"masking half the {kind} of layer {layer} had no effect, or another one than their removal: "
                        "a fused kernel replaces its linear layers; disable it"
                    )


class Adapters:
    """The rows of A and B that belong to units: their norms, their shrinking, their locks."""

    def __init__(self, model: nn.Module, units: Units, rows: list[Row]):
        self.num_layers = units.num_layers
        device = next(model.parameters()).device
        self.rows: list[tuple[nn.Parameter, int, Tensor]] = []  # factor, dimension its rows lie in, unit of each row
        for row in rows:
            wrapped = adapter(model, row)
            factor = (wrapped.lora_B if row.side == "out" else wrapped.lora_A)["default"].weight
            assert isinstance(factor, nn.Parameter)
            self.rows.append((factor, 0 if row.side == "out" else 1, row.unit_R.to(device)))
        self._locked: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def lasso(self, mask_U: Tensor, floor: float = 1e-8) -> Tensor:
        """1/3L times the sum of the norms of all dropped rows; `floor` inside the root keeps it differentiable at 0."""
        dropped_U = 1.0 - mask_U.float()
        total = dropped_U.new_zeros(())
        for factor, dimension, unit_R in self.rows:
            norm_R = (factor.square().sum(1 - dimension) + floor).sqrt()
            total = total + (norm_R * dropped_U[unit_R]).sum()
        return total / (3 * self.num_layers)

    @torch.no_grad()
    def levels(self, mask_U: Tensor) -> dict[str, float]:
        """The lasso without the constant of its root, 0 when every dropped row is zero: whole, and of A and B alone.

        B starts at zero; where it is zero again, nothing reaches the dropped columns of A. These start at random
        values, which the lasso needs more steps for than a short run has.
        """
        dropped_U = 1.0 - mask_U.float()
        total = {0: 0.0, 1: 0.0}
        for factor, dimension, unit_R in self.rows:
            square_R = factor.square().sum(1 - dimension)
            excess_R = square_R / ((square_R + 1e-8).sqrt() + 1e-4)  # sqrt(x + 1e-8) - 1e-4, and 0 at 0 to the bit
            total[dimension] += float((excess_R * dropped_U[unit_R]).sum())
        b, a = (max(0.0, total[dimension]) / (3 * self.num_layers) for dimension in (0, 1))
        return {"lasso": a + b, "lasso_a": a, "lasso_b": b}

    @torch.no_grad()
    def lock(self, keep_U: Tensor) -> None:
        """Dropped rows that are zero stay zero, and their gradients are: these would fill the clipped norm."""
        self.unlock()
        for factor, dimension, unit_R in self.rows:
            zero_R = (~keep_U.bool()[unit_R]) & (factor.abs().sum(1 - dimension) == 0)
            if not bool(zero_R.any()):
                continue
            self._locked[id(factor)] = zero_R
            shape = (-1, 1) if dimension == 0 else (1, -1)
            stays = (~zero_R).to(factor.dtype).view(shape)
            self._handles.append(factor.register_hook(lambda gradient, stays=stays: gradient * stays))

    def unlock(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._locked = [], {}

    @torch.no_grad()
    def shrink(self, keep_U: Tensor, step: float) -> None:
        """One proximal step: a live dropped row v of n elements becomes v max(0, 1 - tau / |v|), tau = step sqrt(n).

        Rows that were zero when they were last locked are set back to zero first: Adam's momentum moves them still.
        """
        for factor, dimension, unit_R in self.rows:
            threshold = step * factor.shape[1 - dimension] ** 0.5
            norm_R = factor.norm(dim=1 - dimension)
            scale_R = (1 - threshold / norm_R.clamp_min(1e-30)).clamp_min(0)
            scale_R = torch.where(keep_U.bool()[unit_R], torch.ones_like(scale_R), scale_R)
            if (locked_R := self._locked.get(id(factor))) is not None:
                scale_R = scale_R.masked_fill(locked_R, 0.0)
            factor.mul_(scale_R.unsqueeze(1 - dimension))

    @torch.no_grad()
    def largest(self, keep_U: Tensor) -> float:
        """The largest norm among dropped rows."""
        found = 0.0
        for factor, dimension, unit_R in self.rows:
            dropped_R = ~keep_U.bool()[unit_R]
            if bool(dropped_R.any()):
                found = max(found, float(factor.norm(dim=1 - dimension)[dropped_R].max()))
        return found

    @torch.no_grad()
    def widen(self, keep_U: Tensor) -> None:
        """Untrained A as it would be drawn for the cut linear: peft draws within a bound of 1 / sqrt(inputs)."""
        for factor, dimension, unit_R in self.rows:
            if dimension == 1:
                factor.mul_((len(unit_R) / max(1, int(keep_U.bool()[unit_R].sum()))) ** 0.5)

    @torch.no_grad()
    def zero(self, keep_U: Tensor) -> float:
        """Set every dropped row to zero; the largest norm among those that were not."""
        largest = self.largest(keep_U)
        for factor, dimension, unit_R in self.rows:
            factor.mul_(keep_U.bool()[unit_R].to(factor.dtype).unsqueeze(1 - dimension))
        return largest


class Teacher(nn.Module):
    """The dense model on the same base weights, switched in for its forward passes only.

    Looks to `Distillation` like a model: base model, head, configuration.

    Args:
        adapter: by name; None: without any, as it was before it was tuned.
        base: inside it the base has the dense model's weights, where they were refitted.
    """

    base_model_prefix = "switched"

    def __init__(self, model: Any, book: MaskBook, adapter: str | None, base: Callable[[], Any] = nullcontext):
        super().__init__()
        self.__dict__.update(model=model, book=book, adapter=adapter)
        self.config = model.config

        def switched(**inputs: Tensor) -> Any:
            with base(), with_adapter(model, adapter), evaluating(model), book.using("off"):
                return structure.base_model(model)(**inputs)

        self.__dict__["switched"] = switched

    def get_output_embeddings(self) -> Any:
        return self.__dict__["model"].get_output_embeddings()
