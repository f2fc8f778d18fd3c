"""What can be removed from this architecture, and removing it for good.

A *unit* is a removable piece of a transformer layer:

====================  ========================================================  ==================================
kind                  what is removed                                           parameters (H hidden, D head_dim)
====================  ========================================================  ==================================
``heads``             a KV group: one KV head with its G query heads            (2G + 2) D H, plus biases
``channels``          one channel of the MLP's inner width                      3 H gated, 2 H plain, plus biases
``sublayers``         a whole attention or MLP branch (the residual stays)      its linears and the norms only it uses
``layers``            a whole block; its output becomes its input               everything in the block
====================  ========================================================  ==================================

Hidden width, head_dim, embeddings, final norm and LM head are never cut. Sizes are read from the modules, never from
the config, so an already pruned model is pruned again like any other.

Shape legend: U units, L layers, H hidden width, D head_dim, G query heads per KV head, C channels.
"""

from sentei.structure.cutting import (
    keep_channels,
    remove,
    slice_linear,
)
from sentei.structure.families import (
    KINDS,
    SUBLAYERS,
    Family,
    LayerSize,
    base_model,
    family,
    family_name,
    is_causal,
    layer_parameters,
    layers,
    part,
    positions,
    reader,
    run_layers,
    sizes,
    sizes_of,
    total_parameters,
)
from sentei.structure.removable import (
    Units,
    channel_costs,
    columns,
    kept,
    kept_mask,
    parse_granularity,
    units,
)

__all__ = [
    "KINDS",
    "SUBLAYERS",
    "Family",
    "LayerSize",
    "Units",
    "base_model",
    "channel_costs",
    "columns",
    "family",
    "family_name",
    "is_causal",
    "keep_channels",
    "kept",
    "kept_mask",
    "layer_parameters",
    "layers",
    "parse_granularity",
    "part",
    "positions",
    "reader",
    "remove",
    "run_layers",
    "sizes",
    "sizes_of",
    "slice_linear",
    "total_parameters",
    "units",
]
