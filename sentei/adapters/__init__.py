"""PEFT modules as removable units: LoRA on linears, a serial bottleneck after the feed-forward of a layer.

LoRA is peft's. The bottleneck (arXiv 2005.00247) is ours, since peft has none; it reads the residual stream as the
`adapters` package does, where h is the feed-forward's output and x the residual it is added to:

    post-norm encoders   a = LN(h + x);   layer output = LN(x + h + drop(Up(relu(Down(a)))))
    pre-norm decoders    a = h + x;       layer output = x + h + drop(Up(relu(Down(a))))

What is injected goes in around the modules it extends, LoRA first and bottlenecks last, and comes out deepest first;
the base weights never change.

Shapes: B rows, T tokens, H hidden width, w bottleneck width.
"""

from sentei.adapters.bottleneck import Bottleneck
from sentei.adapters.injection import (
    INITS,
    init_variances,
    inject,
    lora_config,
    matrices,
    merge_lora,
    modules,
    parameters,
    set_enabled,
    unload,
)
from sentei.adapters.names import check_pattern, fingerprint, head, pattern
from sentei.adapters.space import ROLES, Unit, remarks, units
from sentei.adapters.tensors import load_state, state

__all__ = [
    "INITS",
    "ROLES",
    "Bottleneck",
    "Unit",
    "check_pattern",
    "fingerprint",
    "head",
    "init_variances",
    "inject",
    "load_state",
    "lora_config",
    "matrices",
    "merge_lora",
    "modules",
    "parameters",
    "pattern",
    "remarks",
    "set_enabled",
    "state",
    "units",
    "unload",
]
