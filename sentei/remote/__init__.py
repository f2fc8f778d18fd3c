"""The modelling files that travel with a checkpoint of ours, and their registration with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODELING_FILE = Path(__file__).with_name("modeling_sentei.py")
FOLDED_FILE = Path(__file__).with_name("modeling_sentei_folded.py")


def modeling_files(model_type: str) -> list[Path]:
    """What must lie beside the weights of a checkpoint of ours; the first is the one that `auto_map` names."""
    return [FOLDED_FILE, MODELING_FILE] if model_type.startswith("sentei_folded_") else [MODELING_FILE]


class _AtFirstUse:
    """A model class that is made when transformers first asks it for anything.

    Making it imports the stock modelling file, which may be the very file whose import led here.
    """

    def __init__(self, module: Any, name: str):
        self._module, self._name = module, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(self._module, self._name), attribute)


def register() -> None:
    """Add the `sentei_*` families to AutoConfig and the AutoModel classes, so that no trust flag is needed."""
    import transformers
    from transformers.models.auto import modeling_auto

    from sentei.remote import modeling_sentei, modeling_sentei_folded

    for module in (modeling_sentei, modeling_sentei_folded):
        for model_type in module.FAMILIES:
            names = module.auto_classes(model_type)
            config = getattr(module, names.pop("AutoConfig"))
            transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
            for auto_class, name in names.items():
                # AutoModel.register() would look into the class
                getattr(modeling_auto, auto_class)._model_mapping.register(
                    config, _AtFirstUse(module, name), exist_ok=True
                )
