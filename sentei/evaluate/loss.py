"""Loss per token of a model: next tokens of a causal one, masked tokens of an encoder.

Shapes: B batch, N windows, T tokens of a window, V vocabulary, S scored tokens of a batch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.console
import rich.progress
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sentei import data, structure
from sentei.train import evaluating

UNSCORED = -100
# Logits exist for as many tokens at a time as fill this: 150 000 words of vocabulary at fp32 would otherwise take five
# gigabytes for one window of 8192 tokens, more than most models that are evaluated.
LOGIT_BYTES = 64 * 2**20
MASKED_FRACTION = 0.15


def is_masked_lm(model: nn.Module) -> bool:
    """Whether the model predicts masked tokens from both sides (BERT and its kin), not the next token."""
    return type(model).__name__.endswith("ForMaskedLM")


def perplexity(model: Any, blocks: Tensor, *, batch_size: int = 8, progress: bool = True) -> dict[str, Any]:
    """Perplexity of a causal model over blocks LongTensor[N, T]: every token of a block but its first is scored.

    Returns: perplexity; loss (nats per token); tokens (scored); context (T); blocks (N).

    Raises:
        ValueError: a loss that is not finite, or a model that predicts no next token.
    """
    if is_masked_lm(model):
        raise ValueError(f"{type(model).__name__} predicts masked tokens; measure it with evaluate.masked_lm")
    if blocks.ndim != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
        raise ValueError(f"the blocks have the shape {list(blocks.shape)}; expected [N, T] with N > 0 and T > 1")
    _check_context(model, blocks.shape[1])
    label_NT = blocks.clone()
    label_NT[:, 0] = UNSCORED
    mean, tokens = _mean_loss(model, [(blocks, _next_token(label_NT))], batch_size, "perplexity", progress)
    return {**_as_perplexity(mean), "tokens": tokens, "context": blocks.shape[1], "blocks": len(blocks)}


def perplexity_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    context: int,
    stride: int | None = None,
    max_blocks: int | None = None,
    batch_size: int = 8,
    add_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of one long text, cut to windows of `context` tokens.

    Without `stride` the windows do not overlap, the first token of each is not scored, and the rest shorter than a
    window is left out: the protocol of published WikiText-2 perplexities (with `data.read_text` of wiki.test.raw).
    With `stride` each window starts so many tokens after the last, and only what no window has scored before is scored:
    every token of the text but the first, from the second window on with at least `context - stride` tokens before it.

    For an encoder it is `masked_lm` over the same windows.

    Args:
        max_blocks: only the first so many windows.
        add_bos: start every window with BOS, which is not scored itself (the first token of the text in the window then
            is). None does as the tokenizer does. False repeats published figures of models with a BOS, where it
            stood at the start of the text alone.

    Returns: perplexity, loss, tokens (scored), context, stride, bos ("every window" or "none"), blocks.

    Raises:
        ValueError: too little text for one window, a context the model has no positions for, a loss that is not finite.
    """
    if stride is not None and not 0 < stride < context:
        raise ValueError(f"stride is {stride}; expected 1 to {context - 1}, or none for windows that do not overlap")
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks is {max_blocks}; expected at least 1")
    _check_context(model, context)
    masked = is_masked_lm(model)
    if masked and (stride is not None or add_bos is not None):
        raise ValueError("stride and add_bos are for causal models; an encoder's windows have its own special tokens")
    prefix, suffix = data.special_frame(tokenizer)
    if not masked:
        prefix = _bos(tokenizer, add_bos, prefix)
        suffix = []
    body = context - len(prefix) - len(suffix)
    if body < 1 or context < 2:
        raise ValueError(f"context is {context}; expected more than one token, special tokens not counted")

    # verbose: the text is longer than the model's context, as it should be; no warning.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < body:
        raise ValueError(f"the text has {len(ids)} tokens, one window needs {body}; lower context or give more text")
    step = body if stride is None else min(stride, body)
    starts = range(0, len(ids) - body + 1, body) if stride is None else range(0, len(ids) - body + step, step)
    starts = starts[:max_blocks]
    windows: list[tuple[Tensor, Tensor]] = []
    scored = 0 if prefix else 1  # tokens of the text before this one are scored, or are never to be
    for start in starts:
        end = min(start + body, len(ids))
        input_T = torch.tensor(prefix + ids[start:end] + suffix)
        label_T = input_T.clone()
        first = start + (0 if prefix else 1) if stride is None else scored
        label_T[: len(prefix) + first - start] = UNSCORED
        scored = end
        windows.append((input_T, label_T))

    result = {"context": context, "stride": step, "bos": "every window" if prefix else "none", "blocks": len(windows)}
    if masked:
        input_NT = torch.stack([input_T for input_T, _ in windows])
        return {**masked_lm(model, tokenizer, input_NT, batch_size=batch_size, seed=seed, progress=progress), **result}
    groups = [windows]
    if len(windows) > 1 and len(windows[-1][0]) != len(windows[0][0]):
        groups = [windows[:-1], windows[-1:]]  # the last window of a strided text may be shorter
    pairs = [
        (torch.stack([input_T for input_T, _ in group]), _next_token(torch.stack([label_T for _, label_T in group])))
        for group in groups
    ]
    mean, tokens = _mean_loss(model, pairs, batch_size, f"perplexity at {context}", progress)
    return {**_as_perplexity(mean), "tokens": tokens, **result}


