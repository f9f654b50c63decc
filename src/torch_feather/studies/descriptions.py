"""What the studies ask, in words: `feather study --help` needs no more, and imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Description:
    """The words and defaults of a study.

    Attributes:
        name: name of its command.
        question: the question that it answers.
        background: facts that a reader needs to understand the answer.
        source: figure or table of the paper.
        sparsities: default sparsities.
        methods: default methods; None if the question fixes them.
        digits_settings: settings on the digits. They are learned in a few epochs; more epochs
            would hide all differences.
        digits_sparsities: default sparsities on the digits.
        fixed_settings: settings that the study itself chooses for its runs.
        measured: whether trained networks are measured afterwards, in their run directories.
        timed_on_request: whether they are timed only with `--time`.
        seeds: default seeds.

    Example:
        >>> DESCRIPTIONS["threshold"].question
        'How hard should the threshold be?'
    """

    name: str
    question: str
    background: str
    source: str
    sparsities: str = "0.9,0.95,0.98,0.99,0.995"
    methods: str | None = None
    digits_settings: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 10})
    digits_sparsities: str = "0.95,0.98,0.99"
    fixed_settings: Sequence[str] = ()
    measured: bool = False
    timed_on_request: bool = False
    seeds: str = "0,1,2"


RECIPE = Description(
    name="recipe",
    question="With which hyper-parameters are the networks trained?",
    background="Each recipe uses the same hyper-parameters for every network and sparsity; none is "
    "tuned to either. This page requires no training.",
    source="Table 1 of the supplement",
    digits_settings={},
)

THRESHOLD = Description(
    name="threshold",
    question="How hard should the threshold be?",
    background="Feather sets weights below a threshold to zero and shrinks those above it, less "
    "for larger p: p = 1 is the soft threshold, p = ∞ the hard one. All other settings are equal. "
    "As in Feather, gradients of pruned weights are halved above 95% sparsity (θ = ½).",
    source="Figure 1 of the supplement",
)

STABILITY = Description(
    name="stability",
    question="How early does the mask stabilize, and is earlier better?",
    background="The mask marks the weights that are kept. Feather multiplies the gradient of "
    "pruned weights by θ: with θ = 0 they get no gradient and rarely return, with θ = 1 they get "
    "their full gradient, like kept weights. A correlation of 1 means that the mask is the final "
    "one. The sparsity rises in the first half of training, so the mask cannot be final there.",
    source="Figure 2 of the supplement",
    sparsities="0.9,0.98,0.99",
    digits_sparsities="0.9,0.99",
)

BACKBONES = Description(
    name="backbones",
    question="Does Feather improve other pruning methods when it is built into them?",
    background="gmp prunes every layer to the same sparsity by magnitude. asl+ learns a threshold "
    "for each layer. With Feather they make the same pruning decisions, but use its threshold "
    "operator and its gradient rule.",
    source="Figure 3 of the supplement",
)

MOBILENET = Description(
    name="mobilenet",
    question="Which method trains the most accurate sparse MobileNetV1, a network with little "
    "redundancy?",
    background="Every method prunes the same network with the same training budget. The paper's "
    "ImageNet results are in a separate section; they use other images, so only the ranking is "
    "comparable.",
    source="Table 2 of the supplement",
    methods="dense,feather,gmp:allocation=uniform-dense-depthwise,str,probmask,st3",
    sparsities="0.89,0.941",
    digits_settings={"epochs": 8},
    fixed_settings=("network",),
    digits_sparsities="0.89,0.941",
)

FLOPS = Description(
    name="flops",
    question="Which method gives the most accurate network for its multiply-adds?",
    background="Networks with equal sparsity can have different costs: a weight of an early layer "
    "is used at more pixels. feather-flops ranks weights by |w| / cost^γ. A larger γ prunes costly "
    "layers more; γ = 0 equals feather.",
    source="Figure 4 of the supplement",
    methods="dense,feather,feather-flops,gmp:allocation=uniform,str,st3",
)

LATENCY = Description(
    name="latency",
    question="Which method gives the most accurate network for its latency on this CPU?",
    background="Every network, also the dense one, is compiled by feather.compile_sparse, which "
    "skips zeros in layers that this makes faster. The time of a multiply-add differs between "
    "layers, so the two figures can differ. feather-flops reduces either multiply-adds or "
    "milliseconds; the latter are measured for each layer before training.",
    source="Beyond Figure 4 of the supplement",
    methods="dense,feather,feather-flops",
    measured=True,
)

NETWORKS = Description(
    name="networks",
    question="Is Feather more accurate on different networks, from 90% to 99.5% sparsity?",
    background="ResNet-20 is a plain residual network, MobileNetV1 is designed to be small, and "
    "DenseNet40-24 reuses its features. All are trained with one recipe.",
    source="The paper's main comparison",
    methods="dense,feather,gmp,st3",
    digits_settings={"epochs": 6},
    fixed_settings=("network",),
    digits_sparsities="0.9,0.98",
)

COMPARE = Description(
    name="compare",
    question="Which method trains the most accurate sparse network with the same training budget?",
    background="Every method prunes the same network with the same training budget: the same "
    "images, epochs and learning rates.",
    source="The paper's main comparison",
    methods="dense,feather,hard-ste,soft-ste",
)

BEYOND = Description(
    name="beyond",
    question="Which method is more accurate than Feather at 98% to 99.9% sparsity?",
    background="The protocol was written before the runs (docs/protocol.md). Exploration tries "
    "changes of Feather in short runs, tuning tries Feather's own settings; both measure "
    "validation images, with seeds of their own, and decide nothing. The final comparison uses "
    "new seeds and test images, and Holm correction over all sparsities.",
    source="Beyond the supplement",
    sparsities="0.98,0.99,0.995,0.999",
    fixed_settings=("data.validation",),
    seeds="3,4,5,6,7,8,9,10,11,12",
)

TRANSFORMERS = Description(
    name="transformers",
    question="Which method trains the better sparse transformer, from 50% to 95% sparsity?",
    background="The network is a character-level GPT on a text, otherwise a vision transformer. "
    "Layers are those that sparsify prunes by default: attention, perceptrons, patches, and the "
    "head of the vision transformer. Embeddings (with the GPT's head, which shares their weight), "
    "positions, norms and biases stay dense. Exploration chooses weight decay and θ on validation "
    "data, with seeds of its own. All methods take the same steps of AdamW "
    "(docs/protocol.md).",
    source="Beyond the supplement",
    sparsities="0.5,0.8,0.9,0.95",
    digits_sparsities="0.5,0.9",
    digits_settings={
        "epochs": 10,
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.1,
    },
    fixed_settings=("network", "data.validation"),
    measured=True,
    timed_on_request=True,
)

DESCRIPTIONS = {
    one.name: one
    for one in (
        RECIPE,
        THRESHOLD,
        STABILITY,
        BACKBONES,
        MOBILENET,
        FLOPS,
        LATENCY,
        NETWORKS,
        COMPARE,
        BEYOND,
        TRANSFORMERS,
    )
}
