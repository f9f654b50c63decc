"""Checks the sizes of a network."""

from numbers import Integral

from ..errors import ConfigurationError, shorten


def check_sizes(num_classes: int, in_channels: int) -> None:
    """Check the number of classes and of channels.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Raises:
        ConfigurationError: one of them is not an integer of at least 1.

    Example:
        >>> try:
        ...     check_sizes(0, 3)
        ... except ConfigurationError as error:
        ...     print(error)
        num_classes must be at least 1, got 0.
    """
    for name, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ConfigurationError(f"{name} must be an integer, got {shorten(number)}.")
        if number < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {number}.")
