"""The units of a search over PEFT modules: which there are, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sentei import structure
from sentei.adapters.bottleneck import HOSTS, Bottleneck
from sentei.folding import ChildLinear

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


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
    if "adapter" in kinds and name not in HOSTS:
        raise ValueError(
            f"no adapter host found in {type(model).__name__}; supported families: {', '.join(HOSTS)}; "
            "or use kinds=lora"
        )
    gate = family.up[0] if len(family.up) == 2 else None
    linears = (family.query, family.key, family.value, family.output, gate, family.up[-1], family.down)
    paths: dict[str, str | None] = dict(zip(ROLES, linears, strict=True))
    if "lora" in kinds and (family.fused_qkv or any(paths[target] is None for target in targets)):
        raise ValueError(
            f"no LoRA host found in {type(model).__name__} for {', '.join(targets)}: its projections are fused, or it "
            f"has no gate; supported families: {', '.join(HOSTS)}; or choose other lora_targets, or kinds=adapter"
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
            hidden, host = down.out_features, f"{at}.{HOSTS[name].path}"
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
