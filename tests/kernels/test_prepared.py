"""Prepared calls: bit for bit what the general calls give, and nothing at all where a fact has changed."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from gradlens import kernels
from gradlens.kernels import batched, native, reference
from gradlens.kernels.prepared import GeneralPrepared, NativePrepared
from tests.kernels.test_light import odd

SHAPES = [(3, 4), (), (0,), (70000,), (5,), (33, 40)]
KERNEL = native.load()


def bits(tensor):
    return tensor.contiguous().view(torch.int64)


def some(dtype=torch.float32, seed=0):
    sizes = [math.prod(shape) for shape in SHAPES]
    whole = [odd(max(size, 50), dtype, seed + i) for i, size in enumerate(sizes)]
    return [w[:size].clone().view(shape) for w, size, shape in zip(whole, sizes, SHAPES, strict=True)]


def same(some, others):
    return all(torch.equal(bits(a.double()), bits(b.double())) for a, b in zip(some, others, strict=True))


def fixed(tensors):
    return kernels.StableTensors([t.detach().clone() for t in tensors])


class Case:
    """Parameters with gradients, gradlens' rooms, and the call that is prepared for them."""

    def __init__(self, dtype=torch.float32, flips=True, updates=True, general=False):
        self.weights = [nn.Parameter(w) for w in some(dtype, 10)]
        self.previous = fixed(some(dtype, 20)) if flips else None
        self.before = fixed(some(dtype, 30)) if updates else None
        if general:
            self.call = GeneralPrepared(kernels._backend(self.weights), self.weights, self.previous, self.before)
        else:
            self.call = kernels.prepare(self.weights, self.previous, self.before)
            assert isinstance(self.call, NativePrepared)


