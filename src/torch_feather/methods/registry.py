"""Methods by name: the package's own, registered ones, entry points, and import paths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from ..deprecation import warn_renamed
from ..errors import ConfigurationError, nearest, option, printable
from ..import_path import import_object
from .base import AnyMethod
from .choice import AUTO
from .feather import feather
from .feather_flops import GAMMA, feather_flops
from .feather_ham import feather_ham
from .gmp import feather_gmp, gmp
from .learned import asl, asl_plus, feather_asl_plus, str_
from .option_types import check_option_types
from .probmask import probmask
from .spartan import spartan
from .st3 import st3, st3_sigma
from .ste import hard_ste, soft_ste

Factory = Callable[..., AnyMethod]
"""Called with the keyword `sparsity`, if it takes it, and the method's options."""

ENTRY_POINTS = "torch_feather.methods"

METHODS: dict[str, Factory] = {
    "feather": feather,
    "feather-gmp": feather_gmp,
    "feather-flops": feather_flops,
    "feather-ham": feather_ham,
    "feather-asl+": feather_asl_plus,
    "hard-ste": hard_ste,
    "soft-ste": soft_ste,
    "gmp": gmp,
    "st3": st3,
    "st3-sigma": st3_sigma,
    "probmask": probmask,
    "spartan": spartan,
    "asl": asl,
    "asl+": asl_plus,
    "str": str_,
}
_OWN = frozenset(METHODS)

# Arguments of `sparsify`, which are therefore no options of a method.
_OF_SPARSIFY = ("model", "optimizer", "method", "total_steps", "include", "exclude", "count")

# Options of version 0.1 by method, and their present names.
RENAMED_OPTIONS = {
    "asl": {"rate": "lr_multiplier"},
    "asl+": {"rate": "lr_multiplier"},
    "feather-asl+": {"rate": "lr_multiplier"},
    "str": {"rate": "lr_multiplier"},
    "probmask": {"rate": "lr"},
}

# By method: an option, its default, and another option that it cannot be combined with. The default
# holds only without the other one; the factory's own default is None.
ALTERNATIVES = {"feather-flops": ("gamma", GAMMA, "budget")}


def available_methods() -> list[str]:
    """Return the names that `sparsify` and `feather train --method` accept.

    They also accept `package.module:factory` for a factory that has no name.

    Example:
        >>> "feather" in available_methods()
        True
    """
    return [*METHODS, *(name for name in _entry_points() if name not in METHODS)]


def register_method(name: str, factory: Factory) -> None:
    """Make a method available by name.

    A package can do the same with an entry point of the group `torch_feather.methods`.

    Args:
        name: the name for `sparsify` and `feather train --method`.
        factory: called with the keyword `sparsity` (if it takes it) and the method's options;
            returns an object with `bind(context)`, such as `methods.Method`.

    Raises:
        ConfigurationError: the name belongs to a method of torch-feather, or has ':', spaces or
            control characters, or the factory is not callable.

    Example:
        >>> from torch_feather.methods import feather
        >>> register_method("feather-p2", lambda *, sparsity: feather(sparsity=sparsity, p=2.0))
        >>> "feather-p2" in available_methods()
        True
    """
    if not isinstance(name, str) or not name or ":" in name or printable(name).split() != [name]:
        raise ConfigurationError(
            f"A method's name is text without ':', spaces or control characters, got {name!r:.80}."
        )
    if not callable(factory):
        raise ConfigurationError(f"factory must be callable, got {factory!r}.")
    if name in _OWN or name == AUTO:
        raise ConfigurationError(f"{name!r} is a method of torch-feather. Choose another name.")
    METHODS[name] = factory


def find_method(name: str) -> Factory:
    """Return the factory of a method.

    Args:
        name: a registered name, the name of an entry point, or `package.module:factory`.

    Raises:
        ConfigurationError: there is none; the message says what to import.

    Example:
        >>> find_method("torch_feather.methods:feather").__name__
        'feather'
    """
    if name in METHODS:
        return METHODS[name]
    if isinstance(name, str) and ":" in name:
        return import_object(name, "Method")
    found = _entry_points().get(name)
    if found is not None:
        return found.load()
    if name == AUTO:
        raise ConfigurationError(
            f"{AUTO!r} is no method: sparsify and feather train choose one for it. Name a method "
            "here, such as 'feather'."
        )
    names = available_methods()
    raise ConfigurationError(
        f"There is no method {name!r}{nearest(name, names)} There are: {', '.join(names)}. If your "
        "code registers it, import that module first (feather.register_method), or name its "
        "factory: 'package.module:factory'."
    )


def method_options(name: str) -> dict[str, Any]:
    """Return the options of a method and their defaults.

    Args:
        name: as for `find_method`.

    Example:
        >>> method_options("gmp")["every"]
        1
    """
    parameters = _parameters(name, find_method(name)).values()
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    optional, default, _ = ALTERNATIVES.get(name, ("", None, ""))
    return {
        p.name: default if p.name == optional else p.default
        for p in parameters
        if p.name != "sparsity" and p.kind not in kinds
    }


