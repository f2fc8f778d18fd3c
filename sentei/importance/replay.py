"""Calibration text through a model: block by block, with a look at what the reading linears take in.

Shape legend: N blocks of text, B batch, T tokens, H hidden width, W inputs of a reading linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sentei import structure
from sentei.structure import Family

Tick = Callable[[str, int, int], None]
"""Called as tick(what, done, of) while a long pass goes on."""


def no_tick(what: str, done: int, of: int) -> None: ...


class _Stop(Exception):
    pass


class Replay:
    """Calibration text moving through the model one block at a time: only one layer's hidden states are held.

    `advance(i)` runs layer i on all batches and keeps the outputs; `watch(i, kind, see)` runs it, shows `see` what the
    reading linear takes in (as [tokens, W]) and forgets the outputs. Both run the layer as it is now, hooks included.
    """

    def __init__(self, model: nn.Module, blocks_NT: Tensor, batch_size: int = 8):
        self.row = structure.family(model)
        self.layers = structure.layers(model)
        self.hidden: list[Tensor] = []
        self._arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with torch.no_grad():
            for ids_BT in blocks_NT.split(batch_size):
                with ExitStack() as stack:
                    whole = (len(ids_BT), 0) not in self._arguments  # masks and positions depend on the shape only
                    for number, layer in enumerate(self.layers):
                        hook = self._capture(number, stop=not whole)
                        stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    with suppress(_Stop):
                        structure.run_layers(model, ids_BT)

    def _capture(self, number: int, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if number == 0:
                self.hidden.append(hidden)
            self._arguments[len(hidden), number] = (args[1:], kwargs)
            if stop:
                raise _Stop

        return hook

    def run(self, number: int, now: dict[str, Tensor] | None = None) -> Iterator[Tensor]:
        """The outputs of a layer as it is now, batch by batch.

        `now`, if given, is told of each batch: kind -> [T, H] the stream that the sub-layer's output is added to.
        """
        with ExitStack() as stack, torch.no_grad():
            if now is not None:
                tell = lambda module, inputs: now.update(channels=inputs[0].flatten(0, 1))  # noqa: E731
                before_mlp = self.layers[number].get_submodule(self.row.mlp_norms[0])
                stack.callback(before_mlp.register_forward_pre_hook(tell).remove)
            for hidden in self.hidden:
                if now is not None:
                    now["heads"] = hidden.flatten(0, 1)
                args, kwargs = self._arguments[len(hidden), number]
                yield self.layers[number](hidden, *args, **kwargs)

    def advance(self, number: int) -> None:
        for i, output in enumerate(self.run(number)):
            self.hidden[i] = output

    def watch(
        self, number: int, see: dict[str, Callable[[Tensor], None]], now: dict[str, Tensor] | None = None
    ) -> None:
        with watching(self.layers[number], self.row, see):
            for _ in self.run(number, now):
                pass

    def streams(self, number: int) -> dict[str, Tensor]:
        """Advances; kind -> [tokens, H] the residual stream that the sub-layer's output was added to."""
        now: dict[str, Tensor] = {}
        found: dict[str, list[Tensor]] = {"heads": [], "channels": []}
        for i, output in enumerate(self.run(number, now)):
            self.hidden[i] = output
            for kind, of in found.items():
                of.append(now[kind])
        return {kind: torch.cat(of) for kind, of in found.items()}


@contextmanager
def watching(layer: nn.Module, row: Family, see: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Shows `see[kind]` the input of that reading linear, flattened to [tokens, W], each time the layer runs."""
    with ExitStack() as stack:
        for kind, look in see.items():
            linear = structure.reader(layer, row, kind)
            if linear is not None:

                def hook(module: nn.Module, inputs: tuple[Tensor], look: Callable[[Tensor], None] = look) -> None:
                    look(inputs[0].detach().flatten(0, -2))

                stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield


class Moments:
    """Running sums of a reading linear's inputs, in float64: mean and variance per column, and the mean of squares."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_W = self.square_W = torch.zeros(())

    def __call__(self, x_TW: Tensor) -> None:
        self.count += len(x_TW)
        parts = x_TW.split(64)  # copies in fp32 stay small: large ones leave holes in the C heap
        self.sum_W = self.sum_W + sum(part_TW.float().sum(0).double() for part_TW in parts).cpu()
        self.square_W = self.square_W + sum(part_TW.float().square().sum(0).double() for part_TW in parts).cpu()

    @property
    def mean_W(self) -> Tensor:
        return self.sum_W / self.count

    @property
    def variance_W(self) -> Tensor:
        return (self.square_W / self.count - self.mean_W.square()).clamp_min(0)


@torch.no_grad()
def moments(
    model: nn.Module, blocks_NT: Tensor, kinds: tuple[str, ...], batch_size: int = 8, tick: Tick = no_tick
) -> dict[Any, Moments]:
    """(layer, kind) -> moments of the reading linears' inputs, from one pass over the text."""
    row = structure.family(model)
    found: dict[Any, Moments] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(structure.layers(model)):
            see = {kind: Moments() for kind in kinds if structure.reader(layer, row, kind) is not None}
            found |= {(number, kind): seen for kind, seen in see.items()}
            stack.enter_context(watching(layer, row, see))  # pyright: ignore[reportArgumentType]
        batches = blocks_NT.split(batch_size)
        for number, ids_BT in enumerate(batches):
            tick("calibrating", number, len(batches))
            structure.run_layers(model, ids_BT)
    return found
