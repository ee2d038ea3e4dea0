"""Training loops that others wrote: Lightning, transformers, accelerate."""

import contextlib
import os
import warnings

import pytest
import torch
from torch import nn

import gradlens

pytestmark = [
    pytest.mark.slow,  # the frameworks take seconds to import
    pytest.mark.filterwarnings("ignore"),  # theirs are no business of ours
]
STEPS = 3


def norm(g):
    return g.double().norm().item()


class Truth:
    """What passes by, seen without us: each backward's own partials, and those that the optimizer had at its step's end."""

    def __init__(self, model, optimizers):
        self.backward, self.used = {}, {}
        for name, p in model.named_parameters():
            p.register_hook(self._hook(name))
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._stepped)
        self._names = {p: name for name, p in model.named_parameters()}

    def _hook(self, name):
        def hook(g):
            self.backward.setdefault(name, []).append(norm(g))

        hook.gradlens = True  # as our own are: it is nobody who may change gradients
        return hook

    def _stepped(self, optimizer, args, kwargs):
        for p in [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
            self.used.setdefault(self._names[p], []).append(norm(p.grad))

    def check(self, lens):
        """The records have these, in this order, and nothing else."""
        history = lens.history().query("status == 'ok'")
        assert lens.findings() == []
        for stage in ("backward", "used"):
            rows = history[history["stage"] == stage].groupby("parameter")["l2"].apply(list)
            truth = getattr(self, stage)
            assert set(rows.index) == set(truth)
            for name, norms in truth.items():
                assert rows[name] == pytest.approx(norms, rel=1e-6), (stage, name)


def state(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a, b):
    return all(torch.equal(p, q) for p, q in zip(state(a), state(b), strict=True))


# --- Lightning ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lightning():
    """The package, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("pytorch_lightning")


def fit(module, watched=True, batches=8, **kwargs):
    """Lightning's own loop on a module; the truth and the lens where it is watched."""
    with lightning() as L:

        class Watch(L.Callback):
            def on_train_start(self, trainer, module):
                self.truth = Truth(module, trainer.optimizers)
                self.lens = gradlens.watch(module, module.optimizers())

            def on_train_end(self, trainer, module):
                self.lens.close()

        callback = Watch()
        data = torch.randn(4 * batches, 4, generator=torch.Generator().manual_seed(1))
        trainer = L.Trainer(
            max_steps=STEPS * module.optimizer_steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback] if watched else [],
            **kwargs,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4))
    return (callback.truth, callback.lens) if watched else (None, None)


def automatic():
    """A module under Lightning's automatic optimization, which calls backward inside the optimizer's closure."""
    with lightning() as L:

        class Net(L.LightningModule):
            optimizer_steps = 1

            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

            def training_step(self, batch, i):
                return self.net(batch[0]).pow(2).sum()

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), 0.01)

    return Net()


@pytest.mark.trap(24)
@pytest.mark.situation(
    "Lightning, automatic optimization: plain, accumulation, clipping, bf16-mixed, bf16-true",
    stages={"backward": "yes", "used": "yes: after clipping", "updates": "yes"},
    note="it clips inside the closure of the optimizer's step; `16-mixed` on a CPU is bf16-mixed",
)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"precision": "bf16-true", "accumulate_grad_batches": 2},
        {"precision": "16-mixed"},
    ],
    ids=lambda given: ", ".join(f"{k}={v}" for k, v in given.items()) or "plain",
)
def test_lightnings_own_loop(given):
    """Each backward's own partials, the clipped ones as used, and the same bits as in a training that is not watched."""
    model, plain = automatic(), automatic()
    truth, lens = fit(model, **given)
    fit(plain, watched=False, **given)
    assert same_bits(model, plain)
    truth.check(lens)
    history = lens.history()
    assert sorted(history["step"].unique()) == list(range(STEPS))
    backwards = given.get("accumulate_grad_batches", 1)
    assert len(history) == STEPS * (backwards + 1) * 4
    assert (history.loc[history["stage"] == "used", "update_l2"] > 0).all()
    if "gradient_clip_val" in given:
        used = history[history["stage"] == "used"].groupby("step")["l2"].apply(lambda l2: (l2**2).sum() ** 0.5)
        assert list(used) == pytest.approx([0.1] * STEPS, rel=1e-3)