def masked_lm(
    model: Any,
    tokenizer: Any,
    blocks: Tensor,
    *,
    batch_size: int = 8,
    fraction: float = MASKED_FRACTION,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Loss of an encoder on masked tokens of blocks LongTensor[N, T].

    `fraction` of the tokens of each block (at least one), drawn by `seed`, become the mask token; special tokens never
    do. The draw depends on the blocks' shape and special tokens only, so that two models are asked the same.

    Returns: loss (nats per masked token); perplexity (its exponential, not comparable with a causal one); tokens
    (masked); masked_fraction; context (T); blocks (N).

    Raises:
        ValueError: a model that predicts no masked tokens, a loss that is not finite.
    """
    if not is_masked_lm(model):
        raise ValueError(f"{type(model).__name__} predicts no masked tokens; expected a ...ForMaskedLM model")
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no mask token")
    _check_context(model, blocks.shape[1])
    special_NT = torch.isin(blocks, torch.tensor(tokenizer.all_special_ids))
    draw_NT = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(special_NT, 2.0)
    free_N = (~special_NT).sum(dim=1)
    if not free_N.all():
        raise ValueError("a block has special tokens only; nothing in it can be masked")
    count_N = (free_N * fraction).round().long().clamp(min=1)
    mask_NT = draw_NT.argsort(dim=1).argsort(dim=1) < count_N[:, None]
    input_NT = blocks.masked_fill(mask_NT, tokenizer.mask_token_id)
    label_NT = blocks.masked_fill(~mask_NT, UNSCORED)
    mean, tokens = _mean_loss(model, [(input_NT, label_NT)], batch_size, "masked-token loss", progress)
    shape = {"context": blocks.shape[1], "blocks": len(blocks)}
    return {**_as_perplexity(mean), "tokens": tokens, "masked_fraction": fraction, **shape}


def _next_token(label_NT: Tensor) -> Tensor:
    """Labels moved to the position that predicts them; the last position predicts nothing."""
    return torch.cat([label_NT[:, 1:], torch.full_like(label_NT[:, :1], UNSCORED)], dim=1)


def _bos(tokenizer: Any, add_bos: bool | None, prefix: list[int]) -> list[int]:
    if add_bos is None:
        return prefix
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError(f"add_bos: the tokenizer {type(tokenizer).__name__} has no BOS token")
    return [tokenizer.bos_token_id] if add_bos else []


def _check_context(model: Any, context: int) -> None:
    positions = structure.positions(model)
    if positions is not None and context > positions:
        raise ValueError(f"the context is {context} tokens; the model has positions for {positions} at most")


def _as_perplexity(loss: float) -> dict[str, float]:
    if loss > 700:  # exp would overflow
        raise ValueError(f"the loss is {loss:g} nats per token: the model is destroyed, it has no finite perplexity")
    return {"perplexity": math.exp(loss), "loss": loss}


@torch.no_grad()
def _mean_loss(
    model: Any, pairs: Sequence[tuple[Tensor, Tensor]], batch_size: int, title: str, progress: bool
) -> tuple[float, int]:
    """Mean loss in nats and number of scored tokens of (input_NT, label_NT), labels at the predicting position."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    batches = [
        (input_BT, label_BT)
        for input_NT, label_NT in pairs
        for input_BT, label_BT in zip(input_NT.split(batch_size), label_NT.split(batch_size), strict=True)
    ]
    total, tokens, block = 0.0, 0, 0
    with evaluating(model):
        for input_BT, label_BT in _track(batches, title, progress):
            loss_S = _losses(model, input_BT.to(model.device), label_BT.to(model.device))
            if not torch.isfinite(loss_S).all():
                last = block + len(input_BT) - 1
                raise ValueError(
                    f"the loss of the blocks {block} to {last} is not finite: the weights hold NaN or infinity, or"
                    f" overflow in {next(model.parameters()).dtype}; check the checkpoint, or load it in float32"
                )
            total += loss_S.double().sum().item()
            tokens += len(loss_S)
            block += len(input_BT)
    return total / tokens, tokens


