"""One training loop on accelerate, as a generator: one record per optimiser step, everything else is the caller's.

The caller evaluates, stops early, alternates with another optimiser or shrinks rows *between* records, in plain code:

    run = train(model, batches, loss_function, Settings(steps=100, lr=1e-4), folder=workdir, state=state)
    with closing(run):
        for step in run:
            ...

What makes a killed and resumed run equal to one never killed, to the bit (same machine, same number of threads):

- batch n is a function of (seed, n), not the n-th draw from an iterator (`shuffled`);
- dropout of a micro-batch draws from a generator seeded by (seed, n); the global generator is left as it was;
- a checkpoint holds the trained parameters, the optimiser and the caller's `state`, and is written after the caller has
  dealt with the record of its step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from sentei.atomic import replacing

Batch = dict[str, Tensor]
"""Model inputs plus "targets": what each position (or row) should predict, already shifted; -100: nothing is asked. A
language model's may have "weights", how much each target counts in the mean; without them all count alike."""
Batches = Callable[[int], Batch]
LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""(model, batch) -> scalars; "loss", the mean over the batch's targets, is differentiated, the others only recorded."""

IGNORE = -100


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: optimiser steps, or None for a run limited by `seconds` alone.
        seconds: wall-clock limit, the caller's time between records included. With a limit the schedule follows
            elapsed / limit, so **such a run is not reproducible**; with both, whichever end is nearer sets the pace.
        lr: peak learning rate.
        final_lr: learning rate at the end as a fraction of the peak; 0 is a full cosine, 1 a constant.
        warmup: fraction of the run in which the rate rises from 0.
        vector_lr: peak learning rate of norms, biases and other vectors; None: the same as of matrices.
        weight_decay: on matrices only; norms and biases have none.
        clip: largest gradient norm; 0 does not clip.
        accumulate: micro-batches per optimiser step, weighted by their targets: equal to one large batch.
        precision: "fp32", "bf16" (autocast; trained weights stay fp32), or "auto": bf16 where the device has it.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        dropout: off keeps the model in evaluation mode: what is learnt to agree with a teacher needs no noise.
        save_every: optimiser steps between checkpoints; the last step is always saved.
        patience: steps in a row that may have a non-finite loss or gradient (they are skipped) before the run stops.
    """

    lr: float
    steps: int | None = None
    seconds: float | None = None
    final_lr: float = 0.0
    warmup: float = 0.1
    vector_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "auto"
    checkpointing: bool = False
    dropout: bool = True
    save_every: int = 50
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("training has no end: give steps, seconds, or both")
        for name in ("steps", "seconds", "lr", "vector_lr", "accumulate", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the run, at least 0 and below 1; got {self.warmup}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision is auto, fp32 or bf16; got {self.precision!r}")


@dataclass(frozen=True)
class Step:
    """One optimiser step that was made.

    Attributes:
        step: number of steps made, 1 for the first.
        progress: fraction of the run done, of its steps or of its time.
        losses: mean over the step's targets of what the loss function returned.
        tokens: targets seen since the start.
        seconds: since the start, of all sittings together.
        grad_norm: before clipping; not finite if the step was skipped.
    """

    step: int
    progress: float
    losses: dict[str, float]
    lr: float
    tokens: int
    seconds: float
    grad_norm: float


def processes() -> PartialState:
    """This process and the others of `accelerate launch` or torchrun, as `train` will see them."""
    # By itself PartialState takes no notice of this flag, and would settle for one process.
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def has_bf16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 natively? Where it does not, bf16 is several times slower than fp32."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" -> "bf16" or "fp32"; anything else as it is."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(device) else "fp32"


def autocast(precision: str, device: torch.device) -> Any:
    """The context in which forward passes run."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def learning_rate(settings: Settings, progress: float) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr * lr`; progress in [0, 1]."""
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    angle = math.pi * min(1.0, (progress - settings.warmup) / (1 - settings.warmup))
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(angle)))


