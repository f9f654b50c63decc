"""Reading weights in another thread while training goes on."""

import copy
import threading

import pytest
import torch
from torch import nn

import torch_feather as feather

STEPS = 60


def make(optimizer_class=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    settings = {"sparsity": 0.9, "total_steps": STEPS, "schedule": "constant"} | settings
    return model, optimizer, feather.sparsify(model, optimizer, **settings)


def backward(model, optimizer, i):
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(i))
    optimizer.zero_grad()
    model(x).square().mean().backward()


class PausedSGD(torch.optim.SGD):
    """Waits within each step until another thread has had its turn."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def step(self, closure=None):
        result = super().step(closure)
        self.inside.set()
        assert self.go_on.wait(timeout=60)
        return result


def in_a_step(model, optimizer, read):
    """Call `read` in another thread while the optimizer steps, and let the step end then."""
    read_values = []

    def other():
        assert optimizer.inside.wait(timeout=60)
        read_values.append(read())
        optimizer.go_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    backward(model, optimizer, 0)
    optimizer.step()
    thread.join(timeout=60)
    return read_values[0]


def test_another_thread_sees_latent_weights_during_a_step():
    """What the documentation says: without a lock, a read is not of the sparse model."""
    model, optimizer, sparsifier = make(PausedSGD)
    seen = in_a_step(model, optimizer, lambda: model[0].weight.detach().clone())
    assert torch.equal(seen, sparsifier.latent_weights()["0.weight"])
    assert int((seen == 0).sum()) == 0
    assert feather.sparsity(model) == 0.9


def test_a_thread_that_waits_for_the_lock_reads_after_the_step():
    model, optimizer, _ = make(PausedSGD)
    lock, waits, seen = threading.Lock(), threading.Event(), []

    def read():
        assert optimizer.inside.wait(timeout=60)
        waits.set()
        with lock:
            seen.append(feather.sparsity(copy.deepcopy(model)))

    def release():
        assert waits.wait(timeout=60)
        optimizer.go_on.set()

    threads = [threading.Thread(target=f) for f in (read, release)]
    for thread in threads:
        thread.start()
    backward(model, optimizer, 0)
    with lock:
        optimizer.step()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == [0.9]


@pytest.mark.parametrize("method", ["feather", "str"])
def test_a_thread_with_the_lock_reads_the_weights_of_one_step(method):
    """Every copy is that of a step, bit for bit, also of the optimizer's state; training is as
    without the other thread.
    """
    options = {} if method == "feather" else {"schedule": "cubic"}
    alone, optimizer, _ = make(method=method, **options)
    after = []  # the weights after each step
    for i in range(STEPS):
        after.append([p.detach().clone() for p in alone.parameters()])
        backward(alone, optimizer, i)
        optimizer.step()
    after.append([p.detach().clone() for p in alone.parameters()])

    model, optimizer, sparsifier = make(method=method, **options)
    lock, done, copies = threading.Lock(), threading.Event(), []

    def read():
        while not done.is_set():
            with lock:
                values = [p.detach().clone() for p in model.parameters()]
                copies.append((sparsifier.step_count, values, optimizer.state_dict()))

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(STEPS):
        backward(model, optimizer, i)
        with lock:
            optimizer.step()
    done.set()
    thread.join(timeout=60)

    assert all(map(torch.equal, after[-1], model.parameters()))
    assert copies
    assert all(all(map(torch.equal, values, after[count])) for count, values, _ in copies)
    for count, values, state in copies[:: len(copies) // 20 + 1]:
        other, restarted, resumed = make(method=method, **options)
        other.load_state_dict(model.state_dict())
        restarted.load_state_dict(state)
        assert resumed.step_count == count
        assert torch.equal(other[0].weight, values[0])
