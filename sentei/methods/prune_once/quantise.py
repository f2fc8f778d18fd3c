"""Prune Once for All, stage D: int8 by training with quantisers in the model, the pattern locked (arXiv 2111.05754).

The authors quantise as Q8BERT does (arXiv 1910.06188). Here NNCF puts the quantisers into the torch model, and the IR
that OpenVINO runs is made of that very model, so what is trained is what is run.

1. Quantisers around every linear: weights symmetric int8, inputs asymmetric uint8 set on calibration rows  `_quantised`
2. Train on the task, weights and ranges; zeros stay locked, and after every step weights are clamped to
   their range, or runtime and training would disagree about the largest ones                     `_Clamp`, `Lock.apply`
3. The IR, its int8 weights compared with the codes, scored in the runtime itself                          `_export`
4. Codes and scales go into the sparse container: 0 is code 0, so the zeros of the student are zeros still  `_codes`
   With `fast_path`, also the ranges that torch's 1x4 kernel needs, and a score of that kernel            `_ranges`

`scheme="weights"` is for machines without NNCF and OpenVINO: codes by rounding alone, no training, computed in fp32.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.checkpoint import sparse, zeros
from sentei.export import openvino, torch_1x4
from sentei.methods import Progress, option
from sentei.methods.prune_once import lock as locks
from sentei.methods.prune_once.pretrain import to_fp32
from sentei.methods.prune_once.tasks import Task, in_torch
from sentei.methods.prune_once.transfer import OnTask
from sentei.train import Batch

SCHEMES = ("int8", "int8_paper", "weights")
SCOPES: dict[str, tuple[str, ...]] = {  # operations that stay in fp32
    "linear": ("embedding", "matmul", "scaled_dot_product_attention"),
    "linear+embeddings": ("matmul", "scaled_dot_product_attention"),
    "all": (),
}
PRESETS: dict[str, dict[str, float]] = {
    "paper": {"epochs": 3, "batch_size": 32, "seq_len": 128, "lr": 1e-5},
    "paper_squad": {"epochs": 2, "batch_size": 12, "seq_len": 384, "lr": 1e-5},
    "small_gpu": {"epochs": 1, "batch_size": 32, "seq_len": 128, "lr": 1e-5},
    "cpu_mini": {"epochs": 1, "batch_size": 32, "seq_len": 128, "lr": 1e-5},
}


@dataclass(frozen=True)
class Quantise(OnTask):
    """Stage D: 8 bits, trained with the pattern locked, scored in OpenVINO."""

    scheme: str = option("int8", "int8: a scale per output; int8_paper: per matrix; weights: codes alone, no training")
    scope: str = option("linear", "linear, linear+embeddings or all: what is quantised", "paper: linear")
    fast_path: str = option("none", "none, or torch_1x4: |code| <= 64, exact in torch's sparse kernel (pattern 1x4)")
    calibration_rows: int = option(300, "rows that set the first ranges of the inputs", "NNCF")

    presets: ClassVar[dict[str, dict[str, float]]] = PRESETS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("scheme", SCHEMES), ("scope", tuple(SCOPES)), ("fast_path", ("none", "torch_1x4"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.calibration_rows < 1:
            raise ValueError(f"calibration_rows must be above 0, got {self.calibration_rows}")
        if self.scheme != "weights":  # told when a recipe is read, before the first stage
            openvino.check("stage quantise (or scheme weights, without a runtime)")
        engine = torch.backends.quantized.supported_engines
        if self.fast_path == "torch_1x4" and "fbgemm" not in engine:
            raise ValueError(f"torch_1x4 needs torch's fbgemm engine; found {', '.join(engine)}")

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        text: Any,
        *,
        teacher: Any | None = None,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Quantise a model that `Transfer` made; its weights become code * scale, and zeros a superset of its zeros.

        Returns:
            "scores" by place ("fp32", "torch", "openvino", "openvino f32", "torch_1x4") and part, "metric", "drop" (of
            the metric in the runtime, on test rows; above 0 is worse), "bytes", "history", "seconds".
        Raises:
            ValueError: a dense model, a teacher that does not fit, a runtime that disagrees about a weight.
        """
        started = time.monotonic()
        say = report or (lambda event: None)
        task = self._task(text, tokenizer)
        self._check_teacher(model, teacher)
        held = locks.Lock.on_zeros(locks.lockable(model), model.name_or_path)
        self._check_pattern(held)
        to_fp32(model)
        scores = {"fp32": _both(task, in_torch(model))}
        files: dict[str, Path] = {}
        extra: dict[str, Any] = {}
        ranges: dict[str, dict[str, float]] = {}
        if self.scheme == "weights":
            with torch.no_grad():
                codes = {name: _rounded(p) for name, p in self._matrices(model).items()}
            learnt: dict[str, Any] = {"history": [], "steps": 0}
        else:
            say({"message": "putting quantisers into the model (NNCF compiles an extension the first time)"})
            quantised = self._quantised(model, task)
            found = _weight_quantisers(quantised, _example(task))
            matrices = {name: p for name, p in quantised.named_parameters() if name in held.masks}
            lost = sorted(set(held.masks) - set(found))
            if lost:
                raise ValueError(f"NNCF left {len(lost)} locked matrices in fp32, {lost[0]} first; report this")
            clamp = _Clamp(quantised, found, 64 if self.fast_path == "torch_1x4" else 127)
            with locks.Lock(matrices, dict(held.masks), regrow=False) as zeros_kept:

                def between(step: int, state: dict[str, Any]) -> None:
                    zeros_kept.apply()
                    clamp()

                between(0, {})
                learnt = self._learn(quantised, task, teacher, between=between, workdir=workdir, report=report)
            quantised.eval()
            codes = _codes(quantised, found)
            scores["torch"] = _both(task, in_torch(quantised))
            if self.fast_path == "torch_1x4":
                ranges = self._ranges(quantised, task, set(held.masks))
            say({"message": "converting to OpenVINO and scoring there"})
            with tempfile.TemporaryDirectory() as scratch:
                folder = (workdir or Path(scratch)) / "openvino"
                extra, runs = self._export(quantised, task, codes, held, folder)
            if workdir is not None:
                files["openvino"] = folder
            for place, forward in runs.items():
                scores[place] = _both(task, forward)
        with torch.no_grad():
            state = dict(model.named_parameters())
            if self.scheme != "weights":
                for name, p in quantised.named_parameters():
                    if name in state and name not in codes:
                        state[name].copy_(p)
            for name, (code, step) in codes.items():
                state[name].copy_(code.float() * step.reshape(-1, *[1] * (code.ndim - 1)))
        model.eval()
        if ranges:
            scores["torch_1x4"] = _both(task, in_torch(torch_1x4.converted(model, codes, ranges)))
        after = {name: int((state[name] == 0).sum()) for name in held.masks}
        assert all(not bool(state[name][~mask].any()) for name, mask in held.masks.items())
        runtime = scores["openvino"] if "openvino" in scores else _both(task, in_torch(model))
        scores.setdefault("torch", runtime)
        return {
            "stage": "quantise",
            "scheme": self.scheme,
            "task": task.kind,
            "metric": task.metric,
            "scores": scores,
            "drop": task.drop(scores["fp32"]["test"], runtime["test"]),
            "mask_sha256": held.checksum(),
            "sparsity": held.sparsity,
            "sparsity_int8": sum(after.values()) / sum(mask.numel() for mask in held.masks.values()),
            "bytes": self._bytes(model, held, codes) | extra,
            **learnt,
            "seconds": time.monotonic() - started,
            "saving": {"files": files}
            | (
                {
                    "scales": {name: step for name, (_, step) in codes.items()},
                    "activations": ranges,
                    "zstd": self.zstd,
                }
                if self.shape == "sparse"
                else {}
            ),
        }

    def _check_pattern(self, held: locks.Lock) -> None:
        if self.fast_path != "torch_1x4":
            return
        for name, mask in held.masks.items():
            if mask.shape[1] % 4 or not set(mask.reshape(-1, 4).sum(1).tolist()) <= {0, 4}:
                raise ValueError(f"torch_1x4 needs pattern 1x4; {name} has single zeros: prune with --pattern 1x4")

    def _matrices(self, model: Any) -> dict[str, Tensor]:
        """Weights that get codes without a runtime to ask."""
        found = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        if self.scope != "linear":
            found |= {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
        tied = model.get_input_embeddings().weight
        return {n: p for n, p in found.items() if p is not tied or self.scope != "linear"}

    def _quantised(self, model: Any, task: Task) -> Any:
        """A copy of the model with quantisers, their ranges set on calibration rows."""
        import nncf  # pyright: ignore[reportMissingImports]  (an extra)

        rows = task.encoded("train")[: self.calibration_rows]
        batches = [_calibration(task, rows, start) for start in range(0, len(rows), 4)]
        model.config.use_cache = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, in code that is not ours
            return nncf.quantize(
                model.eval(),
                nncf.Dataset(batches),
                subset_size=len(batches),
                **nncf_arguments(self.scheme, self.scope, self.fast_path),
            )

    def _ranges(self, quantised: Any, task: Task, locked: set[str]) -> dict[str, dict[str, float]]:
        """Locked linear -> the trained range of its inputs, and the range of its outputs on calibration rows."""
        inputs = _input_quantisers(quantised, _example(task), locked)
        seen: dict[str, tuple[float, float]] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, given: Any, made: Tensor) -> None:
                low, high = seen.get(name, (0.0, 0.0))
                seen[name] = min(low, float(made.min())), max(high, float(made.max()))

            return hook

        rows = task.encoded("train")[: self.calibration_rows]
        with ExitStack() as hooks, torch.no_grad():
            for name in inputs:
                hooks.enter_context(quantised.get_submodule(name).register_forward_hook(watch(name)))
            for start in range(0, len(rows), 4):
                quantised(**_calibration(task, rows, start))
        found = {}
        for name, quantiser in inputs.items():
            _, _, in_scale, in_zp = quantiser.get_parameters_for_torch_fq()
            out_scale, out_zp = torch_1x4.uint8_range(*seen[name])
            found[name] = {
                "in_scale": float(in_scale), "in_zp": int(in_zp), "out_scale": out_scale, "out_zp": out_zp,
            }  # fmt: skip
        return found

    def _export(
        self, quantised: Any, task: Task, codes: dict[str, tuple[Tensor, Tensor]], held: locks.Lock, folder: Path
    ) -> tuple[dict[str, Any], dict[str, Callable[[Batch], list[Tensor]]]]:
        """Bytes of the IR, and the model as the runtime computes it, at its own precision and in fp32.

        Raises:
            ValueError: a locked matrix is not int8 in the IR, or has other codes there.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's
            made = openvino.convert(quantised, _example(task), causal=structure.is_causal(quantised))
        constants = [torch.from_numpy(constant) for constant in openvino.int8_constants(made)]
        for name in held.masks:
            code = codes[name][0]
            if not any(constant.shape == code.shape and torch.equal(constant, code) for constant in constants):
                raise ValueError(f"the IR does not hold the int8 codes of {name} that were trained; report this")
        sizes = openvino.save(made, folder)
        runs = {"openvino": openvino.runner(made), "openvino f32": openvino.runner(made, precision="f32")}
        return {
            "ir": sizes[openvino.MODEL.replace(".xml", ".bin")],
            "ir zst": sizes[openvino.MODEL.replace(".xml", ".bin.zst")],
        }, runs

    def _bytes(self, model: Any, held: locks.Lock, codes: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Sizes of the same weights in other forms; of our container, the prunable matrices alone too."""
        matrices = set(held.masks)
        state = zeros.unique(model)
        table = sparse.byte_table(state, matrices)
        for what, chosen in (("whole", set(state)), ("matrices", matrices)):
            part = {n: codes[n][0] if n in codes else t for n, t in state.items() if n in chosen}
            scales = {n: codes[n][1] for n in part if n in codes}
            table.setdefault("ours", {})[what] = sparse.size(part, scales=scales, zstd=self.zstd)
        return table


