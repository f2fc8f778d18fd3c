"""Losses against a teacher: cross-entropy on the text and KL(teacher || student) on the teacher's predictions.

For a vocabulary of 49,152 words the logits of 1,024 tokens take 200 MB in fp32, and a loss written in the usual way
holds half a dozen such tensors. Here the LM head and both losses run over chunks of tokens: the gradient of the loss
with respect to a chunk's logits has a closed form, is taken back through the head at once, and the chunk is forgotten.

Shape legend: B batch, T positions, N targets (positions with a target, of all rows), H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sentei import structure
from sentei.train import IGNORE, Batch, LossFunction, autocast, evaluating, mass

Pairs = tuple[tuple[int, int], ...]
"""(layer of the student, layer of the teacher) whose outputs should agree."""

CHUNK = 128  # tokens whose logits exist at one time
PIECE = 16  # tokens whose logits are gone through at once where a loss is all that is asked: they stay in the cache


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over targets; logits [..., V], targets [...] with -100 where nothing is asked."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE)


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Mean over positions of t^2 KL(teacher || student), both softened by the temperature t.

    The factor t^2 keeps the size of the gradient when t changes (arXiv 1503.02531, section 2.1).

    Args:
        student_logits, teacher_logits: [..., V].
        mask: [...] bool, True where the position counts; None counts all.
    """
    log_p = (student_logits.float() / temperature).log_softmax(-1)
    log_q = (teacher_logits.float() / temperature).log_softmax(-1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2
    return each.mean() if mask is None else each[mask].mean()


@dataclass(frozen=True)
class Head:
    """What turns `hidden` states into logits: the model's output linear, and Gemma's soft cap."""

    linear: nn.Module
    softcap: float | None = None

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        logits_NV = self.linear(hidden_NH)
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


def head(model: nn.Module) -> Head | None:
    """The head of a causal or masked language model; None for models with another task."""
    linear = model.get_output_embeddings()
    if linear is None:
        return None
    return Head(linear, model.config.to_dict().get("final_logit_softcapping"))


@torch.no_grad()
def check_head(model: nn.Module, ids_BT: Tensor) -> None:
    """Compare hidden states taken through `head` with the model's own logits, once, on a few tokens.

    Raises:
        ValueError: the model does something else to its logits, which the losses here would miss.
    """
    found = head(model)
    if found is None:
        return
    own = model(input_ids=ids_BT, use_cache=False) if structure.is_causal(model) else model(input_ids=ids_BT)
    own = own.prediction_logits if "prediction_logits" in own else own.logits
    ours = found(hidden(model, {"input_ids": ids_BT})[0])
    if not torch.allclose(own.float(), ours.float(), atol=1e-3, rtol=1e-2):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the LM head in a way that sentei.distill.Head does not "
            "know; add it there"
        )


@dataclass(frozen=True)
class Likeliest:
    """What a model says of a batch's targets, in little memory: its likeliest words, and all others as one.

    Attributes:
        word_NK: [N, K] words, likeliest first.
        log_q_NK: [N, K] their log-probabilities.
    """

    word_NK: Tensor
    log_q_NK: Tensor


@torch.no_grad()
def likeliest(model: nn.Module, batch: Batch, count: int = 256) -> Likeliest:
    """The `count` likeliest words at each target of a batch: a few bytes where its logits are 200 kB a token."""
    words, logs = [], []
    for z_nV, _, log_total_n1 in _logits(model, batch):
        top = z_nV.topk(min(count, z_nV.shape[1]))
        words.append(top.indices)
        logs.append(top.values - log_total_n1)
    return Likeliest(torch.cat(words), torch.cat(logs))


@torch.no_grad()
def divergence(model: nn.Module, batch: Batch, dense: Likeliest) -> dict[str, Tensor]:
    """Means over a batch's targets, nats: "kl", KL(dense || model) with all but the dense model's likeliest words taken
    as one, and "ce", the cross-entropy.

    Taking words together lowers a divergence, never below 0; it costs no more than the cross-entropy, for the dense
    model's logits are not needed again. No gradient.
    """
    kl = ce = torch.zeros((), dtype=torch.double, device=dense.log_q_NK.device)
    start = 0
    for z_nV, target_n, log_total_n1 in _logits(model, batch):
        rows = slice(start, start := start + len(target_n))
        log_q_nK = dense.log_q_NK[rows]
        log_p_nK = z_nV.gather(1, dense.word_NK[rows]) - log_total_n1
        rest_p_n, rest_q_n = (1 - log_nK.exp().sum(1) for log_nK in (log_p_nK, log_q_nK))
        among = (log_q_nK.exp() * (log_q_nK - log_p_nK)).sum()
        others = rest_q_n.clamp_min(0) * (rest_q_n.clamp_min(1e-6) / rest_p_n.clamp_min(1e-6)).log()
        kl = kl + among + others.sum()
        ce = ce + (log_total_n1 - z_nV.gather(1, target_n[:, None])).sum()
    return {"kl": kl / max(1, start), "ce": ce / max(1, start)}


