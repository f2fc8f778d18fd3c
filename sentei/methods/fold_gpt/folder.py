"""Fold windows of one model, take folds back, and remember what was measured.

A member that runs with another one's linears starts from the best of these, each kept only if KL falls: its own norms
or the parent's; a low-rank term from the weighted SVD of the difference of the weights; output scales of o_proj and
down_proj by least squares against the block's own update; these scales halved, or 0. With scales of 0 a member starts
as if it had been removed, so that sharing is never worse than removal to begin with, and healing may wake it.

Shape legend: T tokens, O outputs and I inputs of a linear, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import folding, importance, masks, structure
from sentei.atomic import write_text
from sentei.importance import Moments, Tick
from sentei.methods.fold_gpt.judge import TINY, Judge, low_rank, output_scale
from sentei.train import mix

Group = dict[str, Any]
"""{"members": [4, 5], "owner": 4 (-1: an average), "starts": {"5": {"norms", "low_rank", "scale", "factor"}}, "kl":
after it}."""

FACTORS = (0.5, 0.0)  # of a member's output scales, beside 1; 0 last, for nothing can be made of it


class _Stop(Exception):
    pass


class Folder:
    """Folds windows of one model, takes folds back, and remembers what it measured.

    Args:
        free: per layer, may it share?
        parent: "first", "best" or "average".
        file: what was measured is kept here by name, and found again by the same run.
        identity: JSON-able; what must be equal for the file to belong to this run.
    """

    def __init__(
        self,
        model: nn.Module,
        judge: Judge,
        *,
        free: list[bool],
        size: int,
        parent: str,
        rank: int,
        scale: bool,
        align: bool,
        file: Path | None = None,
        identity: Any = None,
        tick: Tick | None = None,
    ):
        self.model, self.judge, self.size, self.parent = model, judge, size, parent
        self.rank, self.scale, self.align = rank, scale, align
        self.row, self.layers = structure.family(model), structure.layers(model)
        kinds = [folding.kind(model, number) for number in range(len(self.layers))]
        runs = [list(range(i, i + size)) for i in range(len(self.layers) - size + 1)]
        self.windows = [run for run in runs if all(free[i] for i in run) and len({kinds[i] for i in run}) == 1]
        self.original = [folding.linears(layer) for layer in self.layers]
        self.norms = [
            {name: p.detach().clone() for name, p in layer.named_parameters() if _is_norm(name, self.original[i])}
            for i, layer in enumerate(self.layers)
        ]
        self.saved_bytes_of = [folding.saving(layer, rank, scale) for layer in self.layers]
        self.file, self.identity = file, json.dumps(identity, sort_keys=True, default=str)
        self.known: dict[str, Group] = self._restore()
        self.tick, self.measured = tick, 0
        self.rms = self._input_rms()
        self.terms: dict[tuple[Any, ...], dict[str, Any]] = {}  # low-rank terms, which take a while to find

    # --- sizes ----------------------------------------------------------------------------------------------------

    def saving(self, members: list[int]) -> int:
        """Parameters that a group saves, corrections included."""
        held, added = self.saved_bytes_of[members[0]]
        corrected = len(members) if self.parent == "average" else len(members) - 1
        return (len(members) - 1) * held - corrected * added

    def reach(self) -> int:
        """The most that disjoint windows can save."""
        best = [0] * (len(self.layers) + 1)
        windows = {window[-1]: window for window in self.windows}
        for end in range(1, len(self.layers) + 1):
            best[end] = best[end - 1]
            if window := windows.get(end - 1):
                best[end] = max(best[end], best[window[0]] + self.saving(window))
        return best[-1]

    # --- folding one window ---------------------------------------------------------------------------------------

    def fold(self, members: list[int], inputs: list[Tensor] | None = None) -> Group:
        """Fold a window from the best start that measuring finds, and leave it folded."""
        owners = {"first": members[:1], "best": members, "average": [-1]}[self.parent]
        found: list[Group] = []
        for owner in owners:
            if found:
                self.undo(members)
            found.append(self._fold(members, owner, inputs))
        best = min(found, key=lambda group: group["kl"])
        if best is not found[-1]:
            self.undo(members)
            self.apply(best)
        return best

    def _fold(self, members: list[int], owner: int, inputs: list[Tensor] | None) -> Group:
        self._share(members, owner)
        start = members[0]
        group: Group = {"members": members, "owner": owner, "starts": {}}
        kl = self._kl(start, inputs)
        for number in self._corrected(members, owner):
            choice = {"norms": "own", "low_rank": False, "scale": False, "factor": 1.0}
            group["starts"][str(number)] = choice
            if owner >= 0:
                self._set_norms(number, owner)
                if (other := self._kl(start, inputs)) < kl:
                    kl, choice["norms"] = other, "parent"
                else:
                    self._set_norms(number, number)
            for what, put, wanted in (
                ("low_rank", self._put_low_rank, self.rank > 0),
                ("scale", self._put_scale, self.scale),
            ):
                if not wanted:
                    continue
                before = self.corrections(number)
                if put(number, owner, choice, members, inputs):
                    if (other := self._kl(start, inputs)) < kl:
                        kl, choice[what] = other, True
                    else:
                        self.put_back(number, before)
            for factor in FACTORS if self.scale else ():
                before = self.corrections(number)
                self._multiply(number, factor / choice["factor"])
                if (other := self._kl(start, inputs)) < kl:
                    kl, choice["factor"] = other, factor
                else:
                    self.put_back(number, before)
        return group | {"kl": kl}

    def apply(self, group: Group) -> None:
        """Fold a window the way it was found best. The same model gives the same weights, to the bit."""
        members, owner = group["members"], group["owner"]
        self._share(members, owner)
        for number in self._corrected(members, owner):
            choice = group["starts"][str(number)]
            if choice["norms"] == "parent":
                self._set_norms(number, owner)
            if choice["low_rank"]:
                self._put_low_rank(number, owner, choice, members, None)
            if choice["scale"]:
                self._put_scale(number, owner, choice, members, None)
            self._multiply(number, choice["factor"])

    @torch.no_grad()
    def free_terms(self, seed: int) -> None:
        """Where no SVD was kept, A starts at random and B at 0: nothing is added, but both at 0 would never learn."""
        for number, layer in enumerate(self.layers):
            for path, child in folding.linears(layer).items():
                if isinstance(child, folding.ChildLinear) and child.A is not None and not bool(child.A.any()):
                    random = torch.Generator().manual_seed(mix(seed, "A", number, path))
                    start = (2 * torch.rand(child.A.shape, generator=random) - 1) / child.in_features**0.5
                    child.A.copy_(start.to(child.A))

    def undo(self, members: list[int]) -> None:
        for number in members:
            for path, linear in self.original[number].items():
                self.layers[number].set_submodule(path, linear)
            self._set_norms(number, number)

    def _kl(self, start: int, inputs: list[Tensor] | None) -> float:
        self.measured += 1
        return self.judge.kl(self.model, start, inputs)

    def _corrected(self, members: list[int], owner: int) -> list[int]:
        return [number for number in members if number != owner]

    def _share(self, members: list[int], owner: int) -> None:
        if owner < 0:
            first = self.layers[members[0]]
            for path, linear in self._average(members).items():
                first.set_submodule(path, linear)
            folding.fold(self.model, members, members[0], rank=self.rank, scale=self.scale, average=True)
        else:
            folding.fold(self.model, members, owner, rank=self.rank, scale=self.scale)

    def _dense(self, number: int, like: int) -> dict[str, Tensor]:
        """A layer's own weights and biases by name, renumbered like another layer's if that is asked for."""
        if self.align and number != like:
            with self._own_linears(like), self._own_linears(number):
                return folding.align(self.layers[like], self.layers[number], self.row)
        tensors = {f"{path}.weight": linear.weight for path, linear in self.original[number].items()}
        biases = {f"{path}.bias": x.bias for path, x in self.original[number].items() if x.bias is not None}
        return {name: tensor.detach() for name, tensor in (tensors | biases).items()}

    @torch.no_grad()
    def _average(self, members: list[int]) -> dict[str, nn.Linear]:
        each = [self._dense(number, members[0]) for number in members]
        made = {}
        for path, old in self.original[members[0]].items():
            linear = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
            for name in ("weight", "bias")[: 1 + (old.bias is not None)]:
                mean = torch.stack([tensors[f"{path}.{name}"].float() for tensors in each]).mean(0)
                setattr(linear, name, nn.Parameter(mean.to(old.weight.dtype), requires_grad=False))
            made[path] = linear
        return made

    # --- starts ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _set_norms(self, number: int, of: int) -> None:
        for name, value in self.norms[of].items():
            self.layers[number].get_parameter(name).copy_(value)

    def corrections(self, number: int) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": p.detach().clone()
            for path, linear in folding.linears(self.layers[number]).items()
            if isinstance(linear, folding.ChildLinear)
            for name, p in linear.named_parameters(recurse=False)
        }

    @torch.no_grad()
    def put_back(self, number: int, before: dict[str, Tensor]) -> None:
        for name, value in before.items():
            self.layers[number].get_parameter(name).copy_(value)

    @torch.no_grad()
    def _put_low_rank(
        self, number: int, owner: int, choice: dict[str, Any], members: list[int], inputs: list[Tensor] | None
    ) -> bool:
        """B A from the SVD of what the shared weights lack. False: a norm of the parent has no inverse."""
        key = (number, owner, choice["norms"], tuple(members) if owner < 0 else ())
        if key not in self.terms:
            self.terms[key] = self._low_rank(number, owner, choice, members)
        for path, (a, b) in self.terms[key].items():
            child = self.layers[number].get_submodule(path)
            child.A.zero_()[: len(a)] = a.to(child.A)  # pyright: ignore[reportArgumentType]
            child.B.zero_()[:, : b.shape[1]] = b.to(child.B)  # pyright: ignore[reportArgumentType]
        return bool(self.terms[key])

    def _low_rank(self, number: int, owner: int, choice: dict[str, Any], members: list[int]) -> dict[str, Any]:
        """(A, B) by path; they depend on dense weights and norms only, not on the other folds."""
        dense = self._dense(number, members[0] if owner < 0 else owner)
        ratios: dict[str, Tensor] = {}
        for path in folding.linears(self.layers[number]):
            ratio_I = torch.ones(1)
            if choice["norms"] == "parent" and (norm := self._norm_before(path)) is not None:
                own_I, kept_I = self._gain(number, norm), self._gain(owner, norm)
                if bool((kept_I.abs() < TINY).any()):
                    return {}
                ratio_I = own_I / kept_I
            ratios[path] = ratio_I
        terms: dict[str, Any] = {}
        for path, child in folding.linears(self.layers[number]).items():
            assert isinstance(child, folding.ChildLinear)
            shared: Any = child.shared().weight
            ratio_I = ratios[path].to(shared.device)
            delta_OI = dense[f"{path}.weight"].float() * ratio_I - shared.float()
            rms_I = self.rms[number][path].to(shared.device) / ratio_I.abs().clamp_min(TINY)
            terms[path] = low_rank(delta_OI, rms_I, self.rank)
        return terms

    def _norm_before(self, path: str) -> str | None:
        """The norm that feeds a linear, if one does."""
        if path in (self.row.query, self.row.key, self.row.value):
            return self.row.attention_norms[0]
        return self.row.mlp_norms[0] if path in self.row.up else None

    def _gain(self, number: int, norm: str) -> Tensor:
        """What a norm multiplies by: Gemma's is 1 + weight."""
        weight = self.norms[number][f"{norm}.weight"].float()
        return 1 + weight if structure.family_name(self.model).startswith("gemma") else weight

    @torch.no_grad()
    def _put_scale(
        self, number: int, owner: int, choice: dict[str, Any], members: list[int], inputs: list[Tensor] | None
    ) -> bool:
        """Scales so that o_proj and down_proj put out what the block itself would, for the same input."""
        children = folding.linears(self.layers[number])
        scaled = [path for path, x in children.items() if isinstance(x, folding.ChildLinear) and x.scale is not None]
        sums = {path: [torch.zeros((), dtype=torch.double)] * 2 for path in scaled}
        for i in range(len(self.judge.batches)):
            folded = self._outputs(number, scaled, members[0], i, inputs)
            with self.as_it_was(number):
                own = self._outputs(number, scaled, members[0], i, inputs)
            for path in scaled:
                u, v = own[path].double(), folded[path].double()
                uv_O, vv_O = sums[path]
                sums[path] = [uv_O + (u * v).sum(0), vv_O + v.square().sum(0)]
        for path in scaled:
            scale = self.layers[number].get_submodule(path).scale
            scale.copy_(output_scale(*sums[path]).to(scale))  # pyright: ignore[reportArgumentType]
        return bool(scaled)

    @torch.no_grad()
    def _multiply(self, number: int, factor: float) -> None:
        for child in folding.linears(self.layers[number]).values():
            if isinstance(child, folding.ChildLinear) and child.scale is not None:
                child.scale.mul_(factor)

    def _outputs(
        self, number: int, paths: list[str], start: int, batch: int, inputs: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """What some linears of a layer put out, [T, O] each; the layers after it do not run."""
        found: dict[str, Tensor] = {}
        layer = self.layers[number]

        def stop(*_: Any) -> None:
            raise _Stop

        with ExitStack() as stack:
            if inputs is not None:
                stack.enter_context(masks.starting_at(self.model, start, inputs[batch]))
            for path in paths:

                def see(module: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                    found[path] = output.flatten(0, -2)

                stack.callback(layer.get_submodule(path).register_forward_hook(see).remove)
            stack.callback(layer.register_forward_hook(stop).remove)
            with suppress(_Stop):
                structure.base_model(self.model)(input_ids=self.judge.batches[batch], use_cache=False)
        return found

    @contextmanager
    def _own_linears(self, number: int, inside: str = "") -> Iterator[None]:
        """Inside the block a layer, or a module inside it, runs with its own linears."""
        now = {path: x for path, x in folding.linears(self.layers[number]).items() if path.startswith(inside)}
        for path in now:
            self.layers[number].set_submodule(path, self.original[number][path])
        try:
            yield
        finally:
            for path, linear in now.items():
                self.layers[number].set_submodule(path, linear)

    @contextmanager
    def as_it_was(self, number: int, kind: str | None = None) -> Iterator[None]:
        """Inside the block a layer, its attention ("heads") or its MLP ("channels") has its own linears and norms."""
        row, inside, norms = self.row, "", ("",)
        if kind is not None:
            module, norms = (row.attention, row.attention_norms) if kind == "heads" else (row.mlp, row.mlp_norms)
            inside, norms = f"{module}.", (f"{module}.", *(f"{norm}." for norm in norms))
        own = {name: value for name, value in self.norms[number].items() if name.startswith(norms)}
        now = {name: self.layers[number].get_parameter(name).detach().clone() for name in own}
        with self._own_linears(number, inside):
            self.put_back(number, own)
            try:
                yield
            finally:
                self.put_back(number, now)

    @torch.no_grad()
    def _input_rms(self) -> list[dict[str, Tensor]]:
        """Root mean square of every linear's inputs, from one pass of the model before it is folded."""
        if not self.rank:
            return []
        seen = [{path: Moments() for path in linears} for linears in self.original]
        with ExitStack() as stack:
            for linears, moments in zip(self.original, seen, strict=True):
                for path, linear in linears.items():

                    def look(module: nn.Module, args: Any, moment: Moments = moments[path]) -> None:
                        moment(args[0].flatten(0, -2))

                    stack.callback(linear.register_forward_pre_hook(look).remove)
            for ids_BT in self.judge.batches:
                structure.base_model(self.model)(input_ids=ids_BT, use_cache=False)
        return [{path: (x.square_W / x.count).sqrt().float() for path, x in each.items()} for each in seen]

    # --- what was measured ----------------------------------------------------------------------------------------

    def single(self) -> list[Group]:
        """Every window folded alone, in order of depth; what comes before it is computed once."""
        missing = [window for window in self.windows if _name([], window) not in self.known]
        if missing:
            replay = importance.Replay(self.model, torch.cat(self.judge.batches), len(self.judge.batches[0]))
            for number in range(missing[-1][0] + 1):
                for window in missing:
                    if window[0] == number:
                        group = self.fold(window, replay.hidden)
                        self.undo(window)
                        self._remember(_name([], window), group)
                        self._say("folding pairs alone", number)
                replay.advance(number)
        return [self.known[_name([], window)] for window in self.windows]

    def again(self, made: list[Group], window: list[int]) -> Group:
        """A window on top of the folds made so far. The model has those folds, and keeps them only."""
        name = _name(made, window)
        if name not in self.known:
            self._remember(name, self.fold(window))
            self.undo(window)
            self._say("folding on top", len(made))
        return self.known[name]

    def _say(self, what: str, done: int) -> None:
        if self.tick is not None:
            self.tick(f"{what} ({self.measured} measurements)", done, len(self.layers))

    def _remember(self, name: str, group: Group) -> None:
        self.known[name] = group
        if self.file is not None:
            write_text(self.file, json.dumps({"identity": self.identity, "known": self.known}))

    def _restore(self) -> dict[str, Group]:
        if self.file is None or not self.file.exists():
            return {}
        state = json.loads(self.file.read_text(encoding="utf-8"))
        if state["identity"] != self.identity:
            raise ValueError(f"{self.file} belongs to another run; delete it or use another folder")
        return state["known"]


def _is_norm(name: str, linears: dict[str, Any]) -> bool:
    return not any(name.startswith(f"{path}.") for path in linears)


def _name(made: list[Group], window: list[int]) -> str:
    return " ".join("-".join(map(str, members)) for members in [*(group["members"] for group in made), window])
