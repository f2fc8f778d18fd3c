"""Load and save checkpoints: what is read, in which form a pruned model is written, and what is written about it.

    model, tokenizer = load("parent/")                 # folder, .gguf file or Hugging Face hub id
    save(model, tokenizer, "small/", parent="parent/", record=stage)

source.py checks what a checkpoint says of itself, reading.py loads it; forms.py and folded.py find the configuration
and tensors of each way to write a model; writing.py writes, reloads in a fresh process, and only then shows the folder
under its name; unfolding.py makes layers that share weights independent; card.py words the README; adapters.py does the
same for PEFT modules without their base model.
"""

from sentei.checkpoint import adapters
from sentei.checkpoint.forms import SHAPES, Form, form
from sentei.checkpoint.reading import example_encoder, example_model, load
from sentei.checkpoint.source import Source, inspect
from sentei.checkpoint.unfolding import unfold
from sentei.checkpoint.writing import check_output, save, unpack
from sentei.checkpoint.zeros import export_dense
from sentei.remote import register

__all__ = [
    "SHAPES",
    "Form",
    "Source",
    "adapters",
    "check_output",
    "example_encoder",
    "example_model",
    "export_dense",
    "form",
    "inspect",
    "load",
    "register",
    "save",
    "unfold",
    "unpack",
]