def nncf_arguments(scheme: str = "int8", scope: str = "linear", fast_path: str = "none") -> dict[str, Any]:
    """What `nncf.quantize` is told; also for whoever compares with a model quantised otherwise alike."""
    openvino.check("quantisation")
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")  # two slow cores compile it for minutes
    import nncf  # pyright: ignore[reportMissingImports]
    from nncf.quantization import advanced_parameters as advanced  # pyright: ignore[reportMissingImports]

    fix = advanced.OverflowFix.ENABLE if fast_path == "torch_1x4" else advanced.OverflowFix.DISABLE
    parameters = advanced.AdvancedQuantizationParameters(
        overflow_fix=fix,
        disable_bias_correction=True,
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
    )
    if scheme == "int8_paper":
        parameters.weights_quantization_params = advanced.QuantizationParameters(per_channel=False)
    return {
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.MIXED,
        "ignored_scope": nncf.IgnoredScope(types=list(SCOPES[scope]), validate=False),
        "advanced_parameters": parameters,
    }


class _Clamp:
    """Keeps weights inside their quantiser's range; beyond it the runtime saturates at -128, training at -127."""

    def __init__(self, model: nn.Module, found: dict[str, Any], most: int = 127):
        parameters = dict(model.named_parameters())
        self.pairs = [(parameters[name], quantiser) for name, quantiser in found.items()]
        self.most = most  # the largest code

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, quantiser in self.pairs:
            limit = quantiser.scale.detach().abs() * (self.most / quantiser.level_high)
            parameter.copy_(parameter.clamp(-limit, limit))


