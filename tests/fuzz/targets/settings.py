"""Settings: files, assignments and options, and the start of a run with what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import yaml

from torch_feather import available_methods
from torch_feather.errors import ConfigurationError
from torch_feather.recipes import available_recipes, recipe_values
from torch_feather.training import Config
from torch_feather.training.config import load_config, parse_assignments, resolve_config, to_yaml

from ..mutate import VALUES, WORDS, mutate_bytes, mutate_tree
from .base import Target, refused

YAML_WORDS = (
    *(b"&a ", b"*a", b"!!python/object:os.system ", b"!!binary ", b"<<: ", b"? ", b"- ", b": "),
    *(b"\n  ", b"[", b"]", b"{", b"}", b"|", b">", b"%YAML 1.1\n", b"---\n", b"...", b"# ", b"'"),
    *(b"2001-01-01", b"1:30:00", b"0x10", b"0o7", b"1_000", b".inf", b"-.inf", b".nan", b"~"),
    *(b"yes", b"off", b"=", b"1e", b"1e5", b"9" * 400, b"\t", b"\xef\xbb\xbf", b"\xc2\x85"),
    *(b"options.theta: linear(1, 0)", b"seed", b"optimizer.lr: 1", b"data:", b"epochs: "),
    *WORDS,
)


class Settings(Target):
    traced = ("torch_feather", "yaml")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "config.yaml"
        self.values = (*VALUES, *available_methods(), "dense", "resnet8", "timm/x", "a.b:c", "2:4")

    def seeds(self) -> list[bytes]:
        found = [to_yaml(Config()).encode()]
        found += [yaml.safe_dump(recipe_values(name)).encode() for name in available_recipes()]
        found += [f"method: {name}\nsparsity: 0.5\n".encode() for name in available_methods()]
        found += [to_yaml(Config(method=m).written_out()).encode() for m in available_methods()]
        found += [b"optimizer: {arguments: {betas: [0.9, 0.95]}, layers: {'fc.*': {lr: 10}}}"]
        found += [b"optimizer.lr=0.05", b"options.theta=linear(1, 0)", b"include=[a, 'b*']"]
        return [
            *found,
            b"options: {p: 2.5, theta: 0.5}\ninclude: ['*conv*']\nexclude: [fc.weight]\n",
        ]

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, content, others, YAML_WORDS)[:4096]
        try:
            tree = yaml.safe_load(content)
            text = yaml.safe_dump(mutate_tree(rng, tree, self.values), allow_unicode=True)
            return text.encode()[:4096]
        except Exception:  # not plain YAML, or values that YAML cannot hold
            return mutate_bytes(rng, content, others, YAML_WORDS)[:4096]

    def check(self, content: bytes) -> bool:
        self.path.write_bytes(content)
        text = content.decode("utf-8", "surrogateescape")
        doors = (
            lambda: self._read(lambda: load_config(self.path)),
            lambda: resolve_config(file=self.path),
            lambda: resolve_config(overrides=parse_assignments([text])),
            lambda: resolve_config(overrides=parse_assignments(text.split("\n"))),
        )
        results = [refused(door, ConfigurationError) for door in doors]
        return not all(results)

    def _read(self, load) -> None:
        """What is accepted can be stored, and read again."""
        config = load()
        self.path.with_name("again.yaml").write_text(to_yaml(config), encoding="utf-8")
        again = load_config(self.path.with_name("again.yaml"))
        assert to_yaml(again) == to_yaml(config)
        config.written_out()
