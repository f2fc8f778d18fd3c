"""PEFT modules as removable units: LoRA on linears, a serial bottleneck after the feed-forward of a layer.

LoRA is peft's. The bottleneck (arXiv 2005.00247) is ours, since peft has none; it reads the residual stream as the
`adapters` package does, where h is the feed-forward's output and x the residual it is added to:

    post-norm encoders   a = LN(h + x);   layer output = LN(x + h + drop(Up(relu(Down(a)))))
    pre-norm decoders    a = h + x;       layer output = x + h + drop(Up(relu(Down(a))))

What is injected goes in around the modules it extends, LoRA first and bottlenecks last, and comes out deepest first;
the base weights never change.

Shapes: B rows, T tokens, H hidden width, w bottleneck width.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sentei import structure
from sentei.folding import ChildLinear
from sentei.train import mix

INITS = ("zero", "paper", "hub")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_NAME = "default"  # peft's name for an adapter


@dataclass(frozen=True)
class Unit:
    """One removable module, several that go together, or some of the ranks of LoRA.

    Attributes:
        id: such as "lora.L3", "adapter.L7" or, of a ladder, "lora.L3.r8-16".
        kind: units are compared with others of their kind.
        modules: full names in the model; several for LoRA on query and value.
        sizes: (input, output) features of each module; (H, H) for a bottleneck.
        rank: of the LoRA, or width of the bottleneck; of a ladder's slice, where it ends.
        start: where a slice begins; the layer's LoRA has the rank that its highest living slice ends at.
    """

    id: str
    kind: str
    layer: int
    modules: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    rank: int
    start: int = 0

    @property
    def is_lora(self) -> bool:
        return self.kind != "adapter"

    def stands_on(self, other: Unit) -> bool:
        """Is `other` the next lower slice of the same ladder?"""
        return self.start > 0 and (self.modules, self.start) == (other.modules, other.rank)

    def own(self, role: str, matrix: Tensor) -> Tensor:
        """The unit's part of one of its `matrices`, a view."""
        if not self.is_lora:
            return matrix
        return matrix[self.start : self.rank] if role.endswith(".A") else matrix[:, self.start : self.rank]

    @property
    def parameters(self) -> int:
        if self.is_lora:
            return (self.rank - self.start) * sum(inputs + outputs for inputs, outputs in self.sizes)
        hidden = self.sizes[0][0]
        return 2 * hidden * self.rank + self.rank + hidden


@dataclass(frozen=True)
class _Host:
    """Where a family's bottleneck goes, from a layer; `norm` is None where the host holds it."""

    path: str
    norm: str | None
    pre_norm: bool


_HOSTS = {
    "bert": _Host("output", None, False),
    "roberta": _Host("output", None, False),
    "distilbert": _Host("ffn", "output_layer_norm", False),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _Host("mlp", "post_attention_layernorm", True)),
}


class Bottleneck(nn.Module):
    """A host module (feed-forward, or an encoder's output block) with a serial adapter behind it.

    Args:
        host: takes what it took before; in BERT also the residual.
        norm: the LayerNorm after the residual sum, of post-norm layers; it is used, not owned.
        pre_norm: the residual is caught at the norm before the host, by the hook `keep_residual`.
    """

    def __init__(self, host: nn.Module, hidden: int, width: int, dropout: float, norm: Any, pre_norm: bool):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        self.enabled = True
        self.watch: Any = None
        self._norm = (norm,)  # in a tuple: a child would be saved twice
        self._residual_BTH: Tensor | None = None
        self._hook: Any = None
        self.base_layer = host  # last: names that are not ours by now are looked up in it

    def __getattr__(self, name: str) -> Any:
        """The host's children keep their paths: layers that share weights, and LoRA, look them up there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("base_layer")
            if host is None:
                raise
            return getattr(host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A child of the host that is replaced by its path is replaced in the host."""
        own = self.__dict__.get("_modules", {})
        to_host = name not in own and "base_layer" in own and name in self.base_layer._modules
        if to_host:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, hidden_BTH: Tensor, *rest: Tensor) -> Tensor:
        if rest:  # BERT's output block: linear, dropout, and the norm of the sum
            (residual_BTH,) = rest
            host: Any = self.base_layer
            sum_BTH = host.dropout(host.dense(hidden_BTH)) + residual_BTH
            normed_BTH = host.LayerNorm(sum_BTH)
            if not self.enabled:
                return normed_BTH
            return host.LayerNorm(sum_BTH + self.change(normed_BTH, normed_BTH))
        output_BTH = self.base_layer(hidden_BTH)
        residual_BTH = hidden_BTH
        if self.pre_norm:
            assert self._residual_BTH is not None, "the norm before the host did not run"
            residual_BTH, self._residual_BTH = self._residual_BTH, None
        if not self.enabled:
            return output_BTH
        sum_BTH = output_BTH + residual_BTH
        read_BTH = sum_BTH if self.pre_norm else self._norm[0](sum_BTH)
        return output_BTH + self.change(read_BTH, output_BTH)

    def change(self, read_BTH: Tensor, host_BTH: Tensor) -> Tensor:
        """drop(Up(relu(Down(a)))), in the adapter's own precision, under autocast too."""
        with torch.autocast(read_BTH.device.type, enabled=False):
            added_BTH = self.up(torch.relu(self.down(read_BTH.to(self.down.weight.dtype))))
        if self.watch is not None:
            self.watch(added_BTH.detach(), host_BTH.detach())
        return self.dropout(added_BTH).to(host_BTH.dtype)