def _weight_quantisers(model: nn.Module, example: Batch) -> dict[str, Any]:
    """Name of a weight -> the quantiser that it passes through.

    NNCF's names drop the layer's index, so the model is asked: one forward, watching what comes in.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    places = {p.data_ptr(): name for name, p in model.named_parameters() if p.numel()}
    found: dict[str, Any] = {}

    def watch(module: nn.Module, inputs: Any) -> None:
        name = names.get(id(inputs[0])) or places.get(inputs[0].data_ptr())
        if name is not None:
            found[name] = module

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "SymmetricQuantizer":
                hooks.enter_context(module.register_forward_pre_hook(watch))
        model.eval()(**example)
    return found


def _input_quantisers(model: nn.Module, example: Batch, weights: set[str]) -> dict[str, Any]:
    """Name of a linear, of those whose weight is named -> the quantiser of its input, inside it or before it.

    Raises:
        ValueError: a linear gets fp32.
    """
    found: dict[str, Any] = {}
    made: list[tuple[Tensor, nn.Module]] = []  # holding the tensors, so that no two have one address
    inside: list[tuple[str, Tensor]] = []

    def quantised(module: nn.Module, given: Any, output: Tensor) -> None:
        made.append((output, module))
        if inside and given[0].data_ptr() == inside[-1][1].data_ptr():
            found[inside[-1][0]] = module

    def enters(name: str) -> Any:
        def hook(module: nn.Module, given: Any) -> None:
            inside.append((name, given[0]))
            for tensor, quantiser in made:
                if tensor.data_ptr() == given[0].data_ptr():
                    found[name] = quantiser

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "AsymmetricQuantizer":
                hooks.enter_context(module.register_forward_hook(quantised))
        for weight in weights:
            linear = model.get_submodule(name := weight.removesuffix(".weight"))
            hooks.enter_context(linear.register_forward_pre_hook(enters(name)))
            hooks.enter_context(linear.register_forward_hook(lambda *a: inside.clear()))
        model.eval()(**example)
    lost = sorted(weights - {f"{name}.weight" for name in found})
    if lost:
        raise ValueError(f"NNCF gave {len(lost)} locked matrices fp32 inputs, {lost[0]} first; report this")
    return found


@torch.no_grad()
def _codes(model: nn.Module, found: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> int8 codes and step, [] or [R]; value = code * step, and the weights are set to it.

    A weight in the middle between two codes would be rounded one way here and the other way by the converter.
    """
    parameters = dict(model.named_parameters())
    codes = {}
    for name, quantiser in found.items():
        limit = quantiser.scale.detach().abs()
        step = limit / quantiser.level_high
        value = parameters[name].detach()
        if step.numel() not in (1, value.shape[0]):
            raise ValueError(f"{name} has {step.numel()} scales for {value.shape[0]} rows: no place in the container")
        code = (value.clamp(-limit, limit) / step).round().to(torch.int8)
        parameters[name].copy_(code.float() * step)
        codes[name] = code.cpu(), step.flatten().cpu() if step.numel() > 1 else step.reshape(()).cpu()
    return codes


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes in [-127, 127] with a step per row."""
    step = weight.detach().float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.detach().float() / step[:, None]).round().to(torch.int8).cpu(), step.cpu()


def _calibration(task: Task, rows: Any, start: int) -> Batch:
    if task.kind == "clm":
        # Without a mask the converter meets transformers' search for packed sequences, which it does not know.
        return {"input_ids": rows[start : start + 4], "attention_mask": torch.ones_like(rows[start : start + 4])}
    return {name: x for name, x in task.collate(rows[start : start + 4]).items() if name != "targets"}


def _example(task: Task) -> Batch:
    return _calibration(task, task.encoded("train"), 0)


def _both(task: Task, forward: Any) -> dict[str, dict[str, float]]:
    return {part: task.scores(forward, part) for part in ("validation", "test")}
