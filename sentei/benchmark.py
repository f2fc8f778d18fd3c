"""Is the pruned model really smaller and faster? Parent and child measured against each other in one run.

Each model lives in its own process (`python -m sentei.benchmark`), so its peak memory is its own. The two are driven in
turns, one measurement each, and a worker sleeps while the other works: drift of the machine falls on both, and every
round gives a ratio of two neighbouring measurements. Results are the median of those ratios with their range, next to
the *ideal*: the ratio of the linear weights that one token passes through (LM head included; an embedding is a lookup).

Three things are timed:

=============  ====================================================================================================
prefill        one forward over the prompt with the logits of every position, no cache: scoring or encoding text
first token    the prompt into an empty cache, logits of the last position, arg max: what a user waits for
decode         the tokens after the first, one at a time from the cache: reads every weight for each token
=============  ====================================================================================================

Attention itself (queries x keys, weights x values) grows with the square of the prompt and is not part of the ideal;
`attention_share` says how much of the prefill arithmetic it is.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sentei import checkpoint, structure
from sentei.atomic import can_write, write_text

WEIGHT_SUFFIXES = (".safetensors", ".gguf")
# A measurement shorter than this is repeated inside its round: a timer's noise must not look like the model's.
SHORTEST_SECONDS = 0.2


def run(
    child: str | Path,
    parent: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    batch_size: int = 1,
    rounds: int = 5,
    warmup: int = 1,
    threads: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    json_path: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Time and weigh a checkpoint against its dense parent; both are held in memory at once, in two processes.

    Args:
        child: a saved checkpoint (folder or .gguf file).
        parent: the model it came from: a folder, a .gguf file or a hub id.
        prompt_tokens: tokens of the prompt, each sequence of the batch; random ids, for the content does not matter.
        new_tokens: tokens generated after the first (decoders only).
        rounds: measurements of each quantity; the spread is over these.
        warmup: rounds thrown away before.
        threads: of torch, in each worker; None leaves torch's choice.
        dtype: as in `checkpoint.load`, "auto" or a name such as "float32".
        json_path: where the result is written; None: `bench.json` in the child's folder (nowhere for a file). An older
            result is replaced.
        trust_remote_code: run the Python code that a foreign checkpoint brings along.
        progress: a progress bar on stderr.

    Returns:
        what is written; `sentei.report` describes the fields. `speedup_*` are parent seconds / child seconds, more than
        1 when the child is faster; `speedup_of_ideal` is the prefill speed-up over the ideal one (1 = all of it).

    Raises:
        ValueError: no checkpoint there, numbers out of range, a json_path that cannot be written or is another file,
            or a worker that stopped (with its last error line).
    """
    child, parent = str(child), str(parent)
    if not Path(child).exists():
        raise ValueError(f"no checkpoint at {child}: give a folder that `sentei compress` wrote, or a .gguf file")
    _check_counts(1, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, rounds=rounds)
    _check_counts(0, warmup=warmup)
    if threads is not None:
        _check_counts(1, threads=threads)
    out = Path(json_path) if json_path is not None else Path(child) / "bench.json" if Path(child).is_dir() else None
    if out is not None:
        _check_out(out)
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "threads": threads,
        "dtype": dtype,
        "device": device,
    }
    load_average = psutil.getloadavg()[0]
    paths = {"parent": parent, "child": child}
    with ExitStack() as stack:
        bar = stack.enter_context(_progress_bar(progress))
        workers = {side: stack.enter_context(_Worker(path)) for side, path in paths.items()}
        loading = bar.add_task("loading parent and child", total=2)
        sides = {}
        for side, worker in workers.items():
            sides[side] = worker.ask("load", path=paths[side], trust_remote_code=trust_remote_code, **settings)
            bar.advance(loading)
        timed = ["prefill", "generate"] if all(side["causal"] for side in sides.values()) else ["prefill"]
        measuring = bar.add_task("measuring in turns", total=(warmup + rounds) * len(timed) * 2)
        seconds: dict[str, dict[str, list[float]]] = {"parent": {}, "child": {}}
        for number in range(warmup + rounds):
            for quantity in timed:
                for side, worker in workers.items():
                    answer = worker.ask(quantity)
                    bar.advance(measuring)
                    if number >= warmup:
                        for name, value in answer.items():
                            seconds[side].setdefault(name, []).append(value)
    result = _compare(sides, seconds, settings | {"rounds": rounds, "warmup": warmup})
    result["machine"]["load_average_before"] = round(load_average, 2)
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def _check_out(out: Path) -> None:
    """Minutes of measuring should not end in a file that cannot be written, or on top of one that is something else."""
    if out.is_dir() or not can_write(out):
        raise ValueError(f"cannot write {out}; give another file by --json (json_path)")
    if not out.exists():
        return
    try:
        older = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:
        older = None
    if not isinstance(older, dict) or "speedups" not in older:
        raise ValueError(f"{out} exists and is no benchmark: not replaced; give another file by --json (json_path)")


