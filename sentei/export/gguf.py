"""GGUF: one file for llama.cpp.

Where all layers are alike it is one of the architectures `llama` (Llama, Mistral, Qwen2) and `qwen3`; where they differ
in width, `deci`, which has head counts and feed-forward widths by layer and is a Llama otherwise. For `llama` and
`deci` llama.cpp turns neighbouring coordinates of queries and keys where transformers turns halves, so that their rows
change places here. A file cannot let layers share weights: a folded model is written unfolded.

The file is read back and compared to the bit. With llama.cpp at hand (pip install 'sentei[gguf]') it is also run in a
fresh process, and its log-probabilities after a prompt are compared with those of the same rounded weights here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sentei import checkpoint, folding, structure
from sentei.atomic import can_write, replacing
from sentei.checkpoint import splitting
from sentei.structure import LayerSize

LLAMA_LIKE = ("llama", "mistral", "qwen2")
# How far llama.cpp's log-probabilities of likely tokens may be from those of the same rounded weights: it rounds what
# goes into a matrix too. Twice and more of what SmolLM2-135M shows: 0.0002, 0.006, 0.04, 0.19 and 0.20.
TYPES = {"f32": 1e-3, "f16": 0.03, "bf16": 0.15, "q8_0": 0.5, "q4_0": 0.5}
PROMPT = "The gardener cuts the branches that bear no fruit, and in 1998 the tree"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def write(
    folder: str | Path, out: str | Path, *, outtype: str = "f16", force: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a checkpoint as a .gguf file.

    Args:
        folder: a checkpoint that `sentei.load` takes.
        out: the file.
        outtype: of matrices, one of TYPES. Vectors are float32; matrices whose rows are no multiple of a quantised
            type's block of 32 are float16.
        trust_remote_code: run the Python code that a foreign checkpoint brings along.
    Returns:
        "file", "bytes", "architecture", "outtype", "notes" (what the user should know), "rounding": by how much at most
        `outtype` changes the log-probabilities of the 50 likeliest tokens, and "difference": the largest between
        llama.cpp and transformers with the same rounded weights, None without llama.cpp.
    Raises:
        ValueError: llama.cpp has no such architecture, tokenizer or type (and what to do instead); the file was there
            already, or did not pass its check. Nothing is written then.
    """
    out = Path(out).absolute()
    if outtype not in TYPES:
        raise ValueError(f"outtype {outtype!r} is not known; use {', '.join(TYPES)}")
    if out.suffix != ".gguf" or out.is_dir():
        raise ValueError(f"{out} is a file's name for --to gguf: give one that ends in .gguf")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; choose another file, or pass --force (force=True) to replace it")
    if not can_write(out):
        raise ValueError(f"{out} cannot be written: no right to write there")
    if (Path(folder) / "sentei_adapter.json").is_file():
        raise ValueError(f"{folder} holds adapters, which a .gguf file of the model would leave out; export their base")
    # In float32: what the check compares with.
    model, tokenizer = checkpoint.load(folder, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    notes = []
    if folding.is_folded(model):
        shared = structure.total_parameters(model)
        folding.unfold(model)
        notes.append(
            "a .gguf file cannot share weights between layers: written unfolded, "
            f"{structure.total_parameters(model):,} parameters in place of {shared:,}"
        )
    architecture = architecture_of(model)
    words = vocabulary(tokenizer, model.config.vocab_size)
    if words["special"]["eos"] is None:  # llama.cpp would stop at a token of its own choice
        ends = getattr(model.generation_config, "eos_token_id", None)
        words["special"]["eos"] = ends[0] if isinstance(ends, list) else ends
    if isinstance(tokenizer.chat_template, dict):
        notes.append("of several chat templates a .gguf file holds one: the default, if there is one")
    if getattr(model.config, "sliding_window", None):
        notes.append(f"llama.cpp attends to all tokens, the model to the last {model.config.sliding_window:,}")
    ids = tokenizer(PROMPT)["input_ids"]
    exact_V = _logprobs(model, ids)
    with replacing(out) as part:
        _round(model, outtype)
        wide = _write(part, model, architecture, words, outtype, name=Path(folder).name)
        rounded_V = _logprobs(model, ids)
        rounding = float((rounded_V - exact_V)[exact_V.topk(min(50, len(exact_V))).indices].abs().max())
        difference = _check_run(part, ids, rounded_V, TYPES[outtype])
    if wide:
        notes.append(
            f"{wide} matrices are f16: their rows are no multiple of 32; compress with --round-to 32 to have them "
            f"{outtype}"
        )
    return {
        "file": str(out), "bytes": out.stat().st_size, "architecture": architecture, "outtype": outtype,
        "notes": notes, "difference": difference, "rounding": rounding,
    }  # fmt: skip


def architecture_of(model: nn.Module) -> str:
    """llama.cpp's architecture that holds this model: llama, qwen3 or deci.

    Raises:
        ValueError: none does, and what to do.
    """
    family, sizes = structure.family_name(model), structure.sizes(model)
    if family not in (*LLAMA_LIKE, "qwen3"):
        raise ValueError(
            f"{family} is not written as GGUF here (known: {', '.join(LLAMA_LIKE)}, qwen3); a folder in a plain form "
            "(--shape uniform or padded) can be converted by llama.cpp's own script"
        )
    if not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(f"{type(model).__name__} is no causal language model; a .gguf file here holds no other head")
    if model.config.hidden_act != "silu":
        raise ValueError(f"llama.cpp computes silu in these layers, the model {model.config.hidden_act}")
    if not any(size.num_heads for size in sizes):
        raise ValueError("a model without any attention has no place in llama.cpp")
    if any(size.qk_pairs for size in sizes):
        raise ValueError("heads that were cut inside have no place in GGUF; prune with units groups+channels")
    widths = {(size.num_heads, size.num_kv_heads, size.intermediate_size) for size in sizes}
    alike = len(widths) == 1 and all(next(iter(widths)))
    if family == "qwen3":
        if not alike or any(size.attention_bias or size.mlp_bias for size in sizes):
            raise ValueError(
                "llama.cpp's qwen3 has one width for all layers and no biases: compress with --shape uniform or "
                "padded, and compensate=none"
            )
        if _rope_factors(model) is not None:
            raise ValueError("the model's rotary scaling has no place in llama.cpp's qwen3")
        return "qwen3"
    return "llama" if alike else "deci"


# --- the tokenizer ------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """Tokens, their types, merges, the way of splitting text, and special tokens, as GGUF has them.

    Raises:
        ValueError: not a byte-level BPE tokenizer that llama.cpp has a name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table: dict[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    )
    kind, normalizer = table["model"]["type"], (table.get("normalizer") or {}).get("type")
    pre = splitting.name_of(tokenizer)
    if kind != "BPE" or table["model"].get("byte_fallback") or normalizer not in (None, "NFC") or pre is None:
        raise ValueError(
            f"the tokenizer ({kind}) is not one that sentei can write as GGUF: byte-level BPE, split as gpt-2, smollm, "
            "llama-bpe or qwen2 do. llama.cpp's own conversion script knows more, from a folder in a plain form"
        )
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= size:
        raise ValueError(f"the tokenizer has tokens up to {last:,}, the model {size:,} of them: are they of one model?")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [_UNUSED] * size
    for token, number in table["model"]["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for added in table["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["model"]["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    begun, templates = tokenizer("a")["input_ids"], tokenizer.chat_template
    return {
        "tokens": tokens, "types": types, "merges": merges, "pre": pre, "special": special,
        "add_bos": special["bos"] is not None and len(begun) > 1 and begun[0] == special["bos"],
        "chat_template": templates.get("default") if isinstance(templates, dict) else templates,
    }  # fmt: skip


# --- the file -----------------------------------------------------------------------------------------------------


def _write(part: Path, model: Any, architecture: str, words: dict[str, Any], outtype: str, name: str) -> int:
    """How many matrices could not be of `outtype`."""
    import gguf

    config, sizes = model.config, _held(model, architecture)
    head_dim = max(size.head_dim for size in sizes)
    writer = gguf.GGUFWriter(part, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes))
    by_layer = {
        writer.add_head_count: [size.num_heads for size in sizes],
        writer.add_head_count_kv: [size.num_kv_heads for size in sizes],
        writer.add_feed_forward_length: [size.intermediate_size for size in sizes],
    }
    for add, values in by_layer.items():
        add(values if architecture == "deci" else values[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["types"])
    writer.add_token_merges(words["merges"])
    for which, number in words["special"].items():
        if number is not None:
            getattr(writer, f"add_{which}_token_id")(number)
    writer.add_add_bos_token(words["add_bos"])
    if words["chat_template"]:
        writer.add_chat_template(words["chat_template"])

    written: dict[str, str] = {}
    wide = 0
    for title, tensor in tensors(model, architecture):
        kind = _type(tensor, outtype)
        wide += tensor.ndim > 1 and kind.name != outtype.upper()
        array = gguf.quantize(tensor.detach().float().numpy(), kind)
        written[title] = hashlib.sha256(array.tobytes()).hexdigest()
        writer.add_tensor(title, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {str(t.name): hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(part).tensors}
    if found != written:
        raise ValueError(f"{part.name} was read back with other tensors than were written; is the disk sound?")
    return wide


def _type(tensor: Tensor, outtype: str) -> Any:
    """What a tensor is in the file, as a GGMLQuantizationType."""
    import gguf

    kind = gguf.GGMLQuantizationType[outtype.upper() if tensor.ndim > 1 else "F32"]
    fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else gguf.GGMLQuantizationType.F16


def _round(model: nn.Module, outtype: str) -> None:
    """Give the matrices the values that the file will hold; their rows are rounded in blocks, whatever their order."""
    import gguf

    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.numel():
            kind = _type(parameter, outtype)
            array = gguf.quantize(parameter.detach().numpy(), kind)
            parameter.data.copy_(torch.from_numpy(gguf.dequantize(array, kind)))


def _held(model: nn.Module, architecture: str) -> list[LayerSize]:
    """What each layer has in the file: `deci` needs a feed-forward in all layers and an attention in the first.

    Zeros stand for what is gone; biases that removed heads or channels left need such a place too.
    """
    found, sizes = [], structure.sizes(model)
    head_dim = max(size.head_dim for size in sizes)
    for number, size in enumerate(sizes):
        if architecture == "deci":
            if not size.num_heads and (number == 0 or size.attention_bias):
                size = replace(size, num_heads=1, num_kv_heads=1, head_dim=head_dim)
            size = replace(size, intermediate_size=size.intermediate_size or 32)
        found.append(size)
    return found


def tensors(model: Any, architecture: str) -> list[tuple[str, Tensor]]:
    """(name in the file, tensor) of everything, in order; matrices as [outputs, inputs]."""
    row, hidden, held = structure.family(model), model.config.hidden_size, _held(model, architecture)
    head_dim = max(size.head_dim for size in held)
    base: Any = structure.base_model(model)
    found: list[tuple[str, Tensor]] = [("token_embd.weight", base.embed_tokens.weight)]
    if (factors := _rope_factors(model)) is not None:
        found.append(("rope_freqs.weight", factors))
    for number, (layer, size) in enumerate(zip(structure.layers(model), held, strict=True)):
        shapes = {
            "attn_q": (row.query, size.num_heads * head_dim, hidden),
            "attn_k": (row.key, size.num_kv_heads * head_dim, hidden),
            "attn_v": (row.value, size.num_kv_heads * head_dim, hidden),
            "attn_output": (row.output, hidden, size.num_heads * head_dim),
            "ffn_gate": (row.up[0], size.intermediate_size, hidden),
            "ffn_up": (row.up[1], size.intermediate_size, hidden),
            "ffn_down": (row.down, hidden, size.intermediate_size),
        }
        norms = {"attn_norm": row.attention_norms[0], "ffn_norm": row.mlp_norms[0]}
        if architecture == "qwen3":
            norms |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        for title, path in norms.items():
            if size.num_heads or title == "ffn_norm":
                weight = getattr(structure.part(layer, path), "weight", None)  # of a norm that is gone: any will do
                found.append((f"blk.{number}.{title}.weight", torch.ones(hidden) if weight is None else weight))
        for title, (path, outputs, inputs) in shapes.items():
            if not outputs * inputs:
                continue
            linear = structure.part(layer, path)
            weight = getattr(linear, "weight", None)
            bias = getattr(linear, "bias", None)
            weight = torch.zeros(outputs, inputs) if weight is None or not weight.numel() else weight
            if bias is not None and len(bias) != outputs:  # of a linear without outputs
                bias = torch.zeros(outputs)
            if architecture != "qwen3" and title in ("attn_q", "attn_k"):
                weight = interleaved(weight, head_dim)
                bias = None if bias is None else interleaved(bias, head_dim)
            found.append((f"blk.{number}.{title}.weight", weight))
            if bias is not None:
                found.append((f"blk.{number}.{title}.bias", bias))
    found.append(("output_norm.weight", base.norm.weight))
    if not model.config.tie_word_embeddings:
        found.append(("output.weight", model.lm_head.weight))
    return found


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from halves (i, i + D/2) to neighbours (2i, 2i + 1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _rope_factors(model: Any) -> Tensor | None:
    """[D / 2] what plain rotary frequencies are divided by; None where they are plain.

    Raises:
        ValueError: a scaling that depends on the length of the text, or scales attention.
    """
    rope = model.config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rotary scaling {kind!r} is not written as GGUF here; llama.cpp's own script may know it")
    base: Any = structure.base_model(model)
    turning: Tensor = base.rotary_emb.inv_freq.double()
    plain = float(rope["rope_theta"]) ** (-torch.arange(len(turning), dtype=torch.double) / len(turning))
    factors = plain / turning
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors.float()


# --- the check ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logprobs(model: Any, ids: list[int]) -> Tensor:
    """[V], of the token after `ids`."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def _check_run(file: Path, ids: list[int], expected_V: Tensor, tolerance: float) -> float | None:
    """Largest difference of log-probabilities, llama.cpp against the same weights here; None without llama.cpp.

    The prompt goes in as text: its tokenizer is part of what is checked.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        command = [
            sys.executable,
            str(Path(__file__).with_name("llama_cpp.py")),
            str(file),
            PROMPT,
            str(ids[-1]),
            str(answer),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        except subprocess.TimeoutExpired:
            raise ValueError("llama.cpp did not answer in half an hour; the file is not kept") from None
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        found = json.loads(answer.read_text()) if answer.is_file() else {"error": last}
    if "error" in found:
        raise ValueError(f"llama.cpp does not run the file, which is not kept: {found['error']}")
    if found["prompt_tokens"] != len(ids):
        raise ValueError(
            f"llama.cpp makes {found['prompt_tokens']} tokens of a prompt that the tokenizer makes {len(ids)} of; the "
            "file is not kept"
        )
    difference = max(abs(value - float(expected_V[int(number)])) for number, value in found["logprobs"].items())
    if not difference <= tolerance:
        raise ValueError(
            f"llama.cpp's log-probabilities are up to {difference:.3g} from the model's ({tolerance:g} allowed); the "
            "file is not kept. Please report this, with the model's config.json"
        )
    return difference
