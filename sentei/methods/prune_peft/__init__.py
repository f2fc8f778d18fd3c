"""PrunePEFT: find which layers need LoRA or an adapter, by pruning modules while they train. arXiv 2506.07587.

1. Put LoRA on query and value, and a serial bottleneck behind the feed-forward, into every layer     `adapters.units`
2. Fit the search into its share of one training: steps, rounds, slice of the data                    `planning.plan`
3. Warm-up: short runs in which all six criteria vote; each cell (kind x depth block) gets the
   criteria that prune most in it, each criterion the cell it prunes most                      `rounds.assign`
4. Rounds: start again from the pre-trained weights, train briefly, score every living unit,    `rounds.rounds`
   remove the k most prunable, each kind as large a share of its parameters              `assignment.judge`, `remove`
5. At the budget: put back what still fits                                                           `put_back`
6. Train the survivors from scratch on all the data                                                  `_retrain`

The released code's scores are broken in several ways (they mix the units' sizes, let batches cancel, and never reset
their sums), so ours are not its scores: every criterion and every assignment here removes from each cell no more than
its share when the scores are noise. Equation 1 is used on percentiles within a kind, whose weight grows with
prunability; its softmax is left out, which is monotone within a cell and means nothing between cells.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import parse_flag_from_env

from sentei import adapters, structure
from sentei.adapters import Unit
from sentei.data import examples
from sentei.evaluate import scores
from sentei.methods import Progress, option
from sentei.methods.prune_peft import assignment as assigning
from sentei.methods.prune_peft import pages, planning, rounds, tasks
from sentei.methods.prune_peft.criteria import CRITERIA, THRESHOLDS
from sentei.methods.prune_peft.rounds import Search
from sentei.methods.prune_peft.state import State
from sentei.methods.prune_peft.training import Bench
from sentei.train import processes

FALLBACK = "plain_lora.safetensors"  # in the work folder: what is exported too where a search was rejected
ASSIGNMENTS = ("warmup", "paper", "equal", "random", *CRITERIA)


@dataclass(frozen=True)
class PrunePEFT:
    """Search a PEFT configuration for labelled rows, under a budget of trained parameters, and train it."""

    budget: float = option(0.5, "what may stay: parameters, or a share between 0 and 1 of budget_of", "ours")
    budget_of: str = option("supernet", "supernet: all units; base: the model without its head", "ours")
    kinds: tuple[str, ...] = option(("lora", "adapter"), "what is searched: lora, adapter", "2.2")
    lora_targets: tuple[str, ...] = option(("q", "v"), f"linears with LoRA: {', '.join(adapters.ROLES)}", "2.2")
    lora_split: bool = option(False, "each linear a unit of its own, in place of one LoRA unit a layer", "ours")
    lora_r: int | None = option(
        None, "one rank, so that a layer's LoRA stays or goes whole, as in the paper: 32 for encoders, 8 for decoders"
    )
    rank_choices: tuple[int, ...] | None = option(
        None,
        "ranks to choose from: each layer's LoRA goes down from the last to the first, then out; without lora_r "
        "2,4,8,16,32 for encoders, 2,4,8 for decoders",
        "ours",
    )
    lora_alpha: int | None = option(None, "default 32 for encoders, 16 for decoders", "released code")
    adapter_width: int | None = option(None, "bottleneck; default hidden / 8 for encoders, 32 for decoders", "code")
    adapter_init: str = option("zero", f"first values of the bottleneck: {', '.join(adapters.INITS)}", "eq. 4-5; ours")
    dropout: float = option(0.1, "in both kinds", "released code")
    assignment: str = option(
        "warmup", f"who judges where: {', '.join(ASSIGNMENTS)}, or file:x.json", "sec. 3; ours for the others"
    )
    units_per_round: int | None = option(None, "removed per round; default a twelfth of the units", "released code")
    steps_per_round: int | None = option(None, "default: what max_search_ratio allows", "ours")
    search_fraction: float | None = option(None, "rows that rounds train on; default up to a tenth", "low fidelity 1 %")
    max_search_ratio: float = option(0.3, "steps of the search, of those of one training, weighed", "table 4")
    strict_search_ratio: bool = option(False, "refuse a search that would cost more")
    warmup_examples: int = option(100, "rows of a warm-up turn", "released code")
    warmup_turns: int = option(3, "turns", "released code")
    warmup_epochs: int = option(3, "passes over the rows in a turn", "released code")
    warmup_top: float = option(0.25, "share of a kind that each criterion votes against", "ours")
    rank_slope: float = option(4.0, "beta of the rank weight sigmoid(beta (2p - 1))", "eq. 1; ours")
    threshold: float | None = option(None, "of that criterion; default 0.05 or 1e-6, by mode", "ours; released code")
    threshold_mode: str = option("relative", "to the RMS of the matrix's role; or absolute", "ours")
    score_from: float = option(0.5, "scores are of the rest of a round: LoRA's A has no gradient at first", "ours")
    depth_cuts: tuple[float, ...] = option((0.2, 0.5, 0.8), "where depth blocks begin", "released code")
    kind_weights: tuple[float, ...] | None = option(
        None, "how much more of its parameters a kind loses, in their order", "ours"
    )
    count_head: bool = option(False, "the head is part of the budget", "ours")
    task: str | None = option(None, "classification, regression or response; default: by the labels")
    pair_field: str | None = option(None, "second text of a row")
    label_field: str = option("label", "the label, or the response")
    limit: int | None = option(None, "at most so many rows to train on")
    metric: str | None = option(None, f"{', '.join(scores.SCORES)}; default accuracy, spearman or likelihood")
    epochs: float = option(3.0, "passes of the final training", "released code; 20 in the paper")
    batch_size: int = option(16, "rows per optimiser step and micro-batch", "ours")
    accumulate: int = option(1, "micro-batches per optimiser step", "ours")
    seq_len: int = option(128, "tokens of a row at most", "ours")
    lr: float = option(2e-4, "of units and head, AdamW", "released code")
    weight_decay: float = option(0.01, "on matrices", "ours")
    precision: str = option("auto", "fp32, bf16 (autocast) or auto")
    save_every: int = option(50, "steps between checkpoints of the final training")
    max_drop: float | None = option(
        None, "stop when the watched metric falls so far below the first round's; costs a round more", "ours"
    )
    patience: int = option(2, "rounds in a row that must fall so far", "ours")
    strict_budget: bool = option(False, "a search that stopped early has failed (exit code 4)", "ours")
    min_metric: float | None = option(None, "least metric on validation rows to be accepted", "ours")
    compare: bool = option(False, "train LoRA everywhere too, for its metric and its time", "ours")
    max_drop_vs: float | None = option(None, "largest loss against LoRA everywhere to be accepted", "ours")
    seed: int = option(0, "for every random choice")

    structural: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    reads: ClassVar[str] = "examples"
    saves: ClassVar[str] = "adapter"
    fallback: ClassVar[str] = FALLBACK

    def __post_init__(self) -> None:
        _one_of("budget_of", self.budget_of, ("supernet", "base"))
        _one_of("adapter_init", self.adapter_init, adapters.INITS)
        _one_of("threshold_mode", self.threshold_mode, tuple(THRESHOLDS))
        _one_of("task", self.task, (None, *tasks.DEFAULT_METRIC))
        if not self.assignment.startswith("file:"):
            _one_of("assignment", self.assignment, ASSIGNMENTS)
        for name in (
            "budget", "lora_r", "lora_alpha", "adapter_width", "units_per_round", "steps_per_round", "max_search_ratio",
            "warmup_turns", "warmup_epochs", "warmup_top", "rank_slope", "threshold", "epochs", "batch_size",
            "accumulate", "lr", "save_every", "patience", "search_fraction",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if list(self.depth_cuts) != sorted(self.depth_cuts) or len(self.depth_cuts) != 3:
            raise ValueError(f"depth_cuts are three rising numbers between 0 and 1, got {self.depth_cuts}")
        if self.rank_choices is not None and self.lora_r is not None:
            raise ValueError("rank_choices and lora_r exclude each other: the last choice is the highest rank")
        if not 0 <= self.score_from < 1 or not 0 <= self.dropout < 1 or not 0 < self.warmup_top < 1:
            raise ValueError("score_from and dropout are at least 0 and below 1, warmup_top is between 0 and 1")
        if self.search_fraction is not None and self.search_fraction > 1:
            raise ValueError(f"search_fraction is a share of the rows, at most 1; got {self.search_fraction}")
        if self.kind_weights is not None and (len(self.kind_weights) != len(self.kinds) or min(self.kind_weights) <= 0):
            raise ValueError(f"kind_weights needs a number above 0 for each of {', '.join(self.kinds)}")
        if self.max_drop_vs is not None and not self.compare:
            raise ValueError("max_drop_vs compares with LoRA everywhere, which compare=true trains; set both")
        if self.compare and "lora" not in self.kinds:
            raise ValueError("compare trains LoRA everywhere, which is not among kinds; add lora, or leave compare out")

    # --- data and model -----------------------------------------------------------------------------

    def read(self, spec: Any, text_field: str) -> examples.Examples:
        """Rows for the search: task by `task`, texts from `text_field` and `pair_field`, labels from `label_field`."""
        fields = {"text_field": text_field, "pair_field": self.pair_field, "label_field": self.label_field}
        if self.task == "response":
            fields["make"] = tasks.response_row(text_field, self.label_field)
        return examples.load(spec, kind=self.task, limit=self.limit, **fields)

    def forwards(self, rows: examples.Examples, tokenizer: Any, *, teacher: bool) -> float:
        """Forward passes of the search at its dearest and of training, a backward counted as two."""
        batches = math.ceil(len(rows.train) * self.epochs / self.batch_size)
        return 3 * batches * (1 + self.max_search_ratio + self.compare)

    def head(self, rows: examples.Examples) -> dict[str, Any]:
        """What the model is loaded with."""
        if rows.kind == "response":
            return {}
        return {"task": "SequenceClassification", "labels": rows.labels or ["score"]}

    def space(self, model: Any) -> list[Unit]:
        """All units of the supernet."""
        decoder = structure.is_causal(model)
        hidden = model.config.hidden_size
        return adapters.units(
            model,
            kinds=self.kinds,
            targets=self.lora_targets,
            split=self.lora_split,
            rank=self.ranks(model),
            width=self.adapter_width or (32 if decoder else max(1, hidden // 8)),
        )

    def ranks(self, model: Any) -> tuple[int, ...]:
        """Where the slices of a layer's LoRA end."""
        if self.lora_r:
            return (self.lora_r,)
        return self.rank_choices or ((2, 4, 8) if structure.is_causal(model) else (2, 4, 8, 16, 32))

    def alpha_per_rank(self, model: Any) -> float:
        """LoRA's scale, alpha / rank; the same for all rank_choices, of which lora_alpha belongs to the last."""
        usual_rank, usual_alpha = (8, 16) if structure.is_causal(model) else (32, 32)
        if self.lora_r or self.lora_alpha:
            return (self.lora_alpha or usual_alpha) / self.ranks(model)[-1]
        return usual_alpha / usual_rank

    def weights(self, space: Sequence[Unit]) -> dict[str, float]:
        """kind_weights, of the kinds that units have: those of split LoRA too."""
        given = dict(zip(self.kinds, self.kind_weights, strict=True)) if self.kind_weights else {}
        return {unit.kind: given.get(unit.kind.partition("_")[0], 1.0) for unit in space}

    def pages(self, record: dict[str, Any]) -> dict[str, str]:
        """Text files that go beside the adapter."""
        return pages.all_pages(record)

    # --- the method ---------------------------------------------------------------------------------

    def compress(
        self,
        model: Any,
        tokenizer: Any,
        text: examples.Examples,
        *,
        workdir: Path | None = None,
        report: Progress | None = None,
    ) -> dict[str, Any]:
        """Search on `text.train`, train the survivors on all of it, measure on `text.validation`.

        The model keeps the trained units and head; its base weights are those it came with.

        Args:
            workdir: state goes here after each round and during the final training; a run found here is continued.
        Returns:
            what prunepeft.json holds; "adapter" is what is needed to load the units again.
        Raises:
            ValueError: a model without hosts or with PEFT modules, a budget that removes nothing or leaves nothing, too
                few rows, data-parallel wrappers that split gradients, a workdir with another run.
        """
        _refuse_sharding(model)
        say = report or (lambda event: None)
        base_parameters = sum(p.numel() for p in model.parameters())
        space = self.space(model)
        if self.compare and not any(unit.is_lora for unit in space):
            raise ValueError("compare trains LoRA everywhere, and no layer has a host for it; leave compare out")
        base_fingerprint = adapters.fingerprint(model)
        remarks = adapters.remarks(model, space)
        task = tasks.Task(text, tokenizer, model, metric=self.metric, length=self.seq_len)
        bench = Bench(model, task, self, self.alpha_per_rank(model))
        head_parameters = sum(p.numel() for p in bench.head_parameters())
        searched, watched = tasks.watch_split(text.train, seed=self.seed)
        plan = self._plan(space, text, searched, base_parameters - head_parameters, head_parameters)
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
        for note in [*plan.notes, *remarks]:
            say({"message": note})
        if self.strict_search_ratio and plan.ratio > self.max_search_ratio * 1.001:
            raise ValueError(
                f"{plan.notes[-1]}; raise max_search_ratio or units_per_round, or give more rows or epochs"
            )
        self._warn_about_thresholds(task, watched, text.validation)

        state = State.open(workdir, self, space, text.sha256)
        with state.timed("tokenising"):
            task.encode([*text.train, *text.validation])
        labels = len(text.labels) if text.labels else None
        cell_of = assigning.cells(space, len(structure.layers(model)), self.depth_cuts)
        search = Search(self, bench, space, cell_of, labels, plan, state, say)
        rounds.assign(search, searched)
        sliced = examples.stratified(searched, plan.rows, seed=self.seed, labels=labels)
        living = rounds.rounds(search, sliced, watched)
        adapters.unload(model)
        pattern = adapters.pattern(living)
        pattern_check = adapters.check_pattern(pattern, model, living)
        if self.compare:
            self._compare(search, text)
        self._retrain(search, living, text)
        model.eval()

        result = self._record(search, living, text)
        result["notes"] += remarks
        result["adapter"] = {
            "units": [asdict(unit) for unit in living],
            "alpha_per_rank": bench.alpha_per_rank,
            "dropout": self.dropout,
            "fingerprint": base_fingerprint,
            "head": self.head(text),
            "pattern": pattern,
            "pattern_check": pattern_check,
        }
        if result["rejected"] and result["plain_lora"]:
            result["fallback"] = result["adapter"] | {"units": result["plain_lora"]["units"]}
        result["parameters"] |= {"base": base_parameters - head_parameters, "head": head_parameters}
        return result

    def _plan(self, space: list[Unit], text: examples.Examples, searched: list, base: int, head: int) -> planning.Plan:
        budget = planning.budget_parameters(self.budget, self.budget_of, space, base, head if self.count_head else 0)
        batch = self.batch_size * self.accumulate * processes().num_processes
        least = 2 * len(text.labels) if text.labels else 2
        if len(searched) < max(2 * batch, least):
            raise ValueError(
                f"{len(searched)} rows to search on are fewer than 2 batches of {batch} or two of each label; give "
                "more rows, or lower batch_size"
            )
        warmup = self.warmup_turns * math.ceil(self.warmup_examples * self.warmup_epochs / batch)
        plan = planning.plan(
            space,
            budget,
            train_rows=len(text.train),
            search_rows=len(searched),
            steps=max(1, math.ceil(len(text.train) * self.epochs / batch)),
            batch_size=batch,
            warmup_steps=warmup if self.assignment == "warmup" else 0,
            assignment=self.assignment,
            units_per_round=self.units_per_round,
            steps_per_round=self.steps_per_round,
            search_fraction=self.search_fraction,
            max_ratio=self.max_search_ratio,
            least_rows=least,
            patience=None if self.max_drop is None else self.patience,
            weights=self.weights(space),
        )
        if plan.warmup_steps and self.warmup_examples < 2 * self.batch_size:
            raise ValueError(
                f"a warm-up of {self.warmup_examples} rows is fewer than 2 batches of {self.batch_size}; raise "
                "warmup_examples, or lower batch_size"
            )
        if plan.warmup_steps and text.labels and self.warmup_examples < least:
            raise ValueError(f"warmup_examples {self.warmup_examples}: {least} at least, two of each label")
        turn = plan.warmup_steps // self.warmup_turns
        for name, steps in (("steps_per_round", plan.round_steps), ("warmup_epochs", turn)):
            if steps and steps - math.ceil(self.score_from * steps) < 2:
                raise ValueError(f"{steps} steps leave fewer than 2 scored batches; raise {name}, or lower score_from")
        return plan

    def _compare(self, search: Search, text: examples.Examples) -> None:
        """LoRA in every layer, trained as the survivors will be."""
        state, bench = search.state, search.bench
        if "plain_lora" in state.values:
            return
        everywhere = [unit for unit in search.space if unit.is_lora]
        state.values["seconds"]["plain_lora"] = self._train(search, everywhere, text, "plain_lora", "LoRA everywhere")
        state.values["plain_lora"] = {
            "metric": bench.score(text.validation),
            "parameters": sum(unit.parameters for unit in everywhere),
            "units": [asdict(unit) for unit in everywhere],
        }
        state.save_tensors(FALLBACK, adapters.state(bench.model, everywhere))
        state.save()

    def _retrain(self, search: Search, living: Sequence[Unit], text: examples.Examples) -> None:
        """Step 6."""
        search.state.values["seconds"]["retrain"] = self._train(search, living, text, "retrain", "final training")

    def _train(self, search: Search, units: Sequence[Unit], text: examples.Examples, folder: str, what: str) -> float:
        """Units trained from scratch on all the data, the head as it will be saved; seconds of all sittings."""
        bench, where = search.bench, search.state.folder
        bench.put(units, "final")
        seconds = bench.fit(
            text.train, search.plan.steps, seed="final", folder=where / folder if where else None, say=search.tell(what)
        )
        bench.settle_head()
        return seconds

    def _record(self, search: Search, living: list[Unit], text: examples.Examples) -> dict[str, Any]:
        state, plan, bench = search.state, search.plan, search.bench
        values, metric = state.values, bench.task.metric
        with state.timed("measuring"):
            value = bench.score(text.validation) if text.validation else None
        total, kept = (sum(unit.parameters for unit in units) for units in (search.space, living))
        seconds = values["seconds"]
        spent, final = seconds["warmup"] + seconds.get("rounds", 0.0), seconds["retrain"]
        plain, plain_row = seconds.get("plain_lora"), values.get("plain_lora")
        trained = sum(bool(found.get("scores")) or "watched" in found for found in values["rounds"])
        notes = [*plan.notes, *values.get("notes", [])]
        stopped = values["status"] == "stopped_early"
        if stopped:
            notes.append(
                f"the search stopped early, in round {len(values['rounds'])}: the watched {metric} fell by more than "
                f"{self.max_drop:g}, and the budget is not met"
            )
        rejected = []
        if value is not None and self.min_metric is not None and value < self.min_metric:
            rejected.append(f"{metric} {value:.4f} is below min_metric {self.min_metric:g}")
        if value is not None and plain_row and self.max_drop_vs is not None:
            least = plain_row["metric"] - self.max_drop_vs
            if value < least:
                rejected.append(
                    f"{metric} {value:.4f} is more than {self.max_drop_vs:g} below {plain_row['metric']:.4f}"
                )
        return {
            "status": "rejected" if rejected else "stopped_early" if stopped else "accepted",
            "rejected": rejected,
            "stopped_early": stopped,
            "metric": {"name": metric, "value": value, "rows": len(text.validation), "part": "validation"},
            "plain_lora": plain_row,
            "units": [
                {"id": u.id, "kind": u.kind, "layer": u.layer, "rank": u.rank, "parameters": u.parameters}
                for u in search.space
            ],
            "living": [unit.id for unit in living],
            "put_back": values.get("put_back", []),
            "rounds": values["rounds"],
            "assignment": values["assignment"],
            "assigned_by": plan.assignment,
            "votes": values.get("votes"),
            "chance": values.get("chance"),
            "notes": notes,
            "plan": asdict(plan),
            "parameters": {"supernet": total, "budget": plan.budget, "living": kept},
            "search_ratio": {
                "rows": (plan.warmup_steps + trained * plan.round_steps) / plan.steps,
                "seconds": spent / plain if plain else None,
                "seconds_estimated": None if plain else spent / final,
                "with_training": (spent + final) / plain if plain else None,
            },
            "seconds": sum(seconds.values()),
            "phases": dict(seconds),
            "history": [
                {"step": number, "living": len(found["living"]), "watched": found.get("watched")}
                for number, found in enumerate(values["rounds"], 1)
            ],
        }

    def _warn_about_thresholds(self, task: tasks.Task, watched: list, validation: list) -> None:
        if (self.min_metric is not None or self.max_drop_vs is not None) and not validation:
            raise ValueError("min_metric and max_drop_vs need validation rows; give some")
        if self.max_drop is not None:
            if len(watched) < 2:
                raise ValueError("max_drop needs rows to watch, a tenth of the training rows; there are too few")
            if task.kind != "response":
                error = scores.standard_error(task.metric, 0.8, len(watched))
                if self.max_drop < 2 * error:
                    warnings.warn(
                        f"max_drop {self.max_drop:g} is less than 2 standard errors of {task.metric} on {len(watched)} "
                        f"rows (about {2 * error:.3f}): chance may stop the search",
                        stacklevel=3,
                    )


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        words = ", ".join(str(word) for word in known if word is not None)
        raise ValueError(f"{name} is one of {words}; got {value!r}")


def _refuse_sharding(model: Any) -> None:
    sharded = [flag for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if parse_flag_from_env(flag)]
    if type(model).__name__ in ("DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
        sharded.append(type(model).__name__)
    if sharded:
        raise ValueError(f"{sharded[0]}: the search reads whole gradients: use one process or DDP")
