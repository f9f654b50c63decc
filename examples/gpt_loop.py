"""Sparse training of a small GPT in a plain loop, as a script for language models has it.

    python examples/gpt_loop.py

The usual pieces: embeddings tied to the output layer, groups with and without weight decay, warm-up
and cosine, gradient accumulation, clipping, autocast, and a checkpoint to resume from.
Requires: pip install torch-feather
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

import torch_feather as feather

CONTEXT, WIDTH, HEADS, LAYERS, BATCH, ACCUMULATE = 32, 64, 4, 2, 8, 2
TEXT = torch.tensor(list(Path(__file__).read_bytes()))  # this file


class Block(nn.Module):
    """Attention and two linear layers, each after a norm and beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        parts = self.qkv(self.norms[0](x)).view(b, t, 3, HEADS, WIDTH // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class GPT(nn.Module):
    """A language model of bytes; the output layer has the weights of the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.05)

    def forward(self, text):
        x = self.tokens(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    """Return the loss of a batch of pieces of the text; they depend on the number alone."""
    random = torch.Generator().manual_seed(number)
    first = torch.randint(len(TEXT) - CONTEXT, (BATCH,), generator=random)
    text = torch.stack([TEXT[i : i + CONTEXT + 1] for i in first.tolist()])
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def learning_rate(step: int, steps: int) -> float:
    """Return the rate after warm-up and along a cosine."""
    warm = steps // 10
    done = max(step - warm, 0) / (steps - warm)
    return 5e-3 * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * done))


def train(folder: Path, steps: int, stop: int | None = None) -> GPT:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that step."""
    torch.manual_seed(0)
    model = GPT()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95))
    # The embedding, and the output layer that has its weights, stay dense.
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=steps, exclude=["tokens*", "positions*"]
    )
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(sparsifier.step_count, steps if stop is None else stop):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        for part in range(ACCUMULATE):
            (loss_of(model, step * ACCUMULATE + part) / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    if stop is None:
        sparsifier.finalize()  # new
    return model


def main(steps: int = 100) -> None:
    """Train in two parts, then evaluate."""
    with TemporaryDirectory() as folder:
        train(Path(folder), steps, stop=steps // 2)
        model = train(Path(folder), steps)
    with torch.no_grad():
        loss = loss_of(model, 10**6)
    zeros = feather.sparsity(model)
    print(f"loss {loss:.2f}, {zeros:.2%} of the weights are zero")


if __name__ == "__main__":
    main()