def mix(*parts: object) -> int:
    """A seed from anything printable, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def weights_digest(model: nn.Module) -> str:
    """Of the sum of every weight's bits as whole numbers: quick, exact in any order, and any training changes it."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = [
        (name, tuple(p.shape), str(p.dtype), int(p.detach().contiguous().view(whole[p.element_size()]).sum()))
        for name, p in model.named_parameters()
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def causal_batch(ids_BT: Tensor, mask_BT: Tensor | None = None, answer_BT: Tensor | None = None) -> Batch:
    """A batch for next-token prediction.

    Args:
        mask_BT: attention mask, 0 on padding; padding is never a target. None: every position is text.
        answer_BT: bool, True on the tokens that may be targets; None: all of them.
    """
    targets_BT = torch.full_like(ids_BT, IGNORE)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    for allowed_BT in (mask_BT, answer_BT):
        if allowed_BT is not None:
            targets_BT[:, :-1][~allowed_BT[:, 1:].bool()] = IGNORE
    batch = {"input_ids": ids_BT, "targets": targets_BT}
    return batch if mask_BT is None else batch | {"attention_mask": mask_BT}


def mass(batch: Batch) -> float:
    """What a batch counts for beside others in a mean over targets: their number, or the sum of their weights."""
    asked = batch["targets"] != IGNORE
    return float(batch["weights"][asked].sum()) if "weights" in batch else float(asked.sum())


def masked_batch(ids_BT: Tensor, tokenizer: Any, *, seed: int, probability: float = 0.15) -> Batch:
    """A batch for masked-token prediction: 80 % of the chosen are masked, 10 % random, 10 % left (BERT's rule)."""
    random = torch.Generator().manual_seed(seed)
    special = torch.tensor([*tokenizer.all_special_ids])
    u_BT, kind_BT = torch.rand(2, *ids_BT.shape, generator=random)
    ordinary_BT = ~torch.isin(ids_BT, special)
    least = u_BT[ordinary_BT].min() if ordinary_BT.any() else 0.0  # a batch without any target has no loss
    chosen_BT = ordinary_BT & ((u_BT < probability) | (u_BT == least))
    inputs_BT = ids_BT.clone()
    inputs_BT[chosen_BT & (kind_BT < 0.8)] = tokenizer.mask_token_id
    other_BT = torch.randint(len(tokenizer), ids_BT.shape, generator=random)
    inputs_BT = torch.where(chosen_BT & (kind_BT >= 0.9), other_BT, inputs_BT)
    return {"input_ids": inputs_BT, "targets": ids_BT.masked_fill(~chosen_BT, IGNORE)}


def shuffled(
    blocks_NT: Tensor, batch_size: int, *, seed: int, make: Callable[[Tensor, int], Batch] | None = None
) -> Batches:
    """Batches of rows without end: every epoch is a new permutation, and batch n depends on (seed, n) alone.

    Args:
        make: (rows [batch_size, T], n) -> batch; None makes `causal_batch`.
    """
    if not len(blocks_NT):
        raise ValueError("there is no block of text to train on")
    orders: dict[int, Tensor] = {}

    def row(position: int) -> int:
        epoch, place = divmod(position, len(blocks_NT))
        if epoch not in orders:
            random = torch.Generator().manual_seed(mix(seed, "order", epoch))
            orders.clear()
            orders[epoch] = torch.randperm(len(blocks_NT), generator=random)
        return int(orders[epoch][place])

    def batch(n: int) -> Batch:
        rows = blocks_NT[[row(n * batch_size + i) for i in range(batch_size)]]
        return causal_batch(rows) if make is None else make(rows, n)

    return batch


class _Objective(nn.Module):
    """Model and loss as one module: data-parallel wrappers see one forward, whatever part of the model it calls."""

    def __init__(self, model: nn.Module, loss_function: LossFunction):
        super().__init__()
        self.model, self.loss_function = model, loss_function

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss_function(self.model, batch)


