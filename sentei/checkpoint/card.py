"""The model card: README.md of a checkpoint, made from its compression.json alone."""

from __future__ import annotations

import json
from typing import Any

_LLAMA_CPP_NATIVE = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}
_LLAMA_LIKE = {"llama", "mistral", "qwen2"}
_TO_GGUF = "after `sentei export --to gguf`"


def text(account: dict[str, Any], name: str) -> str:
    """The whole README.md, yaml front matter included.

    Args:
        account: what compression.json holds.
        name: title; also the path in the examples.
    """
    parent, result = account["parent"], account["result"]
    sections = [
        _front_matter(account),
        f"# {name}",
        f"`{parent['path']}`, made smaller with sentei {account['sentei']}.",
        "## Before and after",
        _sizes(account),
        "## How to load",
        _how_to_load(result, name),
        "## Loads in",
        _loads_in(result),
        "## Recipe",
        _recipe(account),
        "## Back to the parent",
        f"What was removed is not in this folder. The dense parent is `{parent['path']}`; its weights have sha256 "
        f"`{parent['sha256']}`. `compression.json` holds every setting and the units that were kept.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(account: dict[str, Any]) -> str:
    parent = account["parent"]
    lines = ["---"]
    if parent.get("license"):
        lines.append(f"license: {parent['license']}")
    if _is_hub_id(parent["path"]):
        lines += [f"base_model: {parent['path']}"]
    task = "text-generation" if account["result"]["causal"] else "fill-mask"
    if "ForCausalLM" in account["result"]["architecture"] or "ForMaskedLM" in account["result"]["architecture"]:
        lines.append(f"pipeline_tag: {task}")
    return "\n".join([*lines, "library_name: transformers", "tags:", "- sentei", "- pruning", "- compression", "---"])


def _is_hub_id(path: str) -> bool:
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not path.endswith(".gguf")


def _sizes(account: dict[str, Any]) -> str:
    parent, result = account["parent"], account["result"]
    rows = [
        ("parameters", parent["parameters"], result["parameters"]),
        ("parameters of the layers", parent["layer_parameters"], result["layer_parameters"]),
        ("bytes of weights", parent["bytes"], result["bytes"]),
    ]
    table = ["| | parent | this | ratio |", "|---|---|---|---|"]
    for label, before, after in rows:
        table.append(f"| {label} | {before:,} | {after:,} | {after / before:.3f} |")
    for row in account["evaluation"]:
        before, after = row["before"], row["after"]
        table.append(f"| {row['metric']} | {before:.4g} | {after:.4g} | {after / before:.3f} |")
    note = ""
    if result["shape"] == "padded":
        note = (
            f"\n\nThe layers are filled up with zeros to the widest one; {result['effective_parameters']:,} parameters "
            "are left of the parent. `--shape heterogeneous` writes only those."
        )
    return "\n".join(table) + note


def _how_to_load(result: dict[str, Any], name: str) -> str:
    task = result["architecture"].partition("For")[2]
    auto_class = f"AutoModelFor{task}" if task else "AutoModel"
    if result["shape"] == "sparse":
        return (
            f'```python\nmodel, tokenizer = sentei.load("{name}")\n```\n\nThe weights are in a sparse container, which '
            f"transformers does not read; `sentei export {name} --to dense --out DIR` writes an ordinary checkpoint."
        )
    if result["shape"] not in ("heterogeneous", "folded"):
        return f'```python\nmodel = transformers.{auto_class}.from_pretrained("{name}")\n```'
    load = f'```python\nmodel = transformers.{auto_class}.from_pretrained("{name}", trust_remote_code=True)\n```\n\n'
    if result["shape"] == "folded":
        return (
            f"{load}The code is `modeling_sentei_folded.py` and `modeling_sentei.py` in this folder: layers of "
            "the stock class that share weights, each stored and held in memory once. With `import sentei` before, the "
            "flag is not needed and the files are not run; `sentei unfold` writes independent layers for any other "
            "runtime. A stock class refuses the folder: the shapes of the shared weights do not fit it. Adapters: "
            '`LoraConfig(target_modules="all-linear")` finds each stored weight once, acts in every layer that uses it '
            "and merges exactly; a list of names such as q_proj is refused."
        )
    return (
        f"{load}The code is `modeling_sentei.py` in this folder, which resizes the layers of the stock class. With "
        "`import sentei` before, the flag is not needed and the file is not run."
    )


def _loads_in(result: dict[str, Any]) -> str:
    verified = "yes, reloaded in a fresh process with equal outputs" if result["verified"] else "not verified"
    if result["shape"] == "sparse":
        verified = "yes, read back and compared to the bit" if result["verified"] else "not verified"
        rows = [("sentei", "`sentei.load`", verified), ("others", "after `sentei export --to dense`", "no")]
        head = ["| runtime | how | verified when written |", "|---|---|---|"]
        return "\n".join(head + [f"| {runtime} | {how} | {done} |" for runtime, how, done in rows])
    kind = result["model_type"].removeprefix("sentei_")
    head = ["| runtime | how | verified when written |", "|---|---|---|"]
    if result["shape"] == "folded":
        unfolded = "after `sentei unfold`, which stores shared weights once per layer"
        rows = [
            ("transformers 5.16 to 5.23", "`trust_remote_code=True`, or `import sentei` before", verified),
            ("vLLM", unfolded, "no"),
            ("llama.cpp", f"{_TO_GGUF}, unfolded" if kind.removeprefix("folded_") in _LLAMA_LIKE else unfolded, "no"),
        ]
    elif result["shape"] == "heterogeneous":
        vllm = "`--trust-remote-code`, on its Transformers backend"
        if not all(layer["heads"] for layer in result["layers"]):
            vllm = "no: it needs attention in every layer; write with `--shape padded`"
        llama_cpp = "write with `--shape uniform` or `padded`" if result["causal"] else "not tried"
        if kind in _LLAMA_LIKE:
            llama_cpp = f"{_TO_GGUF}, as its architecture `deci`"
        if any("qk_head_dim" in layer for layer in result["layers"]):
            vllm = "not tried: keys and values of a head differ in width"
            llama_cpp = "no: it needs one head size for all layers; use units groups+channels"
        rows = [
            ("transformers 5.16 to 5.23", "`trust_remote_code=True`, or `import sentei` before", verified),
            ("vLLM", vllm if result["causal"] else "not tried", "no"),
            ("llama.cpp", llama_cpp, "no"),
        ]
    else:
        gguf = "native, after conversion to GGUF by its own script" if kind in _LLAMA_CPP_NATIVE else "not tried"
        if kind in _LLAMA_LIKE | {"qwen3"}:
            gguf = f"native, {_TO_GGUF}"
        rows = [
            ("transformers", "native, no flag", verified),
            ("vLLM", "native" if result["causal"] else "not tried", "no"),
            ("llama.cpp", gguf, "no"),
        ]
    rows += [
        ("ONNX Runtime", "after `sentei export --to onnx`", "no"),
        ("OpenVINO", "after `sentei export --to openvino`", "no"),
    ]
    return "\n".join(head + [f"| {runtime} | {how} | {done} |" for runtime, how, done in rows])


def _recipe(account: dict[str, Any]) -> str:
    steps = []
    for number, stage in enumerate(account["stages"], 1):
        data = stage.get("data") or {}
        calibration = f", data `{data['name']}` (sha256 `{str(data.get('sha256'))[:12]}`)" if data.get("name") else ""
        fields = json.dumps(stage.get("fields") or {}, indent=2, default=str)
        steps.append(
            f"{number}. `{stage.get('method')}`, seed {stage.get('seed')}{calibration}\n\n```json\n{fields}\n```"
        )
    versions = ", ".join(f"{package} {version}" for package, version in account["versions"].items())
    return "\n\n".join([*steps, f"Written with {versions}."])
