"""What a lens refers to goes when nobody else has it any more: parameters, losses, and what their graphs have saved."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import gradlens
from gradlens.capture.moves import Moves
from gradlens.testing import RecordingWriter
from tests.capture.helpers import Fails, data

KINDS = pytest.mark.parametrize("kind", ["steady", "general"])


class Training:
    """A net that was trained for some steps by the book, or by the general way."""

    def __init__(self, kind, *, model=None, moved=None, **options):
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) if model is None else model
        moved = self.model.parameters() if moved is None else moved
        self.optimizers = [torch.optim.SGD(moved, 0.1)]
        self.writer = RecordingWriter()
        self.lens = gradlens.watch(self.model, self.optimizers, writers=[self.writer], **options)
        self.lens._watcher.steady.allowed = kind == "steady"
        self.train(6)
        assert (self.lens._watcher.steady.layout is not None) == (kind == "steady")

    def backward(self, step=0):
        self.model.zero_grad()
        self.model(data(step)).square().mean().backward()

    def train(self, steps):
        for step in range(steps):
            self.backward(step)
            self.optimizers[0].step()


@pytest.fixture
def trained():
    """Makes trainings, whose lenses are closed in the end."""
    made = []

    def make(*args, **options):
        made.append(Training(*args, **options))
        return made[-1]

    yield make
    for training in made:
        training.lens.close()


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


def failing(training):
    """A backward that fails midway: weak references to its loss, and to what its graph has saved."""
    training.model.zero_grad()
    saved = training.model[0](data(0)).exp()
    loss = training.model[2](Fails.apply(saved)).square().mean()
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    return [weakref.ref(loss), weakref.ref(saved.untyped_storage())]


def failing_onto(training):
    """The same onto gradients of an earlier one."""
    training.backward()
    training.model.zero_grad = lambda: None
    failing(training)
    del training.model.zero_grad


def raising(training):
    """An optimizer's step that raises."""
    training.backward()

    def fails(*_):
        raise RuntimeError("no step")

    with training.optimizers[0].register_step_pre_hook(fails), pytest.raises(RuntimeError, match="no step"):
        training.optimizers[0].step()


def resting(training):
    """A step that moves nothing."""
    training.optimizers[0].param_groups[0]["lr"] = 0.0
    training.train(1)


ENDS = pytest.mark.parametrize("end", [Training.backward, failing, failing_onto, raising, resting])


@KINDS
def test_a_failed_backward_keeps_nothing_of_its_graph(trained, kind):
    """Whoever finds no memory tries again with a smaller batch: it is there then."""
    assert alive(failing(trained(kind))) == []


@KINDS
def test_a_failed_backward_keeps_none_of_the_inputs_that_it_was_given(trained, kind):
    """`backward(inputs=...)` may be given what was computed."""
    training = trained(kind)
    made = training.model[0](data(0))
    inputs = [Fails.apply(made), *training.model[2].parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        training.model[2](inputs[0]).sum().backward(inputs=[made, *inputs[1:]])
    references = [weakref.ref(made)]
    del made, inputs
    assert alive(references) == []


@KINDS
@ENDS
def test_parameters_go_with_the_model_however_training_ended(trained, kind, end):
    """The lens closes itself, and refers to none of them."""
    training = trained(kind)
    end(training)
    parameters = list(map(weakref.ref, training.model.parameters()))
    training.model.zero_grad()
    training.optimizers = training.model = None
    gc.collect()
    training.lens._ended.wait(10)
    assert alive(parameters) == []


@KINDS
@ENDS
def test_a_closed_lens_refers_to_no_parameter(trained, kind, end):
    """However training ended before."""
    training = trained(kind)
    end(training)
    parameters = list(map(weakref.ref, training.model.parameters()))
    training.model.zero_grad()
    training.lens.close()
    training.optimizers = training.model = None
    assert alive(parameters) == []


def test_a_closed_lens_holds_no_gradient(trained):
    """Those of a backward by the book that failed, which it was to add to what was there."""
    training = trained("steady")
    failing_onto(training)
    plain = training.lens._watcher._hooks.plain
    assert plain.added
    training.lens.close()
    assert not plain.added


@KINDS
def test_a_lens_that_is_closed_while_another_thread_trains_refers_to_no_parameter(trained, kind):
    """What that has open is not handed over, and not kept either."""
    made, begun, done = [], threading.Event(), threading.Event()

    def train():
        made.append(trained(kind))
        made[0].backward()
        begun.set()
        done.wait(10)

    trains = threading.Thread(target=train)
    trains.start()
    assert begun.wait(10)
    (training,) = made
    assert training.lens._watcher.elsewhere()
    training.lens.close()
    done.set()
    trains.join()
    parameters = list(map(weakref.ref, training.model.parameters()))
    training.optimizers = training.model = None
    assert alive(parameters) == []


@KINDS
@pytest.mark.parametrize("schedule", [1, lambda step: step < 6])
def test_a_part_that_is_deleted_goes_at_once(trained, kind, schedule):
    """Though nothing is trained afterwards, or nothing that is observed."""
    training = trained(kind, schedule=schedule)
    parameters = list(map(weakref.ref, training.model[2].parameters()))
    training.model.zero_grad()
    del training.model[2], training.optimizers[0]
    assert alive(parameters) == []


@KINDS
def test_a_frozen_part_that_is_deleted_goes_at_once(trained, kind):
    """No optimizer has it, and the one that there is lives on."""
    model = nn.ModuleDict({"frozen": nn.Linear(4, 4).requires_grad_(False), "rest": nn.Linear(4, 3)})
    model.forward = lambda x: model["rest"](model["frozen"](x))
    training = trained(kind, model=model, moved=model["rest"].parameters())
    parameters = list(map(weakref.ref, model["frozen"].parameters()))
    del model["frozen"]
    assert alive(parameters) == []
    model.forward = model["rest"].forward
    training.train(4)
    assert (training.lens._watcher.steady.layout is not None) == (kind == "steady")


@KINDS
def test_what_an_optimizer_moved_goes_with_it(kind):
    """The parameters of another model too, that is not watched."""
    maker, teller = nn.Linear(4, 5), nn.Linear(5, 1)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (teller, maker)]
    with gradlens.watch(maker, optimizers, writers=[RecordingWriter()]) as lens:
        lens._watcher.steady.allowed = kind == "steady"
        for step in range(8):
            maker.zero_grad()
            teller.zero_grad()
            teller(maker(data(step))).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        parameters = list(map(weakref.ref, teller.parameters()))
        del teller, optimizers[0], optimizer
        assert alive(parameters) == []
        for step in range(20):
            maker.zero_grad()
            maker(data(step)).square().mean().backward()
            optimizers[0].step()
        assert (lens._watcher.steady.layout is not None) == (kind == "steady")


def test_a_step_whose_reading_fails_keeps_no_parameter(trained, monkeypatch):
    """Of ours, after the optimizer has stepped."""
    training = trained("steady")

    def fails(*_):
        raise ValueError("ours")

    with monkeypatch.context() as patched:
        patched.setattr(Moves, "_read_after", fails)
        training.train(1)
    assert [watched.share for watched in training.lens._watcher.optimizers.watched] == [None]