def train(
    model: nn.Module,
    batches: Batches,
    loss_function: LossFunction,
    settings: Settings,
    *,
    folder: Path | None = None,
    state: dict[str, Any] | None = None,
    fingerprint: str = "",
    on_gradients: Callable[[], None] | None = None,
    rate: Callable[[int], float] | None = None,
    restored: Callable[[], None] | None = None,
) -> Generator[Step, None, None]:
    """Train the parameters that require gradients, with AdamW.

    The generator's end (or `close()`) leaves no gradient, no checkpointing and the model in its former mode. Parameters
    must be fp32: small updates vanish in 16 bits. Frozen ones may have any dtype.

    Args:
        batches: n -> batch of micro-batch n; on W processes with A micro-batches, step k takes batches kAW .. kAW+AW-1.
        folder: where checkpoints go (`train.pt`); a run found there is continued.
        state: the caller's own values (numbers, strings, lists, dicts, tensors), saved with each checkpoint and
            updated in place from the one that is continued before the first record.
        rate: learning rate of a step (the first is 0) as a multiple of `lr`, in place of warm-up and cosine.
        restored: called once after a checkpoint was loaded, `state` included, before the first step.
        fingerprint: whatever else must be equal for a checkpoint to belong to this run (data, loss weights).
        on_gradients: called when a step's gradients are whole (all micro-batches and processes), before clipping.
    Yields:
        a record per step, skipped steps included.
    Raises:
        ValueError: nothing to train, 16-bit trained parameters, a folder with another run, or a loss that is not finite
            `patience` times in a row.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter requires a gradient: there is nothing to train")
    narrow = [name for name, p in trained.items() if p.dtype != torch.float32]
    if narrow:
        raise ValueError(
            f"trained parameters must be float32, {narrow[0]} is {trained[narrow[0]].dtype}; convert it first"
        )

    state = {} if state is None else state
    accelerator = Accelerator(mixed_precision="no")  # autocast is ours: accelerate's is fixed for the whole process
    device = next(iter(trained.values())).device
    if accelerator.num_processes > 1:
        if settings.seconds is not None:  # clocks differ, and one process would wait for the others for ever
            raise ValueError(f"a time limit works in one process, there are {accelerator.num_processes}; give steps")
        device = accelerator.device
        model.to(device)
    objective = accelerator.prepare_model(_Objective(model, loss_function), device_placement=False)
    optimizer = _adamw(list(trained.values()), settings)
    run = _digest(model, trained, settings, fingerprint) if folder else ""
    file = folder / "train.pt" if folder else None
    step = tokens = bad = 0
    earlier = 0.0
    if file is not None and file.exists():
        step, tokens, bad, earlier = _restore(file, run, trained, optimizer, state)
        if restored is not None:
            restored()

    precision = resolve_precision(settings.precision, device)
    was_training = model.training
    if settings.checkpointing:
        recompute_activations(model)
    started = time.monotonic() - earlier
    last_seconds = (settings.seconds or 0.0) / 100  # a guess, until a step has been timed
    try:
        while not _finished(settings, step, time.monotonic() - started, last_seconds if step else 0.0):
            begun = time.monotonic()
            model.train(settings.dropout)
            # The middle of the step, so that neither the first nor the last step has a rate of zero.
            lr = learning_rate(settings, _progress(settings, step + 0.5, begun - started + 0.5 * last_seconds))
            if rate is not None:
                lr = settings.lr * rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]
            first = step * settings.accumulate * accelerator.num_processes
            numbers = range(first + accelerator.process_index, first + settings.accumulate * accelerator.num_processes)
            numbers = numbers[:: accelerator.num_processes]
            losses, seen = _gradients(accelerator, objective, batches, numbers, device, precision, settings.seed)
            if on_gradients is not None:
                on_gradients()
            norm = accelerator.clip_grad_norm_(trained.values(), settings.clip or math.inf)
            grad_norm = float(norm)  # pyright: ignore[reportArgumentType]
            finite = math.isfinite(losses["loss"]) and math.isfinite(grad_norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens, bad = step + 1, tokens + seen, 0 if finite else bad + 1
            if bad >= settings.patience:
                raise ValueError(
                    f"the loss or its gradient was not finite in {bad} steps in a row (up to step {step}, learning "
                    f"rate {lr:.3g}, {precision}, loss {losses['loss']}); lower lr, or train in fp32"
                )
            now = time.monotonic()
            last_seconds = now - begun
            progress = _progress(settings, step, now - started)
            yield Step(step, progress, losses, lr, tokens, now - started, grad_norm)
            elapsed = time.monotonic() - started
            last = _finished(settings, step, elapsed, last_seconds)
            if file is not None and accelerator.is_main_process and (last or step % settings.save_every == 0):
                _save(file, run, trained, optimizer, state, (step, tokens, bad, elapsed))
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
        if settings.checkpointing:
            model.gradient_checkpointing_disable()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards in the mode it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def recompute_activations(model: Any) -> None:
    """Switch activation checkpointing on. Blocks that are not in train mode keep their activations all the same."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers also hooks the embeddings, which only the re-entrant kind needs, and leaves that hook behind.
    model.disable_input_require_grads()


