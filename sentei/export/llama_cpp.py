"""A script, for a process of its own: the likeliest tokens after a prompt by llama.cpp.

    python llama_cpp.py FILE.gguf PROMPT TOKEN ANSWER.json

TOKEN, a number, is made the next one; the log-probabilities are those before that. llama.cpp gives none when the next
token ends the text, or is half a character.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(file: str, prompt: str, token: str, answer: str) -> None:
    import xllamacpp  # pyright: ignore[reportMissingImports]

    asked: Any = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = file, 256, 1, False
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    reply = xllamacpp.Server(asked).handle_completions(
        {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 50, "logit_bias": [[int(token), 1000]]}
    )
    content = (reply.get("choices", [{}])[0].get("logprobs") or {}).get("content")
    if content:
        logprobs = {str(one["id"]): one["logprob"] for one in content[0]["top_logprobs"]}
        found = {"logprobs": logprobs, "prompt_tokens": reply["usage"]["prompt_tokens"]}
    else:
        found = {"error": str(reply.get("error", reply))}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
