"""Objects by import path: `package.module:name`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from .errors import ConfigurationError, nearest


def is_import_path(name: object) -> bool:
    """Whether a name is an import path, not a name of this package or of timm.

    Args:
        name: the name.

    Example:
        >>> is_import_path("package.module:factory"), is_import_path("timm/hf-hub:user/name")
        (True, False)
    """
    return isinstance(name, str) and ":" in name and "/" not in name


def import_object(path: str, kind: str) -> Callable[..., Any]:
    """Return the callable at `package.module:name`. Importing a module executes it.

    Args:
        path: the import path; `name` may have dots, such as `module:Class.method`.
        kind: what it is, for messages.

    Raises:
        ConfigurationError: the module cannot be imported, or has no such callable.

    Example:
        >>> import_object("torch.nn:Linear", "Network")(2, 3)
        Linear(in_features=2, out_features=3, bias=True)
    """
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ConfigurationError:
        raise
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"{kind} {path!r}: module {module!r} cannot be imported ({error}). Install it, or add "
            "its folder to PYTHONPATH."
        ) from error
    except Exception as error:  # of the user's code
        raise ConfigurationError(
            f"{kind} {path!r}: module {module!r} raises {type(error).__name__} when it is imported "
            f"({error})."
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [one for one in vars(found) if not one.startswith("_")]
            raise ConfigurationError(
                f"{kind} {path!r}: module {module!r} has no {attribute!r}{nearest(name, known)}"
            )
        found = getattr(found, name)
    if not callable(found):
        raise ConfigurationError(f"{kind} {path!r}: {attribute!r} is not callable.")
    return found


def accepted(factory: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments that a callable takes.

    Args:
        factory: the callable.
        arguments: the arguments by name.

    Example:
        >>> accepted(lambda num_classes: None, {"num_classes": 3, "in_channels": 1})
        {'num_classes': 3}
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some callables of C have no signature
        return {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {name: value for name, value in arguments.items() if name in names}
