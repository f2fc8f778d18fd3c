"""Before anything is trained: is the model one whose blocks can be dropped and shared, and how alike are they?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sentei import checkpoint, distill, folding, structure

if TYPE_CHECKING:
    from sentei.methods.fold_gpt import FoldGPT

ADAPTERS = ("lora_", "adapter")
TARGETS = ("target_blocks", "target_model", "target_bytes")
HEADER = 96  # bytes of a safetensors header per tensor, beside its name


def check(model: nn.Module, *, fold: bool) -> None:
    """Refuse a model that this method cannot work on.

    Args:
        fold: blocks are to share weights, not only to go.
    Raises:
        ValueError: what is in the way and what to do about it.
    """
    if not structure.is_causal(model):
        raise ValueError(
            f"{structure.family_name(model)} is an encoder; FoldGPT is for decoders. Use policy_gradient or one_shot"
        )
    if distill.head(model) is None:
        raise ValueError(
            f"{type(model).__name__} predicts no tokens, and every choice here is judged by what it predicts: compress "
            "the language model, and train the head of another task afterwards"
        )
    config = structure.base_model(model).config
    if getattr(model, "peft_config", None) or any(
        part in name for name, _ in model.named_parameters() for part in ADAPTERS
    ):
        raise ValueError("the model has adapters on top: merge or unload them first")
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised or any(not p.is_floating_point() or p.element_size() < 2 for p in model.parameters()):
        raise ValueError("the weights are quantised: load the model in 16 or 32 bit, fold it, and quantise the result")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError("layers of this model share keys and values; FoldGPT needs blocks that stand for themselves")
    if folding.is_folded(model):
        raise ValueError("the model is folded already; fold its parent in one go, or `sentei unfold` it first")
    blocks = list(structure.layers(model))
    first = _tree(blocks[0])
    for number, block in enumerate(blocks):
        if different := sorted(_tree(block) ^ first):
            name, kind = different[0]
            where = (number, 0) if (name, kind) in _tree(block) else (0, number)
            raise ValueError(
                f"FoldGPT needs identical blocks: block {where[0]} has {name} ({kind}), block {where[1]} has not. "
                "Use a width method for this model, such as policy_gradient"
            )
    if not fold:
        return
    if any(size.qk_pairs for size in structure.sizes(model)):
        raise ValueError(
            "the heads of this model were cut inside, each layer's at other places, so layers cannot share weights: "
            "prune with units=groups+channels, or leave the target out and only remove blocks"
        )
    devices = [str(next(block.parameters()).device) for block in blocks]
    if len(set(devices)) > 1:
        split = next(i for i in range(1, len(devices)) if devices[i] != devices[i - 1])
        raise ValueError(f"layers {split - 1}-{split} share weights and must be on one device; load the model on one")
    if len({parameter.dtype for block in blocks for parameter in block.parameters()}) > 1:
        raise ValueError("the blocks' weights have several dtypes and cannot be shared: load the model in one dtype")


def _tree(block: nn.Module) -> set[tuple[str, str]]:
    return {(name or "the block", type(module).__name__) for name, module in block.named_modules()}


def check_pairs(model: nn.Module, size: int, free: list[bool]) -> None:
    """Refuse folding where no run of `size` adjacent unprotected layers is alike."""
    kinds = [folding.kind(model, number) for number in range(len(free))]
    runs = [range(i, i + size) for i in range(len(free) - size + 1)]
    if any(all(free[i] for i in run) and len({kinds[i] for i in run}) == 1 for run in runs):
        return
    sizes = structure.sizes(model)
    if len({kind[1] for kind in kinds}) > 1:
        widths = ", ".join(f"{size.num_kv_heads} KV groups x {size.intermediate_size}" for size in sizes[:4])
        raise ValueError(
            f"cannot fold: no {size} adjacent blocks of equal shape (attention and MLP: {widths}, ..). Prune with "
            "shape=uniform, or leave the target out and only remove blocks"
        )
    for i in range(len(kinds) - 1):
        if kinds[i][0] != kinds[i + 1][0]:
            raise ValueError(
                f"cannot fold blocks {i} and {i + 1}: {kinds[i][0]} and {kinds[i + 1][0]}. No {size} adjacent blocks "
                "match; leave the target out and only remove blocks"
            )
    raise ValueError(f"group_size {size} is more than the {sum(free)} blocks that are neither removed nor protected")


def allowed(method: FoldGPT, model: nn.Module) -> int | None:
    """Parameters that the whole model may store, of the dense model's; None: as many as there are."""
    blocks, total = structure.layer_parameters(model), structure.total_parameters(model)
    if method.target_blocks is not None:
        return total - blocks + int(method.target_blocks * blocks)
    if method.target_model is not None:
        return int(method.target_model * total)
    if method.target_bytes is not None:
        return (method.target_bytes - header_bytes(model)) // stored_bytes(method, model) - num_linears(model)
    return None


def num_linears(model: nn.Module) -> int:
    """Linears of the blocks; one that uses another's weight is stored with one element, see `ChildLinear`."""
    return sum(len(folding.linears(layer)) for layer in structure.layers(model))


