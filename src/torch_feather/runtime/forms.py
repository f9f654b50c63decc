"""The forms in which a network can run: with the whole batch, or with one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from .batch import BatchPlan
from .chunks import concatenated, for_one_sample, split
from .independence import samples_of
from .layer import Layer
from .memory import return_freed_memory
from .plan import Plan, Sparse, can_run_sparse
from .recurrent import Recurrent
from .timing import milliseconds
from .tuning import LayerTuning, Tuning, distinct_ways, tune_layer
from .workspace import WorkspacePool

CLEAR = 0.95  # one sample at a time is chosen without tuning the whole batch
TOLERANCE = 1e-4  # of the largest output; sums are taken in other orders


class Form:
    """A graph for a number of samples: its layers are tuned, and the network is timed.

    Args:
        graph: a captured graph.
        values: values of the nodes that do not depend on the input.
        batch: number of samples.
        threads: number of threads of sparse layers.
        chunk_size: the same number, if these samples are a part of the batch.

    Example:
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(2, 3)
        >>> _ = graph.output(x)
        >>> form = Form(graph, {}, batch=2, threads=1)
        >>> form.tuned({})
        {}
    """

    def __init__(
        self,
        graph: Graph,
        values: Mapping[Node, Any],
        batch: int,
        threads: int,
        chunk_size: int | None = None,
    ) -> None:
        self.graph, self.values, self.batch = graph, values, batch
        self.threads, self.chunk_size = threads, chunk_size
        self.constants = {node.name: value for node, value in values.items()}
        first = next(n for n in graph.nodes if n.op == "placeholder")
        self.symbol = first.meta["val"].shape[0]  # of the batch, or its number
        self.layers = {
            n: n.target
            for n in graph.nodes
            if isinstance(n.target, Layer | Recurrent) and can_run_sparse(n, self.symbol)
        }
        self._plans: dict[tuple[str, ...], Plan] = {}

    def plan(self, tuning: Tuning) -> Plan:
        """Return the steps of the network."""
        return self._plan([x for x in self.layers.values() if tuning[x.name].sparse])

    def _plan(self, sparse: Sequence[Any]) -> Plan:
        names = tuple(layer.name for layer in sparse)
        if names not in self._plans:
            self._plans[names] = Plan.build(self.graph, sparse, self.values)
        return self._plans[names]

    def tuned(self, known: Tuning) -> dict[str, LayerTuning]:
        """Return how each layer runs; time those that are not known."""
        steps = self._plan(list(self.layers.values())).steps
        return_freed_memory()
        places: dict[Any, Sparse] = {s.layer: s for s in steps if isinstance(s, Sparse)}
        times, sizes, found = dict[Any, Any](), (self.batch, self.threads), {}
        for node, layer in self.layers.items():
            if (tuning := known.get(layer.name)) is None:
                place = places.get(layer.kernel_form)
                timed = tune_layer(node, layer, *sizes, place, times)
                tuning = replace(timed, chunk_size=self.chunk_size)
            found[layer.name] = tuning
        return found

    def fastest(self, given: Sequence[Tensor]) -> dict[str, LayerTuning]:
        """Return how the layers of the fastest network run.

        The whole network is timed with each layer in its faster way, with all layers sparse, and
        with all layers dense. The conversion between the layouts of sparse and dense layers takes
        time, too. The times of single layers do not include it.

        Args:
            given: inputs of the graph.
        """

        def time(tuning: Tuning) -> float:
            took = milliseconds(partial(self.pool(tuning), *given), min_total=100.0)
            for layer in self.layers.values():
                layer.free_packed()
            return took

        found: Tuning = min(_ways(self.tuned({})), key=time)
        return dict(found)

    def pool(self, tuning: Tuning) -> WorkspacePool:
        """Return the function that executes the graph."""
        tiles = {name: layer.tile for name, layer in tuning.items()}
        plan = BatchPlan(self.plan(tuning), self.constants, self.batch, tiles, self.threads)
        return WorkspacePool(plan)


def _ways(tuned: Tuning) -> list[Tuning]:
    """Return the ways to run a network: as tuned, all layers sparse, and all layers dense."""
    sparse = {n: replace(t, sparse=t.sparse_ms is not None) for n, t in tuned.items()}
    dense = {n: replace(t, sparse=False) for n, t in tuned.items()}
    return distinct_ways(tuned, sparse, dense)


class _Run:
    """Processes a batch in a form; keeps the output.

    Args:
        form: the form.
        tuning: how its layers run.
        given: the batch.
    """

    def __init__(self, form: Form, tuning: Tuning, given: Sequence[Tensor]) -> None:
        self.form, self.tuning, self.given = form, tuning, given
        self.output: list[Any] = []
        self._pool = form.pool(tuning)

    def __call__(self) -> None:
        parts = [self._pool(*part) for part in split(self.given, self.form.chunk_size)]
        self.output = parts[0] if len(parts) == 1 else list(map(concatenated, *parts))

    def milliseconds(self, give_up: float = float("inf")) -> float:
        """Return the time of the batch. Dense layers pack their weights for the size of a batch."""
        for layer in self.form.layers.values():
            layer.free_packed()
        self()  # kernels are compiled, and tables built
        return milliseconds(self, min_total=100.0, give_up=give_up)

    def agrees(self, other: _Run) -> bool:
        """Return whether the last outputs of both are equal but for rounding."""
        pairs = zip(tree_leaves(self.output), tree_leaves(other.output), strict=True)
        return all(_are_close(a, b) for a, b in pairs if isinstance(a, Tensor))


def _are_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    largest = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)


def choose_form(
    whole: Form, given: Sequence[Tensor], known: Tuning | None, may_split: bool
) -> tuple[Form, dict[str, LayerTuning]]:
    """Return the fastest form of a network, and how its layers run.

    Layers are first tuned for one sample, which takes less time than for the batch. If the batch is
    clearly faster one sample at a time, they are not tuned for the whole batch.

    Args:
        whole: the form that processes the batch at once.
        given: the batch.
        known: earlier tuning results, which determine the form; None to time all forms.
        may_split: whether to process one sample at a time if the graph keeps samples apart.

    Example:
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(2, 3)
        >>> _ = graph.output([x])
        >>> choose_form(Form(graph, {}, 2, threads=1), [torch.ones(2, 3)], {}, True)[0].batch
        2
    """
    names = [layer.name for layer in whole.layers.values()]
    if known is not None:
        sizes = {found.chunk_size for name in names if (found := known.get(name))}
        single = _single(whole) if may_split and sizes == {1} else None
        form = single or whole
        return form, form.tuned(known)
    single = _single(whole) if may_split and names else None
    if single is None:
        return whole, whole.fastest(given)
    first = [x[:1] for x in given]
    tuning = single.fastest(first)
    run = _Run(single, tuning, given)
    ms = run.milliseconds()
    # A layer that is slower sparse for one sample may be faster for several, as in a perceptron.
    others = [_Run(whole, way, given) for way in _ways(tuning)]
    whole_ms = min(other.milliseconds(give_up=1.5 * ms) for other in others)
    agrees = run.agrees(others[0])  # the graph shows it: this would be a defect of `samples_of`
    if agrees and ms < CLEAR * whole_ms:
        return single, tuning
    own = whole.fastest(given)
    if agrees and ms < _Run(whole, own, given).milliseconds():
        return single, tuning
    return whole, own


def _single(whole: Form) -> Form | None:
    """Return the form that processes one sample; None if samples may depend on each other."""
    samples = samples_of(whole.graph, whole.values, whole.symbol)
    if samples is None or whole.batch == 1:
        return None
    graph, values = whole.graph, whole.values
    if isinstance(whole.symbol, int):
        graph, values = for_one_sample(graph, values, samples)
    form = Form(graph, values, 1, whole.threads, chunk_size=1)
    names = ([layer.name for layer in f.layers.values()] for f in (whole, form))
    return form if len({*map(tuple, names)}) == 1 else None
