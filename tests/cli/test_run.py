"""`gradlens run`: scripts that know nothing of gradlens run as they do without it, and are watched."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gradlens.store.run import open_run
from tests.cli.helpers import call, forked, forked_call

NET = """
import sys, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())

def batch(step):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)

def state(*modules):
    import hashlib
    data = b"".join(p.detach().numpy().tobytes() for m in modules for p in m.parameters())
    return hashlib.sha256(data).hexdigest(), torch.rand(1).item()
"""

TRAIN = (
    NET
    + """
def train(net, optimizer, steps=12):
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
"""
)

PLAIN = (
    TRAIN
    + """
if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net()
    train(net, torch.optim.Adam(net.parameters(), 1e-2))
    print(state(net))
"""
)


def _script(folder, text, name="train.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def _by_python(path, *arguments):
    """The script as Python runs it."""
    command = [sys.executable, path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=path.parent)


def _alone(path):
    """The same, without the time that torch takes to import: for what does not depend on how Python starts."""
    return forked(path, cwd=path.parent)


def _watched(path, *arguments, code=0, options=(), start=forked_call):
    """The script under `gradlens run`, and its run."""
    done = start("run", "--run", "out", *options, path.name, *arguments, cwd=path.parent, code=code)
    return done, path.parent / "out"


def _names(run):
    return open_run(run).names()


def test_training_is_bit_identical_and_every_step_is_seen(tmp_path):
    """Weights, random state, output and exit code are those of the script alone; the first backward is in the records, under
    the model's own names, and the end says what was seen."""
    path = _script(tmp_path, PLAIN + "    print(sys.argv, __file__, __name__, sys.path[0]); sys.exit(7)\n")
    alone = _by_python(path, "--lr", "x y")
    done = call("run", "--run", "out", str(path), "--lr", "x y", cwd=tmp_path, code=7)
    assert done.stdout == alone.stdout
    assert alone.returncode == 7
    run = open_run(tmp_path / "out")
    assert run.steps("backward") == list(range(12))
    assert run.names() == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert set(run.table(0, stage="backward")["status"]) == {"ok"}
    assert "12 steps, 0 to 11" in done.stderr
    assert "gradlens report" in done.stderr


def test_the_run_is_named_after_the_script_and_the_time(tmp_path):
    """Without --run: runs/train-DATE-TIME below the working directory."""
    path = _script(tmp_path, PLAIN)
    forked_call("run", path.name, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"train-\d{8}-\d{6}", run.name)


def test_a_traceback_is_the_scripts_own(tmp_path):
    """No frame of ours is in it, and the exit code is Python's."""
    path = _script(tmp_path, PLAIN + "    raise ValueError('mine')\n")
    alone = _by_python(path)
    done = call("run", "--run", "out", str(path), cwd=tmp_path, code=1)
    theirs = alone.stderr[alone.stderr.index("Traceback") :]
    assert theirs in done.stderr
    assert "12 steps" in done.stderr


@pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, ""), (signal.SIGINT, "KeyboardInterrupt")])
def test_signals_are_the_scripts(tmp_path, number, words):
    """The process that was started is the script: a signal ends it as it ends any script, and what was seen is on disk."""
    path = _script(tmp_path, PLAIN.replace("print(state(net))", "print('ready', flush=True); import time; time.sleep(60)"))
    process = subprocess.Popen(
        [sys.executable, "-m", "gradlens", "run", "--run", "out", path.name],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -number
    assert words in error
    assert open_run(tmp_path / "out").steps("used") == list(range(12))


def test_what_main_defines_can_be_pickled_and_spawned(tmp_path):
    """Classes of the script pickle as of `__main__`; a spawned process imports the script by its file."""
    body = """
    import pickle, multiprocessing

    def double(x):
        return 2 * x

    if __name__ == "__main__":
        assert type(pickle.loads(pickle.dumps(Net()))) is Net
        assert pickle.dumps(double)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(double, [1, 2]))
    """
    path = _script(tmp_path, PLAIN + textwrap.dedent(body))
    done, run = _watched(path, start=call)
    assert "[2, 4]" in done.stdout
    assert done.stdout == _by_python(path).stdout
    assert len(_names(run)) == 4
    assert not (tmp_path / "out-2").exists()


def test_a_module_runs_as_with_python_m(tmp_path):
    """`-m` finds it from the working directory, and its package is set."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    _script(tmp_path / "pack", PLAIN + "    print(__package__, sys.argv[1:])\n")
    done = call("run", "--run", "out", "-m", "pack.train", "--x", cwd=tmp_path)
    assert "pack ['--x']" in done.stdout
    assert len(_names(tmp_path / "out")) == 4


def test_options_of_watch_are_flags(tmp_path):
    """They stand before the script; what stands behind it is the script's."""
    path = _script(tmp_path, PLAIN + "    print(sys.argv[1:])\n")
    options = ("--schedule", "3", "--select", "*.weight", "--features", "", "--first-step", "100", "--stage", "used")
    done, run = _watched(path, "--schedule", "7", options=options)
    assert "['--schedule', '7']" in done.stdout
    opened = open_run(run)
    assert opened.names() == ["fc1.weight", "fc2.weight"]
    assert opened.steps() == [102, 105, 108, 111]
    assert opened.settings["features"] == []


def test_python_keeps_its_own_options(tmp_path):
    """`python -u -W error -m gradlens run` runs the script with -u and -W error."""
    path = _script(tmp_path, "import sys; print(sys.orig_argv[1:-1], sys.warnoptions)")
    command = [sys.executable, "-u", "-W", "error::FutureWarning", "-m", "gradlens", "run", path.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "['-u', '-W', 'error::FutureWarning'] ['error::FutureWarning']" in done.stdout


def test_a_script_without_torch_is_left_alone(tmp_path):
    """Nothing is imported, printed or written."""
    path = _script(tmp_path, "import sys; print('torch' in sys.modules, 'gradlens' in sys.modules, 'numpy' in sys.modules)")
    done, run = _watched(path, start=call)
    assert (done.stdout, done.stderr) == ("False False False\n", "")
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian.py"], "did you mean 'train.py'"),
        (["-m", "nosuchmodule"], "no module 'nosuchmodule'"),
        (["--features", "updtes", "train.py"], "did you mean 'updates'"),
        (["--memory", "lots", "train.py"], "256MiB"),
        (["--budget", "2", "train.py"], "range"),
    ],
)
def test_a_wrong_call_starts_nothing(tmp_path, arguments, words):
    """Exit code 2 and the nearest word, before the script runs."""
    _script(tmp_path, "print('started')")
    done = call("run", *arguments, cwd=tmp_path, code=2)
    assert words in done.stderr
    assert "started" not in done.stdout


# --- what is found --------------------------------------------------------------------------------------------------


def _body(text):
    return TRAIN + textwrap.dedent(text)


def test_without_an_optimizer_each_backward_is_a_step(tmp_path):
    """The model is found as the first backward reaches it, before any of its gradients."""
    body = """
    torch.manual_seed(0)
    net = Net()
    for step in range(8):
        x, y = batch(step)
        nn.functional.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    print(state(net))
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert open_run(run).steps("backward") == list(range(8))
    assert len(_names(run)) == 4


FUNCTION = """
    torch.manual_seed(0)
    net, function, engine = Net(), torch.autograd.backward, torch.autograd._engine_run_backward
    {optimizer}
    for step in range(8):
        x, y = batch(step)
        net.zero_grad()
        x.requires_grad_()
        torch.autograd.grad(net(x).sum(), x)
        function({losses})
        {move}
    print(state(net))
"""


def _function(losses, move="optimizer.step()", optimizer="optimizer = torch.optim.Adam(net.parameters(), 1e-2)"):
    return textwrap.dedent(FUNCTION).format(losses=losses, move=move, optimizer=optimizer)


@pytest.mark.parametrize(
    "losses",
    ["nn.functional.cross_entropy(net(x), y)", "[net(x).square().mean(), net.fc1.bias.sum()]", "(net(x),), (x[:, :4],)"],
)
def test_the_function_backward_is_watched_from_the_first_one(tmp_path, losses):
    """A script that calls `torch.autograd.backward`, by a name that it took before, and never a tensor's: every step has its
    gradients, and weights and random state are those of the script alone."""
    path = _script(tmp_path, TRAIN + _function(losses))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    opened = open_run(run)
    assert opened.steps("backward") == opened.steps("used") == list(range(8))
    assert set(opened.table(0, stage="backward")["status"]) == {"ok"}
    assert _names(run) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_the_function_backward_without_an_optimizer_reaches_all_its_losses(tmp_path):
    """What any of several losses depends on is watched, a model that only the second reaches too."""
    move = "[p.data.sub_(p.grad, alpha=0.1) for p in [*net.parameters(), *last.parameters()]]; last.zero_grad()"
    losses = "[net(x).square().mean(), last(x.detach()).square().mean()]"
    path = _script(tmp_path, TRAIN + _function(losses, move, "last = nn.Linear(8, 1)"))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert open_run(run).steps("backward") == list(range(8))
    assert {name.split(".")[0] for name in _names(run)} == {"net", "last"}


def test_torch_is_as_it_was_after_the_first_backward(tmp_path):
    """What stood in for `backward` is gone, for either way to call it; a backward within another starts nothing."""
    body = """
    import torch.utils.checkpoint
    plain = torch.Tensor.backward, torch.autograd._engine_run_backward
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    first = torch.autograd._engine_run_backward, torch.Tensor.__dict__["backward"]

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                torch.autograd.backward(torch.ones(2, requires_grad=True).sum())
            return g

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Inner.apply(x).sum(), x)
    still = torch.autograd._engine_run_backward is first[0]
    torch.autograd.backward(net(batch(0)[0]).sum())
    from torch.autograd import graph
    now = torch.autograd._engine_run_backward, torch.Tensor.__dict__["backward"]
    print(first[0] is graph._engine_run_backward, still, now[0] is graph._engine_run_backward, type(now[1]).__name__)
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout.split() == ["False", "True", "True", "function"]
    assert _alone(path).stdout.split() == ["True", "True", "True", "function"]
    assert open_run(run).steps("backward") == [0]