class _KeepResidual:
    """Forward-pre-hook of the norm before a host. An object, not a closure: it is copied with the model."""

    def __init__(self, adapter: Bottleneck):
        self.adapter = adapter

    def __call__(self, norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.adapter._residual_BTH = arguments[0]


def units(
    model: nn.Module,
    *,
    kinds: Sequence[str] = ("lora", "adapter"),
    targets: Sequence[str] = ("q", "v"),
    split: bool = False,
    rank: int | Sequence[int],
    width: int,
) -> list[Unit]:
    """The search space: per layer one unit for each kind; layers that lost their attention or feed-forward have none.

    Args:
        targets: linears that get LoRA, by ROLES.
        split: each linear is a unit, and a kind, of its own ("lora_q", "lora_v").
        rank: several, rising, make LoRA a ladder: a unit for each slice from one rank to the next.

    Raises:
        ValueError: unknown kind or target, a family without hosts, a model that has adapters already.
    """
    if any(isinstance(module, BaseTunerLayer | Bottleneck) for module in model.modules()) or hasattr(
        model, "peft_config"
    ):
        raise ValueError("the model has PEFT modules already; start from the base model (merge or unload them first)")
    for kind in kinds:
        if kind not in ("lora", "adapter"):
            raise ValueError(f"kind {kind!r} is not known; expected lora, adapter or both (prefixes are not searched)")
    for target in targets:
        if target not in ROLES:
            raise ValueError(f"LoRA target {target!r} is not known; expected some of {', '.join(ROLES)}")
    if not kinds or ("lora" in kinds and not targets) or len(set(targets)) < len(targets):
        raise ValueError(f"kinds {kinds} and LoRA targets {targets}: name at least one of each, none twice")
    ends = [rank] if isinstance(rank, int) else list(rank)
    if not ends or ends != sorted(set(ends)) or ends[0] < 1:
        raise ValueError(f"ranks to choose from must rise and be at least 1; got {ends}")
    name, family = structure.family_name(model), structure.family(model)
    if "adapter" in kinds and name not in _HOSTS:
        raise ValueError(
            f"no adapter host found in {type(model).__name__}; supported families: {', '.join(_HOSTS)}; "
            "or use kinds=lora"
        )
    gate = family.up[0] if len(family.up) == 2 else None
    linears = (family.query, family.key, family.value, family.output, gate, family.up[-1], family.down)
    paths: dict[str, str | None] = dict(zip(ROLES, linears, strict=True))
    if "lora" in kinds and (family.fused_qkv or any(paths[target] is None for target in targets)):
        raise ValueError(
            f"no LoRA host found in {type(model).__name__} for {', '.join(targets)}: its projections are fused, or it "
            f"has no gate; supported families: {', '.join(_HOSTS)}; or choose other lora_targets, or kinds=adapter"
        )
    names = {id(module): name for name, module in model.named_modules()}
    found: list[Unit] = []
    for number, layer in enumerate(structure.layers(model)):
        at = names[id(layer)]
        if "lora" in kinds:
            here = {target: _linear(layer, str(paths[target])) for target in targets}
            here = {t: linear for t, linear in here.items() if isinstance(linear, nn.Linear)}
            modules = {target: f"{at}.{paths[target]}" for target in here}
            sizes = {target: (linear.in_features, linear.out_features) for target, linear in here.items()}
            groups = [(f"lora_{t}", (t,)) for t in modules] if split else [("lora", tuple(modules))]
            for kind, of in groups:
                at_modules, at_sizes = tuple(modules[t] for t in of), tuple(sizes[t] for t in of)
                for start, end in zip([0, *ends], ends, strict=False) if of else ():
                    slice_ = f".r{start}-{end}" if len(ends) > 1 else ""
                    found.append(Unit(f"{kind}.L{number}{slice_}", kind, number, at_modules, at_sizes, end, start))
        if "adapter" in kinds and (down := _linear(layer, family.down)) is not None:
            hidden, host = down.out_features, f"{at}.{_HOSTS[name].path}"
            found.append(Unit(f"adapter.L{number}", "adapter", number, (host,), ((hidden, hidden),), width))
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer with an attention or feed-forward left to adapt")
    return found


def _linear(layer: nn.Module, path: str) -> nn.Linear | ChildLinear | None:
    """The linear at a path of a layer, its own or another layer's, or None where it was pruned away."""
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear | ChildLinear) and module.in_features * module.out_features else None


