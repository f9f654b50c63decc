"""Sparse training of a language model of LitGPT with Lightning Fabric.

    python examples/litgpt_loop.py

Trains a small model with grouped queries on the bytes of a text, and writes a checkpoint for
LitGPT. Requires: pip install 'torch-feather[train,frameworks]' litgpt
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

import torch_feather as feather

CONTEXT, BATCH = 32, 16
TEXT = torch.tensor(list(Path(__file__).read_bytes()))  # this file


def small_model() -> GPT:
    """Return an untrained model of bytes."""
    config = Config(
        name="small", block_size=CONTEXT, vocab_size=128, padded_vocab_size=128, n_layer=2,
        n_head=4, n_embd=64, n_query_groups=2, rotary_percentage=1.0, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=128,
    )  # fmt: skip
    return GPT(config)


def batch(step: int) -> torch.Tensor:
    """Return pieces of the text; they depend on the step alone."""
    random = torch.Generator().manual_seed(step)
    first = torch.randint(len(TEXT) - CONTEXT, (BATCH,), generator=random)
    return torch.stack([TEXT[i : i + CONTEXT + 1] for i in first.tolist()])


def train(folder: Path, steps: int, stop: int | None = None) -> GPT:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that step."""
    fabric = L.Fabric(accelerator="cpu", precision="bf16-mixed")
    fabric.seed_everything(0, verbose=False)
    model = fabric.setup(small_model())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=5e-3))
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=steps, exclude=["*wte*", "*lm_head*"]
    )
    state = {"model": model, "optimizer": optimizer}
    if (folder / "lit_model.pth").exists():
        fabric.load(folder / "lit_model.pth", state)
    while sparsifier.step_count < (steps if stop is None else stop):
        pieces = batch(sparsifier.step_count)
        loss = chunked_cross_entropy(model(pieces[:, :-1]), pieces[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    if stop is None:
        sparsifier.finalize()  # new
        state = {"model": model}
    fabric.save(folder / "lit_model.pth", state)
    return model.module


def main(steps: int = 60) -> None:
    """Train in two parts, then read the checkpoint as LitGPT does."""
    with TemporaryDirectory() as folder:
        train(Path(folder), steps, stop=steps // 2)
        train(Path(folder), steps)
        model = small_model()
        model.load_state_dict(torch.load(Path(folder) / "lit_model.pth")["model"])
    pieces = batch(0)
    with torch.no_grad():
        loss = chunked_cross_entropy(model(pieces[:, :-1]), pieces[:, 1:].contiguous())
    zeros = feather.sparsity(model, exclude=["*wte*", "*lm_head*"])
    print(f"loss {loss:.2f}, {zeros:.2%} of the weights are zero")


if __name__ == "__main__":
    main()