@pytest.mark.parametrize("losses", ["net(x)", "Fails.apply(net(x)).sum()", "7"])
def test_the_traceback_of_the_function_backward_is_torchs_own(tmp_path, losses):
    """A first backward that fails, before the engine or in it, fails with the same frames as alone."""
    body = """
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ValueError("mine")
    """
    path = _script(tmp_path, _body(body) + _function(losses))
    alone = _alone(path)
    done = forked_call("run", "--run", "out", str(path), cwd=tmp_path, code=1)
    theirs = alone.stderr[alone.stderr.index("Traceback") :]
    assert theirs in done.stderr
    assert "gradlens/integrations" not in done.stderr


def test_two_models_are_named_after_the_scripts_variables(tmp_path):
    """A GAN: both are watched from the start, in one run."""
    body = """
    torch.manual_seed(0)
    def main():
        netD, netG = nn.Linear(2, 1), nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        optD, optG = (torch.optim.Adam(net.parameters(), 1e-3) for net in (netD, netG))
        loss = nn.BCEWithLogitsLoss()
        for step in range(6):
            optD.zero_grad()
            fake = netG(torch.randn(16, 3))
            loss(netD(torch.randn(16, 2)), torch.ones(16, 1)).backward()
            loss(netD(fake.detach()), torch.zeros(16, 1)).backward()
            optD.step()
            optG.zero_grad()
            loss(netD(fake), torch.ones(16, 1)).backward()
            optG.step()
        print(state(netD, netG))
    main()
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert {name.split(".")[0] for name in _names(run)} == {"netD", "netG"}
    assert len(open_run(run).steps("used")) >= 6
    assert not (tmp_path / "out-2").exists()


def test_accumulation_with_a_scaler_is_unscaled(tmp_path):
    """Micro-batches of one step, a GradScaler that was never told to anybody."""
    body = """
    torch.manual_seed(0)
    net = Net()
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        for micro in range(2):
            x, y = batch(10 * step + micro)
            scaler.scale(nn.functional.cross_entropy(net(x), y) / 2).backward()
        scaler.step(optimizer)
        scaler.update()
    print(state(net))
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    history = open_run(run).history()
    assert history[history["stage"] == "backward"].groupby("step")["backward"].nunique().tolist() == [2] * 5
    assert history[history["stage"] == "used"]["abs_max"].max() < 10


def test_plain_tensors_are_watched_from_the_first_step(tmp_path):
    """No module at all: an optimizer's tensors, under the names of the script's variables."""
    body = """
    torch.manual_seed(0)
    scale, offset = torch.ones(3, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([scale, offset], 0.1)
    for step in range(6):
        optimizer.zero_grad()
        ((scale * torch.randn(3) + offset) ** 2).sum().backward()
        optimizer.step()
    print(scale.tolist(), offset.tolist())
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    opened = open_run(run)
    assert set(opened.names()) == {"scale", "offset"}
    assert opened.steps("used") == list(range(6))
    assert opened.findings() == []


def test_an_optimizer_that_comes_late_continues_the_run(tmp_path):
    """A model that went backward before its optimizer was made: one run, in which the optimizer's steps come next."""
    body = """
    torch.manual_seed(0)
    net = Net()
    for _ in range(2):
        net(batch(0)[0]).sum().backward()
    net.zero_grad()
    train(net, torch.optim.SGD(net.parameters(), 0.1))
    print(state(net))
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert "Traceback" not in done.stderr
    opened = open_run(run)
    assert opened.steps("backward") == list(range(14))
    assert opened.steps("used") == list(range(14))
    assert opened.settings["optimizers"]
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["out"]
    assert done.stderr.count("the whole page:") == 1


def test_what_is_trained_later_gets_a_run_of_its_own(tmp_path):
    """Two models, one after the other: `out` and `out-2`."""
    body = """
    torch.manual_seed(0)
    for lr in (0.1, 0.01):
        net = Net()
        train(net, torch.optim.SGD(net.parameters(), lr))
        print(state(net))
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    for each in (run, tmp_path / "out-2"):
        assert open_run(each).steps("used") == list(range(12))


