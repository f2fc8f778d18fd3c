"""Load a checkpoint as a stranger would, without sentei, and write down what it computes.

    python reload.py FOLDER OUT.safetensors TEXT

OUT holds `output`: the first output of the model, float32, on fixed token ids; `tokens`: the ids of TEXT.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def prompt_ids(vocab_size, length):
    """Fixed token ids spread over the vocabulary, [1, length]."""
    return (torch.arange(length) * 7919 + 3).remainder(vocab_size)[None]


def main(folder, out, text):
    config = json.loads((Path(folder) / "config.json").read_text())
    task = config["architectures"][0].partition("For")[2]
    auto_class = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    trust = "auto_map" in config
    model, report = auto_class.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust, use_safetensors=True, output_loading_info=True
    )
    wrong = (
        sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]) + sorted(map(str, report["mismatched_keys"]))
    )
    if wrong:
        raise SystemExit(f"{len(wrong)} tensors do not match the architecture, {wrong[0]} first")
    length = min(24, model.config.max_position_embeddings - 4)
    with torch.no_grad():
        output = model.eval()(input_ids=prompt_ids(model.config.vocab_size, length))[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    tokens = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    save_file({"output": output.contiguous(), "tokens": tokens}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
