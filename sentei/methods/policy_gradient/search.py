"""The search: runs the levels one after another, judges the hard mask on held-out text, logs, saves and resumes.

With several processes (`accelerate launch`) each has its own batches and masks; what is averaged are the estimates of
the levels, a handful of numbers. Every process then holds the same scores and the same mask.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast, reduce
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sentei import importance, masks
from sentei.atomic import replacing
from sentei.distill import Likeliest, divergence, likeliest
from sentei.methods import settings
from sentei.methods.policy_gradient.levels import Allocation, Bits, Drops, Level, Slopes, Widths
from sentei.methods.policy_gradient.reward import Batch, Reward, examples
from sentei.methods.structural import Run
from sentei.step_log import StepLog
from sentei.train import Batch as TokenBatch
from sentei.train import mix, processes, weights_digest

if TYPE_CHECKING:
    from sentei.methods.policy_gradient import PolicyGradient

STATE = "search.safetensors"
PATIENCE = 20  # losses in a row that are not finite, until the search gives up
ENOUGH = 4096  # blocks: of a larger text no more are read than the steps need


class Search:
    """One search over the units of a model."""

    def __init__(self, method: PolicyGradient, run: Run):
        self.method, self.run, self.units, self.folder = method, run, run.units, run.workdir
        self.processes = processes()
        self.rank, self.ranks = self.processes.process_index, self.processes.num_processes
        if self.ranks > 1 and len({weight.device for weight in run.model.parameters()}) > 1:
            raise ValueError("a model over several devices is searched by one process; start it without accelerate")
        self.remove = masks.removal_target(run.units, method.sparsity)
        self.reward = None if method.on_text else Reward(method.reward)
        # The batches of the step under way, and what the dense model says of them.
        self.dense: dict[int, tuple[TokenBatch, Likeliest]] = {}
        self._read_data()
        # Minutes of calibration: after what may be refused.
        metrics = {init: self._shared(self._initial_metric(init)) for init in method.inits}
        self.init, self.metric_U = next(iter(metrics.items()))
        self.fill: masks.Fill | None = None
        if method.compensates:
            self.fill = {key: self._shared(fill_W) for key, fill_W in run.fill.items()}
        self.history: list[dict[str, Any]] = []
        self.log = StepLog(None if self.rank else method.log)
        self.held_perplexity: dict[str, float] = {}  # of the mask that was judged last, where text judges
        self.ticked, self.ticks = 0, 1  # what a progress bar has behind it when a level begins, and all there is
        self.numbers: dict[str, Any] = {
            "level": 0, "step": 0, "forwards": 0, "skipped": 0, "ties": 0, "evaluations": 0, "held_forwards": 0,
        }  # fmt: skip
        self.best: dict[str, Tensor] = {"keep": torch.ones(len(self.units), dtype=torch.bool)}
        if len(metrics) > 1 and self.remove > 0:
            self._choose_order(metrics)

    def _choose_order(self, metrics: dict[str, Tensor]) -> None:
        """Of the orders inside a layer the one that the search starts best from; no order is best for every model."""
        losses = {}
        for init, self.metric_U in metrics.items():
            loss = self._held_loss(Allocation(self).hard())
            losses[init] = loss if math.isfinite(loss) else math.inf
        self.init = min(losses, key=lambda init: losses[init])
        self.metric_U = metrics[self.init]
        self._tell(f"order inside a layer: {self.init} (loss {', '.join(f'{k} {v:.3f}' for k, v in losses.items())})")

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
            if len(self.held_rows) < self.ranks:
                raise ValueError(
                    f"reward_data leaves {len(self.held_rows)} held-out rows to {self.ranks} processes, each of which "
                    "needs one; give more rows or a larger eval_samples"
                )
            self.batches: tuple[Tensor, ...] = ()
            return
        run.blocks(max(2, self.ranks) * method.batch_size, method.seq_len)  # refuses too little text
        steps = 1 + method.slope_sweeps + method.coarse_steps + method.steps
        enough = max(ENOUGH, 2 * steps * self.ranks * method.batch_size)
        blocks_NT = run.blocks(None, method.seq_len, most=enough)
        self.batches = blocks_NT[: len(blocks_NT) // method.batch_size * method.batch_size].split(method.batch_size)
        enough = max(ENOUGH, method.eval_samples)
        self.held = run.blocks(None, method.seq_len, "validation", most=enough)[: method.eval_samples]
        if len(self.held) < self.ranks:
            raise ValueError(f"the validation text holds too few blocks of {method.seq_len} tokens; give more text")

    def account(self) -> dict[str, Any]:
        """What the record says of the search."""
        names = (
            "start_loss", "best_loss", "best_step", "start_perplexity", "best_perplexity", "forwards", "evaluations",
            "held_forwards", "skipped", "ties",
        )  # fmt: skip
        found = {name: self.numbers.get(name) for name in names}
        found |= {"init": self.init, "improved": bool(found["best_step"]), "processes": self.ranks}
        return found | {"history": self.history}

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
            if level is bits and not self.numbers["step"]:
                if number and allocation is not None:
                    bits.start_from_allocation()
                self._say_what_is_absorbed(bits)
            self._climb(level, levels, sum(before.steps for before in levels[:number]))
            self.numbers |= {"level": number + 1, "step": 0}
        if not self.numbers["best_step"]:
            self._tell("no mask was better than the start on what is held out: the search gained nothing")
        return self.best["keep"] if method.keep_best or method.finish else levels[-1].hard()

    def _climb(self, level: Level, levels: list[Level], offset: int) -> None:
        total, broken = sum(each.steps for each in levels), 0
        self.ticks = sum(each.steps * each.parts for each in levels)
        self.ticked = sum(each.steps * each.parts for each in levels[: levels.index(level)])
        for step in range(self.numbers["step"], level.steps):
            before = self._state(levels)
            try:
                finite = self._step(level, levels, step, offset, total)
            except (Exception, KeyboardInterrupt):
                # A reward of the user's may raise after hours, or they may stop it: nothing before this step is lost.
                if self._write(before):
                    self._tell(
                        f"stopped in step {offset + step + 1} of {total}, {self.folder} keeps the search: the same "
                        "command goes on from here; with --finish true it cuts the best mask so far"
                    )
                raise
            anywhere = float(self.mean(torch.tensor([finite], dtype=torch.double)))
            broken = 0 if anywhere else broken + len(self.history[-1]["losses"])
            if broken >= PATIENCE:
                self._save(levels)
                raise ValueError(f"{self._not_finite()} {broken} times in a row: {self._advice()}")
            if step + 1 == level.steps or (step + 1) % self.method.save_every == 0:
                self._save(levels)

    def _step(self, level: Level, levels: list[Level], step: int, offset: int, total: int) -> int:
        """One step of a level; returns how many of its losses were finite."""
        numbers, began, turn = self.numbers, time.monotonic(), offset + step
        losses = level.measure(step, turn)
        finite = [loss for loss in losses if math.isfinite(loss)]
        numbers["forwards"] += level.forwards
        numbers["skipped"] += len(losses) - len(finite)
        numbers["ties"] += len(finite) > 1 and len(set(finite)) == 1
        record: dict[str, Any] = {"step": turn + 1, "losses": losses}
        record["loss"] = sum(finite) / len(finite) if finite else math.nan
        record |= level.update(losses, step)
        numbers["step"] = step + 1
        if step + 1 == level.steps or (step + 1) % self.method.eval_every == 0 or level.judges:
            record["held_loss"] = self._evaluate(level.hard(), turn + 1)
            record |= self.held_perplexity
        record["seconds"] = time.monotonic() - began
        record = _without_nan(record)
        self.history.append(record)
        self.log.write(record)
        if turn + 1 in (20, total) and numbers["ties"] > 0.5 * (turn + 1):
            self._tell(
                f"in {numbers['ties']} of {turn + 1} steps all masks had the same reward, which tells nothing: enlarge "
                f"batch_size (now {self.method.batch_size}), or reward something finer"
            )
        self.tick(f"searching: {self._in_words(record)}", (step + 1) * level.parts)
        return len(finite)

    def _in_words(self, record: dict[str, Any]) -> str:
        """Of a step: loss, baseline, parameters kept, best held-out loss, samples skipped."""
        numbers, units = self.numbers, self.units
        name = "divergence" if self.method.reward == "kl" else "loss"
        words = [f"{name} not finite" if record["loss"] is None else f"{name} {record['loss']:.3f}"]
        if record.get("baseline") is not None:
            words.append(f"baseline {record['baseline']:.3f}")
        words.append(f"best held-out {numbers['best_loss']:.3f}")
        kept = record.get("kept", 1 - self.remove / units.total) * units.total + units.layer_parameters - units.total
        words.append(f"keeps {kept / 1e6:,.4g} M of {units.layer_parameters / 1e6:,.4g} M parameters")
        if numbers["skipped"]:
            words.append(f"{numbers['skipped']} losses skipped")
        return ", ".join(words)

    def tick(self, what: str, part: int) -> None:
        """Of the level under way so many parts are done."""
        self.run.tick(what, self.ticked + part, self.ticks)

    def _tell(self, what: str) -> None:
        if self.run.report is not None and not self.rank:
            self.run.report({"message": what})

    def _say_what_is_absorbed(self, bits: Bits) -> None:
        count = int((bits.s == 0).sum())
        if count and not self.method.score_floor:
            self._tell(
                f"{count:,} of {len(bits.s):,} probabilities start at 0 and cannot rise; with score_floor, for example "
                "0.01, they can"
            )

    def _not_finite(self) -> str:
        return "the loss was not finite" if self.reward is None else f"reward {self.reward.name} was not finite"

    def _advice(self) -> str:
        return "try --dtype float32" if self.reward is None else "let it return a number for every model"

    # --- what is measured --------------------------------------------------------------------------------------------

    def loss(self, keep_U: Tensor, step: int) -> float:
        """The loss of this process's batch of a step under a mask."""
        if self.reward is not None:
            return self._reward_loss(keep_U, self._of_step(self.rows or self.batches, step))
        with masks.sliced(self.run.model, self.units, keep_U, self.fill):
            if self.method.reward == "kl":
                return float(divergence(self.run.model, *self.dense[step])["kl"])
            return float(self.run.loss(self.run.model, self.batch(step), step))

    def ask_dense(self, *steps: int) -> None:
        """Let the dense model say its word on the batches of these steps, before a level masks anything on them."""
        if self.method.reward == "kl":
            self.dense = {step: self._asked(self.batch(step), step) for step in {*steps}}
            self.numbers["forwards"] += len(self.dense)

    @cached_property
    def _held_batches(self) -> list[tuple[TokenBatch, Likeliest]]:
        """This process's share of the held-out text, and what the dense model says of it."""
        blocks = self.held[self.rank :: self.ranks].split(self.method.batch_size)
        return [self._asked(ids_BT, number) for number, ids_BT in enumerate(blocks)]

    def _asked(self, ids_BT: Tensor, seed: int) -> tuple[TokenBatch, Likeliest]:
        batch = self.run.batch(ids_BT, seed)
        return batch, likeliest(self.run.model, batch)

    def from_layer(self, layer: int, inputs: list[Tensor]) -> AbstractContextManager[None]:
        """Forwards inside start at a layer, if `inputs` (`masks.layer_inputs`) can stand for the ones below.

        A reward may run the model as often as it likes; the language-model loss runs it once, on its batch.
        """
        if self.reward is None and len(inputs) == self.units.num_layers:
            return masks.starting_at(self.run.model, layer, inputs[layer])
        return nullcontext()

    def cost_from(self, layer: int) -> float:
        """Forwards of the whole model that one inside `from_layer` costs."""
        return 1 - layer / self.units.num_layers if self.reward is None else 1.0

    def batch(self, step: int) -> Tensor:
        """[B, T] this process's text of a step."""
        return self._of_step(self.batches, step)

    def _of_step(self, batches: Any, step: int) -> Any:
        """This process's batch of a step; of step -1 - n one that step n does not see, if there are two."""
        place = self._place(step, len(batches))
        if step < 0 and place == self._place(-1 - step, len(batches)):
            place = self._place(step, len(batches), after=1)
        return batches[place]

    def _place(self, step: int, count: int, after: int = 0) -> int:
        """Which of `count` batches this process takes in a step, or the one `after` it in the same permutation."""
        turn = step * self.ranks + self.rank
        generator = torch.Generator().manual_seed(mix(self.method.seed, turn // count))
        return int(torch.randperm(count, generator=generator)[(turn + after) % count])

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
        loss = self._held_loss(keep_U)
        self.numbers["evaluations"] += 1
        perplexity = self.held_perplexity.get("held_perplexity")
        if "best_loss" not in self.numbers:
            self.numbers["start_perplexity"] = perplexity
            if not math.isfinite(loss):
                raise ValueError(f"{self._not_finite()} for the start, on what is held out: {self._advice()}")
            self.numbers["best_loss"] = math.inf
        if loss < self.numbers["best_loss"]:
            self.numbers |= {"best_loss": loss, "best_step": step, "best_perplexity": perplexity}
            self.best["keep"] = keep_U
        return loss

    def _held_loss(self, keep_U: Tensor) -> float:
        """Of the held-out text or rows: the mean over processes, each of which takes its share."""
        held = self.held_rows if self.method.reward_data is not None else self.held
        self.numbers["held_forwards"] += math.ceil(len(held) / self.method.batch_size)
        mine, sums = held[self.rank :: self.ranks], torch.zeros(2, dtype=torch.double)  # what is lowered; the loss
        if self.reward is not None:
            size = self.method.batch_size
            for start in range(0, len(mine), size):
                batch = mine[start : start + size]
                sums[0] += self._reward_loss(keep_U, batch) * len(batch)
        elif self.method.reward == "kl":
            batches = self._held_batches
            with masks.sliced(self.run.model, self.units, keep_U, self.fill):
                for batch, dense in batches:
                    found = divergence(self.run.model, batch, dense)
                    sums += torch.stack([found["kl"], found["ce"]]).double().cpu() * len(batch["input_ids"])
        else:
            with masks.sliced(self.run.model, self.units, keep_U, self.fill):
                sums += self.run.mean_loss(self.held[self.rank :: self.ranks]) * len(mine)
        lowered, loss = self.mean(sums / len(mine)).tolist()
        self.held_perplexity = {} if self.reward else {"held_perplexity": math.exp(min(loss, 50))}
        return lowered

    def _initial_metric(self, init: str) -> Tensor:
        """[U] float64, higher is better: the order inside a layer, and the start of s."""
        method, model, units = self.method, self.run.model, self.units
        if init == "random":
            return torch.randn(len(units), generator=torch.Generator().manual_seed(method.seed)).double()
        if init == "magnitude":
            return importance.magnitude(model, units)
        calibration = self.run.calibration
        if init == "wanda":
            return importance.wanda(model, units, calibration, self.remove / units.total, tick=self.run.tick)
        if init == "flap":
            return importance.flap(model, units, self.run.moments)
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

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a state belongs to."""
        rows = json.dumps([self.rows, self.held_rows], sort_keys=True)
        identity = {
            "fields": settings(self.method),
            "text": self.run.text.sha256,
            "reward_rows": hashlib.sha256(rows.encode()).hexdigest(),
            "weights": weights_digest(self.run.model),
            "units": len(self.units),
            "parameters": self.units.layer_parameters,
            "processes": self.ranks,
        }
        return json.loads(json.dumps(identity))

    def _state(self, levels: list[Level]) -> dict[str, Any]:
        """A copy of all that a search goes on from. Of the history only its length: it grows at its end alone."""
        if self.folder is None or self.rank:
            return {}
        tensors = {f"{i}.{name}": x.clone() for i, level in enumerate(levels) for name, x in level.tensors().items()}
        tensors["best"] = self.best["keep"].clone()
        return {"tensors": tensors, "numbers": dict(self.numbers), "history": len(self.history)}

    def _save(self, levels: list[Level]) -> None:
        self._write(self._state(levels))

    def _write(self, state: dict[str, Any]) -> bool:
        """One file, written beside the old one and moved over it: a kill at any moment leaves a whole state."""
        if self.folder is None or self.rank:
            return False
        account = {"numbers": state["numbers"], "history": self.history[: state["history"]]}
        text = json.dumps({"identity": self._identity} | account)
        tensors = {name: x.contiguous() for name, x in state["tensors"].items()}
        with replacing(self.folder / STATE) as part:
            save_file(tensors, part, metadata={"state": text})
        return True

    def _resume(self, levels: list[Level]) -> None:
        file = None if self.folder is None else self.folder / STATE
        if file is None or not file.exists():
            if self.method.finish:
                raise ValueError("finish: there is no state of an interrupted search to finish; leave it out")
            return
        with safe_open(file, "pt") as opened:
            state = json.loads(opened.metadata()["state"])
        ours, theirs = self._identity, state["identity"]
        if theirs != ours:
            differs = [key for key in ours["fields"] if theirs["fields"].get(key) != ours["fields"][key]]
            differs += [key for key in ours if key != "fields" and theirs.get(key) != ours[key]]
            raise ValueError(
                f"{file} belongs to another run ({', '.join(differs).replace('_', ' ')} differs); "
                "delete it to start afresh"
            )
        tensors = load_file(file)
        self.best["keep"] = tensors["best"]
        self.numbers, self.history = state["numbers"], state["history"]
        for i, level in enumerate(levels):
            for name, x in level.tensors().items():
                x.copy_(tensors[f"{i}.{name}"])


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN."""

    def finite(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return {
        name: [finite(each) for each in value] if isinstance(value, list) else finite(value)
        for name, value in record.items()
    }
