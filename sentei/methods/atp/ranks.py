"""Several processes and one mask: values from the first process, sums over all, and a check that none went astray."""

from __future__ import annotations

import zlib

import torch
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor

from sentei.train import processes


def shared(tensor: Tensor) -> Tensor:
    """What the first process has, on all of them: masks that differ would never let the lasso fall."""
    these = processes()
    if these.num_processes == 1:
        return tensor
    moved = tensor.to(these.device)
    return broadcast(moved, from_process=0).to(tensor.device)  # pyright: ignore[reportAttributeAccessIssue]


def summed(tensor: Tensor) -> Tensor:
    these = processes()
    if these.num_processes == 1:
        return tensor
    return reduce(tensor.to(these.device), "sum").to(tensor.device)  # pyright: ignore[reportAttributeAccessIssue]


def check_same(keep_U: Tensor) -> None:
    """Compare the checksums of all processes' masks.

    Raises:
        ValueError: names the processes whose mask is not that of the first.
    """
    these = processes()
    if these.num_processes == 1:
        return
    sums = gather(torch.tensor([zlib.crc32(keep_U.numpy().tobytes())], device=these.device))
    different = [rank for rank, other in enumerate(sums.tolist()) if other != sums[0]]  # pyright: ignore
    if different:
        raise ValueError(f"the masks of the processes {different} differ from that of process 0; the run stops")
