"""How well a model knows a domain: choices by log-likelihood, responses by ROUGE and by perplexity.

Every row of a test file counts, decoding is greedy, and prompts are made by the template that training used. A choice
wins by the mean log-likelihood of its tokens, so that a long one is not at a disadvantage.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentei import structure
from sentei.data import fingerprint, prompts
from sentei.data.examples import read_rows
from sentei.data.prompts import Row, Template
from sentei.distill import Distillation, head
from sentei.evaluate import scores

ROUGE = ("rouge1", "rouge2", "rougeL")


def read(path: str | Path) -> list[Row]:
    """All rows of a test file, checked; ValueError names file, line and field."""
    rows = [prompts.make_row(row, where) for row, where in read_rows(str(path))]
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows


@torch.inference_mode()
def choices(
    model: Any, rows: Sequence[Row], template: Template, *, seq_len: int, batch_size: int = 8
) -> dict[str, Any]:
    """Accuracy and macro-F1 of multiple-choice rows.

    Returns:
        "accuracy"; "macro_f1" where all rows have the same choices; "chance", the accuracy of a uniform guess;
        "majority", that of always the commonest answer; "samples"; "predicted", the indices; "answer_probability",
        the mean of the right choice's share among its row's choices.
    """
    jobs: list[tuple[int, int, list[int], int]] = []  # row, choice, tokens, where the choice starts
    for number, row in enumerate(rows):
        for place, choice in enumerate(row["choices"]):
            parts = template.parts(row, choice)
            answer = template.response_ids(parts, end=False)
            prompt = template.prompt_ids(parts, max(1, seq_len - len(answer)))
            if prompt is None:
                raise ValueError(f"row {number}: the choices alone are longer than seq_len {seq_len}; raise it")
            jobs.append((number, place, prompt + answer, len(prompt)))
    # Choices of one token need one forward for all of them: their last position is their prompt's.
    likelihood = [[-math.inf] * len(row["choices"]) for row in rows]
    unique: dict[tuple[int, ...], list[tuple[int, int, list[int], int]]] = {}
    for job in jobs:
        unique.setdefault(tuple(job[2][:-1]), []).append(job)
    order = sorted(unique, key=len)
    pad, device = prompts.pad_id(template.tokenizer), next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids_BT = torch.full((len(batch), len(batch[-1])), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for place, ids in enumerate(batch):
            ids_BT[place, : len(ids)] = torch.tensor(ids)
            mask_BT[place, : len(ids)] = 1
        logits_BTV = _last_logits(model, ids_BT.to(device), mask_BT.to(device), batch, unique)
        for place, ids in enumerate(batch):
            for number, choice, tokens, first in unique[ids]:
                log_p_TV = logits_BTV[place].float().log_softmax(-1)[-(len(ids) - first + 1) :]
                targets = torch.tensor(tokens[first:], device=log_p_TV.device)
                likelihood[number][choice] = float(log_p_TV.gather(1, targets[:, None]).mean())
    predicted = [max(range(len(of)), key=of.__getitem__) for of in likelihood]
    answers = [row["answer"] for row in rows]
    found: dict[str, Any] = {
        "accuracy": scores.accuracy(predicted, answers),
        "chance": sum(1 / len(row["choices"]) for row in rows) / len(rows),
        "samples": len(rows),
        "predicted": predicted,
        "answer_probability": float(
            sum(
                torch.tensor(of, dtype=torch.double).softmax(0)[answer]
                for of, answer in zip(likelihood, answers, strict=True)
            )
            / len(rows)
        ),
    }
    if len({tuple(row["choices"]) for row in rows}) == 1:
        found["macro_f1"] = scores.macro_f1(predicted, answers)
        found["majority"] = Counter(answers).most_common(1)[0][1] / len(rows)
    return found


def _last_logits(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, batch: list[tuple[int, ...]], unique: dict[tuple[int, ...], list]
) -> list[Tensor]:
    """Of each sequence, the logits [t, V] of the positions that predict its choices: the head skips the prompts."""
    base = structure.base_model(model)
    hidden_BTH = base(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    turn = head(model)
    assert turn is not None
    found = []
    for place, ids in enumerate(batch):
        wanted = max(len(ids) - first + 1 for *_, first in unique[ids])
        found.append(turn(hidden_BTH[place, len(ids) - wanted : len(ids)]))
    return found


@torch.inference_mode()
def rouge(
    model: Any,
    rows: Sequence[Row],
    template: Template,
    *,
    seq_len: int,
    new_tokens: int = 128,
    stemming: bool = True,
) -> dict[str, Any]:
    """ROUGE-1, -2 and -L (F-measure, means over rows) of greedy generations against the responses.

    Raises:
        ValueError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs rouge-score, which is not installed; pip install 'sentei[tasks]'") from error
    scorer, totals = RougeScorer(list(ROUGE), use_stemmer=stemming), dict.fromkeys(ROUGE, 0.0)
    texts = []
    for row in rows:
        parts = template.parts(row)
        texts.append(generate(model, template, row, seq_len=seq_len, new_tokens=new_tokens))
        for name, score in scorer.score(parts.response.strip(), texts[-1]).items():
            totals[name] += score.fmeasure / len(rows)
    return {**totals, "samples": len(rows), "generated": texts}