def _parameters(name: str, factory: Factory) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a factory; raise ConfigurationError if one cannot be an option."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables of C have no signature
        raise ConfigurationError(
            f"{factory!r:.80} is no factory of the method {name!r}: its options are not known. "
            "Write a Python function that takes them as keywords and returns the method."
        ) from None
    first = inspect.Parameter.POSITIONAL_ONLY
    if wrong := [p.name for p in parameters.values() if p.kind is first]:
        raise ConfigurationError(
            f"The factory of method {name!r} takes {', '.join(wrong)} by position only. Options "
            "are keywords: remove the '/' from its parameters."
        )
    if taken := [p for p in parameters if p in _OF_SPARSIFY]:
        raise ConfigurationError(
            f"The factory of method {name!r} has an option {taken[0]!r}, which is an argument of "
            "sparsify and would not reach it. Rename the option."
        )
    return parameters


def unused_options(name: str, options: Mapping[str, Any]) -> set[str]:
    """Return the options whose default does not hold with these options.

    Configurations that version 0.1 stored have such options, which it ignored.

    Args:
        name: name of the method.
        options: its options.

    Example:
        >>> unused_options("feather-flops", {"budget": 1e6, "gamma": 0.25})
        {'gamma'}
        >>> unused_options("feather-flops", {"gamma": 0.25})
        set()
    """
    optional, default, other = ALTERNATIVES.get(name, ("", None, ""))
    unused = options.get(other) is not None and options.get(optional, default) == default
    return {optional} if unused else set()


def describe_method(name: str) -> str:
    """Return a method in one sentence: the first line of its factory's docstring.

    Args:
        name: as for `find_method`.

    Example:
        >>> describe_method("gmp")
        'Gradual magnitude pruning: the smallest weights of each layer are zero.'
    """
    lines = (inspect.getdoc(find_method(name)) or "").splitlines()
    text = lines[0].removeprefix("Return ") if lines else ""
    return text[:1].upper() + text[1:]


def current_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with present names in place of those of version 0.1.

    Args:
        name: name of the method.
        options: its options, old names included.

    Example:
        >>> current_options("str", {"rate": 0.5})
        {'lr_multiplier': 0.5}
    """
    renamed = RENAMED_OPTIONS.get(name, {})
    return {renamed.get(option, option): value for option, value in options.items()}


def build_method(name: str, *, sparsity: float, **options: Any) -> AnyMethod:
    """Return the method called `name` for a final sparsity.

    Args:
        name: as for `find_method`.
        sparsity: final fraction of zeros.
        **options: see `method_options`.

    Raises:
        ConfigurationError: an unknown name or option (the message names the nearest), an invalid
            value, a missing option, or a factory that fails.

    Example:
        >>> build_method("feather", sparsity=0.9, p=2.0).operator
        Power(p=2.0)
    """
    factory, known = find_method(name), method_options(name)
    for old, new in RENAMED_OPTIONS.get(name, {}).items():
        if old in options:
            warn_renamed(f"Option {old!r} of method {name!r}", repr(new), stacklevel=4)
    options = current_options(name, options)
    parameters = _parameters(name, factory)
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for one in options:
        if one not in known and not free:
            raise ConfigurationError(
                f"Method {name!r} has no option {one!r}{nearest(one, known)} "
                f"Its options: {', '.join(known) or 'none'}."
            )
    required = [one for one, default in known.items() if default is inspect.Parameter.empty]
    if missing := [one for one in required if one not in options]:
        values = ", ".join(option(one, "...", of_method=True) for one in missing)
        raise ConfigurationError(
            f"Method {name!r} requires {values}: its factory has no default for "
            f"{'it' if len(missing) == 1 else 'them'}."
        )
    given = {"sparsity": sparsity} if "sparsity" in parameters or free else {}
    method = _call(name, factory, options, given)
    check_option_types(name, factory, options)
    if not hasattr(method, "bind"):
        raise ConfigurationError(
            f"The factory of method {name!r} returned {type(method).__name__}, which has no "
            "bind(context). Return a torch_feather.methods.Method or an object with bind(context)."
        )
    return method


def _call(
    name: str, factory: Factory, options: dict[str, Any], given: dict[str, float]
) -> AnyMethod:
    """Return what a factory returns; raise ConfigurationError if it fails."""
    try:
        return factory(**options, **given)
    except ConfigurationError:  # the factory knows best what is wrong
        raise
    except Exception as error:
        check_option_types(name, factory, options)
        if name in _OWN:
            raise
        raise ConfigurationError(
            f"The factory of method {name!r} raises {type(error).__name__} ({error})."
        ) from error


def _entry_points() -> dict[str, Any]:
    """Return the entry points of installed packages, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