def _logits(model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For a few targets at a time: logits below zero [n, V] in fp32, targets [n], log sum exp of the logits [n, 1]."""
    turn = head(model)
    assert turn is not None
    wanted_BT = batch["targets"] != IGNORE
    hidden_BTH, _ = hidden(model, {name: x for name, x in batch.items() if name != "targets"})
    device = next(turn.linear.parameters()).device
    hidden_NH, target_N = hidden_BTH[wanted_BT.to(hidden_BTH.device)].to(device), batch["targets"][wanted_BT].to(device)
    for hidden_nH, target_n in zip(hidden_NH.split(CHUNK), target_N.split(CHUNK), strict=True):
        logits_nV = turn(hidden_nH)
        for piece_nV, targets in zip(logits_nV.split(PIECE), target_n.split(PIECE), strict=True):
            z_nV = _below_zero_(piece_nV.float())
            yield z_nV, targets, z_nV.exp().sum(1, keepdim=True).log()


@dataclass(frozen=True)
class Distillation:
    """ce_weight * cross-entropy + kl_weight * t^2 KL(teacher || student), means over a batch's targets.

    The cross-entropy's mean is weighted where the batch has weights, the divergence's never.

    A loss function for `sentei.train.train`: call it with the student and a batch; it returns "loss", "ce" and, with a
    teacher, "kl". The teacher sees the same inputs, in inference mode; give it in eval mode.

    Attributes:
        teacher: None leaves cross-entropy alone, whatever `kl_weight` says.
        positions: where the KL is taken: "targets", or "all" that the attention mask does not exclude. Masked language
            models are asked at a seventh of the positions, and their teacher has something to say at every one.
        chunk: tokens whose logits exist at one time.
    """

    teacher: nn.Module | None = None
    temperature: float = 1.0
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    chunk: int = CHUNK
    positions: str = "targets"

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.with_outputs(student, batch)[0]

    def with_outputs(self, student: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Any, Any]:
        """The losses, and what student and teacher (or None) gave besides, for losses of a second head."""
        targets = batch["targets"]
        wanted = targets != IGNORE
        inputs = {name: x for name, x in batch.items() if name not in ("targets", "weights")}
        weights = batch.get("weights", wanted).masked_fill(~wanted, 0)
        if self.positions == "all" and self.teacher is not None:
            wanted = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(wanted)
        student_head = head(student)
        if student_head is None:
            raise ValueError(f"{type(student).__name__} has no language-model head: no tokens to predict")
        device = next(student_head.linear.parameters()).device  # of a model over several, the head's
        hidden_BTH, output = hidden(student, inputs)
        hidden_NH = hidden_BTH[wanted.to(hidden_BTH.device)].to(device)
        teacher_NH = teacher_head = teacher_output = None
        if self.teacher is not None:
            teacher_head = head(self.teacher)
            with torch.inference_mode():
                hidden_BTH, teacher_output = hidden(self.teacher, inputs)
                teacher_NH = hidden_BTH[wanted]
        parameters = [p for p in student_head.linear.parameters() if p.requires_grad]
        differentiate = torch.is_grad_enabled() and (hidden_NH.requires_grad or bool(parameters))
        loss, ce, divergence = _HeadLoss.apply(  # pyright: ignore[reportGeneralTypeIssues]
            hidden_NH,
            student_head,
            teacher_NH,
            teacher_head,
            targets[wanted].to(device),
            weights[wanted].to(device),
            self,
            differentiate,
            *parameters,
        )
        losses = {"loss": loss, "ce": ce} | ({} if self.teacher is None else {"kl": divergence})
        return losses, output, teacher_output


@dataclass(frozen=True)
class HiddenDistillation(Distillation):
    """`Distillation` and hidden_weight * the mean over `pairs` of `hidden_loss`, also returned as "hidden".

    Attributes:
        pairs: taken at the blocks themselves, so a decoder's last one is before the final norm.
    """

    hidden_weight: float = 1.0
    pairs: Pairs = ()

    def with_outputs(self, student: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Any, Any]:
        if self.teacher is None or not self.hidden_weight or not self.pairs:
            return super().with_outputs(student, batch)
        with comparing(student, self.teacher, self.pairs) as distances:
            losses, *outputs = super().with_outputs(student, batch)
        hidden = torch.stack(distances(batch)).mean()
        losses |= {"loss": losses["loss"] + self.hidden_weight * hidden, "hidden": hidden.detach()}
        return losses, *outputs


@dataclass(frozen=True)
class HiddenStates:
    """The mean over `pairs` of `hidden_loss`, as "loss": of the layers alone, whatever stands on them or nothing.

    The output of a pooler counts as one more layer.

    Attributes:
        teacher: in eval mode; it sees the same inputs, in inference mode.
    """

    teacher: nn.Module
    pairs: Pairs

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs: Any = {name: x for name, x in batch.items() if name != "targets"}
        if structure.is_causal(student):
            inputs["use_cache"] = False
        with comparing(student, self.teacher, self.pairs) as distances:
            output = structure.base_model(student)(**inputs)
            with torch.inference_mode():
                expected = structure.base_model(self.teacher)(**inputs)
        each = distances(batch)
        if (pooled_BH := output.get("pooler_output")) is not None:
            of_all_B1 = torch.ones(len(pooled_BH), 1, dtype=torch.bool, device=pooled_BH.device)
            each.append(hidden_loss(pooled_BH[:, None], expected.pooler_output.clone()[:, None], of_all_B1))
        return {"loss": torch.stack(each).mean()}


def same_layers(model: nn.Module) -> Pairs:
    """Every layer with that of the same number."""
    return tuple((number, number) for number in range(len(structure.layers(model))))


@contextlib.contextmanager
def comparing(student: nn.Module, teacher: nn.Module, pairs: Pairs) -> Iterator[Callable[[Batch], list[Tensor]]]:
    """Inside the block both models read a batch; the function then gives `hidden_loss` of every pair on it."""
    layers, taught = zip(*pairs, strict=True)
    with _seen(student, layers) as ours, _seen(teacher, taught) as theirs:

        def distances(batch: Batch) -> list[Tensor]:
            mask_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            if structure.is_causal(student):  # activations are huge at a decoder's first position
                mask_BT = mask_BT & (torch.arange(mask_BT.shape[1], device=mask_BT.device) > 0)
            # A tensor made in inference mode may not be kept for a backward pass; its clone may.
            return [hidden_loss(ours[s], theirs[t].clone(), mask_BT) for s, t in pairs]

        yield distances


def hidden_loss(student_BTH: Tensor, teacher_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the tokens of `mask_BT` of |h_s - h_t|^2 / |h_t|^2."""
    student_NH, teacher_NH = student_BTH[mask_BT].float(), teacher_BTH[mask_BT].float()
    return ((student_NH - teacher_NH).square().sum(-1) / teacher_NH.square().sum(-1).clamp_min(1e-12)).mean()


@contextlib.contextmanager
def _seen(model: nn.Module, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Inside the block the outputs of some layers, as they were computed last, by number."""
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number in set(numbers):

            def see(module: nn.Module, args: Any, output: Tensor, number: int = number) -> None:
                found.setdefault(number, output)  # recomputation in a backward pass comes later

            stack.callback(structure.layers(model)[number].register_forward_hook(see).remove)
        yield found


@torch.no_grad()
def held_out(
    model: nn.Module, batches: Iterable[Batch], precision: str, loss: LossFunction | None = None
) -> dict[str, float]:
    """Means over the targets of held-out batches of what a loss gives; without one "ce" alone, nats."""
    sums: dict[str, float] = {}
    count = 0.0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            part = mass(batch)
            with autocast(precision, device):
                parts = (loss or Distillation())(model, {name: x.to(device) for name, x in batch.items()})
            for name in parts:
                sums[name] = sums.get(name, 0.0) + float(parts[name]) * part
            count += part
    return {name: total / (count or 1.0) for name, total in sums.items()}


def hidden(model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
    """What goes into the output linear, [B, T, H], and all that the model gave.

    A masked language model transforms its last hidden state first, each family in a module of another name; with its
    output linear set aside the model itself says what comes out of there.
    """
    if structure.is_causal(model):
        output = structure.base_model(model)(**inputs, use_cache=False)
        return output.last_hidden_state, output
    linear: Any = model.get_output_embeddings()
    linear.forward = _as_it_is  # shadows the class's method; deleting it brings that back
    try:
        output = model(**inputs)
    finally:
        del linear.forward
    return output.prediction_logits if "prediction_logits" in output else output.logits, output


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _HeadLoss(torch.autograd.Function):
    """LM head and both losses over chunks of tokens; the gradients are made in the forward pass and only scaled later.

    With p = softmax(z), p_t = softmax(z / t) and q_t = softmax(teacher / t), the gradient with respect to the logits z
    is ce_weight (p - onehot) + kl_weight t (p_t - q_t), over the number of targets. Logits become exponentials and then
    slopes in the same memory: a fresh tensor of this size costs more time than what is computed into it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        student: Head,
        teacher_NH: Tensor | None,
        teacher: Head | None,
        targets_N: Tensor,
        weights_N: Tensor,
        how: Distillation,
        differentiate: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = max(1, len(targets_N))
        # The others have a KL only. All is divided by `count` at the end; 1 where every position is asked.
        ce_share = count / (float(weights_N.sum()) or 1.0)
        ce = torch.zeros((), device=hidden_NH.device)
        divergence = torch.zeros((), device=hidden_NH.device)
        grad_NH = torch.zeros_like(hidden_NH) if differentiate else None
        grads = [torch.zeros_like(p) for p in parameters] if differentiate else []
        t, kl_weight = how.temperature, how.kl_weight
        for start in range(0, len(targets_N), how.chunk):
            rows = slice(start, start + how.chunk)
            hidden_nH = hidden_NH[rows].detach().requires_grad_(differentiate)
            with torch.enable_grad() if differentiate else contextlib.nullcontext():
                logits_nV = student(hidden_nH)
            if teacher is None and grad_NH is None:
                pieces = (of.split(PIECE) for of in (logits_nV, targets_N[rows], weights_N[rows]))
                for piece_nV, target_n, weight_n in zip(*pieces, strict=True):
                    ce += _surprise_(_below_zero_(piece_nV.float()), target_n, weight_n)[0] * ce_share
                continue
            z_nV = _below_zero_(logits_nV.detach().float())
            softened_nV = z_nV / t if teacher is not None else None
            surprise, weight_n1, target_n1, total_n1 = _surprise_(z_nV, targets_N[rows], weights_N[rows])
            ce += surprise * ce_share
            weight_n1 = weight_n1 * (how.ce_weight * ce_share / count)
            slope_nV = z_nV.mul_(weight_n1 / total_n1).scatter_add_(1, target_n1, -weight_n1.to(z_nV.dtype))
            if teacher is not None:
                assert teacher_NH is not None and softened_nV is not None
                wanted_nV = _below_zero_(teacher(teacher_NH[rows]).float()).div_(t)
                q_nV = wanted_nV.exp()
                total_q_n1 = q_nV.sum(-1, keepdim=True)
                q_nV.div_(total_q_n1)
                divergence += torch.dot(q_nV.flatten(), wanted_nV.sub_(softened_nV).flatten()) * t**2
                total_n1 = softened_nV.exp_().sum(-1, keepdim=True)
                divergence += (total_n1.log() - total_q_n1.log()).sum() * t**2
                slope_nV.add_(softened_nV.div_(total_n1).sub_(q_nV), alpha=kl_weight * t / count)
            if grad_NH is not None:
                slope_nV = slope_nV.to(logits_nV.dtype)
                grad_nH, *more = torch.autograd.grad(logits_nV, [hidden_nH, *parameters], slope_nV)
                grad_NH[rows] = grad_nH
                for total, new in zip(grads, more, strict=True):
                    total += new
        ctx.save_for_backward(*([grad_NH, *grads] if grad_NH is not None else []))
        ce, divergence = ce / count, divergence / count
        loss = how.ce_weight * ce + (kl_weight * divergence if teacher is not None else 0.0)
        ctx.mark_non_differentiable(ce, divergence)
        return loss, ce, divergence

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_NH, *grads = (grad * outputs[0] for grad in ctx.saved_tensors)
        return grad_NH, None, None, None, None, None, None, None, *grads


def _surprise_(z_nV: Tensor, target_n: Tensor, weight_n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum of the cross-entropies; the weights; the targets; the sums of exp(z), which z becomes."""
    weight_n1 = weight_n[:, None]
    target_n1 = target_n[:, None].clamp_min(0)  # one that is not asked has no weight
    picked_n1 = z_nV.gather(1, target_n1)
    total_n1 = z_nV.exp_().sum(-1, keepdim=True)
    return ((total_n1.log() - picked_n1) * weight_n1).sum(), weight_n1, target_n1, total_n1


def _below_zero_(z_nV: Tensor) -> Tensor:
    """The same softmax, and none of its exponentials above 1."""
    return z_nV.sub_(z_nV.amax(-1, keepdim=True))
