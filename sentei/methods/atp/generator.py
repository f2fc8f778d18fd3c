"""The network that decides what stays, its noise, and the price of missing the budget.

Shape legend: U units, L layers, E embedding width (64).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sentei.structure import KINDS, Units
from sentei.train import evaluating, mix

EMBEDDING = 64
BORDER = math.log(math.log(2))  # the logit, without the offset, at which P(keep) is 0.5
START_SLOPE = 8.0  # of the logits from the worst unit of a kind to its best; Gumbel noise has a deviation of 1.3


class Generator(nn.Module):
    """Layers in, one logit per unit out; no data enters.

    A fixed orthogonal table, one row per layer, passes through a small transformer, so that the layers' logits can
    influence each other; every layer and kind of unit then has a linear head of its own, without bias. To its output a
    fixed `start_U` is added, 0 in the paper.

    Args:
        seed: of the table and of all first values.
    """

    table_LE: Tensor
    start_U: Tensor

    def __init__(self, units: Units, *, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(mix(seed, "generator"))
            self.register_buffer("table_LE", nn.init.orthogonal_(torch.empty(units.num_layers, EMBEDDING)))
            block = nn.TransformerEncoderLayer(EMBEDDING, 4, 256, dropout=0.1, batch_first=True)
            self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
            for part in self.encoder.layers:  # TransformerEncoder copies one layer; each gets values of its own
                _initialise(part)
            self.norm = nn.LayerNorm(EMBEDDING)
            self.heads = nn.ParameterDict()
            for kind in units.granularity:
                count = int((units.kind_U == KINDS.index(kind)).sum())
                self.heads[kind] = nn.Parameter(torch.empty(count, EMBEDDING).uniform_(-1, 1) / math.sqrt(EMBEDDING))
        self._layer_of = {kind: units.layer_U[units.kind_U == KINDS.index(kind)] for kind in units.granularity}
        self._place_of = {kind: (units.kind_U == KINDS.index(kind)).nonzero().flatten() for kind in units.granularity}
        self.register_buffer("start_U", torch.zeros(len(units)))

    def forward(self) -> Tensor:
        """Logits, [U]; with dropout in train mode."""
        hidden_LE = self.norm(self.encoder(self.table_LE[None])[0])
        logits_U = torch.zeros_like(self.start_U)
        for kind, head in self.heads.items():
            of_kind = (hidden_LE[self._layer_of[kind]] * head).sum(-1)
            logits_U = logits_U.index_put((self._place_of[kind],), of_kind)
        return logits_U + self.start_U

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits without dropout or noise, [U]: the same at every call."""
        with evaluating(self):
            return self()


def _initialise(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, nn.Linear):
            module.reset_parameters()


def gumbel(count: int, *seed: object) -> Tensor:
    """One Gumbel draw per logit, on the CPU and from the seed's parts alone: the same on every device and resume."""
    u_U = torch.rand(count, generator=torch.Generator().manual_seed(mix(*seed)))
    return -torch.log(-torch.log(u_U + 1e-10) + 1e-10)


def binarise(logits_U: Tensor, noise_U: Tensor, temperature: float, offset: float) -> tuple[Tensor, Tensor]:
    """(soft, hard): soft = sigmoid((logit + noise + offset) / temperature), hard = soft >= 0.5 with soft's gradient."""
    soft_U = torch.sigmoid((logits_U + noise_U + offset) / temperature)
    hard_U = (soft_U >= 0.5).to(soft_U.dtype)
    return soft_U, hard_U + soft_U - soft_U.detach()


def keep_probability(logits_U: Tensor, offset: float) -> Tensor:
    """P(hard = 1) = 1 - exp(-exp(logit + offset)); in double, since fp32 is 1.0 for every logit above about 0."""
    return -torch.expm1(-torch.exp(logits_U.double() + offset))


def start_logits(score_U: Tensor, units: Units, sparsity: float, offset: float) -> Tensor:
    """Logits with which each kind of unit keeps about 1 - sparsity, the higher scores more surely.

    The worst of its kind is kept with a probability of 0.7 exp(-8 sparsity), that at the budget's border with 0.5.
    """
    logits_U = torch.zeros(len(units))
    for kind in units.granularity:
        of = (units.kind_U == KINDS.index(kind)).nonzero().flatten()
        logits_U[of] = _by_rank(score_U[of], sparsity)
    return logits_U + BORDER - offset


def start_alike(score_U: Tensor, units: Units, sparsity: float, offset: float) -> Tensor:
    """As `start_logits`, every layer alike: ranks inside each, and heads that go half as often as channels make good.

    Channels go with at most 0.9. One KV group weighs as much as hundreds of them, and what no layer has lost LoRA can
    use; which groups and layers are to lose more is for the generator to find. A layer's only group never goes.
    """
    logits_U = torch.zeros(len(units))
    heads = float(units.cost_U[units.kind_U == KINDS.index("heads")].sum()) / units.total
    often = 0.5 if any(len(units.of(layer, "heads")) > 1 for layer in range(units.num_layers)) else 0.0
    channels = min(0.9, sparsity * (1 - often * heads) / (1 - heads)) if heads < 1 else 0.0
    share = {"channels": channels, "heads": (sparsity - (1 - heads) * channels) / heads if heads else 0.0}
    for kind in units.granularity:
        for layer in range(units.num_layers):
            of = units.of(layer, kind)
            logits_U[of] = _by_rank(score_U[of], share[kind])
    return logits_U + BORDER - offset


def start_near(score_U: Tensor, keep_U: Tensor, units: Units, offset: float) -> Tensor:
    """Logits with which every layer keeps as much of a kind as a mask does: first what it keeps, then by the scores."""
    logits_U = torch.zeros(len(units))
    for kind in units.granularity:
        for layer in range(units.num_layers):
            of = units.of(layer, kind)
            kept_N = keep_U[of].float()
            place_N = score_U[of].argsort(stable=True).argsort() + len(of) * kept_N
            logits_U[of] = _by_rank(place_N, float((1 - kept_N).mean()) if len(of) else 0.0)
    return logits_U + BORDER - offset


def _by_rank(score_N: Tensor, share: float) -> Tensor:
    """Evenly spaced logits, the higher scores higher, with a part of `share` below 0, [N]."""
    place_N = torch.empty(len(score_N))
    place_N[score_N.argsort(stable=True)] = (torch.arange(len(score_N)) + 0.5) / max(1, len(score_N))
    return START_SLOPE * (place_N - share)


def budget_loss(kept: Tensor, wanted: float) -> Tensor:
    """log(max(r, p) / min(r, p)): 0 where the kept fraction r is the wanted p, and steep on both sides.

    Args:
        kept: scalar r, the fraction of the prunable parameters that the hard mask keeps, with its gradient.
    """
    p = torch.as_tensor(wanted, dtype=kept.dtype)
    return torch.log(torch.maximum(kept, p) / (torch.minimum(kept, p) + 1e-10))
