"""A second model from a first: each KV head repeated for its query heads, so that a head is a third of the size.

    python benchmarks/mha_twin.py MODEL OUT

The twin computes the same function with as many KV heads as query heads (its KV projections are larger), which makes
heads a finer unit to remove. For decoders whose layers are named as Llama's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sentei import checkpoint


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise SystemExit(f"{args.out} exists")
    model, tokenizer = checkpoint.load(args.model, dtype="float32")
    config = AutoConfig.from_pretrained(args.model)
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    size = model.model.layers[0].self_attn.head_dim
    config.num_key_value_heads = heads
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.split(".")[-2] in ("k_proj", "v_proj"):
            by_head = weight.view(groups, size, *weight.shape[1:])
            weights[name] = by_head.repeat_interleave(heads // groups, 0).reshape(heads * size, *weight.shape[1:])
    twin.load_state_dict(weights)
    ids = torch.arange(64)[None] + 100
    difference = float((twin(ids).logits - model(ids).logits).abs().max())
    if difference > 1e-3:
        raise SystemExit(f"the twin's logits differ by {difference:.2g}")
    twin.to(checkpoint_dtype(args.model)).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {heads} KV heads instead of {groups}, logits within {difference:.1e}")


def checkpoint_dtype(model: str) -> torch.dtype:
    return getattr(torch, str(AutoConfig.from_pretrained(model).dtype).removeprefix("torch."))


if __name__ == "__main__":
    main()
