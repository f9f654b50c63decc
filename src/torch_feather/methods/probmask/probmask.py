"""ProbMask: learned probabilities of keeping each weight, within a global budget."""

from __future__ import annotations

from ..own_parameters import Adam
from .masks import ProbabilisticMethod


def probmask(
    *,
    sparsity: float,
    epochs: int = 300,
    finetune: float = 0.0625,
    lr: float = 0.006,
    passes: int = 1,
    seed: int = 0,
) -> ProbabilisticMethod:
    """Return ProbMask: random soft masks from learned probabilities, projected onto the budget.

    Source: Zhou et al., Effective Sparsification of Neural Networks with Global Sparsity
    Constraint (CVPR 2021), and its public code. Their last phase
    fine-tunes the best of ten random masks, with approximately the target sparsity. This method
    takes the mask of the most probable weights, with exactly the target sparsity.

    Args:
        sparsity: final fraction of zeros; the budget falls to it between 16% and 60% of the epochs.
        epochs: number of changes of temperature, budget and learning rate. They are distributed
            evenly over the steps before the last phase.
        finetune: fraction of the steps in the last phase, with a frozen mask; published: 20 of 320
            epochs.
        lr: Adam's learning rate for the probabilities, with its own cosine schedule.
        passes: masks that each step averages over in a loop with `Sparsifier.passes`, at most 1000;
            the paper uses 2.
        seed: seed of the masks, the same on all ranks of a distributed training run.

    Example:
        >>> probmask(sparsity=0.9).epochs
        300
    """
    return ProbabilisticMethod(Adam(lr), epochs, finetune, passes, seed)