def _losses(model: Any, input_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Cross-entropy (fp32) of the scored tokens, Tensor[S], without ever having the logits of all of them."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} predicts no tokens; expected a ...ForCausalLM or ...ForMaskedLM model"
        )
    scored_BT = label_BT != UNSCORED
    with _last_position_only(head) as seen:
        logit_B1V = model(input_ids=input_BT, **_arguments(model, input_BT)).logits
    if torch.equal(logit_B1V, seen["output"]):
        return torch.cat(
            [
                cross_entropy(head(hidden).float(), label, reduction="none")
                for hidden, label in _chunks(seen["input"][scored_BT], label_BT[scored_BT], logit_B1V)
            ]
        )
    # The model does more to the logits than its head (Gemma 2 caps them): take what it returns, a window at a time.
    losses = []
    for index in range(len(input_BT)):
        row = slice(index, index + 1)
        logit_SV = model(input_ids=input_BT[row], **_arguments(model, input_BT[row])).logits[scored_BT[row]]
        losses += [
            cross_entropy(logit.float(), label, reduction="none")
            for logit, label in _chunks(logit_SV, label_BT[row][scored_BT[row]], logit_B1V)
        ]
    return torch.cat(losses)


def _arguments(model: Any, input_BT: Tensor) -> dict[str, Any]:
    # An encoder warns where it meets its padding token without a mask.
    return {"attention_mask": torch.ones_like(input_BT)} if is_masked_lm(model) else {"use_cache": False}


@contextmanager
def _last_position_only(head: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let the head see the last position alone; yields its whole "input" and its short "output" of the last forward."""
    seen: dict[str, Tensor] = {}

    def narrow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["input"] = inputs[0]
        return (inputs[0][:, -1:], *inputs[1:])

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["output"] = output.clone()  # some models cap or scale it in place

    handles = [head.register_forward_pre_hook(narrow), head.register_forward_hook(keep)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _chunks(value: Tensor, label_S: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `value` with their labels, as many at a time as fill LOGIT_BYTES with fp32 rows as wide as `logits`."""
    size = max(1, LOGIT_BYTES // (4 * logits.shape[-1]))
    return zip(value.split(size), label_S.split(size), strict=True)


def _track(batches: Sequence[Any], title: str, progress: bool) -> Iterable[Any]:
    """A progress bar with the time left, on a terminal only."""
    console = rich.console.Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    return rich.progress.track(batches, title, console=console, disable=hidden, transient=True)
