"""`feather-ham` by the name and with the options that the rows of the study have."""

from __future__ import annotations

from ..feather_ham import feather_ham as final
from ..magnitude import Method
from .phases import Phases


def feather_ham(
    *,
    sparsity: float,
    alpha: float = 20.0,
    beta: float = 0.0,
    theta: float | str = "auto",
    p: float = 3.0,
    end: float = 0.5,
) -> Method:
    """Return `feather-ham`, with the end of the rise as a fraction of training.

    Args:
        sparsity: final fraction of zeros.
        alpha, beta, theta, p: as for `methods.feather_ham`.
        end: fraction of training after which the sparsity has risen.

    Example:
        >>> feather_ham(sparsity=0.98, alpha=2.0).latent_update
        HAM(alpha=2.0, beta=0.0)
    """
    schedule = "cubic" if end == 0.5 else Phases(float(end), count=0, last=1.0)
    return final(sparsity=sparsity, alpha=alpha, beta=beta, theta=theta, p=p, schedule=schedule)
