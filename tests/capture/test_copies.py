"""Copies of a watched model, other processes, and its end: as if not watched."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradlens
from gradlens.lens import _open_lenses

X = torch.ones(5, 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def step(model, optimizer=None):
    model.zero_grad()
    model(X).pow(2).sum().backward()
    if optimizer is not None:
        optimizer.step()


@pytest.fixture
def watched():
    """A watched model that has made a step, its optimizer and its lens; torch's warnings are errors meanwhile."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with gradlens.watch(model, optimizer) as lens:
        step(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            yield model, optimizer, lens


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).module,
}


@pytest.mark.trap(30)
@pytest.mark.situation(
    "deepcopy, pickle, `torch.save`, EMA copies", stages={"backward": "yes: the model's own, not its copies'"}
)
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_a_plain_model(watched, kind):
    """A copy has the weights and no hook of ours, trains without a record, and the model is still watched."""
    model, optimizer, lens = watched
    rows = len(lens.history())
    twin = COPIES[kind](model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not q._backward_hooks
        assert not q._post_accumulate_grad_hooks
    step(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert len(lens.history()) == rows
    step(model, optimizer)
    assert len(lens.history()) == 2 * rows


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_model_that_has_its_lens_as_an_attribute(watched, kind):
    """A lens is not copied with the model: where it was, the copy has None. The model may have it and be freed."""
    model, optimizer, lens = watched
    model.lens = lens
    twin = COPIES[kind](model)
    assert twin.lens is None
    assert model.lens is lens
    assert copy.copy(lens) is None
    step(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert set(lens.history()["step"]) == {0}
    step(model, optimizer)
    assert set(lens.history()["step"]) == {0, 1}


def test_an_average_follows_a_watched_model(watched):
    """update_parameters() of an EMA sees the watched model's weights."""
    model, optimizer, _ = watched
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = model[0].weight.detach().clone()
    average.update_parameters(model)  # the first one copies
    step(model, optimizer)
    average.update_parameters(model)
    assert torch.allclose(average.module[0].weight, (first + model[0].weight) / 2)


def test_an_optimizer_may_be_copied_and_saved(watched):
    """deepcopy, pickle and state_dict of a watched optimizer work; the copy's steps are none of ours."""
    _, optimizer, lens = watched
    rows = len(lens.history())
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.load_state_dict(optimizer.state_dict())
        twin.step()
    assert len(lens.history()) == rows


def traced(model):
    return torch.jit.trace(model, X)


EXPORTS = {
    "jit.script": torch.jit.script,
    "jit.trace": traced,
    "jit.freeze": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "fx": torch.fx.symbolic_trace,
}


@pytest.mark.trap(30)
@pytest.mark.situation("`torch.export`, `jit.script`, `jit.trace`, fx", stages={"backward": "yes: the model is watched on"})
@pytest.mark.parametrize("kind", EXPORTS)
def test_a_watched_model_can_be_exported(watched, kind):
    """What is exported from a watched model gives the same output as the model, which is watched on."""
    model, optimizer, lens = watched
    rows = len(lens.history())
    model.eval()
    exported = EXPORTS[kind](model)
    torch.testing.assert_close(exported(X), model(X))
    model.train()
    step(model, optimizer)
    assert len(lens.history()) == 2 * rows


# --- other processes ------------------------------------------------------------------------------------------------


def worker(model, queue):
    """What a child makes of the model that it was sent."""
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    step(model)
    queue.put((hooked, [p.grad.numpy().copy() for p in model.parameters()]))


@pytest.mark.slow
@pytest.mark.trap(30)
@pytest.mark.situation("a model sent to a spawned process", stages={"backward": "no: another process's gradients"})
def test_a_watched_model_is_sent_to_another_process(watched):
    """torch.multiprocessing takes a watched model to a new process without a warning, and it is a plain one there."""
    model, _, lens = watched
    rows = len(lens.history())
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=worker, args=(model, queue), daemon=True)
    process.start()
    hooked, gradients = queue.get(timeout=100)
    process.join(30)
    assert process.exitcode == 0
    assert not hooked
    assert len(lens.history()) == rows
    step(model)
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, torch.from_numpy(g))


FORKS = """
import os, sys, threading, time, torch, gradlens
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
lens = gradlens.watch(model, optimizer, run=sys.argv[1])

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

def fork():
    child = os.fork()
    if child == 0:
        before = model.weight.detach().clone()
        train(5)
        assert not torch.equal(before, model.weight)
        sys.exit(0)  # what was registered with atexit runs
    for _ in range(300):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.1)
    os.kill(child, 9)
    return "the child hangs"

def hold():
    with lens._watcher.engine.lock:
        held.set()
        released.wait(40)

train(3)
assert fork() == 0
train(2)
held, released = threading.Event(), threading.Event()
threading.Thread(target=hold, daemon=True).start()
held.wait()
assert fork() == 0
released.set()
train(1)
lens.close()
"""


@pytest.mark.trap(33)
@pytest.mark.situation(
    "a forked process", stages={"backward": "no: another process's gradients", "used": "no: another process's updates"}
)
def test_a_forked_child_is_silent(tmp_path):
    """A child that trains its copy writes nothing into the run, and does not hang, though a lock was held at the fork."""
    run = str(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", FORKS, run], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    history = gradlens.open_run(run).history()
    assert sorted(history["step"].unique()) == list(range(6))
    assert len(history) == 6 * 2 * 2


@pytest.mark.slow
def test_workers_of_a_data_loader_are_silent(watched):
    """Forked loader workers, which inherit the hooks, neither record nor hang at their exit."""
    model, optimizer, lens = watched
    rows = len(lens.history())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=1, num_workers=2)
    assert sum(len(x) for (x,) in loader) == 5
    step(model, optimizer)
    assert len(lens.history()) == 2 * rows


# --- the end --------------------------------------------------------------------------------------------------------


def wait_until(condition, seconds=5.0):
    end = threading.Event()
    for _ in range(int(seconds * 100)):
        if condition():
            return True
        end.wait(0.01)
    return False


@pytest.mark.trap(31)
@pytest.mark.parametrize("features", [(), ("updates", "flips", "evidence")])
def test_a_watched_model_is_freed_when_it_is_deleted(features):
    """With the lens and the optimizer's hooks alive, the model and its parameters go as soon as nobody uses them."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    lens = gradlens.watch(model, optimizer, features=features)
    for _ in range(3):
        step(model, optimizer)
    gone = [weakref.ref(model), weakref.ref(optimizer), *(weakref.ref(m) for m in model)]
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    lens.flush()
    gc.disable()
    try:
        del model, optimizer
        assert [ref() for ref in gone] == [None] * len(gone), "freed without the garbage collector"
        assert [ref() for ref in storages] == [None] * len(storages)
    finally:
        gc.enable()
    assert wait_until(lambda: lens not in _open_lenses)
    assert set(lens.table()["step"]) == {2}


def registries():
    """The sizes of torch's global registries of hooks that a lens uses."""
    found = [
        torch_module._global_parameter_registration_hooks,
        torch_module._global_module_registration_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    return [len(hooks) for hooks in found]


@pytest.mark.slow
@pytest.mark.trap(32)
def test_many_cycles_of_watch_and_close_leave_nothing(capsys):
    """After 2,500 cycles there are as many objects, hooks, threads and open files as after the first hundred."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = registries()

    def cycles(n):
        for k in range(n):
            lens = gradlens.watch(model, optimizer, features=(), rules=())
            if k % 50 == 0:
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            lens.close()
        del lens
        gc.collect()
        return len(gc.get_objects()), threading.active_count(), len(os.listdir("/proc/self/fd"))

    objects, threads, files = cycles(100)
    more_objects, more_threads, more_files = cycles(2500)
    assert more_objects - objects < 50  # less than one for fifty cycles
    assert (more_threads, more_files) == (threads, files)
    assert registries() == before
    assert all(p._backward_hooks is None and p._post_accumulate_grad_hooks is None for p in model.parameters())
    assert not _open_lenses


def test_an_unassigned_lens_of_a_dead_model_is_freed():
    """The package holds a lens that nobody assigned only while its model lives."""
    model = net()
    gradlens.watch(model)
    (lens,) = [weakref.ref(lens) for lens in _open_lenses]
    step(model)
    del model
    assert wait_until(lambda: gc.collect() is not None and lens() is None)