@torch.inference_mode()
def generate(model: Any, template: Template, row: Row, *, seq_len: int, new_tokens: int) -> str:
    """The model's own response to a row's prompt, most likely token first."""
    prompt = template.prompt_ids(template.parts(row), max(1, seq_len - new_tokens))
    if prompt is None:
        raise ValueError(f"the prompt cannot be cut to seq_len {seq_len} less {new_tokens} new tokens; raise seq_len")
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    tokenizer = template.tokenizer
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=prompts.pad_id(tokenizer),
    )
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


@torch.inference_mode()
def perplexity(
    model: Any, rows: Sequence[Row], template: Template, *, seq_len: int, batch_size: int = 8, loss_on: str = "response"
) -> dict[str, Any]:
    """Perplexity of the responses given their prompts, or of prompt and response (`loss_on="full"`)."""
    encoded = prompts.encode(rows, template, seq_len)
    pad, device = prompts.pad_id(template.tokenizer), next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.ids[i]))
    total = count = 0.0
    for start in range(0, len(order), batch_size):
        batch = prompts.collate(encoded, order[start : start + batch_size], pad=pad, loss_on=loss_on)
        batch = {name: x.to(device) for name, x in batch.items()}
        targets = int((batch["targets"] != -100).sum())
        total += float(Distillation()(model, batch)["ce"]) * targets
        count += targets
    loss = total / max(count, 1)
    return {"perplexity": math.exp(min(loss, 700)), "loss": loss, "tokens": int(count), "samples": len(encoded)}


def measure(
    model: Any,
    rows: Sequence[Row],
    template: Template,
    *,
    seq_len: int = 512,
    new_tokens: int = 128,
    batch_size: int = 8,
    generations: int | None = None,
) -> dict[str, Any]:
    """Every score that fits the rows: {"choices": ..., "rouge": ..., "perplexity": ..., "perplexity_full": ...}.

    Args:
        generations: at most so many rows are answered for ROUGE; 0 leaves it out, None takes all.
    """
    model.eval()
    found: dict[str, Any] = {
        "perplexity": perplexity(model, rows, template, seq_len=seq_len, batch_size=batch_size),
        "perplexity_full": perplexity(model, rows, template, seq_len=seq_len, batch_size=batch_size, loss_on="full"),
    }
    asked = [row for row in rows if row["kind"] == "choices"]
    if asked:
        found["choices"] = choices(model, asked, template, seq_len=seq_len, batch_size=batch_size)
    told = [row for row in rows if row["kind"] != "choices"][:generations]
    if told:
        found["rouge"] = rouge(model, told, template, seq_len=seq_len, new_tokens=new_tokens)
    return found


def run(
    folder: str | Path,
    path: str | Path,
    *,
    template: str | None = None,
    seq_len: int | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Measurements of a saved checkpoint on a test file, as `evaluate.run` writes them.

    Template and length, where not given, are those that the checkpoint was tuned with, or else plain and 512; a parent
    must be given those of its child to be compared with it. Rows that its training or its pruning generator has seen
    are refused.

    Raises:
        ValueError: the file's rows, or an overlap with what was seen.
    """
    from sentei import checkpoint

    rows = read(path)[:limit]
    record = Path(folder) / "compression.json"
    stages = json.loads(record.read_text(encoding="utf-8")).get("stages", []) if record.is_file() else []
    fields: dict[str, Any] = {}
    for stage in stages:
        if stored := (stage.get("record") or {}).get("seen_prompts"):
            prompts.check_unseen(rows, stored)
            fields = stage.get("fields") or {}
    seq_len = int(seq_len or fields.get("seq_len", 512))
    model, tokenizer = checkpoint.load(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    made = Template(tokenizer, template or fields.get("template", "plain"))
    found = measure(model, rows, made, seq_len=seq_len, batch_size=batch_size)
    shared = {
        "dataset": str(path),
        "part": "whole" if limit is None else f"first {limit}",
        "sha256": fingerprint([json.dumps(row, sort_keys=True) for row in rows]),
        "seq_len": seq_len,
        "template": made.name,
        "compute_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    measurements = []
    for name, result in found.items():
        metrics = {"choices": ("accuracy", "macro_f1"), "rouge": ROUGE}.get(name, ("perplexity",))
        extra = {"chance": result["chance"]} if "chance" in result else {}
        for metric in metrics:
            if metric in result:
                label = "perplexity_prompt_and_response" if name == "perplexity_full" else metric
                measurements.append(
                    {"metric": label, "value": result[metric], "samples": result["samples"], **extra, **shared}
                )
    return measurements
