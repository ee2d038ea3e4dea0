"""Forward hooks leave no trace in what is made of a model: copies, pickles, scripted and shallow ones."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import gradlens
from gradlens.capture.forward_hooks import ForwardHook


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.body(x)


def watch(model):
    return gradlens.watch(model, features="activations", writers=[], rules=())


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def own(module, args, output):
    """A hook of the user's."""


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([Net, nn.Sequential, nn.Linear, nn.ReLU]):
        return torch.load(file, weights_only=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle in Python": lambda model: pickle.loads(pickle._dumps(model)),
    "pickle, protocol 2": lambda model: pickle.loads(pickle.dumps(model, 2)),
    "torch.load, weights_only": reloaded,
    "a copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_has_no_hook(kind):
    """Nothing of gradlens is in a copy, which works, records nothing and can be scripted."""
    model, x = Net(), torch.randn(5, 4)
    lens = watch(model)
    for _ in range(3):
        model(x).sum().backward()
    twin = COPIES[kind](model)
    assert not hooks_of(twin)
    assert all(type(module._forward_hooks) is OrderedDict and not vars(module._forward_hooks) for module in twin.modules())
    assert b"gradlens" not in pickle.dumps(twin)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(torch.jit.script(twin)(x), model(x))
    twin(x).sum().backward()
    rows = len(lens.activations())
    model(x).sum().backward()
    assert len(lens.activations()) == rows + 3
    lens.close()


def test_a_saved_model_loads_without_gradlens(tmp_path):
    """In a process that cannot import it."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    lens = watch(model)
    torch.save(model, tmp_path / "model.pt")
    lens.close()
    code = (
        "import sys, torch; sys.modules['gradlens'] = None\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "assert not any(module._forward_hooks for module in model.modules())\n"
        "print(tuple(model(torch.ones(2, 4)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "(2, 8)", done.stderr


def test_hooks_of_the_user_are_copied_as_ever():
    """Theirs are in copies, in order, whether they came before the watch, during or after; and can be taken off."""
    model = Net()
    before = model.body[0].register_forward_hook(own)
    lens = watch(model)
    during = model.body[0].register_forward_hook(own)
    assert len(hooks_of(copy.deepcopy(model))) == 2
    assert len(hooks_of(pickle.loads(pickle.dumps(model)))) == 2
    before.remove()
    assert len(hooks_of(copy.deepcopy(model))) == 1
    lens.close()
    during.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_watched_model_can_be_scripted():
    """The scripted one gives what the model gives, and the model is watched on."""
    model, x = Net(), torch.randn(5, 4)
    lens = watch(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    model(x).sum().backward()
    assert set(lens.activations()["calls"]) == {1}
    lens.close()


def test_a_shallow_copy_records_nothing():
    """It shares the dictionary of hooks, as torch has it; ours do nothing for it."""
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(5, 4)
    lens = watch({"m": model[0]})
    copy.copy(model[0])(x).sum().backward()
    assert not len(lens.activations())
    lens.close()


def test_two_lenses_and_the_end_of_both():
    """The dictionary is told how to be copied until the last lens is closed, and then is as it was."""
    model = Net()
    first, second = watch(model), watch(model)
    first.close()
    assert not hooks_of(copy.deepcopy(model))
    assert sum(isinstance(hook, ForwardHook) for m in model.modules() for _, hook in m._forward_hooks.items()) == 3
    second.close()
    assert not any(module._forward_hooks or vars(module._forward_hooks) for module in model.modules())