def remarks(model: nn.Module, space: Sequence[Unit]) -> list[str]:
    """What is not as in a stock model: layers without a unit of some kind, and LoRA that acts in several layers."""
    layers, found = structure.layers(model), []
    for kind in dict.fromkeys(unit.kind for unit in space):
        has = {unit.layer for unit in space if unit.kind == kind}
        if missing := ", ".join(str(number) for number in range(len(layers)) if number not in has):
            found.append(f"no {kind} unit in layers {missing}: what it would extend is pruned away, or another layer's")
    users: dict[tuple[int, str], set[int]] = {}
    for number, layer in enumerate(layers):
        for child in layer.modules():
            if isinstance(child, ChildLinear) and child.base is None:
                users.setdefault((child.owner, child.path), set()).add(number)
    for unit in space:
        of = [users.get((unit.layer, name.partition(f".{unit.layer}.")[2]), set()) for name in unit.modules]
        if unit.is_lora and (numbers := sorted(set().union(*of))):
            found.append(f"{unit.id} acts in layers {', '.join(map(str, numbers))} too, which run with its weights")
    return found


def inject(
    model: nn.Module,
    living: Sequence[Unit],
    *,
    alpha_per_rank: float = 1.0,
    dropout: float = 0.0,
    init: str = "zero",
    seed: object = 0,
) -> None:
    """Put units into a model; their parameters, and no others, require gradients. Exact no-op at first with "zero".

    Args:
        alpha_per_rank: LoRA's product is scaled by it (alpha / r).
        init: of bottlenecks. "zero": Down ~ N(0, 0.02), Up 0; "hub": both N(0, 0.02); "paper": both N(0, 1 / sqrt(H)).
            LoRA starts as peft has it: A Kaiming-uniform, B 0.
        seed: a unit's first weights depend on it and on the unit's id, not on which others live.
    """
    model.requires_grad_(False)
    lora = [unit for unit in living if unit.is_lora]
    if lora:
        with torch.random.fork_rng():  # peft draws weights, which are drawn again below
            inject_adapter_in_model(lora_config(lora, alpha_per_rank, dropout), model)
    name = structure.family_name(model)
    for unit in living:
        if not unit.is_lora:
            _wrap(model, unit, dropout, _HOSTS[name])
    for unit in living:
        _initialise(model, unit, init, seed)
    for parameter in parameters(model, living):
        parameter.requires_grad_(True)


def lora_config(living: Sequence[Unit], alpha_per_rank: float, dropout: float, **more: Any) -> LoraConfig:
    """peft's configuration: `r` alone where all ranks are equal, since some loaders know no patterns."""
    rank_of: dict[str, int] = {}
    for unit in sorted((unit for unit in living if unit.is_lora), key=lambda unit: unit.rank):
        rank_of |= dict.fromkeys(unit.modules, unit.rank)
    ranks = list(rank_of.values())
    common = max(set(ranks), key=lambda rank: (ranks.count(rank), rank)) if ranks else 8
    others = {re.escape(name): rank for name, rank in rank_of.items() if rank != common}
    alphas = {name: _alpha(alpha_per_rank * rank) for name, rank in others.items()}
    return LoraConfig(
        r=common,
        lora_alpha=_alpha(alpha_per_rank * common),
        lora_dropout=dropout,
        target_modules=pattern(living),
        rank_pattern=others,
        alpha_pattern=alphas,
        bias="none",
        **more,
    )


