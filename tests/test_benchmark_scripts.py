"""The small trainings of benchmarks/scripts.py: each can be watched and stays as it was, and a change would be noticed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The program; what it imports from its own folder goes with it."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("scripts")
    sys.path[:] = path
    fresh = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - modules}
    for name in (name for name, file in fresh.items() if file and Path(file).parent == BENCHMARKS):
        del sys.modules[name]


KINDS = ["mnist", "resnet", "vae", "gan", "siamese", "super-resolution"]
KINDS += ["word-lstm", "tiny-gpt", "time-series", "reinforce", "graph"]


def test_every_kind_is_tried_here(scripts):
    """The list of this file is that of the benchmark."""
    assert list(scripts.SCRIPTS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_watching_leaves_the_training_as_it_was(scripts, kind):
    """Two watched steps give the losses, weights, optimizer states and random numbers of two bare ones."""
    script = scripts.Script("", scripts.SCRIPTS[kind].start, steps=1, warm_up=1)
    assert scripts.run(script, watched=True).digest == scripts.run(script, watched=False).digest


@pytest.mark.parametrize("change", ["weight", "buffer", "optimizer", "random", "loss"])
def test_a_changed_training_is_noticed(scripts, change):
    """One bit elsewhere gives another digest, wherever it is."""

    def digest(touch):
        torch.manual_seed(0)
        loop = scripts.SCRIPTS["resnet"].start()
        losses = [loop.step()]
        if touch == "weight":
            next(loop.target.parameters()).data.view(-1)[0].nextafter_(torch.tensor(9.0))
        elif touch == "buffer":
            next(b for name, b in loop.target.named_buffers() if name.endswith("running_var")).view(-1)[3] += 1
        elif touch == "optimizer":
            next(iter(loop.optimizers[0].state.values()))["momentum_buffer"].view(-1)[-1] += 1
        elif touch == "random":
            torch.rand(1)
        elif touch == "loss":
            losses[0] += 1e-6
        return scripts.digest(loop, losses)

    assert digest(None) == digest(None)
    assert digest(change) != digest(None)


def test_a_training_that_watching_changes_fails_the_program(scripts, monkeypatch, capsys):
    """The exit status is 1, and the script is named."""
    digests = iter("abcdefghij")
    real = scripts.run
    monkeypatch.setattr(scripts, "run", lambda *given, **named: real(*given, **named)._replace(digest=next(digests)))
    monkeypatch.setitem(scripts.SCRIPTS, "graph", scripts.Script("", scripts.SCRIPTS["graph"].start, 1, 1))
    monkeypatch.setattr(sys, "argv", ["scripts.py", "--only", "graph", "--seconds", "0", "--dry"])
    assert scripts.main() == 1
    printed = capsys.readouterr()
    assert "identical in 0 of 1" in printed.out
    assert "watching changed the training of graph" in printed.err


def test_the_page_of_costs_has_a_row_a_training_or_none(tmp_path, monkeypatch):
    """docs/performance.py writes what scripts.csv has, and leaves the page as it is without one."""
    spec = importlib.util.spec_from_file_location("performance", BENCHMARKS.parent / "docs" / "performance.py")
    performance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(performance)
    page = "<!-- table: scripts -->\nold\n<!-- end of table: scripts -->"
    monkeypatch.setattr(performance, "BENCHMARKS", tmp_path)
    assert performance.text(page) == page
    fields = "title,parameters,bare_us,added_us,low,high,added,again,says,felt,identical,machine"
    row = 'A GAN,18,16000,4000,3500,5000,0.25,-0.01,0.19,0.2,4 of 4,"a machine, load 0.5"'
    (tmp_path / "scripts.csv").write_text(f"{fields}\n{row}\n")
    line = "| A GAN | 18 | 16 ms | +4 ms (3.5 ms to 5 ms), +25.0 % | -1.0 % | 19.0 % | 20.0 % | in 4 of 4 |"
    assert line in performance.text(page).splitlines()
    assert "Torch on one thread. a machine, load 0.5 to 0.5." in performance.text(page)