@pytest.mark.slow
def test_a_compiled_model_keeps_its_names(tmp_path):
    """`torch.compile` of the model, and of a whole step with `fullgraph`: neither breaks, names have no prefix."""
    body = """
    torch.manual_seed(0)
    net = Net()
    compiled = torch.compile(net)
    train(compiled, torch.optim.Adam(net.parameters(), 1e-2), 4)
    print(state(net))

    @torch.compile(fullgraph=True)
    def loss(x, y):
        return nn.functional.cross_entropy(other(x), y)

    other = Net()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss(*batch(step)).backward()
        optimizer.step()
    print(state(other))
    """
    path = _script(tmp_path, _body(body))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert _names(run) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert open_run(run).steps("used") == list(range(4))


@pytest.mark.slow
@pytest.mark.parametrize("call_of", ["torch.autograd.backward(loss)", "loss.backward()"])
def test_a_backward_within_a_compiled_step_trains_as_it_does_alone(tmp_path, call_of):
    """The backward stands inside what `torch.compile` reads: the same bits and graph breaks, and every step is seen."""
    body = """
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    @torch.compile
    def step(x, y):
        loss = nn.functional.cross_entropy(net(x), y)
        CALL

    for number in range(4):
        optimizer.zero_grad()
        step(*batch(number))
        optimizer.step()
    from torch._dynamo.utils import counters
    print(state(net), sorted(counters["graph_break"].values()))
    """
    path = _script(tmp_path, _body(body.replace("CALL", call_of)))
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert open_run(run).steps("used") == open_run(run).steps("backward") == list(range(4))


LIGHTNING = (
    NET
    + """
import pytorch_lightning as pl

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, i):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, i):
        self.log("v", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

torch.manual_seed(0)
x, y = batch(0)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
lit = Lit()
pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False).fit(lit, data, data)
print(state(lit))
"""
)


@pytest.mark.slow
def test_lightning_trains_as_it_does_alone(tmp_path):
    """Its sanity check, which is without gradients, does not count; names are those of the LightningModule."""
    path = _script(tmp_path, LIGHTNING)
    done, run = _watched(path)
    assert done.stdout == _alone(path).stdout
    assert open_run(run).steps("used") == list(range(16))
    assert _names(run)[0] == "net.fc1.weight"


TRANSFORMERS = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.set_num_threads(1)  # on a busy machine a sum over two threads differs from run to run
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))
tokens = torch.randint(0, 32, (32, 16))
arguments = TrainingArguments(
    "checkpoints", per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2, report_to=[],
    save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
)
Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]).train()
print([p.sum().item() for p in model.parameters()], torch.rand(1).item())
"""


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_as_it_does_alone(tmp_path):
    """Its optimizer is wrapped by accelerate; two micro-batches make a step, and names are those of the model."""
    pytest.importorskip("transformers")
    path = _script(tmp_path, TRANSFORMERS)
    done, run = _watched(path)
    weights = done.stdout.splitlines()[-1]  # before it stands how many seconds the training took
    assert weights == _alone(path).stdout.splitlines()[-1]
    opened = open_run(run)
    assert opened.steps("used") == list(range(8))
    assert opened.history(stage="backward").groupby("step")["backward"].nunique().tolist() == [2] * 8
    assert opened.names()[0] == "transformer.wte.weight"


DDP = (
    NET
    + """
import torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.parallel.DistributedDataParallel(Net())
optimizer = torch.optim.SGD(net.parameters(), 0.1)
for step in range(6):
    x, y = batch(10 * step + dist.get_rank())
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(state(net))
dist.destroy_process_group()
"""
)


@pytest.mark.distributed
@pytest.mark.parametrize("outside", [True, False], ids=["torchrun-m-gradlens", "gradlens-m-torchrun"])
def test_ranks_of_torchrun_share_one_run(tmp_path, outside):
    """`torchrun -m gradlens run` and `gradlens run -m torch.distributed.run`: both ranks, one directory, once said."""
    path = _script(tmp_path, DDP)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ours = ["-m", "gradlens", "run"]
    inside = [*torchrun, *ours, path.name] if outside else [*ours, *torchrun, path.name]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *inside], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    run = open_run(folder)
    assert run.ranks() == [0, 1]
    assert run.steps("reduced") == list(range(6))
    assert run.names()[0] == "fc1.weight"
    assert done.stderr.count("the whole page:") == 1
