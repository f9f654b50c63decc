"""TorchScript modules, whose layers cannot be recognized."""

from __future__ import annotations

from torch import jit, nn

from .errors import ConfigurationError


def check_not_scripted(model: nn.Module) -> None:
    """Check that no part of a model is TorchScript, which hides the kinds of its layers.

    Raises:
        ConfigurationError: a part is a TorchScript module.

    Example:
        >>> check_not_scripted(nn.Linear(2, 2))
    """
    for name, module in model.named_modules():
        if isinstance(module, jit.ScriptModule):
            raise ConfigurationError(
                f"{name or 'The model'} is a TorchScript module ({module.original_name}), which "
                "hides its layers. Pass the model before torch.jit.script or torch.jit.trace."
            )
