"""torch's sparse int8 kernel for 1x4 blocks (fbgemm): the linears of a model computed by it, everything else in fp32.

Trap: the kernel adds products of u8 and s8 in pairs of 16 bits, which saturate for codes above 64 (of 127) without a
word. Such codes are refused here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_CODE = 64


class Linear(nn.Module):
    """x [..., I] -> [..., O] through the kernel: input and output are uint8 with static ranges."""

    def __init__(self, code_OI: Tensor, step: Tensor, bias: Tensor | None, ranges: Mapping[str, float]):
        super().__init__()
        if int(code_OI.abs().max()) > LARGEST_CODE:
            raise ValueError(f"torch's 1x4 kernel saturates for codes above {LARGEST_CODE}: use fast_path torch_1x4")
        outputs = len(code_OI)
        steps_O = step.double().expand(outputs).contiguous()
        zero_O = torch.zeros(outputs, dtype=torch.long)
        self.ranges, self.outputs = dict(ranges), outputs
        with _fbgemm():
            weight = torch._make_per_channel_quantized_tensor(code_OI, steps_O, zero_O, 0)
            self.packed = torch.ops.sparse.qlinear_prepack(weight, bias, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        with _fbgemm():
            codes = torch.quantize_per_tensor(flat, self.ranges["in_scale"], int(self.ranges["in_zp"]), torch.quint8)
            made = torch.ops.sparse.qlinear(codes, self.packed, self.ranges["out_scale"], int(self.ranges["out_zp"]))
        return made.dequantize().reshape(*x.shape[:-1], self.outputs)


def converted(
    model: nn.Module, codes: Mapping[str, tuple[Tensor, Tensor]], ranges: Mapping[str, Mapping[str, float]]
) -> Any:
    """A copy of the model whose linears with `ranges` are computed by the kernel.

    Args:
        codes: name of a weight -> int8 [O, I] and step, [] or [O].
        ranges: name of a linear -> "in_scale", "in_zp", "out_scale", "out_zp".
    Raises:
        ValueError: codes at which the kernel saturates.
    """
    made = copy.deepcopy(model).eval()
    for name, of in ranges.items():
        bias = made.get_submodule(name).bias
        code, step = codes[f"{name}.weight"]
        made.set_submodule(name, Linear(code, step, None if bias is None else bias.detach().float(), of))
    return made


def uint8_range(low: float, high: float) -> tuple[float, int]:
    """Step and zero point of 256 levels over a range, widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(high - low, 1e-8) / 255
    return step, round(-low / step)


@contextmanager
def _fbgemm() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            # Of torch: such tensors are deprecated.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before