@pytest.mark.parametrize("general", [False, True], ids=["native", "general"])
@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("flips", "updates"), [(True, True), (True, False), (False, True), (False, False)])
def test_three_steps_give_what_the_general_calls_give(general, dtype, detail, flips, updates):
    """Rows, samples, the last gradients and the copy of the weights, bit for bit, step after step."""
    case = Case(dtype, flips, updates, general)
    previous = fixed(case.previous) if flips else None
    for step in range(3):
        gradients = some(dtype, 100 * step)
        wanted = kernels.summarize(gradients, case.weights, previous, previous, detail)
        reading = case.call.read(gradients, detail)
        assert torch.equal(bits(reading.rows), bits(wanted))
        assert torch.equal(bits(reading.gradient_samples), bits(kernels.sample(gradients)))
        assert torch.equal(bits(reading.weight_samples), bits(kernels.sample(case.weights)))
        if flips:
            assert same(case.previous, gradients)
        assert case.call.unchanged(gradients) == (True, True)
        with torch.no_grad():
            for w, g in zip(case.weights, gradients, strict=True):
                w -= 0.1 * g
        if updates:
            assert torch.equal(
                bits(case.call.compare(gradients)), bits(kernels.compare(gradients, case.before, case.weights))
            )
        else:
            assert case.call.compare(gradients) is None


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_samples_of_a_tensor_that_threads_share_are_those_of_one_thread(threads, monkeypatch):
    """Whichever thread comes last to a tensor that is cut between them, all its samples stay."""
    monkeypatch.setattr(native, "THREADED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = Case()
    for step in range(5):
        gradients = some(seed=100 * step)
        reading = case.call.read(gradients)
        assert torch.equal(bits(reading.gradient_samples), bits(kernels.sample(gradients)))
        assert torch.equal(bits(reading.weight_samples), bits(kernels.sample(case.weights)))
        assert case.call.unchanged(gradients) == (True, True)
        assert case.call.compare(gradients) is not None


def test_the_copy_is_of_the_weights_as_they_were_read():
    """So that it is the copy from before the step; and none is made where none is asked for."""
    case = Case()
    was = [w.detach().clone() for w in case.weights]
    case.call.read(some())
    assert same(case.before, was)
    with torch.no_grad():
        case.weights[0].fill_(3)
    case.call.read(some(), copy=False)
    assert same(case.before, was)


def test_what_is_written_behind_the_version_counter_is_noticed():
    """By the samples: of the gradients, and of the weights."""
    case, gradients = Case(), some()
    assert case.call.unchanged(gradients) == (False, False), "nothing was read"
    case.call.read(gradients)
    gradients[3].data.mul_(2)
    assert case.call.unchanged(gradients) == (False, True)
    case.call.read(gradients)
    case.weights[5].data.add_(1)
    assert case.call.unchanged(gradients) == (True, False)


class Odd(torch.Tensor):
    pass


def shrunk():
    tensor = torch.randn(3, 4)
    tensor.untyped_storage().resize_(20)
    return tensor


CHANGES = {
    "another size": lambda g: torch.randn(4, 4),
    "another type": lambda g: g.double(),
    "another order in memory": lambda g: torch.randn(4, 3).t(),
    "a subclass": lambda g: g.as_subclass(Odd),
    "sparse": lambda g: g.to_sparse(),
    "a negative bit": lambda g: torch._neg_view(g),
    "no device": lambda g: g.to("meta"),
    "a storage that is too small": lambda g: shrunk(),
    "missing": lambda g: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_that_is_otherwise_is_refused_and_nothing_is_written(change):
    """The general call takes over from there: the rooms are as they were."""
    case, gradients = Case(), some()
    rooms = [t.clone() for t in (*case.previous, *case.before)]
    gradients[0] = CHANGES[change](gradients[0])
    assert case.call.read(gradients) is None
    assert case.call.unchanged(gradients) == (False, False)
    now = (*case.previous, *case.before)
    assert same(now, rooms)
    assert case.call.read(some()) is not None, "the next step is as before"


def test_a_gradient_of_another_type_without_a_room_is_read():
    """Only where the last one is kept do types have to agree."""
    case = Case(flips=False)
    gradients = some(torch.float64)
    assert torch.equal(bits(case.call.read(gradients).rows), bits(kernels.summarize(gradients, case.weights)))


@pytest.mark.parametrize("move", ["data", "freed", "fewer"])
def test_weights_that_moved_are_refused(move):
    """A parameter whose data were swapped, freed as FSDP1 does, or cut."""
    case, gradients = Case(), some()
    weight = case.weights[0]
    assert case.call.read(gradients) is not None
    if move == "data":
        weight.data = weight.data.clone()
    elif move == "freed":
        weight.data.untyped_storage().resize_(0)
    else:
        weight.data = weight.data[:2]
    assert case.call.compare(gradients) is None
    assert case.call.unchanged(gradients) == (False, False)
    assert case.call.read(gradients) is None


@pytest.mark.parametrize("general", [False, True], ids=["native", "general"])
def test_a_call_goes_on_from_what_a_longer_one_has_read(general):
    """With its samples: it tells what was written since, and compares with the weights that the longer one has copied."""
    case, gradients = Case(general=general), some(seed=1)
    samples, some_rows = case.call.read(gradients).samples, slice(1, 5)
    weights, given = case.weights[some_rows], gradients[some_rows]
    before = kernels.StableTensors(case.before[some_rows])
    if general:
        part = GeneralPrepared(kernels._backend(weights), weights, None, before)
    else:
        part = kernels.prepare(weights, None, before)
    assert part.unchanged(given) == (False, False)
    assert part.take_over(given, samples[some_rows])
    assert part.unchanged(given) == (True, True)
    with torch.no_grad():
        weights[2].sub_(0.25)
    assert part.unchanged(given) == (True, False)
    assert torch.equal(bits(part.compare(given)), bits(kernels.compare(given, case.before[some_rows], weights)))
    given[2].data.mul_(2)
    assert not part.unchanged(given)[0]
    assert part.compare(given) is None
    assert not part.take_over(given[1:], samples[some_rows])


def test_a_gradient_that_was_freed_is_not_read_again():
    """Between backward and the optimizer anything may happen to it."""
    case, gradients = Case(), some()
    case.call.read(gradients)
    gradients[3].untyped_storage().resize_(0)
    assert case.call.unchanged(gradients) == (False, False)
    assert case.call.compare(gradients) is None


def test_gradients_are_not_held():
    """Training frees them when it likes."""
    case, gradients = Case(), some()
    case.call.read(gradients)
    case.call.compare(gradients)
    dead = [weakref.ref(g) for g in gradients]
    del gradients
    gc.collect()
    assert all(ref() is None for ref in dead)


@pytest.mark.parametrize("why", ["another device", "not contiguous", "shared room", "no kernel"])
def test_what_the_kernel_cannot_prepare_is_prepared_from_the_general_calls(why, monkeypatch):
    """The same object, from the calls of another backend."""
    weights, before = [torch.randn(4, 3), torch.randn(5)], [torch.empty(4, 3), torch.empty(5)]
    if why == "not contiguous":
        weights[0] = torch.randn(3, 4).t()
    elif why == "shared room":
        before[1] = before[0].view(-1)[:5]
    elif why == "another device":
        weights, before = ([t.to("meta") for t in tensors] for tensors in (weights, before))
    else:
        monkeypatch.setattr(kernels, "_native", lambda: None)
    call = kernels.prepare(weights, None, kernels.StableTensors(before))
    assert isinstance(call, GeneralPrepared)
    if why != "another device":
        gradients = [torch.randn(w.shape) for w in weights]
        assert torch.equal(bits(call.read(gradients).rows), bits(kernels.summarize(gradients, weights)))


def test_modes_and_lists_of_another_length_are_refused():
    """Under a dispatch mode what is made is no ordinary tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = Case()
    assert case.call.read(some()[:-1]) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert case.call.read(some()) is None


def test_the_general_calls_stay_on_their_device():
    """Whether samples are the same is not asked where the host would have to wait."""
    call = GeneralPrepared(batched, [torch.randn(3)], None, None)
    assert call.unchanged([torch.randn(3)]) == (False, False)
    assert reference.SAMPLES == 16


# --- one parameter at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("flips", [True, False])
def test_a_row_call_gives_what_summarize_gives(dtype, detail, flips):
    """Row and last gradient, bit for bit, step after step, where weights and gradients move in memory too."""
    rooms, seen = kernels.RowRooms(), []
    for at, weight in enumerate(some(dtype, 10)):
        previous, other = (fixed([some(dtype, 20)[at]])[0] if flips else None for _ in range(2))
        call = kernels.prepare_row(weight, previous, rooms)
        for step in range(3):
            g, w = some(dtype, 40 + step)[at], weight.clone()
            row, columns = call.read(g, w, detail), None if other is None else [other]
            seen.append((row, kernels.summarize([g], [w], columns, columns, detail)))
            assert not flips or same([previous], [other])
    assert all(torch.equal(bits(row), bits(expected)) for row, expected in seen)


def test_a_row_call_reads_only_what_it_fits():
    """Nothing is done for another size or type than the copy's, and for what is not contiguous."""
    previous = torch.ones(4, 4)
    call = kernels.prepare_row(torch.ones(4, 4), previous, kernels.RowRooms())
    w = torch.ones(4, 4)
    for g in (torch.rand(3, 4), torch.rand(4, 4).double(), torch.rand(4, 4).t(), torch.rand(4, 4).to_sparse()):
        assert call.read(g, w, True) is None
    assert call.read(torch.rand(4, 4), w.double(), True) is not None
    assert call.read(torch.rand(4, 4), w.t(), True) is None
    assert call.read(torch.rand(4, 4), w, True) is not None


def test_a_row_call_keeps_no_parameter_alive():
    """It refers to gradlens' own memory alone."""
    weight, gradient = nn.Parameter(torch.ones(3)), torch.ones(3)
    call = kernels.prepare_row(weight, torch.zeros(3), kernels.RowRooms())
    assert call.read(gradient, weight, False) is not None
    references = weakref.ref(weight), weakref.ref(gradient)
    del weight, gradient
    gc.collect()
    assert [reference() for reference in references] == [None, None]