def header_bytes(model: nn.Module) -> int:
    """The most that the header of the folded file takes: where a linear was, a mark, A, B and a scale may stand."""
    tensors = sum(len(name) + HEADER for name in model.state_dict())
    return 1024 + tensors + sum(
        3 * (len(name) + HEADER)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()  # pyright: ignore
    )  # fmt: skip


def stored_bytes(method: FoldGPT, model: nn.Module) -> int:
    """Bytes per parameter of the saved file: as in the checkpoint that the model came from, unless the field says."""
    if method.bytes_per_parameter is not None:
        return method.bytes_per_parameter
    place = Path(getattr(model.config, "_name_or_path", "") or "nowhere")  # pyright: ignore[reportArgumentType]
    if (place / "config.json").is_file():
        return checkpoint.inspect(place, trust_remote_code=True).dtype.itemsize  # its code is not run here
    packed = sorted(place.glob("*.gguf")) if place.is_dir() else []
    if packed:
        return max(checkpoint.inspect(file).dtype.itemsize for file in packed)
    return next(model.parameters()).element_size()


def reach(method: FoldGPT, model: nn.Module, remove: int) -> str:
    """Refuse before any training what folding cannot do; a line on what it will.

    Which blocks go is not known yet, so the bound is that of the best case: the rest are neighbours.

    Args:
        remove: parameters that go before anything is folded.
    """
    layers = structure.layers(model)
    count, size, rank, scale = len(layers), method.group_size, method.lora_rank, method.scaled(model)
    check_pairs(model, size, method.free(count))
    held, added = folding.saving(layers[method.protect_first], rank, scale)
    if added >= held:
        per_rank = (added - folding.saving(layers[method.protect_first], 0, scale)[1]) // rank
        raise ValueError(
            f"lora_rank={rank} adds {added / 1e6:.3g}M parameters per folded block, folding saves {held / 1e6:.3g}M. "
            f"Use lora_rank <= {max(1, held // per_rank // 8)}"
        )
    may_store = allowed(method, model)
    if may_store is None:
        return "every free block"
    kinds = {folding.kind(model, number) for number in range(count)}
    if len(kinds) > 1 or method.granularity != "layers":
        return "as far as blocks that are alike lie side by side"
    blocks, total = structure.layer_parameters(model), structure.total_parameters(model)
    left = total - -(-remove // (blocks // count)) * (blocks // count)
    groups = (count - -(-remove // (blocks // count)) - method.protect_first - method.protect_last) // size
    each = (size - 1) * held - (size - (method.parent != "average")) * added
    least = left - groups * max(0, each)
    if least > may_store:
        name = next(name for name in TARGETS if getattr(method, name) is not None)
        extra = header_bytes(model) + num_linears(model) * stored_bytes(method, model)
        bound = {
            "target_blocks": f"{1 - (total - least) / blocks:.2f}",
            "target_model": f"{least / total:.2f}",
            "target_bytes": f"{least * stored_bytes(method, model) + extra:,}",
        }[name]
        raise ValueError(
            f"{name}={getattr(method, name)} with sparsity={method.sparsity:g} is below what group_size={size} "
            f"reaches ({bound}). Raise group_size or sparsity, or lower lora_rank"
        )
    need = max(0, left - may_store)
    return f"{-(-need // max(1, each))} groups of {size}, {each:,} parameters each, to store {may_store:,} in all"


@torch.no_grad()
def similarity(model: nn.Module, blocks_NT: Tensor, forward: Callable[[Tensor], Any], batch_size: int = 4) -> Any:
    """How alike the blocks are: mean over tokens of cosines, as lists of L rows with L entries each.

    "outputs": between what the blocks put out. Adjacent ones are alike because an update is small next to the residual
    stream, which is a reason to remove blocks, not to share their weights. "updates": between h_{l+1} - h_l.
    The last output is taken at the block, before the final norm.
    """
    layers = structure.layers(model)
    sums = torch.zeros(2, len(layers), len(layers), dtype=torch.double)
    count = 0
    for ids_BT in blocks_NT.split(batch_size):
        outputs: list[Tensor] = []
        updates: list[Tensor] = []
        with ExitStack() as stack:
            for layer in layers:

                def see(
                    module: nn.Module, args: Any, kwargs: Any, output: Tensor,
                    outputs: list[Tensor] = outputs, updates: list[Tensor] = updates,
                ) -> None:  # fmt: skip
                    hidden = args[0] if args else kwargs["hidden_states"]
                    for seen, x in ((outputs, output), (updates, output - hidden)):
                        seen.append(nn.functional.normalize(x.float().flatten(0, 1), dim=-1))

                stack.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
            forward(ids_BT)
        for i, seen in enumerate((outputs, updates)):
            for number, x in enumerate(seen):
                sums[i, number, number:] += torch.stack([(x * y).sum() for y in seen[number:]]).double().cpu()
        count += ids_BT.numel()
    mean = sums / count
    mean = mean + mean.triu(1).transpose(1, 2)
    return {
        name: [[round(value, 4) for value in row] for row in mean[i].tolist()]
        for i, name in enumerate(("outputs", "updates"))
    }