def _progress(settings: Settings, steps: float, seconds: float) -> float:
    of_steps = steps / settings.steps if settings.steps else 0.0
    of_time = seconds / settings.seconds if settings.seconds else 0.0
    return min(1.0, max(of_steps, of_time))


def _finished(settings: Settings, steps: int, seconds: float, next_seconds: float) -> bool:
    """Is the run over, or would the next step pass the time limit? A first step is always made."""
    if settings.steps is not None and steps >= settings.steps:
        return True
    return settings.seconds is not None and steps > 0 and seconds + next_seconds > settings.seconds


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay, "lr_factor": 1.0},
        {
            "params": [p for p in parameters if p.ndim < 2],
            "weight_decay": 0.0,
            "lr_factor": 1.0 if settings.vector_lr is None else settings.vector_lr / settings.lr,
        },
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def _gradients(
    accelerator: Accelerator,
    objective: nn.Module,
    batches: Batches,
    numbers: range,
    device: torch.device,
    precision: str,
    seed: int,
) -> tuple[dict[str, float], int]:
    """Accumulate the gradient of the mean loss over all targets of a step; the losses' means and the target count."""
    micro = [{name: x.to(device) for name, x in batches(n).items()} for n in numbers]
    asked = sum(int((batch["targets"] != IGNORE).sum()) for batch in micro)
    asked = int(accelerator.reduce(torch.tensor(asked, device=device), "sum"))  # pyright: ignore[reportArgumentType]
    if not asked:
        raise ValueError("a whole training step holds no target; check the labels (-100 means: do not learn this)")
    masses = [mass(batch) for batch in micro]
    whole = float(accelerator.reduce(torch.tensor(sum(masses), device=device), "sum"))  # pyright: ignore[reportArgumentType]
    sums: dict[str, Tensor] = {}
    for n, batch, part in zip(numbers, micro, masses, strict=True):
        share = part / whole
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(mix(seed, "dropout", n))
            with accelerator.no_sync(objective) if n != numbers[-1] else nullcontext():
                with autocast(precision, device):
                    parts = objective(batch)
                # Data-parallel training averages gradients over processes; the shares already sum to one over them all.
                accelerator.backward(parts["loss"] * (share * accelerator.num_processes))
        for name, value in parts.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float() * share
    means = {name: float(accelerator.reduce(value, "sum")) for name, value in sums.items()}  # pyright: ignore[reportArgumentType]
    return means, asked


def _digest(model: nn.Module, trained: dict[str, nn.Parameter], settings: Settings, fingerprint: str) -> str:
    """What must be equal for a checkpoint to belong to this run: settings, and the weights that it starts from."""
    # Saving more often changes no number, and what is left of a time limit differs from sitting to sitting.
    same = {"save_every": None, "seconds": None, "fingerprint": fingerprint, "trained": sorted(trained)}
    how = asdict(settings) | same
    return hashlib.sha256(json.dumps([weights_digest(model), how], sort_keys=True).encode()).hexdigest()


def _save(
    file: Path,
    run: str,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    counters: tuple[int, int, int, float],
) -> None:
    """Write a checkpoint beside the old one and put it in its place in one move: a kill at any moment leaves one."""
    parameters = {name: p.detach() for name, p in trained.items()}
    whole = {"run": run, "counters": counters, "parameters": parameters, "optimizer": optimizer.state_dict()}
    with replacing(file) as part:
        torch.save(whole | {"state": state}, part)


def _restore(
    file: Path,
    run: str,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> tuple[int, int, int, float]:
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if saved["run"] != run:
        raise ValueError(
            f"{file} belongs to another run (other settings, data or starting weights); delete it or use another folder"
        )
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(saved["parameters"][name])
    optimizer.load_state_dict(saved["optimizer"])
    state.update(saved["state"])
    return saved["counters"]
