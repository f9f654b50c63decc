"""The passes over the weights on a CPU: reference, plain and compiled forms have the same bits."""

import functools
import gc
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import torch_feather as feather
from torch_feather import devices, scalars, threads
from torch_feather.methods import method_options
from torch_feather.methods.learned.changes import sums_of_changes
from torch_feather.operators import Hard, Power
from torch_feather.roots import cube_root, square_root
from torch_feather.selection.bracket import Bracket
from torch_feather.selection.cpu import TensorScores, select_scores
from torch_feather.selection.reference import select_reference
from torch_feather.threads import for_each
from torch_feather.weights import checksum, compiled, passes
from torch_feather.weights.exchange import bracket_of, read_latent
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.passes import (
    count_pruned,
    pruned_mask,
    row_sums,
    write_effective,
)
from torch_feather.weights.rows import has_rows
from torch_feather.weights.segments import Segment
from torch_feather.weights.selecting import select_each, select_weights
from torch_feather.weights.sums import Recorded

OPERATORS = [Hard(), Power(1.0), Power(2.0), Power(3.0)]
OTHER_EXPONENTS = [Power(p) for p in (1.5, 2.5, 4.0, 7.3)]  # without compiled passes
FORMS = ["plain", "compiled"]
WIDTHS = {"compiled, 4": 4, "compiled, 8": 8}


@functools.cache
def kernels_of(width):
    return compiled.Kernels(width)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Use one form of the passes."""
    if request.param == "plain":
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    elif compiled.kernels() is None:
        pytest.skip("llvmlite is not installed")
    elif request.param in WIDTHS:
        found = kernels_of(WIDTHS[request.param])
        monkeypatch.setattr(compiled, "kernels", lambda: found)
    return request.param


SHAPES = ((3,), (301, 401), (5, 7), (20, 11, 3, 3), (1,))


def make_weights(seed, *, ties=False, special=False, dtype=torch.float32, shapes=SHAPES):
    """Return weights of several shapes, more than one block, with a tensor of few elements."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if ties:
        tensors = [(8 * t).round() / 8 for t in tensors]
    tensors = [t.to(dtype) for t in tensors]
    if special:
        flat = tensors[1].view(-1)
        flat[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 0.0, -0.0])
    return LatentWeights(tensors)


def expected_weights(weights, segment, operator):
    """Return the effective weights by their definition: PyTorch operators on whole tensors."""
    found = []
    for view, (start, _) in zip(weights.views, weights.local_spans, strict=True):
        wide = view.to(weights.wide)
        pruned = segment.pruned(wide.abs().flatten(), start).view(view.shape)
        found.append(torch.where(pruned, 0.0, operator(wide, segment.threshold)).to(view.dtype))
    return found


