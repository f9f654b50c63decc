"""ProbMask: the probability of keeping each weight is learned, within a global budget."""

from __future__ import annotations

from ..own_parameters import Adam
from .masks import ProbabilisticMethod


def probmask(
    *,
    sparsity: float,
    epochs: int = 300,
    finetune: float = 0.0625,
    rate: float = 0.006,
    passes: int = 1,
    seed: int = 0,
) -> ProbabilisticMethod:
    """Random soft masks from learned probabilities, which are projected onto the budget.

    Source: Zhou et al., Effective Sparsification of Neural Networks with Global Sparsity
    Constraint (CVPR 2021), and its public code for the margin at 0 and 1. There the last phase
    fine-tunes the best of ten masks drawn at random, of about the wanted sparsity; here that of
    the most probable weights, of exactly the wanted one.

    Args:
        sparsity: final share of zeros; the budget falls to it between 16 and 60 % of the epochs.
        epochs: in which temperature, budget and learning rate change, whatever the length of
            training: they are stretched over the steps before the last phase.
        finetune: share of the steps in the last phase, where the mask is frozen: 20 of 320 epochs.
        rate: Adam's learning rate for the probabilities, on its own cosine.
        passes: how many masks each step averages over in a loop with `Sparsifier.passes`; the
            paper takes 2.
        seed: of the masks, the same on all ranks of a distributed training.
    """
    return ProbabilisticMethod(Adam(rate), epochs, finetune, passes, seed)
