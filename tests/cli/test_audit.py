"""`gradlens audit`: a script to its first backward."""

import json

import pytest

from tests.cli.helpers import call, forked_call

SCRIPT = """
import sys, torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4){softmax})
optimizer = torch.optim.Adam(net.parameters())
x, y = torch.randn(32, 8), torch.randint(4, (32,))
print("before", sys.argv[1:])
try:
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    print("after")
finally:
    print("finally")
"""


def _script(folder, softmax=""):
    path = folder / "train.py"
    path.write_text(SCRIPT.format(softmax=softmax))
    return path


def test_a_softmax_too_many_is_named_before_the_first_step(tmp_path):
    """The script ends before its backward; what it prints is on standard error, the answer on standard output."""
    done = call("audit", _script(tmp_path, ", nn.Softmax(1)"), "--lr", "1", cwd=tmp_path)
    assert "softmax" in done.stdout.lower()
    assert "before ['--lr', '1']" in done.stderr
    assert "finally" in done.stderr
    assert "after" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_sound_script_has_nothing(tmp_path):
    """And says how much of the model the loss reaches."""
    done = forked_call("audit", _script(tmp_path))
    assert "it reaches 4 of the model's 4 parameters" in done.stdout
    assert "nothing looks wrong" in done.stdout


def test_the_function_backward_is_a_backward(tmp_path):
    """`torch.autograd.backward` of several losses: the graph is that of all."""
    path = tmp_path / "train.py"
    path.write_text(
        SCRIPT.format(softmax="").replace("loss.backward()", "torch.autograd.backward([loss, net[0].bias.sum()])")
    )
    done = forked_call("audit", path)
    assert "it reaches 4 of the model's 4 parameters" in done.stdout
    assert "after" not in done.stdout + done.stderr


def test_json_and_the_exit_code_are_for_ci(tmp_path):
    """--fail-on exits with 1; the output is JSON and nothing else."""
    done = forked_call("audit", "--json", "--fail-on", "warning", _script(tmp_path, ", nn.Softmax(1)"), code=1)
    content = json.loads(done.stdout)
    assert not content["ok"]
    assert any("softmax" in finding["seen"].lower() for finding in content["findings"])


def test_a_script_without_a_backward_is_an_error(tmp_path):
    """Exit code 2, and why."""
    path = tmp_path / "none.py"
    path.write_text("import torch; print('done')")
    assert "ended before any backward" in forked_call("audit", path, code=2).stderr


@pytest.mark.parametrize("arguments", [["nothing.py"], ["-m", "nosuchmodule"]])
def test_a_script_that_is_not_there_is_an_error(tmp_path, arguments):
    """As for `gradlens run`."""
    assert "Error" in forked_call("audit", *arguments, cwd=tmp_path, code=2).stderr