def by_hand():
    """Two optimizers under manual optimization: the other one's parameters are frozen while one is toggled."""
    with lightning() as L:

        class Gan(L.LightningModule):
            optimizer_steps = 2

            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.automatic_optimization = False
                self.g, self.d = nn.Linear(4, 4), nn.Linear(4, 1)

            def training_step(self, batch, i):
                for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
                    self.toggle_optimizer(optimizer)
                    optimizer.zero_grad()
                    self.manual_backward(sign * self.d(self.g(batch[0])).sum())
                    optimizer.step()
                    self.untoggle_optimizer(optimizer)

            def configure_optimizers(self):
                return torch.optim.SGD(self.d.parameters(), 0.01), torch.optim.SGD(self.g.parameters(), 0.01)

    return Gan()


@pytest.mark.situation(
    "Lightning, manual optimization of two optimizers",
    stages={"backward": "yes: `frozen` while the other one is toggled", "used": "yes", "updates": "yes"},
)
def test_lightnings_manual_optimization():
    """The last of the optimizers is the clock; each gives the rows of its own parameters."""
    model, plain = by_hand(), by_hand()
    truth, lens = fit(model)
    fit(plain, watched=False)
    assert same_bits(model, plain)
    truth.check(lens)
    history = lens.history()
    assert sorted(history["step"].unique()) == list(range(STEPS))
    first = history.query("step == 0 and stage == 'backward' and backward == 0").set_index("parameter")["status"]
    assert dict(first) == {"g.weight": "frozen", "g.bias": "frozen", "d.weight": "ok", "d.bias": "ok"}


# --- transformers and accelerate ------------------------------------------------------------------------------------


def train(watched=True, *, folder, **kwargs):
    """The Trainer's own loop on a small GPT-2; the model, and where it is watched the truth and the lens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **rest):
            self.truth = Truth(model, [optimizer.optimizer])
            self.lens = gradlens.watch(model, optimizer)

        def on_train_end(self, *args, **rest):
            self.lens.close()

    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    tokens = [torch.arange(8) * k % 32 for k in range(1, 25)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **kwargs,
    )
    callback = Watch()
    transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": t, "labels": t} for t in tokens],
        callbacks=[callback] if watched else [],
    ).train()
    return (model, callback.truth, callback.lens) if watched else (model, None, None)


@pytest.mark.trap(26)
@pytest.mark.situation(
    "transformers' Trainer: plain, accumulation, clipping, bf16, checkpointing, fused and Adafactor",
    stages={"backward": "yes", "used": "yes: after clipping", "updates": "yes"},
    note="its optimizer is accelerate's wrapper, an `Optimizer` whose step calls no hooks: the one inside it does",
)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"optim": "adamw_torch_fused"},
        {"optim": "adafactor"},
    ],
    ids=lambda given: ", ".join(f"{k}={v}" for k, v in given.items()) or "plain",
)
def test_the_trainers_own_loop(tmp_path, given):
    """Each backward's own partials, the clipped ones as used, and the same bits as in a training that is not watched."""
    model, truth, lens = train(folder=tmp_path, **given)
    plain, _, _ = train(False, folder=tmp_path, **given)
    assert same_bits(model, plain)
    truth.check(lens)
    history = lens.history()
    assert sorted(history["step"].unique()) == list(range(STEPS))
    backwards = given.get("gradient_accumulation_steps", 1)
    assert len(history) == STEPS * (backwards + 1) * len(list(model.parameters()))
    if "max_grad_norm" in given:
        used = history[history["stage"] == "used"].groupby("step")["l2"].apply(lambda l2: (l2**2).sum() ** 0.5)
        assert list(used) == pytest.approx([0.1] * STEPS, rel=1e-3)


@pytest.mark.trap(26)
@pytest.mark.situation("accelerate, `accumulate()`", stages={"backward": "yes", "used": "yes"})
def test_a_loop_with_accelerate():
    """The wrapper's step does nothing on micro-batches: those are backwards of one step."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 2)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 3)), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), data)
    truth = Truth(model, [optimizer.optimizer])
    with gradlens.watch(model, optimizer) as lens:
        for (x,) in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).pow(2).sum())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        truth.check(lens)
        keys = lens.history()[["step", "stage", "backward"]].drop_duplicates()
    assert [tuple(key) for key in keys.to_numpy()] == [
        (step, stage, backward) for step in range(3) for stage, backward in (("backward", 0), ("backward", 1), ("used", 1))
    ]
