"""What sharing costs, KL(dense || model) on fixed text, and the two closed forms that a corrected layer starts from.

Shape legend: T tokens, H hidden width, O outputs and I inputs of a linear, R rank.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sentei import distill, masks, structure

SHRINK = 0.1  # pulls the least-squares scale towards 1
TINY = 1e-6


def output_scale(uv_O: Tensor, vv_O: Tensor, shrink: float = SHRINK) -> Tensor:
    """Least squares of u against v per channel, pulled to 1: (sum uv + mu sum vv) / ((1 + mu) sum vv)."""
    scale_O = (uv_O + shrink * vv_O) / ((1 + shrink) * vv_O)
    return torch.where(vv_O > 0, scale_O, torch.ones_like(scale_O))


def low_rank(delta_OI: Tensor, rms_I: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [R, I], B [O, R]) so that B A x is nearest to delta x for inputs of that root mean square: weighted SVD."""
    rms_I = rms_I.clamp_min(1e-6 * float(rms_I.max().clamp_min(TINY)))
    u, s, v = torch.linalg.svd(delta_OI * rms_I, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank] / rms_I, u[:, :rank] * root


class Judge:
    """KL(dense || model) on fixed text, mean per token. The dense model's last hidden states are computed once."""

    def __init__(self, dense: nn.Module, blocks_NT: Tensor, batch_size: int = 4, chunk: int = 256):
        self.batches = list(blocks_NT.to(next(dense.parameters()).device).split(batch_size))
        self.head, self.chunk = distill.head(dense), chunk
        assert self.head is not None
        self.dense = [self._hidden(dense, ids_BT) for ids_BT in self.batches]

    @staticmethod
    @torch.no_grad()
    def _hidden(model: nn.Module, ids_BT: Tensor) -> Tensor:
        return structure.base_model(model)(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)

    @torch.no_grad()
    def kl(self, model: nn.Module, number: int = 0, inputs: list[Tensor] | None = None) -> float:
        """Args: inputs: what layer `number` takes in for each batch, when the layers before need not run again."""
        assert self.head is not None
        total = count = 0.0
        for i, ids_BT in enumerate(self.batches):
            with ExitStack() as stack:
                if inputs is not None:
                    stack.enter_context(masks.starting_at(model, number, inputs[i]))
                ours_TH = self._hidden(model, ids_BT)
            chunks = zip(ours_TH.split(self.chunk), self.dense[i].split(self.chunk), strict=True)
            for ours, theirs in chunks:
                total += float(distill.kl(self.head(ours), self.head(theirs))) * len(ours)
            count += ids_BT.numel()
        return total / count