def _alpha(value: float) -> Any:
    return int(value) if float(value).is_integer() else value


def _wrap(model: nn.Module, unit: Unit, dropout: float, host: _Host) -> None:
    (name,) = unit.modules
    inner, hidden = model.get_submodule(name), unit.sizes[0][0]
    layer = model.get_submodule(name.removesuffix(f".{host.path}"))
    norm = layer.get_submodule(host.norm) if host.norm else None
    adapter = Bottleneck(inner, hidden, unit.rank, dropout, None if host.pre_norm else norm, host.pre_norm)
    device = next(inner.parameters()).device
    for part in (adapter.down, adapter.up):
        part.to(device=device, dtype=torch.float32)
    adapter.train(inner.training)
    if host.pre_norm:
        assert norm is not None
        adapter._hook = norm.register_forward_pre_hook(_KeepResidual(adapter))
    model.set_submodule(name, adapter)


@torch.no_grad()
def _initialise(model: nn.Module, unit: Unit, init: str, seed: object) -> None:
    assert init in INITS
    random = torch.Generator().manual_seed(mix(seed, unit.id))
    for (role, weight), variance in zip(matrices(model, unit), init_variances(unit, init), strict=True):
        weight.data = weight.data.float()
        own = unit.own(role, weight.data)
        drawn = torch.zeros(own.shape)
        if variance and unit.is_lora:
            bound = (3 * variance) ** 0.5
            drawn.uniform_(-bound, bound, generator=random)
        elif variance:
            drawn.normal_(0, variance**0.5, generator=random)
        own.copy_(drawn)
    for module in modules(model, unit):
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.down.bias)
            nn.init.zeros_(module.up.bias)


def init_variances(unit: Unit, init: str) -> list[float]:
    """Variance of each of the unit's `matrices` when it starts; 0 for those that start at 0."""
    if unit.is_lora:  # Kaiming-uniform with a = sqrt(5): uniform in +-1 / sqrt(inputs)
        return [variance for inputs, _ in unit.sizes for variance in (1 / (3 * inputs), 0.0)]
    hidden = unit.sizes[0][0]
    return {"zero": [4e-4, 0.0], "hub": [4e-4, 4e-4], "paper": [1 / hidden, 1 / hidden]}[init]


def matrices(model: nn.Module, unit: Unit) -> list[tuple[str, nn.Parameter]]:
    """The unit's weight matrices with their roles ("q.A", "q.B", ...; "down", "up"); biases are not among them.

    Of a ladder they are whole, all slices together: `Unit.own` has the unit's part.
    """
    found: list[tuple[str, Any]] = []
    for name, module in zip(unit.modules, modules(model, unit), strict=True):
        if isinstance(module, Bottleneck):
            found += [("down", module.down.weight), ("up", module.up.weight)]
        else:
            role = name.rpartition(".")[2]
            found += [(f"{role}.A", module.lora_A[_NAME].weight), (f"{role}.B", module.lora_B[_NAME].weight)]
    return found


def modules(model: nn.Module, unit: Unit) -> list[Any]:
    """The unit's injected modules: peft's LoRA layers, or one Bottleneck."""
    found = [model.get_submodule(name) for name in unit.modules]
    assert all(isinstance(module, LoraLayer if unit.is_lora else Bottleneck) for module in found), unit.id
    return found


def parameters(model: nn.Module, living: Iterable[Unit]) -> list[nn.Parameter]:
    """All trained parameters of the units, biases included; what slices share, once."""
    found = list({id(weight): weight for unit in living for _, weight in matrices(model, unit)}.values())
    for unit in living:
        if not unit.is_lora:
            (adapter,) = modules(model, unit)
            found += [adapter.down.bias, adapter.up.bias]
    return found


