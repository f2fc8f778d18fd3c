"""Time and memory of the search on a large model with random weights, against what the paper reports for 13B.

    python benchmarks/gpu_scale.py --out results/gpu-scale.json                     # LLaMA-2-13B's shape, one GPU, bf16
    python benchmarks/gpu_scale.py --hidden 256 --intermediate 688 --layers 4 --heads 8 --steps 4      # a try on a CPU
    python benchmarks/gpu_scale.py --widths 256 512 1024 --layers 4 --heads 8 --steps 4                # how cost grows

The paper names about 35 GB and 2.7 hours on one A100 for a 13B model (arXiv 2406.10576, abstracts of versions 1 and 2);
its scripts make 15,000 steps of two masks on 8 x 128 tokens. Here the initialisation by Wanda is run whole (128 blocks
of 1,024 tokens), some steps are timed and that many extrapolated; the peak is that of both. Text is random: neither
time nor memory depends on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tables import write
from transformers import LlamaConfig, LlamaForCausalLM

from sentei import structure
from sentei.methods.policy_gradient import PolicyGradient
from sentei.methods.policy_gradient.levels import Bits
from sentei.methods.policy_gradient.search import Search
from sentei.methods.structural import Run

STEPS = 15_000


class RandomText(Run):
    """A run on random tokens."""

    def blocks(self, num: int | None, seq_len: int, part: str = "train") -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        config: Any = self.model.config
        return torch.randint(5, config.vocab_size, (num or 256, seq_len), generator=generator)


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [measure(args, width, device, dtype) for width in args.widths or [args.hidden]]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    result = {"device": name, "dtype": str(dtype), "torch": torch.__version__, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.out:
        write(Path(args.out), result)


@torch.inference_mode()
def measure(args: argparse.Namespace, hidden: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    intermediate = args.intermediate if not args.widths else hidden * 43 // 16
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, vocab_size=32_000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    method = PolicyGradient(
        sparsity=args.sparsity, preset="paper", steps=args.steps, channel_group=args.channel_group,
        batch_size=args.batch, seq_len=args.tokens, calibration_samples=args.calibration,
        calibration_seq_len=args.calibration_tokens,
    )  # fmt: skip
    units = structure.units(model)
    run = RandomText(model, None, units, None, method, None, None, time.monotonic())  # pyright: ignore[reportArgumentType]
    synchronise(device)
    reset_peak(device)
    began = time.monotonic()
    search = Search(method, run)
    bits = Bits(search, None)
    synchronise(device)
    initialisation, initial_peak = time.monotonic() - began, peak(device)
    batch = search.batch(0).to(device)

    def seconds(work: Any, rounds: int) -> float:
        work(0)
        synchronise(device)
        began = time.monotonic()
        for number in range(rounds):
            work(number)
        synchronise(device)
        return (time.monotonic() - began) / rounds

    reset_peak(device)
    dense = seconds(lambda number: run.loss(model, batch, number), max(2, args.steps // 2))
    inference = peak(device)
    reset_peak(device)
    step = seconds(lambda number: bits.update(bits.measure(number, number), number), args.steps)
    peaks = [found for found in (initial_peak, peak(device)) if found is not None]
    return {
        "parameters": structure.total_parameters(model), "hidden": hidden, "layers": args.layers,
        "sparsity": args.sparsity, "tokens_per_forward": args.batch * args.tokens, "dense_forward_seconds": dense,
        "initialisation_seconds": initialisation, "initialisation_peak_gb": initial_peak, "step_seconds": step,
        "step_over_two_dense_forwards": step / (2 * dense),
        "hours_for_15000_steps": (initialisation + step * STEPS) / 3600, "inference_peak_gb": inference,
        "search_peak_gb": max(peaks, default=None),
    }  # fmt: skip


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> float | None:
    """Gigabytes of the device; None on a CPU, where benchmarks/search.py measures memory in a process of its own."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--widths", type=int, nargs="+", help="several hidden sizes, MLPs in proportion")
    parser.add_argument("--intermediate", type=int, default=13_824)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--channel-group", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calibration", type=int, default=128, help="blocks of text for the initialisation")
    parser.add_argument("--calibration-tokens", type=int, default=1024, help="tokens in each of them")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