def _check_counts(smallest: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < smallest:
            raise ValueError(f"{name} must be {smallest} or more, got {value}")


def _progress_bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)


class _Worker:
    """One model in one process, asked over stdin and answering over stdout, a JSON object a line."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> _Worker:
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        # The worker must find this very package, also when it runs from a source tree that is not installed.
        source = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sentei.benchmark"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"PYTHONPATH": source},
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                with suppress(BrokenPipeError):  # a request the worker did not live to read
                    stream.close()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(f"benchmark of {self.path} stopped while it should {command}: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        if code == -signal.SIGKILL:
            return "killed by the system, most likely out of memory; lower batch_size or prompt_tokens"
        return lines[-1].removeprefix("ValueError: ") if lines else f"no message, exit code {code}"


def _compare(sides: dict[str, Any], seconds: dict[str, dict[str, list[float]]], settings: dict) -> dict[str, Any]:
    parent, child = sides["parent"], sides["child"]
    tokens = {"prefill": settings["batch_size"] * settings["prompt_tokens"]}
    tokens["decode"] = settings["batch_size"] * settings["new_tokens"]
    for side, name in ((parent, "parent"), (child, "child")):
        for quantity, values in seconds[name].items():
            if quantity == "first_token":
                side["first_token_seconds"] = _spread(values)
            else:
                side[f"{quantity}_tokens_per_second"] = _spread([tokens[quantity] / value for value in values])
    speedups = {
        quantity: _spread([slow / fast for slow, fast in zip(values, seconds["child"][quantity], strict=True)])
        for quantity, values in seconds["parent"].items()
    }
    touched = {name: side["linear_parameters_per_token"] for name, side in sides.items()}
    ideal = {
        "touched_ratio": touched["child"] / touched["parent"],
        "speedup": touched["parent"] / touched["child"],
        "speedup_with_attention": parent["prefill_operations"] / child["prefill_operations"],
    }
    if parent["causal"] and child["causal"]:
        ideal["speedup_first_token"] = parent["first_token_weights"] / child["first_token_weights"]
    notes = []
    if parent["dtype"] != child["dtype"]:
        notes.append(f"the parent ran in {parent['dtype']}, the child in {child['dtype']}: pass dtype to compare alike")
    medians = {f"speedup_{quantity}": spread["median"] for quantity, spread in speedups.items()}
    return {
        **medians,
        "speedup_of_ideal": medians["speedup_prefill"] / ideal["speedup"],
        "ideal": ideal,
        "speedups": speedups,
        "ratios": {
            "parameters": child["parameters"] / parent["parameters"],
            "layer_parameters": child["layer_parameters"] / parent["layer_parameters"],
            "bytes": child["bytes"] / parent["bytes"] if parent["bytes"] and child["bytes"] else None,
            "peak_memory": child["memory"]["peak_bytes"] / parent["memory"]["peak_bytes"],
            "loaded_memory": _grown(child["memory"], "loaded_bytes") / _grown(parent["memory"], "loaded_bytes"),
        },
        "parent": parent,
        "child": child,
        "settings": settings,
        "machine": _machine(child["threads"], child["device"]),
        "notes": notes,
    }


def _grown(memory: dict[str, int], what: str) -> int:
    return max(1, memory[what] - memory["imports_bytes"])


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def _machine(threads: int, device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # platform.processor() is empty or "x86_64" on Linux
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _weight_bytes(path: str) -> int | None:
    """Bytes of the weights files of a checkpoint on this disk; None if it cannot be found."""
    where = Path(path)
    if where.is_file():
        return where.stat().st_size
    if not where.is_dir():
        from huggingface_hub import snapshot_download

        try:
            where = Path(snapshot_download(path, local_files_only=True))
        except (OSError, ValueError):
            return None
    # .stat() follows the hub cache's links to its blobs
    return sum(file.stat().st_size for file in where.iterdir() if file.suffix in WEIGHT_SUFFIXES) or None


# ---------------------------------------------------------------------------------------------------- in the worker


class _Subject:
    """The model inside a worker and the measurements it can be asked for."""

    def load(
        self,
        path: str,
        prompt_tokens: int,
        new_tokens: int,
        batch_size: int,
        threads: int | None,
        dtype: str,
        device: str | None,
        trust_remote_code: bool = False,
    ) -> dict[str, Any]:
        """Load, weigh after one inference, count the arithmetic; in this order, for counting needs memory too."""
        if threads is not None:
            torch.set_num_threads(threads)
        imports_bytes = psutil.Process().memory_info().rss
        self.model, _ = checkpoint.load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        self.model.eval()
        self.new_tokens = new_tokens
        self.causal = structure.is_causal(self.model)
        self._check_room(path, prompt_tokens + (new_tokens + 1 if self.causal else 0))
        vocabulary = self.model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        prompt_BT = torch.randint(0, vocabulary, (batch_size, prompt_tokens), generator=generator)
        self.prompt_BT = prompt_BT.to(self.model.device)
        loaded_bytes = psutil.Process().memory_info().rss
        self._generate_once() if self.causal else self._forward(self.prompt_BT)
        cuda = self.model.device.type == "cuda"
        memory = {
            "imports_bytes": imports_bytes,
            "loaded_bytes": loaded_bytes,
            "peak_bytes": _peak_bytes(),
            "cuda_peak_bytes": torch.cuda.max_memory_allocated(self.model.device) if cuda else None,
        }
        weights, attention = self._count(self.prompt_BT)
        tokens = batch_size * prompt_tokens
        once = self._prefill_once() | (self._generate_once() if self.causal else {})  # warm now, so worth timing
        self.repeats = {"prefill": _repeats(once["prefill"])}
        self.repeats["generate"] = _repeats(sum(once.values()) - once["prefill"])
        return {
            "path": path,
            "causal": self.causal,
            "parameters": structure.total_parameters(self.model),
            "layer_parameters": structure.layer_parameters(self.model),
            "bytes": _weight_bytes(path),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
            "linear_parameters_per_token": round(weights / tokens),
            "prefill_operations": 2 * weights + attention,
            "attention_share": attention / (2 * weights + attention),
            "first_token_weights": self._count(self.prompt_BT, logits_to_keep=1)[0] if self.causal else None,
            "memory": memory,
        }

    def prefill(self) -> dict[str, float]:
        """Seconds of one forward over the prompt."""
        return _mean([self._prefill_once() for _ in range(self.repeats["prefill"])])

    def generate(self) -> dict[str, float]:
        """Seconds to the first token, and for all tokens after it."""
        return _mean([self._generate_once() for _ in range(self.repeats["generate"])])

    def _check_room(self, path: str, tokens: int) -> None:
        room = structure.positions(self.model)
        if room is not None and tokens > room:
            raise ValueError(f"{path} has room for {room} positions, {tokens} are asked; lower prompt_tokens")

    def _forward(self, ids_BT: Tensor, **arguments: Any) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=ids_BT, **arguments)

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _prefill_once(self) -> dict[str, float]:
        start = self._clock()
        self._forward(self.prompt_BT, **({"use_cache": False} if self.causal else {}))
        return {"prefill": self._clock() - start}

    def _generate_once(self) -> dict[str, float]:
        """A bare greedy loop: no stopping rules or logits processors, which would weigh on small models."""
        start = self._clock()
        output = self._forward(self.prompt_BT, use_cache=True, logits_to_keep=1)
        next_B1 = output.logits[:, -1:].argmax(-1)
        first = self._clock()
        for _ in range(self.new_tokens):
            output = self._forward(next_B1, use_cache=True, past_key_values=output.past_key_values, logits_to_keep=1)
            next_B1 = output.logits[:, -1:].argmax(-1)
        return {"first_token": first - start, "decode": self._clock() - first}

    def _count(self, ids_BT: Tensor, **arguments: Any) -> tuple[int, int]:
        """Linear weights passed through (once per token each), and operations of attention, in one forward.

        Linears are counted as they run, so blocks that share weights count each time they are used.
        """
        weights = 0

        def passed(linear: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            nonlocal weights
            weights += linear.weight.numel() * (inputs[0].numel() // inputs[0].shape[-1])

        hooks = [m.register_forward_hook(passed) for m in self.model.modules() if isinstance(m, nn.Linear)]
        counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_FUSED_ATTENTION, _attention_operations))
        try:
            with counter:
                self._forward(ids_BT, **arguments)
        finally:
            for hook in hooks:
                hook.remove()
        operations = counter.get_flop_counts()["Global"]
        # attention that is not fused runs as batched products
        attention = (*_FUSED_ATTENTION, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return weights, sum(operations.get(operation, 0) for operation in attention)


# torch counts the GPU kernels of these but not the CPU one, and no grouped queries.
_FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


def _attention_operations(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Both products of attention, the masked half included; shapes are [batch, heads, tokens, head_dim]."""
    return 4 * math.prod(query) * key[-2]


def _repeats(seconds: float) -> int:
    return max(1, min(100, math.ceil(SHORTEST_SECONDS / max(seconds, 1e-6))))


def _mean(measurements: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(m[name] for m in measurements) for name in measurements[0]}


def _peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the size of the process that forked us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _work() -> None:
    """Answer requests until stdin ends. Whatever libraries print goes to stderr: stdout carries answers only."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subject = _Subject()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(subject, request.pop("command"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _work()
