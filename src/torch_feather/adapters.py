"""Adapters such as LoRA: small trainable layers around the layers of a pretrained model."""

from __future__ import annotations

from torch import nn

# Layers of PEFT that hold adapters and the layer around which they are, by name, so that PEFT need
# not be imported; and the attribute of that layer.
_LAYER, _BASE = "peft.tuners.tuners_utils.BaseTunerLayer", "base_layer"


def is_adapter_part(module: nn.Module, name: str) -> bool:
    """Return whether a child or parameter of a module belongs to an adapter.

    Args:
        module: the module.
        name: the attribute.

    Example:
        >>> is_adapter_part(nn.Linear(2, 2), "lora_A"), is_adapter_part(nn.Linear(2, 2), "weight")
        (True, False)
    """
    if name.lower().startswith("lora_"):
        return True
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    return _LAYER in kinds and name != _BASE


def in_adapter(model: nn.Module, name: str) -> bool:
    """Return whether a parameter belongs to an adapter.

    Args:
        model: the model.
        name: dotted name of the parameter.

    Example:
        >>> model = nn.ModuleDict({"lora_A": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        >>> in_adapter(model, "lora_A.weight"), in_adapter(model, "head.weight")
        (True, False)
    """
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None:
            return False
        if is_adapter_part(module, part):
            return True
        module = module._modules.get(part)
        module = getattr(module, "_orig_mod", module)
    return False
