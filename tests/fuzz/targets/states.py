"""States of optimizers and sparsifiers, through each way to load them.

An input is a JSON text: which run, which door, and edits of the saved state.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

import torch_feather as feather
from torch_feather.errors import FeatherError

from ..mutate import VALUES, mutate_tree
from .base import Target, refused

METHODS = ("feather", "str", "gmp", "spartan", "probmask", "st3")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
DOORS = ("optimizer", "early", "sparsifier", "relaxed", "average", "model")
STEPS = 8
TYPES = ("float32", "float16", "bfloat16", "float64", "uint8", "int64", "bool", "complex64")
FILLS = (0, 1, -1, 255, 3, float("nan"), float("inf"), 1e30)
# What may replace a value; lists are shapes.
SPECIAL = (
    *(
        {"tensor": [t, s, f]}
        for t in TYPES
        for s in ([], [3], [56], [5, 6], [0])
        for f in FILLS[:4]
    ),
    *({"tensor": ["float32", [5, 6], f]} for f in FILLS),
    *({"flip": i} for i in (0, 7, 8, 15, 16, 23, 24, 31, 32, 39, 40, 47, 48, 55)),
    *({"cast": t} for t in TYPES),
    *({"layout": kind} for kind in ("sparse", "meta", "transposed", "expanded", "quantized")),
)


class States(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.set_num_threads(1)
        self.saved: dict[tuple[str, str], Any] = {}

    def seeds(self) -> list[bytes]:
        inputs = [
            {"method": m, "optimizer": o, "door": d, "edits": []}
            for m in METHODS
            for o in OPTIMIZERS
            for d in DOORS
        ]
        return [json.dumps(one).encode() for one in inputs]

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        try:
            given = _recipe(content)
        except ValueError:
            return content
        edits = given["edits"][:6]
        if edits and rng.random() < 0.3:
            edits.pop(rng.randrange(len(edits)))
        if edits and rng.random() < 0.3:
            changed = mutate_tree(rng, edits)
            edits = changed if isinstance(changed, list) else edits
        for _ in range(rng.choice((1, 1, 2))):
            path = [rng.randrange(9) for _ in range(rng.choice((1, 2, 2, 3, 3, 3)))]
            change = rng.choice(("set", "set", "set", "delete", "rename", "copy"))
            value = rng.choice(SPECIAL if rng.random() < 0.7 else VALUES)
            edits.append([change, path, value])
        if rng.random() < 0.2:
            given["door"] = rng.choice(DOORS)
        return json.dumps({**given, "edits": edits}).encode()

    def check(self, content: bytes) -> bool:
        try:
            given = _recipe(content)
        except ValueError:
            return False
        method, optimizer, door = given["method"], given["optimizer"], given["door"]
        if (method, optimizer) not in self.saved:
            self.saved[method, optimizer] = _train(method, optimizer)
        state = copy.deepcopy(self.saved[method, optimizer][door])
        for edit in given["edits"]:
            apply_edit(state, edit)
        return _load(method, optimizer, door, state)


def _recipe(content: bytes) -> dict[str, Any]:
    """Return the fields of an input; raises ValueError if it is none."""
    given = json.loads(content)
    if not isinstance(given, dict) or not isinstance(given.get("edits"), list):
        raise ValueError
    for name, known in (("method", METHODS), ("optimizer", OPTIMIZERS), ("door", DOORS)):
        if not isinstance(given.get(name), str) or given[name] not in known:
            raise ValueError
    return given


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _sparsify(model: nn.Module, optimizer: torch.optim.Optimizer, method: str) -> Any:
    return feather.sparsify(
        model, optimizer, method, sparsity=0.5, total_steps=STEPS, exclude=["2.weight"]
    )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Any) -> None:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    for fraction in sparsifier.passes():
        (model(x).square().mean() * fraction).backward()
    optimizer.step()
    optimizer.zero_grad()


def _train(method: str, optimizer: str) -> dict[str, Any]:
    """Return the states of a run after three steps, by door."""
    model = _model()
    own = OPTIMIZERS[optimizer](model.parameters())
    sparsifier = _sparsify(model, own, method)
    for _ in range(3):
        _step(model, own, sparsifier)
    state = own.state_dict()
    return copy.deepcopy(
        {
            "optimizer": state,
            "early": state,
            "relaxed": state,
            "sparsifier": sparsifier.state_dict(),
            "average": feather.LatentAverage(sparsifier).state_dict(),
            "model": model.state_dict(),
        }
    )


def _load(method: str, optimizer: str, door: str, state: Any) -> bool:
    model = _model()
    own = OPTIMIZERS[optimizer](model.parameters())
    given = copy.deepcopy(state)  # a loaded state shares tensors with its optimizer
    before = None
    if door != "early":
        sparsifier = _sparsify(model, own, method)
        before = [p.detach().clone() for p in model.parameters()]
        latent = {name: w.clone() for name, w in sparsifier.latent_weights().items()}

    def load() -> None:
        nonlocal sparsifier
        if door == "early":
            own.load_state_dict(state)
            sparsifier = _sparsify(model, own, method)
        elif door == "optimizer":
            own.load_state_dict(state)
        elif door == "relaxed":
            with sparsifier.relaxed_loading():
                own.load_state_dict(state)
        elif door == "sparsifier":
            sparsifier.load_state_dict(state)
        elif door == "average":
            average = feather.LatentAverage(sparsifier)
            average.load_state_dict(state)
            average.update()
            average.copy_to(copy.deepcopy(model))
        else:
            model.load_state_dict(state)

    try:
        if refused(load):
            if before is not None:  # nothing is changed
                pairs = zip(before, model.parameters(), strict=True)
                assert all(torch.equal(a, b.detach()) for a, b in pairs)
                now = sparsifier.latent_weights()
                assert all(torch.equal(now[name], latent[name]) for name in latent)
            return False
    except Exception:
        if _fails_without(optimizer, door, given):  # an error of PyTorch, not of a state of ours
            return False
        raise
    try:
        _step(model, own, sparsifier)
        zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n == "0.weight")
        assert 0 <= zeros <= 30
        assert 0 <= sparsifier.step_count <= STEPS, sparsifier.step_count
        assert sparsifier.state_dict() is not None
    except FeatherError:
        return True
    except Exception:
        if _fails_without(optimizer, door, given, step=True):
            return False
        raise
    return True


def _fails_without(optimizer: str, door: str, state: Any, step: bool = False) -> bool:
    """Return whether loading and stepping fails without sparse training, too."""
    if door in ("sparsifier", "average"):
        return False
    model = _model()
    own = OPTIMIZERS[optimizer](model.parameters())
    try:
        if door == "model":
            model.load_state_dict(state)
        else:
            from torch_feather.engine.checkpoint import split

            own.load_state_dict(state if door == "early" else split(state)[0])
        if step:
            model(torch.ones(4, 6)).sum().backward()
            own.step()
    except Exception:
        return True
    return False


def apply_edit(state: Any, edit: Any) -> None:
    """Apply one edit. One that does not fit changes nothing."""
    try:
        change, path, value = edit
        holder: Any = {"": state}
        key: Any = ""
        for index in path:
            inner = holder[key]
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            if not isinstance(inner, dict | list) or not keys:
                break
            holder, key = inner, keys[int(index) % len(keys)]
        if holder is state or key != "":
            _change(holder, key, change, value)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        RuntimeError,
        OverflowError,
        AttributeError,
    ):
        return


def _change(holder: Any, key: Any, change: str, value: Any) -> None:
    if change == "delete":
        del holder[key]
    elif change == "rename":
        holder[value if isinstance(value, str | int | float | None) else "x"] = holder.pop(key)
    elif change == "copy":
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        holder[key] = holder[keys[hash(str(value)) % 1000 % len(keys)]]
    else:
        holder[key] = _value(value, holder[key])


def _value(value: Any, old: Any) -> Any:
    """Return the value that a plain one stands for."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, given),) = value.items()
    if kind == "tensor":
        dtype, shape, fill = given
        if len(shape) > 3 or any(n > 100 for n in shape):
            return value
        return torch.full(shape, fill, dtype=getattr(torch, dtype))
    if not isinstance(old, torch.Tensor):
        return value
    if kind == "cast":
        return old.to(getattr(torch, given))
    if kind == "flip":
        data = old.clone().reshape(-1)
        bits = data.view(torch.uint8)
        if len(bits):
            bits[given % len(bits)] ^= 0x81
        return data.reshape(old.shape)
    return _layout(old, given)


def _layout(old: torch.Tensor, kind: Any) -> Any:
    if kind == "sparse":
        return old.to_sparse()
    if kind == "meta":
        return old.to("meta")
    if kind == "expanded":
        return old.flatten()[:1].expand(old.numel()).reshape(old.shape)
    if kind == "quantized":
        return torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8)
    return old.t() if old.ndim == 2 else old