def same_bits(a, b):
    """Return whether two tensors are bitwise identical, except for the payload of NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
    return bool(equal.all())


def written(kind, fraction, operator):
    """Return weights, the segment of all of them, and the effective weights that were written."""
    weights = make_weights(1, ties=kind == "ties", special=kind == "special")
    k = torch.tensor(int(fraction * weights.size))
    scale = torch.tensor(1.7) if kind == "scaled" else None
    scales = None if scale is None else [scale] * len(weights.views)
    segment = Segment(0, weights.size, select_weights(weights, k, scales), scale)
    out = Recorded([torch.full_like(view, 7.0) for view in weights.views])
    write_effective(weights, [segment], operator, out)
    return weights, segment, out


@pytest.mark.parametrize("form", [*FORMS, *WIDTHS], indirect=True)
@pytest.mark.parametrize("operator", [*OPERATORS, *OTHER_EXPONENTS], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "special", "scaled"])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.95, 1.0])
def test_effective_weights_have_the_bits_of_their_definition(form, operator, kind, fraction):
    weights, segment, out = written(kind, fraction, operator)
    for i, (u, expected) in enumerate(
        zip(out, expected_weights(weights, segment, operator), strict=True)
    ):
        assert same_bits(u, expected)
        assert out.sums.checksum(weights, i) == checksum.checksum(u)
    assert out.sums.nonfinite == any(not bool(u.isfinite().all()) for u in out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_other_types_agree_with_their_definition(operator, dtype):
    weights = make_weights(2, dtype=dtype)
    segment = Segment(0, weights.size, select_weights(weights, torch.tensor(100_000)))
    out = [torch.empty_like(view) for view in weights.views]
    write_effective(weights, [segment], operator, out)
    for u, expected in zip(out, expected_weights(weights, segment, operator), strict=True):
        assert torch.equal(u == 0, expected == 0)
        torch.testing.assert_close(u, expected, rtol=1e-14 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "special", "scaled"])
def test_inductor_keeps_the_bits_of_the_form_of_pytorch(operator, kind):
    weights = make_weights(1, ties=kind == "ties", special=kind == "special")
    scale = torch.tensor(1.7) if kind == "scaled" else None
    scales = None if scale is None else [scale] * len(weights.views)
    k = torch.tensor(int(0.6 * weights.size))
    segment = Segment(0, weights.size, select_weights(weights, k, scales), scale)
    found, expected = [[torch.ones_like(view) for view in weights.views] for _ in range(2)]
    passes._write_device(weights, [segment], operator, expected)
    torch._dynamo.reset()
    compiled_pass = torch.compile(passes._write_device, dynamic=False)
    compiled_pass(weights, [segment], operator, found)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


def test_an_operator_without_a_compiled_pass_keeps_all_weights_before_pruning_begins(form):
    weights = make_weights(3)
    segment = Segment(0, weights.size, select_weights(weights, torch.tensor(0)))
    out = [torch.zeros_like(view) for view in weights.views]
    write_effective(weights, [segment], Power(4.0), out)
    assert all(map(torch.equal, out, weights.views))


def test_a_process_without_weights_has_no_passes(form):
    weights, out = LatentWeights([torch.empty(0, 4)]), Recorded([torch.empty(0, 4)])
    write_effective(weights, [], Power(3.0), out)
    assert out.sums.checksums.shape == (0,)
    out.sums = None
    changes = sums_of_changes(weights, Hard(), lambda i: torch.ones(()), out, list(out))
    assert changes.tolist() == [0.0]
    assert out.sums.checksums.shape == (0,)


def test_weights_below_the_smallest_normal_number_are_kept(form):
    weights = LatentWeights([torch.tensor([1e-44, 2e-44, 3e-44, 4e-44])])
    segment = Segment(0, 4, select_weights(weights, torch.tensor(1)))
    out = torch.empty(4)
    write_effective(weights, [segment], Power(3.0), [out])
    assert torch.equal(out != 0, torch.tensor([False, True, True, True]))


def test_the_cube_root_is_within_one_unit_in_the_last_place():
    first, last = (np.float32(x).view(np.int32) for x in (0.125, 1.0))
    bits = np.append(np.arange(first, last, 7), [first, last])  # all exponents behave alike
    x = bits.astype(np.int32).view(np.float32)
    found = cube_root(torch.from_numpy(x)).numpy()
    error = np.abs(found - np.cbrt(x.astype(np.float64))) / np.spacing(found)
    assert error.max() < 0.74
    assert found[-1] == 1.0
    assert cube_root(torch.zeros(1)).item() == 0.0


def test_the_square_root_is_correctly_rounded():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(square_root(x), x.double().sqrt().float())


def test_the_roots_have_derivatives():
    x = torch.tensor([0.3, 0.9], requires_grad=True)
    (gradient,) = torch.autograd.grad(cube_root(x).sum(), x)
    torch.testing.assert_close(gradient, x.detach() ** (-2 / 3) / 3)


# Selection


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.floats(0, 1), st.floats(0, 3), st.floats(0, 0.05))
def test_a_bracket_never_changes_the_cutoff(seed, ties, fraction, value, width):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(70_000, generator=generator).abs()
    if ties:
        scores = (4 * scores).round() / 4
    k = int(fraction * scores.numel())
    found = select_scores(TensorScores(scores), k, Bracket(value, width))
    for a, b in zip(found, select_reference(scores, k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["nan", "zeros", "equal", "inf"])
@pytest.mark.parametrize("fraction", [0.1, 0.9, 1.0])
def test_a_bracket_finds_scores_that_are_not_ordinary(form, kind, fraction):
    scores = torch.randn(70_000, generator=torch.Generator().manual_seed(3)).abs()
    scores[:63_000] = {"nan": torch.nan, "zeros": 0.0, "equal": 0.5, "inf": torch.inf}[kind]
    k = int(fraction * scores.numel())
    bracket = Bracket()
    for _ in range(3):  # from a sample, then from the bracket
        found = select_scores(TensorScores(scores), k, bracket)
        for a, b in zip(found, select_reference(scores, k), strict=True):
            assert torch.equal(a, b)


def test_selections_per_layer_after_a_copy_are_those_of_the_copied_weights(form):
    shapes = [(400, 401), (90, 11), (300, 301)]
    weights, other = (
        LatentWeights([torch.randn(s, generator=torch.Generator().manual_seed(n)) for s in shapes])
        for n in (4, 5)
    )
    counts = (0.9 * weights.sizes).long()
    select_each(weights, counts)  # now a bracket of each layer is known
    read_latent(weights, range(len(weights.views)), other.views)
    assert sorted(weights.collected) == [weights.spans[0], weights.spans[2]]  # one is small
    for found, expected in zip(
        select_each(weights, counts), select_each(other, counts), strict=True
    ):
        assert all(map(torch.equal, found, expected))
    read_latent(weights, range(len(weights.views)), other.views)
    read_latent(weights, range(len(weights.views)), other.views)
    assert not weights.collected  # no selection since the last copy, so none is expected


def test_a_selection_after_a_copy_is_that_of_the_copied_weights(form):
    weights, other = make_weights(4), make_weights(5)
    k = torch.tensor(int(0.9 * weights.size))
    select_weights(weights, k)  # now a bracket is known
    read_latent(weights, range(len(weights.views)), other.views)
    assert weights.collected is not None
    for a, b in zip(select_weights(weights, k), select_weights(other, k), strict=True):
        assert torch.equal(a, b)


def test_a_copy_that_has_no_room_for_its_scores_changes_no_cutoff(form, monkeypatch):
    monkeypatch.setattr(compiled, "ROOM", 0)
    weights, other = make_weights(4), make_weights(5)
    k = torch.tensor(weights.size // 2)
    select_weights(weights, k)
    bracket_of(weights, 0, weights.size).width = 0.2  # a sixth of the weights are within
    read_latent(weights, range(len(weights.views)), other.views)
    assert bool(weights.collected) == (form == "plain")
    assert all(map(torch.equal, weights.views, other.views))
    for a, b in zip(select_weights(weights, k), select_weights(other, k), strict=True):
        assert torch.equal(a, b)


def test_what_a_copy_collected_is_not_used_after_another_change(form):
    weights = make_weights(6)
    k = torch.tensor(int(0.9 * weights.size))
    select_weights(weights, k)
    read_latent(weights, range(len(weights.views)), [view.clone() for view in weights.views])
    weights.views[1].mul_(1.001)
    found = select_weights(weights, k)
    fresh = select_weights(LatentWeights([view.clone() for view in weights.views]), k)
    for a, b in zip(found, fresh, strict=True):
        assert torch.equal(a, b)


def test_a_copy_follows_parameters_in_other_memory(form):
    weights, other = make_weights(4), make_weights(5)
    parameters = [torch.nn.Parameter(view.clone()) for view in weights.views]
    every = range(len(parameters))
    read_latent(weights, every, parameters)
    for parameter, view in zip(parameters, other.views, strict=True):
        parameter.data = view.clone()
    read_latent(weights, every, parameters)
    assert all(map(torch.equal, weights.views, other.views))
    parameters[1].data = torch.ones_like(weights.views[1].t()).t()  # another layout
    read_latent(weights, every, parameters)
    assert bool((weights.views[1] == 1).all())


@pytest.mark.parametrize("zeros", [None, [3, 0, 11]])
def test_numbers_of_a_step_on_a_host_are_those_of_operators(zeros, monkeypatch):
    targets, rests = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)).double()
    zeros = None if zeros is None else torch.tensor(zeros)

    def numbers():
        found = []
        for step in (torch.tensor(n) for n in (0, 7, 39, 50)):
            target = scalars.scheduled(step, targets, rests, zeros, 1001)
            found += [target, scalars.count_of(target, 1001), scalars.progress(step, 41)]
        return [*found, scalars.count_of(torch.tensor(0.5).double(), 5)]  # half to even

    on_host = numbers()
    monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    for a, b in zip(on_host, numbers(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# Threads and memory


@pytest.mark.parametrize("form", [*FORMS, *WIDTHS], indirect=True)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(form, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = trained_weights()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, trained_weights())


def trained_weights():
    """Return a weight tensor after some steps of sparse training."""
    torch.manual_seed(0)
    model = torch.nn.Linear(700, 600)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    feather.sparsify(model, optimizer, sparsity=0.95, total_steps=6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return model.weight.detach()


def test_an_error_in_a_thread_is_raised():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            for_each(lambda x: 1 / x, [1, 0])
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allocation", ["global", "sigma", "erk"])
def test_a_step_of_shards_holds_no_copy(mesh, allocation, dtype):
    """Magnitudes of all weights would be a copy of them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(700, 700, bias=False) for _ in range(16)))
    for layer in model:
        part = torch.randn(layer.weight.shape, dtype=dtype)
        layer.weight = torch.nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]))
        layer.weight.grad = DTensor.from_local(torch.randn_like(part), mesh, [Shard(0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    feather.sparsify(model, optimizer, sparsity=0.9, total_steps=50, allocation=allocation)
    optimizer.step()
    assert peak_memory(optimizer.step) < 0.5 * 4 * 16 * 700**2


def peak_memory(call, before=lambda: None):
    """Return the most memory held at once during a call, in bytes; its result counts.

    What `before` allocates and keeps counts too. NumPy's and PyTorch's peaks are added.
    """
    gc.collect()  # so that nothing older is freed meanwhile
    tracemalloc.start()  # memory of NumPy
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        kept = before()
        tracemalloc.reset_peak()
        with torch.profiler.record_function("call"):
            result = call()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept, result
    events = list(profiler.profiler.kineto_results.events())
    [begin] = [event.start_ns() for event in events if event.name() == "call"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
        if event.start_ns() >= begin:
            most = max(most, held)
    return most + numpy_peak


LAYERS = 40


def peak_of_a_training_step(method, width=640, **options):
    """Return the peak memory of a step in copies of the weights, with all that earlier steps keep.

    Forward and backward pass, gradients and momentum count; the model does not.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(2, width)
    threads._memory.clear()  # what other tests left would not be counted

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def begin():
        if method != "dense":
            given = {"sparsity": 0.95, "total_steps": 10_000}
            if "schedule" in method_options(method):
                given["schedule"] = "constant"
            feather.sparsify(model, optimizer, method, **(given | options))
        for _ in range(16):  # after a jump of the sparsity, the bracket narrows within some steps
            step()

    return peak_memory(step, begin) / (4 * LAYERS * width**2)


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("feather", {"theta": 1.0}, 1.10),
        # There is room for some of the candidates' values.
        ("feather", {"theta": 1.0, "sparsity": 0.88}, 1.10),
        # The sparsity rises fast, so brackets are wide.
        ("feather", {"theta": 1.0, "schedule": "cubic", "total_steps": 100}, 1.10),
        # A gradient of one layer more, while its hook runs.
        ("feather", {"theta": 0.5}, 1.10 + 1 / LAYERS),
        *(
            pytest.param(method, {}, most, marks=pytest.mark.slow, id=method)
            for method, most in {
                "feather-ham": 1.10,
                "hard-ste": 1.10,
                "soft-ste": 1.10,
                "gmp": 1.10 + 1 / LAYERS,
                "st3": 1.11 + 1 / LAYERS,  # sums of rows
                "asl": 1.10,
                "asl+": 1.10,
                "str": 1.3,
                "spartan": 5.75,
                "probmask": 6.25,
            }.items()
        ),
    ],
)
def test_a_step_holds_few_copies_of_the_weights_more_than_a_dense_step(form, method, options, most):
    """One copy is the latent weights; the rest is temporary and kept memory of the passes."""
    peak_of_a_training_step(method, width=100, **options)  # imports, and kernels are compiled
    more = peak_of_a_training_step(method, **options) - peak_of_a_training_step("dense")
    print(f"{form} {method} {options}: {more:.3f}")
    assert 1.0 <= more < most


@pytest.mark.parametrize(
    ("call", "copies"), [("state_dict", 1), ("masks", 0.25), ("report", 0), ("finalize", 0)]
)
def test_calls_between_steps_hold_few_copies(call, copies):
    model = torch.nn.Sequential(*(torch.nn.Linear(600, 600, bias=False) for _ in range(10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=1)
    optimizer.step()
    assert peak_memory(getattr(sparsifier, call)) < (copies + 0.25) * 4 * 10 * 600**2


def test_finalize_of_a_modified_model_holds_two_copies():
    model = torch.nn.Sequential(*(torch.nn.Linear(600, 600, bias=False) for _ in range(10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=1)
    optimizer.step()
    best = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    assert peak_memory(sparsifier.finalize) < 2.25 * 4 * 10 * 600**2
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("k", [0, 1, 5_000, 120_000])
@pytest.mark.parametrize("ties", [False, True])
def test_masks_are_those_of_the_cutoff(k, ties):
    weights = make_weights(7, ties=ties)
    segment = Segment(0, weights.size, select_weights(weights, torch.tensor(k)))
    for i, view in enumerate(weights.views):
        expected = segment.pruned(view.abs().flatten(), weights.local_spans[i][0])
        assert torch.equal(pruned_mask(weights, [segment], i), expected.view(view.shape))


@pytest.mark.parametrize("k", [0, 5_000, 120_000])
@pytest.mark.parametrize("ties", [False, True])
def test_counts_are_those_of_the_masks(k, ties):
    weights = make_weights(7, ties=ties)
    segments = [Segment(0, weights.size, select_weights(weights, torch.tensor(k)))]
    masks = [pruned_mask(weights, segments, i) for i in range(len(weights.views))]
    assert count_pruned(weights, segments).tolist() == [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_have_the_sums_and_factors_of_their_definition(form, dtype, channels_last):
    generator = torch.Generator().manual_seed(8)
    shapes = [(7, 3, 3, 3), (90, 128, 5, 5), (3, 90_000, 1, 1)]  # rows within and beyond blocks
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors = [(8 * t).round() / 8 for t in tensors]  # ties, so that masks change within a block
    if channels_last:
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    weights = LatentWeights(tensors)
    k = torch.tensor(int(0.8 * weights.size) + 11)
    segments = [Segment(0, weights.size, select_weights(weights, k))]
    factors = {}
    for i, w in enumerate(weights.views):
        assert has_rows(weights, i)
        magnitudes = w.abs().double()
        kept = magnitudes.masked_fill(pruned_mask(weights, segments, i), 0.0)
        expected = torch.stack([x.flatten(1).sum(1) for x in (kept, magnitudes)], 1)
        [found] = row_sums(weights, segments, [i])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        factors[i] = torch.rand(len(w), generator=generator).to(weights.wide) + 0.5
    plain, scaled = ([torch.empty_like(w) for w in weights.views] for _ in range(2))
    write_effective(weights, segments, Power(1.0), plain)
    scaled = Recorded(scaled)
    write_effective(weights, segments, Power(1.0), scaled, factors)
    for i, (u, v) in enumerate(zip(plain, scaled, strict=True)):
        assert torch.equal(v, (u * factors[i].view(-1, 1, 1, 1)).to(dtype))
        assert scaled.sums.checksum(weights, i) == checksum.checksum(v)
        assert scaled.sums.versions[i] == v._version
