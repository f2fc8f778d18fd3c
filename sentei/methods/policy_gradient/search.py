"""The search: runs the levels one after another, judges the hard mask on held-out text, logs, saves and resumes.

With several processes (`accelerate launch`) each has its own batches and masks; what is averaged are the estimates of
the levels, a handful of numbers. Every process then holds the same scores and the same mask.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast, reduce
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sentei import importance, masks
from sentei.methods import settings
from sentei.methods.policy_gradient.levels import Allocation, Bits, Drops, Level, Slopes, Widths
from sentei.methods.policy_gradient.reward import Batch, Reward, examples
from sentei.methods.structural import Run
from sentei.step_log import StepLog
from sentei.train import mix, processes

if TYPE_CHECKING:
    from sentei.methods.policy_gradient import PolicyGradient

STATE = "search.safetensors"


class Search:
    """One search over the units of a model."""

    def __init__(self, method: PolicyGradient, run: Run):
        self.method, self.run, self.units, self.folder = method, run, run.units, run.workdir
        self.processes = processes()
        self.rank, self.ranks = self.processes.process_index, self.processes.num_processes
        self.remove = masks.removal_target(run.units, method.sparsity)
        self.reward = None if method.reward == "lm_loss" else Reward(method.reward)
        self._read_data()
        self.metric_U = self._shared(self._initial_metric())  # minutes of calibration: after what may be refused
        self.fill: masks.Fill | None = None
        if method.resolved_compensate != "none":
            self.fill = {key: self._shared(fill_W) for key, fill_W in run.fill.items()}
        self.history: list[dict[str, Any]] = []
        self.log = StepLog(None if self.rank else method.log)
        self.numbers: dict[str, Any] = {"level": 0, "step": 0, "forwards": 0, "skipped": 0, "ties": 0}
        self.best: dict[str, Tensor] = {"keep": torch.ones(len(self.units), dtype=torch.bool)}

    def _read_data(self) -> None:
        method, run = self.method, self.run
        self.rows: list[list[dict[str, Any]]] = []
        self.held_rows: list[dict[str, Any]] = []
        if method.reward_data is not None:
            rows, held = examples(method.reward_data)
            size = method.batch_size
            self.rows = [rows[i : i + size] for i in range(0, len(rows) - len(rows) % size, size)]
            self.held_rows = held[: method.eval_samples]
            if len(self.rows) < self.ranks:
                raise ValueError(
                    f"reward_data has {len(rows)} rows to search on, {self.ranks} processes need a batch of {size} each"
                )
            self.batches: tuple[Tensor, ...] = ()
            return
        run.blocks(max(2, self.ranks) * method.batch_size, method.seq_len)  # refuses too little text
        blocks_NT = run.blocks(None, method.seq_len)
        self.batches = blocks_NT[: len(blocks_NT) // method.batch_size * method.batch_size].split(method.batch_size)
        self.held = run.blocks(None, method.seq_len, "validation")[: method.eval_samples]
        if len(self.held) < self.ranks:
            raise ValueError(f"the validation text holds too few blocks of {method.seq_len} tokens; give more text")

    def account(self) -> dict[str, Any]:
        """What the record says of the search."""
        names = ("start_loss", "best_loss", "best_step", "forwards", "skipped", "ties")
        found = {name: self.numbers.get(name) for name in names}
        return found | {"improved": bool(found["best_step"]), "processes": self.ranks, "history": self.history}

    def best_U(self) -> Tensor:
        """[U] bool: run all levels and return the mask to cut."""
        method = self.method
        levels: list[Level] = []
        allocation = None
        if not method.whole and method.shape != "uniform":  # else all layers are alike: nothing to allocate
            allocation = Allocation(self)
            levels += [Drops(self, allocation), Slopes(self, allocation), Widths(self, allocation)]
        bits = Bits(self, allocation)
        levels = [level for level in (*levels, bits) if level.steps]
        if not levels:
            return bits.hard()
        self._resume(levels)
        if "start_loss" not in self.numbers:
            self.numbers["start_loss"] = self._evaluate(levels[0].hard(), 0)
        for number in range(self.numbers["level"], len(levels)):
            if method.finish:
                break
            level = levels[number]
            if number and level is bits and not self.numbers["step"] and allocation is not None:
                bits.start_from_allocation()
            self._climb(level, levels, sum(before.steps for before in levels[:number]))
            self.numbers |= {"level": number + 1, "step": 0}
        return self.best["keep"] if method.keep_best or method.finish else levels[-1].hard()

    def _climb(self, level: Level, levels: list[Level], offset: int) -> None:
        method, numbers, total = self.method, self.numbers, sum(each.steps for each in levels)
        broken = 0
        for step in range(numbers["step"], level.steps):
            began = time.monotonic()
            try:
                losses = level.measure(step, offset + step)
            except Exception:
                self._save(levels)  # a reward of the user's may raise after hours: nothing before this step is lost
                raise
            finite = [loss for loss in losses if math.isfinite(loss)]
            numbers["forwards"] += level.forwards
            numbers["skipped"] += len(losses) - len(finite)
            numbers["ties"] += len(finite) > 1 and len(set(finite)) == 1
            broken = 0 if finite else broken + 1
            if broken == 20:
                raise ValueError("the loss was not finite in 20 steps in a row: try --dtype float32")
            shown = [loss if math.isfinite(loss) else None for loss in losses]  # JSON knows no NaN
            record: dict[str, Any] = {"step": offset + step + 1, "losses": shown}
            record |= level.update(losses, step)
            numbers["step"] = step + 1
            last = step + 1 == level.steps
            if last or (step + 1) % method.eval_every == 0 or level.evaluate_always:
                held_loss = self._evaluate(level.hard(), offset + step + 1)
                record["held_loss"] = held_loss if math.isfinite(held_loss) else None
            record["seconds"] = time.monotonic() - began
            self.history.append(record)
            self.log.write(record)
            if last or (step + 1) % method.save_every == 0:
                self._save(levels)
            message = f"loss {finite[0]:.3f}, best held-out {numbers['best_loss']:.3f}" if finite else "loss not finite"
            self.run.tick(f"searching: {message}", offset + step + 1, total)

    # --- what is measured --------------------------------------------------------------------------------------------

    def loss(self, keep_U: Tensor, step: int) -> float:
        """The loss of this process's batch of a step under a mask."""
        if self.reward is not None:
            return self._reward_loss(keep_U, self._of_step(self.rows or self.batches, step))
        with masks.sliced(self.run.model, self.units, keep_U, self.fill):
            return float(self.run.loss(self.run.model, self.batch(step), step))

    def from_layer(self, layer: int, inputs: list[Tensor]) -> AbstractContextManager[None]:
        """Forwards inside start at a layer, if `inputs` (`masks.layer_inputs`) can stand for the ones below.

        A reward may run the model as often as it likes; the language-model loss runs it once, on its batch.
        """
        if self.reward is None and len(inputs) == self.units.num_layers:
            return masks.starting_at(self.run.model, layer, inputs[layer])
        return nullcontext()

    def batch(self, step: int) -> Tensor:
        """[B, T] this process's text of a step."""
        return self._of_step(self.batches, step)

    def _of_step(self, batches: Any, step: int) -> Any:
        turn = step * self.ranks + self.rank
        generator = torch.Generator().manual_seed(mix(self.method.seed, turn // len(batches)))
        order = torch.randperm(len(batches), generator=generator)
        return batches[int(order[turn % len(batches)])]

    def _reward_loss(self, keep_U: Tensor, batch: Any) -> float:
        assert self.reward is not None
        device = next(self.run.model.parameters()).device
        if isinstance(batch, Tensor):
            shown = Batch(self.run.tokenizer, device, input_ids=batch.to(device))
        else:
            shown = Batch(self.run.tokenizer, device, examples=batch)
        # A reward may generate, token by token with a cache: masks, for slices pay on long inputs only.
        with masks.masked(self.run.model, self.units, keep_U, self.fill):
            return self.reward(self.run.model, shown)

    def _evaluate(self, keep_U: Tensor, step: int) -> float:
        loss = self.mean(torch.tensor([self._held_loss(keep_U)], dtype=torch.double)).item()
        if "best_loss" not in self.numbers:
            if not math.isfinite(loss):
                raise ValueError(
                    "the start's loss on held-out text is not finite; try --dtype float32 or less sparsity"
                )
            self.numbers["best_loss"] = math.inf
        if loss < self.numbers["best_loss"]:
            self.numbers |= {"best_loss": loss, "best_step": step}
            self.best["keep"] = keep_U
        return loss

    def _held_loss(self, keep_U: Tensor) -> float:
        """Of this process's share of the held-out text or rows."""
        if self.reward is not None:
            held = self.held_rows or self.held
            return self._reward_loss(keep_U, held[self.rank :: self.ranks] if self.held_rows else held)
        with masks.sliced(self.run.model, self.units, keep_U, self.fill):
            return self.run.mean_loss(self.held[self.rank :: self.ranks])

    def _initial_metric(self) -> Tensor:
        """[U] float64, higher is better: the order inside a layer, and the start of s."""
        method, model, units = self.method, self.run.model, self.units
        init = method.resolved_init
        if init == "random":
            return torch.randn(len(units), generator=torch.Generator().manual_seed(method.seed)).double()
        if init == "magnitude":
            return importance.magnitude(model, units)
        calibration = self.run.calibration
        if init == "wanda":
            return importance.wanda(model, units, calibration, self.remove / units.total, tick=self.run.tick)
        if init == "flap":
            return importance.flap(model, units, calibration)
        if init == "taylor":
            with torch.inference_mode(False), torch.enable_grad():
                return importance.taylor(model, units, calibration.clone(), self.run.loss, tick=self.run.tick)
        return importance.block_influence(model, units, calibration)

    # --- several processes -------------------------------------------------------------------------------------------

    def mean(self, x: Tensor) -> Tensor:
        """The mean over processes; the same numbers on each."""
        if self.ranks == 1:
            return x
        return reduce(x.to(self.processes.device), "mean").to(x.device)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    def _shared(self, x: Tensor) -> Tensor:
        """The first process's tensor: a calibration pass need not be equal to the bit on every device."""
        if self.ranks == 1:
            return x
        return broadcast(x.to(self.processes.device)).to(x.device)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    # --- saved state -------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        identity = {
            "fields": settings(self.method),
            "units": len(self.units),
            "parameters": self.units.layer_parameters,
        }
        return json.loads(json.dumps(identity | {"processes": self.ranks}))

    def _save(self, levels: list[Level]) -> None:
        """One file, written beside the old one and moved over it: a kill at any moment leaves a whole state."""
        if self.folder is None or self.rank:
            return
        tensors = {f"{i}.{name}": x for i, level in enumerate(levels) for name, x in level.tensors().items()}
        tensors["best"] = self.best["keep"]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": self._identity(), "numbers": self.numbers, "history": self.history})
        temporary = self.folder / "search.tmp"
        save_file({name: x.clone().contiguous() for name, x in tensors.items()}, temporary, metadata={"state": text})
        temporary.replace(self.folder / STATE)

    def _resume(self, levels: list[Level]) -> None:
        file = None if self.folder is None else self.folder / STATE
        if file is None or not file.exists():
            if self.method.finish:
                raise ValueError("finish: there is no state of an interrupted search to finish; leave it out")
            return
        with safe_open(file, "pt") as opened:
            state = json.loads(opened.metadata()["state"])
        ours, theirs = self._identity(), state["identity"]
        if theirs != ours:
            differs = [key for key in ours["fields"] if theirs["fields"].get(key) != ours["fields"][key]]
            differs += [key for key in ("processes",) if theirs.get(key) != ours[key]]
            raise ValueError(
                f"{file} belongs to another run ({', '.join(differs) or 'another model'} differs); "
                "delete it to start afresh"
            )
        tensors = load_file(file)
        self.best["keep"] = tensors["best"]
        self.numbers, self.history = state["numbers"], state["history"]
        for i, level in enumerate(levels):
            for name, x in level.tensors().items():
                x.copy_(tensors[f"{i}.{name}"])
