"""Sparse training of a graph network of torch_geometric: name its weights with include=.

    python examples/geometric_graph.py

torch_geometric has a linear layer of its own, which is not pruned by default.
Requires: pip install 'torch-feather[train]' torch_geometric
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GCNConv

import torch_feather as feather

CLASSES = 4


class Graph(nn.Module):
    """Two layers of torch_geometric, and a head of PyTorch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = GCNConv(16, 64), GATConv(64, 32, heads=2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x, edges):
        x = F.relu(self.first(x, edges))
        return self.head(F.relu(self.second(x, edges)))


def communities(count: int = 200) -> Data:
    """Return a graph of four groups; most edges lie within one."""
    random = torch.Generator().manual_seed(0)
    group = torch.arange(count) % CLASSES
    same = group[:, None] == group
    edges = torch.rand(count, count, generator=random) < torch.where(same, 0.1, 0.005)
    means = torch.randn(CLASSES, 16, generator=random)
    x = 0.5 * means[group] + torch.randn(count, 16, generator=random)
    return Data(x=x, edge_index=edges.nonzero().T, y=group)


def train(folder: Path, steps: int, stop: int | None = None) -> Graph:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that step."""
    torch.manual_seed(0)
    data, model = communities(), Graph()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=steps, include=["default", "*.lin.weight"]
    )
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while sparsifier.step_count < (steps if stop is None else stop):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x, data.edge_index), data.y).backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    if stop is None:
        sparsifier.finalize()  # new
    return model


def main(steps: int = 60) -> None:
    """Train in two parts, then evaluate."""
    with TemporaryDirectory() as folder:
        train(Path(folder), steps, stop=steps // 2)
        model = train(Path(folder), steps)
    data = communities()
    right = (model(data.x, data.edge_index).argmax(1) == data.y).float().mean()
    print(f"{right:.1%} of the nodes, {feather.sparsity(model):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
