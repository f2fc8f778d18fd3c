"""The modelling file that travels with a heterogeneous checkpoint, and its registration with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODELING_FILE = Path(__file__).with_name("modeling_sentei.py")


class _AtFirstUse:
    """A model class that is made when transformers first asks it for anything.

    Making it imports the stock modelling file, which may be the very file whose import led here.
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        from sentei.remote import modeling_sentei

        return getattr(getattr(modeling_sentei, self._name), attribute)


def register() -> None:
    """Add the `sentei_*` families to AutoConfig and the AutoModel classes, so that no trust flag is needed."""
    import transformers
    from transformers.models.auto import modeling_auto

    from sentei.remote import modeling_sentei

    for model_type in modeling_sentei.FAMILIES:
        names = modeling_sentei.auto_classes(model_type)
        config = getattr(modeling_sentei, names.pop("AutoConfig"))
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class, name in names.items():
            # AutoModel.register() would look into the class
            getattr(modeling_auto, auto_class)._model_mapping.register(config, _AtFirstUse(name), exist_ok=True)