def unload(model: nn.Module) -> None:
    """Take everything injected out again, deepest first, hooks too; the model is as it was before `inject`."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer | Bottleneck)]
    for name, module in sorted(named, key=lambda item: -item[0].count(".")):
        if isinstance(module, Bottleneck) and module._hook is not None:
            module._hook.remove()
        model.set_submodule(name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch everything injected on, or off: the model then computes as its base does."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.enabled = enabled
        elif isinstance(module, LoraLayer):
            module.enable_adapters(enabled)


def merge_lora(model: nn.Module) -> None:
    """Add LoRA into the base weights and take it out.

    Raises:
        ValueError: bottlenecks are there, which no weight of the base can hold.
    """
    if any(isinstance(module, Bottleneck) for module in model.modules()):
        raise ValueError("a serial adapter cannot be merged into the weights; use kinds=lora for that")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    unload(model)


# --- names --------------------------------------------------------------------------------------


def pattern(living: Sequence[Unit]) -> str:
    """One regular expression that fully matches the names of the units' modules, bare or below a head's prefix."""
    layers_of: dict[tuple[str, str], set[int]] = {}
    for unit in living:
        for name in unit.modules:
            before, _, after = name.partition(f".{unit.layer}.")
            layers_of.setdefault((_stack(before), after), set()).add(unit.layer)
    by_layers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stack, after), layers in layers_of.items():
        by_layers.setdefault((stack, tuple(sorted(layers))), []).append(after)
    parts = [
        rf"{re.escape(stack)}\.{_either(map(str, layers))}\.{_either(map(re.escape, sorted(afters)))}"
        for (stack, layers), afters in by_layers.items()
    ]
    return rf"(?:.*\.)?{_either(parts)}"


def _stack(before: str) -> str:
    """The list of layers without the model around it: "encoder.layer" of "bert.encoder.layer", "layers"."""
    *above, last = before.split(".")
    return ".".join([*above[-1:], last]) if last == "layer" else last


def _either(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def check_pattern(expression: str, model: nn.Module, living: Sequence[Unit]) -> dict[str, int]:
    """How many modules of the bare model the expression matches: {"expected", "matched", "others"}.

    Raises:
        ValueError: it misses one, or matches another.
    """
    compiled = re.compile(expression)
    hits = {name for name, _ in model.named_modules() if compiled.fullmatch(name)}
    expected = {name for unit in living for name in unit.modules}
    if hits != expected:
        odd = sorted(hits ^ expected)[0]
        raise ValueError(
            f"the expression {expression} matches {len(hits)} modules, expected {len(expected)}; see {odd}"
        )
    return {"expected": len(expected), "matched": len(hits & expected), "others": len(hits - expected)}


def head(model: Any) -> list[str]:
    """Names of the modules that a task adds to the model, and its pooler; empty for language models."""
    if not re.search("For(SequenceClassification|QuestionAnswering|TokenClassification)$", type(model).__name__):
        return []
    base = model.base_model_prefix
    found = [name for name, module in model.named_children() if name != base and any(True for _ in module.parameters())]
    pooler = getattr(getattr(model, base), "pooler", None)
    return [*found, *([f"{base}.pooler"] if pooler is not None else [])]


def fingerprint(model: nn.Module) -> str:
    """Of a bare model's architecture: names and shapes, the head left out."""
    skip = tuple(f"{name}." for name in head(model))
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters() if not name.startswith(skip or ("\0",))]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def state(model: nn.Module, living: Sequence[Unit]) -> dict[str, Tensor]:
    """The units' and the head's tensors, under the names that peft gives them in a file."""
    trained = {id(p) for p in parameters(model, living)}
    heads = tuple(f"{name}." for name in head(model)) or ("\0",)
    return {
        _in_file(name): tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.named_parameters()
        if id(tensor) in trained or name.startswith(heads)
    }


def _in_file(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"


@torch.no_grad()
def load_state(model: nn.Module, living: Sequence[Unit], tensors: dict[str, Tensor]) -> None:
    """Put tensors of `state` back. ValueError where names or shapes differ."""
    own = {_in_file(name): p for name, p in model.named_parameters()}
    wanted = state(model, living)
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))[0]
        raise ValueError(f"the adapter file and its configuration differ, in {odd} and maybe others; get it again")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"the adapter's {name} is {list(tensor.shape)}, the base needs {list(own[name].shape)}")
        own[name].copy_(tensor)
