"""Trainings that were written by hand, one function each: the rules' thresholds were made with all of them at hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.base import (
    Callable,
    Language,
    Recurrent,
    Residual,
    Training,
    adam,
    adamw,
    cnn,
    diabetes,
    digit,
    examples,
    ill,
    mlp,
    plain,
    sentences,
    sgd,
    spoken,
    text,
    told,
    well,
)

# --- those that are well --------------------------------------------------------------------------------------------


@well
def mlp_adam() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, adam(model), digit)


@well
def mlp_sgd() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model), digit)


@well
def mlp_momentum_bold() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model, 0.1, momentum=0.9, nesterov=True), digit)


@well
def mlp_tanh_deep() -> Training:
    model = mlp(64, *[64] * 6, 10, act=nn.Tanh)
    return plain(model, adam(model), digit)


@well
def mlp_dropout_batchnorm() -> Training:
    model = nn.Sequential(mlp(64, 128, 64, norm=True), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))
    return plain(model, adamw(model, 3e-3, weight_decay=0.05), digit)


@well
def cnn_batchnorm_momentum_cosine() -> Training:
    model = cnn()
    optimizer = sgd(model, 0.1, momentum=0.9, weight_decay=5e-4)
    return plain(model, optimizer, digit, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300))


@well
def cnn_batchnorm_adam() -> Training:
    model = cnn()
    return plain(model, adam(model), digit)


def _resnet(zero: bool) -> nn.Sequential:
    blocks = [Residual(16, zero) for _ in range(6)]
    stem = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@well
def resnet() -> Training:
    model = _resnet(zero=False)
    return plain(model, sgd(model, 0.05, momentum=0.9), digit)


@well
def resnet_branches_begin_at_zero() -> Training:
    model = _resnet(zero=True)
    return plain(model, sgd(model, 0.05, momentum=0.9), digit)


@well
def vision_transformer() -> Training:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cls, self.place = (
                nn.Linear(4, 32),
                nn.Parameter(torch.zeros(1, 1, 32)),
                nn.Parameter(0.02 * torch.randn(1, 17, 32)),
            )
            self.blocks = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), 4, enable_nested_tensor=False
            )
            self.head = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
            h = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.place
            return self.head(self.blocks(h)[:, 0])

    model = Patches()
    return plain(model, adamw(model), digit)


def _warm(optimizer: torch.optim.Optimizer, steps: int = 50) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / steps))


@well
def transformer_pre_norm() -> Training:
    model = Language()
    optimizer = adamw(model, 3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    return plain(model, optimizer, spoken, clip=1.0, schedule=_warm(optimizer))


@well
def transformer_post_norm_tied() -> Training:
    model = Language(first=False, tied=True)
    optimizer = adam(model, 1e-3)
    return plain(model, optimizer, spoken, schedule=_warm(optimizer, 100))


@well
def transformer_deep_sgd() -> Training:
    model = Language(width=32, depth=8)
    return plain(model, sgd(model, 0.3, momentum=0.9), spoken, clip=1.0)


@well
def lstm_carried_state() -> Training:
    model, state = Recurrent(), None
    optimizer = adam(model, 3e-3)

    def step(k: int) -> Tensor:
        nonlocal state
        x, y = sentences(k)
        optimizer.zero_grad()
        out, state = model(x, state)
        state = tuple(part.detach() for part in state)
        loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
        told(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return Training(model, [optimizer], step)


@well
def gru_rmsprop() -> Training:
    model = Recurrent(nn.GRU, layers=1)
    return plain(model, torch.optim.RMSprop(model.parameters(), lr=2e-3), spoken)


@well
def rnn_sgd_clipped() -> Training:
    model = Recurrent(nn.RNN, layers=1)
    return plain(model, sgd(model, 0.5), spoken, clip=1.0)


@well
def autoencoder() -> Training:
    model = mlp(64, 48, 16, 48, 64)
    return plain(model, adam(model), lambda m, k: F.mse_loss(m(examples(k)[0]), examples(k)[0]))


@well
def autoencoder_sigmoid_bce() -> Training:
    model = nn.Sequential(mlp(64, 48, 16, 48, 64), nn.Sigmoid())
    return plain(model, adam(model), lambda m, k: F.binary_cross_entropy(m(examples(k)[0]), examples(k)[0]))


@well
def variational_autoencoder() -> Training:
    model = nn.ModuleDict({"enc": mlp(64, 64, 32), "dec": mlp(16, 64, 64)})

    def loss(m: Any, k: int) -> Tensor:
        x, _ = examples(k)
        mean, log = m["enc"](x).chunk(2, 1)
        out = m["dec"](mean + (log / 2).exp() * torch.randn_like(mean))
        near = F.binary_cross_entropy_with_logits(out, x, reduction="none").sum(1)
        return (near + 0.5 * (mean**2 + log.exp() - 1 - log).sum(1)).mean()

    return plain(model, adam(model), loss)


def _gan(forgets: bool = False) -> Training:
    g, d = nn.Sequential(mlp(16, 64, 64, 64), nn.Sigmoid()), mlp(64, 64, 32, 1, act=lambda: nn.LeakyReLU(0.2))
    og, od = adam(g, 5e-4, betas=(0.5, 0.999)), adam(d, 5e-4, betas=(0.5, 0.999))

    def step(k: int) -> Tensor:
        x, _ = examples(k)
        fake = g(torch.randn(len(x), 16))
        if not forgets:
            od.zero_grad()
        real, made = d(x), d(fake.detach())
        loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        told(loss + F.binary_cross_entropy_with_logits(made, torch.zeros_like(made))).backward()
        od.step()
        og.zero_grad()
        made = d(fake)
        loss = F.binary_cross_entropy_with_logits(made, torch.ones_like(made))
        told(loss).backward()
        og.step()
        return loss.detach()

    return Training({"G": g, "D": d}, [od, og], step)


@well
def gan_two_optimizers() -> Training:
    return _gan()


def _regression(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Training:
    model = mlp(10, 32, 32, 1)

    def loss(m: nn.Module, k: int) -> Tensor:
        x, y = examples(k, 32, diabetes)
        return F.mse_loss(m(x), (y - 152) / 77)

    return plain(model, make(model), loss)


@well
def regression_adam() -> Training:
    return _regression(adam)


@well
def regression_sgd() -> Training:
    return _regression(lambda m: sgd(m, 0.01))


@well
def regression_adamw() -> Training:
    return _regression(adamw)


@well
def regression_rmsprop() -> Training:
    return _regression(lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3))


@well
def regression_adagrad() -> Training:
    return _regression(lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2))


@well
def regression_linear_to_convergence() -> Training:
    """Full batches, without noise in the targets: the loss falls to the last digits."""
    model = nn.Linear(10, 1)
    x, _ = diabetes()
    y = x @ torch.arange(10.0)[:, None] / 10
    return plain(model, sgd(model, 0.2), lambda m, k: F.mse_loss(m(x), y))


@well
def regression_sum_over_batch() -> Training:
    model = mlp(10, 32, 1)
    x, y = diabetes()
    return plain(model, sgd(model, 1e-5), lambda m, k: F.mse_loss(m(x), (y - 152) / 77, reduction="sum"))


@well
def regression_lbfgs() -> Training:
    model = mlp(10, 16, 1, act=nn.Tanh)
    x, y = diabetes()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)

    def step(k: int) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), (y - 152) / 77)
            told(loss).backward()
            return loss

        return optimizer.step(closure).detach()  # type: ignore[attr-defined,no-any-return]

    return Training(model, [optimizer], step)


def _pretrained() -> nn.Sequential:
    model = cnn()
    training = plain(model, adam(model, 3e-3), lambda m, k: F.cross_entropy(m(examples(k)[0]), examples(k)[1] % 10))
    for k in range(60):
        training.step(10_000 + k)
    model[-1] = nn.Linear(32, 2)
    return model


def _parity(model: nn.Module, k: int) -> Tensor:
    x, y = examples(k)
    return F.cross_entropy(model(x), y % 2)


@well
def fine_tuning_a_head() -> Training:
    model = _pretrained().requires_grad_(False)
    model[-1].requires_grad_(True)
    return plain(model, adam(model[-1], 1e-3), _parity)


@well
def fine_tuning_thawed_midway() -> Training:
    """The optimizer has all parameters from the start; the lower layers learn from step 50 on."""
    model = _pretrained().requires_grad_(False)
    model[-1].requires_grad_(True)
    training = plain(model, adam(model, 3e-4), _parity)

    def step(k: int) -> Tensor | float:
        if k == 50:
            model.requires_grad_(True)
        return training.step(k)

    return Training(model, training.optimizers, step)


@well
def fine_tuning_small_rates_below() -> Training:
    model = _pretrained()
    groups = [{"params": model[:-1].parameters(), "lr": 1e-5}, {"params": model[-1].parameters(), "lr": 1e-3}]
    return plain(model, torch.optim.AdamW(groups), _parity)


class LowRank(nn.Module):
    """A frozen linear layer beside B A, of which B begins at 0 (Hu et al. 2021)."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) / inner.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.a.T @ self.b.T


@well
def low_rank_adapters() -> Training:
    model = mlp(64, 128, 64, 10)
    before = plain(model, adam(model), digit)
    for k in range(60):
        before.step(10_000 + k)
    for i in (0, 2, 4):
        model[i] = LowRank(model[i])  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    return plain(
        model, torch.optim.AdamW(trained, lr=1e-3), lambda m, k: F.cross_entropy(m(examples(k)[0]), 9 - examples(k)[1])
    )


@well
def autocast_bfloat16() -> Training:
    model = mlp(64, 128, 64, 10)

    def loss(m: nn.Module, k: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return digit(m, k)

    return plain(model, adam(model), loss)


@well
def autocast_bfloat16_transformer() -> Training:
    model = Language()

    def loss(m: nn.Module, k: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return spoken(m, k)

    return plain(model, adamw(model), loss, clip=1.0)


def _half(*, given: bool = True, clipped: str = "", scale: float = 2.0**16) -> Training:
    model = mlp(64, 128, 64, 10)
    optimizer, scaler = sgd(model, 0.1, momentum=0.9), torch.amp.GradScaler("cpu", init_scale=scale)

    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = digit(model, k)
        scaler.scale(told(loss)).backward()
        if clipped == "unscaled":
            scaler.unscale_(optimizer)
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return Training(model, [optimizer], step, {"scaler": scaler} if given else {})


@well
def autocast_float16_scaler() -> Training:
    return _half()


@well
def autocast_float16_scaler_clipped() -> Training:
    return _half(clipped="unscaled")


@well
def all_bfloat16_bold() -> Training:
    """16-bit weights with a learning rate that they can represent."""
    model = mlp(64, 128, 64, 10).bfloat16()

    def loss(m: nn.Module, k: int) -> Tensor:
        x, y = examples(k)
        return F.cross_entropy(m(x.bfloat16()).float(), y)

    return plain(model, sgd(model, 0.1), loss)


def _accumulated() -> Training:
    model = mlp(64, 128, 64, 10)
    optimizer = adam(model)

    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        for i in range(4):
            loss = digit(model, 4 * k + i) / 4
            told(loss).backward()
        optimizer.step()
        return 4 * loss.detach()

    return Training(model, [optimizer], step)


@well
def accumulated() -> Training:
    return _accumulated()


@well
def accumulated_evidence() -> Training:
    training = _accumulated()
    training.options = {"features": ("updates", "flips", "evidence")}
    return training


@well
def two_tasks_in_turn() -> Training:
    """Each step trains one of two heads."""
    model = nn.ModuleDict({"body": mlp(64, 64, 64), "class": nn.Linear(64, 10), "odd": nn.Linear(64, 2)})

    def loss(m: Any, k: int) -> Tensor:
        x, y = examples(k)
        h = F.relu(m["body"](x))
        return F.cross_entropy(m["odd"](h), y % 2) if k % 2 else F.cross_entropy(m["class"](h), y)

    return plain(model, adam(model), loss)


def _experts(learnt: bool) -> Training:
    model = nn.ModuleDict({"gate": nn.Linear(64, 8), "experts": nn.ModuleList(mlp(64, 32, 10) for _ in range(8))})

    def loss(m: Any, k: int) -> Tensor:
        x, y = examples(k)
        gate = m["gate"](x).softmax(1)
        chosen = gate.argmax(1) if learnt else (16 * x.sum(1)).long() % 8
        out = torch.zeros(len(x), 10)
        for i, expert in enumerate(m["experts"]):
            mine = (chosen == i).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, gate[mine, i, None] * expert(x[mine]))
        return F.cross_entropy(out, y)

    return plain(model, adam(model, 3e-3), loss)


@well
def mixture_of_experts_by_hash() -> Training:
    """Each example has its expert of eight from the start (Roller et al. 2021)."""
    return _experts(learnt=False)


@well
def embedding_sparse() -> Training:
    n = text()[1]
    model = nn.ModuleDict({"table": nn.EmbeddingBag(n, 32, mode="mean", sparse=True), "head": nn.Linear(32, n)})

    def loss(m: Any, k: int) -> Tensor:
        x, y = sentences(k, 64, 8)
        return F.cross_entropy(m["head"](m["table"](x)), y[:, -1])

    return plain(model, sgd(model, 1.0), loss)


@well
def contrastive_with_temperature() -> Training:
    model = nn.ModuleDict({"net": mlp(64, 128, 32), "log": nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0))})})

    def loss(m: Any, k: int) -> Tensor:
        x, _ = examples(k)
        a, b = (F.normalize(m["net"](x + 0.1 * torch.randn_like(x))) for _ in range(2))
        return F.cross_entropy(m["log"]["scale"].exp() * a @ b.T, torch.arange(len(x)))

    return plain(model, adam(model), loss)


@well
def policy_gradient() -> Training:
    """REINFORCE with a baseline: name the digit, and hear only whether it is right."""
    model, mean = mlp(64, 64, 10), 0.1
    optimizer = adam(model, 3e-3)

    def step(k: int) -> Tensor:
        nonlocal mean
        x, y = examples(k)
        chance = torch.distributions.Categorical(logits=model(x))
        said = chance.sample()
        reward = (said == y).float()
        optimizer.zero_grad()
        loss = -((reward - mean) * chance.log_prob(said)).mean() - 0.01 * chance.entropy().mean()
        told(loss).backward()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * float(reward.mean())
        return 1 - reward.mean()

    return Training(model, [optimizer], step)


@well
def gradient_penalty() -> Training:
    """A second-order loss: the gradient by the input is part of it."""
    model = mlp(64, 64, 10, act=nn.Tanh)

    def loss(m: nn.Module, k: int) -> Tensor:
        x, y = examples(k)
        x = x.clone().requires_grad_(True)
        first = F.cross_entropy(m(x), y)
        (by,) = torch.autograd.grad(first, x, create_graph=True)
        return first + by.square().sum()

    return plain(model, adam(model), loss)


@well
def spectral_and_weight_norm() -> Training:
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    model = nn.Sequential(
        spectral_norm(nn.Linear(64, 64)), nn.ReLU(), weight_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 10)
    )
    return plain(model, adam(model), digit)


@well
def q_learning_with_target() -> Training:
    """A target network that is copied each 20 steps and never gets a gradient."""
    net, target = mlp(64, 64, 10), mlp(64, 64, 10)
    target.load_state_dict(net.state_dict())
    target.requires_grad_(False)
    model = nn.ModuleDict({"net": net, "target": target})

    def loss(m: Any, k: int) -> Tensor:
        if k % 20 == 0:
            m["target"].load_state_dict(m["net"].state_dict())
        x, y = examples(k)
        goal = F.one_hot(y, 10).float() + 0.5 * m["target"](x).max(1, keepdim=True).values.detach()
        return F.smooth_l1_loss(m["net"](x), goal)

    return plain(model, torch.optim.Adam(net.parameters(), lr=1e-3), loss)


@well
def shuffled_overfit_to_nothing() -> Training:
    """Eight examples by heart: the loss falls to 1e-6 and the gradient with it."""
    model = mlp(64, 128, 10)
    x, y = examples(0, 8)
    return plain(model, adam(model, 3e-3), lambda m, k: F.cross_entropy(m(x), y))


@well
def one_cycle() -> Training:
    model = cnn()
    optimizer = sgd(model, 0.05, momentum=0.9)
    return plain(model, optimizer, digit, schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=2_000))


@well
def observed_each_fifth_step() -> Training:
    model = cnn()
    training = plain(model, adam(model), digit)
    training.options = {"schedule": 5}
    return training


# --- those that are ill ---------------------------------------------------------------------------------------------


@ill("vanishing", "fading")
def sigmoid_stack() -> Training:
    model = mlp(64, *[64] * 8, 10, act=nn.Sigmoid)
    return plain(model, sgd(model), digit)


@ill("vanishing", "fading")
def tanh_saturated() -> Training:
    """Weights ten times too large."""
    model = mlp(64, *[64] * 8, 10, act=nn.Tanh)
    for p in model.parameters():
        p.data.mul_(0.05 if p.ndim == 1 else 0.2)
    return plain(model, sgd(model), digit)


@ill("vanishing", "dead")
def output_saturated() -> Training:
    """Squared error on sigmoids far out."""
    model = nn.Sequential(mlp(64, 64, 10), nn.Sigmoid())
    nn.init.constant_(model[0][-1].bias, -30.0)  # type: ignore[index,arg-type]
    return plain(model, sgd(model), lambda m, k: F.mse_loss(m(examples(k)[0]), F.one_hot(examples(k)[1], 10).float()))


@ill("exploding")
def weights_too_large() -> Training:
    model = mlp(64, *[64] * 10, 10)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=3 * (2 / p.shape[1]) ** 0.5)
    return plain(model, sgd(model, 1e-9), digit)


@ill("exploding", "update_ratio", "nonfinite")
def targets_not_normalised() -> Training:
    """A regression on raw targets under plain gradient descent."""
    model = mlp(10, 64, 64, 1)
    return plain(
        model, sgd(model, 0.01), lambda m, k: F.mse_loss(m(examples(k, 32, diabetes)[0]), 1e3 * examples(k, 32, diabetes)[1])
    )


@ill("exploding", "spike", "update_ratio", "nonfinite")
def recurrent_unclipped() -> Training:
    model = Recurrent(nn.RNN, layers=1)
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=1.5)  # type: ignore[arg-type]
    model.rnn.nonlinearity = model.rnn.mode = "RNN_RELU"  # type: ignore[assignment]
    return plain(model, sgd(model, 0.1), spoken)


@ill("dead")
def rectifiers_shut() -> Training:
    model = mlp(64, 64, 64, 10)
    nn.init.constant_(model[2].bias, -20.0)  # type: ignore[arg-type]
    return plain(model, adam(model), digit)


@ill("dead", "update_ratio", "too_fast")
def rectifiers_die() -> Training:
    """A learning rate that shuts a layer for good after some steps."""
    model = mlp(64, 16, 16, 16, 10)
    return plain(model, adam(model, 0.5), digit)


@ill("dead", "identical")
def weights_all_zero() -> Training:
    model = mlp(64, 64, 64, 10)
    for p in model.parameters():
        nn.init.zeros_(p)
    return plain(model, sgd(model), digit)


@ill("update_ratio", "exploding", "nonfinite", "too_fast")
def rate_too_high_sgd() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model, 20.0), digit)


@ill("update_ratio", "too_fast")
def rate_too_high_adam() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, adam(model, 0.3), digit)


@ill("update_ratio", "too_fast")
def rate_too_high_transformer() -> Training:
    model = Language()
    return plain(model, adamw(model, 0.1), spoken)


@ill("update_ratio", "too_fast")
def rate_too_high_cnn_momentum() -> Training:
    model = cnn()
    return plain(model, sgd(model, 5.0, momentum=0.9), digit)


@ill("update_ratio", "too_slow")
def rate_too_low_sgd() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model, 1e-5), digit)


@ill("update_ratio", "too_slow")
def rate_too_low_adam() -> Training:
    model = Language()
    return plain(model, adamw(model, 1e-8), spoken)


@ill("stale")
def zero_grad_missing() -> Training:
    model = mlp(64, 128, 64, 10)
    optimizer = sgd(model, 0.01)

    def step(k: int) -> Tensor:
        loss = digit(model, k)
        told(loss).backward()
        optimizer.step()
        return loss.detach()

    return Training(model, [optimizer], step)


@ill("stale")
def zero_grad_missing_transformer() -> Training:
    model = Language()
    optimizer = adamw(model)

    def step(k: int) -> Tensor:
        loss = spoken(model, k)
        told(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return Training(model, [optimizer], step)


@ill("stale")
def zero_grad_missing_in_a_gan() -> Training:
    """The discriminator's gradients of the generator's turn stay."""
    return _gan(forgets=True)


@ill("stale")
def zero_grad_missing_accumulated() -> Training:
    model = mlp(64, 128, 64, 10)
    optimizer = sgd(model, 0.01)

    def step(k: int) -> Tensor:
        for i in range(4):
            loss = digit(model, 4 * k + i) / 4
            told(loss).backward()
        optimizer.step()
        return loss.detach() * 4

    return Training(model, [optimizer], step)


def _zeroed_too_late(model: nn.Module, optimizer: torch.optim.Optimizer, **zeroing: bool) -> Training:
    def step(k: int) -> Tensor:
        loss = digit(model, k)
        told(loss).backward()
        optimizer.zero_grad(**zeroing)
        optimizer.step()
        return loss.detach()

    return Training(model, [optimizer], step)


@ill("lost")
def zero_grad_too_late() -> Training:
    """Between backward() and step(): the optimizer has nothing to use."""
    model = mlp(64, 128, 64, 10)
    return _zeroed_too_late(model, sgd(model))


@ill("lost")
def zero_grad_too_late_zeros() -> Training:
    model = mlp(64, 128, 64, 10)
    return _zeroed_too_late(model, adam(model), set_to_none=False)


@ill("unstepped", within=0)
def step_missing() -> Training:
    """Nobody calls optimizer.step()."""
    model = mlp(64, 128, 64, 10)
    optimizer = sgd(model)

    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        loss = digit(model, k)
        told(loss).backward()
        return loss.detach()

    return Training(model, [optimizer], step)


class Cut(nn.Module):
    """An encoder whose output is cut off the graph in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.encoder, self.head = way, mlp(64, 64, 32), mlp(32, 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        h = {"detach": h.detach, "data": lambda: h.data, "numpy": lambda: torch.from_numpy(h.detach().numpy())}[self.way]()
        return self.head(h)


def _cut(way: str) -> Training:
    model = Cut(way)
    return plain(model, adam(model), digit)


@ill("absent")
def detached() -> Training:
    return _cut("detach")


@ill("absent")
def through_data() -> Training:
    return _cut("data")


@ill("absent")
def through_numpy() -> Training:
    return _cut("numpy")


@ill("absent")
def encoder_under_no_grad() -> Training:
    model = nn.ModuleDict({"encoder": mlp(64, 64, 32), "head": mlp(32, 32, 10)})

    def loss(m: Any, k: int) -> Tensor:
        x, y = examples(k)
        with torch.no_grad():
            h = m["encoder"](x)
        return F.cross_entropy(m["head"](h), y)

    return plain(model, adam(model), loss)


@ill("absent")
def head_not_in_the_loss() -> Training:
    model = nn.ModuleDict({"body": mlp(64, 64, 64), "class": nn.Linear(64, 10), "odd": nn.Linear(64, 2)})

    def loss(m: Any, k: int) -> Tensor:
        x, y = examples(k)
        h = F.relu(m["body"](x))
        m["odd"](h)
        return F.cross_entropy(m["class"](h), y)

    return plain(model, adam(model), loss)


@ill("absent")
def experts_that_nobody_asks() -> Training:
    """The best of eight experts answers, and nothing balances their load: those that begin badly are asked no more."""
    return _experts(learnt=True)


@ill("vanishing", "update_ratio", "too_slow")
def loss_scaled_down() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model), lambda m, k: 1e-6 * digit(m, k))


@ill("vanishing", "too_slow")
def loss_scaled_down_adam() -> Training:
    """So far that Adam's epsilon is larger than the gradient."""
    model = mlp(64, 128, 64, 10)
    return plain(model, adam(model), lambda m, k: 1e-9 * digit(m, k))


@ill("exploding", "update_ratio", "nonfinite")
def loss_scaled_up() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model), lambda m, k: 1e5 * digit(m, k))


@ill("scaler-found")
def scaler_not_given() -> Training:
    """Found at its first step, and used from there on: no number is wrong, and the first step says so."""
    return _half(given=False, scale=2.0**10)


@ill("clipped_scaled")
def clipped_before_unscale() -> Training:
    """The norm of the scaled gradient is clipped to 1: the step is a 65,536th of what it should be."""
    return _half(clipped="scaled")


@ill("skipped", within=20)
def scaler_that_skips_for_ever() -> Training:
    model = mlp(64, 128, 64, 10)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        x, y = examples(k)
        x[0, 0] = math.inf
        loss = F.cross_entropy(model(x), y)
        scaler.scale(told(loss)).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return Training(model, [optimizer], step, {"scaler": scaler})


@ill("frozen")
def frozen_by_mistake() -> Training:
    """A layer without requires_grad, though the optimizer has it."""
    model = mlp(64, 128, 64, 10)
    model[2].requires_grad_(False)
    return plain(model, adam(model), digit)


@ill("frozen", within=60)
def frozen_midway() -> Training:
    model = mlp(64, 128, 64, 10)
    training = plain(model, adam(model), digit)

    def step(k: int) -> Tensor | float:
        if k == 50:
            model[0].requires_grad_(False)
        return training.step(k)

    return Training(model, training.optimizers, step)


@ill("unmoved")
def layer_not_in_the_optimizer() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, adam(model[:3]), digit)


@ill("unmoved", "foreign-parameters", within=20)
def head_replaced_after_the_optimizer() -> Training:
    model = mlp(64, 128, 64, 10)
    optimizer = adam(model)
    model[4] = nn.Linear(64, 10)
    return plain(model, optimizer, digit)


@ill("rounded_away")
def all_bfloat16() -> Training:
    model = mlp(64, 128, 64, 10).bfloat16()

    def loss(m: nn.Module, k: int) -> Tensor:
        x, y = examples(k)
        return F.cross_entropy(m(x.bfloat16()).float(), y)

    return plain(model, sgd(model, 1e-3), loss)


@ill("rounded_away")
def all_bfloat16_transformer() -> Training:
    model = Language().bfloat16()
    return plain(model, adamw(model, 1e-5), spoken)


@ill("dead", "vanishing", "rounded_away")
def all_float16_underflow() -> Training:
    model = mlp(64, 128, 64, 10).half()

    def loss(m: nn.Module, k: int) -> Tensor:
        x, y = examples(k)
        return 1e-6 * F.cross_entropy(m(x.half()).float(), y)

    return plain(model, sgd(model), loss)


def _poisoned(spoil: Callable[[nn.Module, Tensor, Tensor, int], Tensor], act: Callable[[], nn.Module] = nn.ReLU) -> Training:
    model = mlp(64, 128, 64, 10, act=act)
    return plain(model, sgd(model, 0.05), lambda m, k: spoil(m, *examples(k), k))


@ill("nonfinite", within=40)
def nan_in_the_data() -> Training:
    def spoil(m: nn.Module, x: Tensor, y: Tensor, k: int) -> Tensor:
        if k == 40:
            x[3, 5] = math.nan
        return F.cross_entropy(m(x), y)

    return _poisoned(spoil)


@ill("nonfinite", within=200)
def log_of_zero() -> Training:
    """log(softmax) by hand, which underflows once the model is sure."""

    def spoil(m: nn.Module, x: Tensor, y: Tensor, k: int) -> Tensor:
        share = (10 * m(x)).softmax(1)
        return -share.gather(1, y[:, None]).log().mean()

    model = mlp(64, 128, 64, 10)
    return plain(model, sgd(model, 1.0), lambda m, k: spoil(m, *examples(k), k))


@ill("nonfinite")
def root_at_zero() -> Training:
    """The distance of two outputs that are the same."""

    def spoil(m: nn.Module, x: Tensor, y: Tensor, k: int) -> Tensor:
        out = m(x)
        far = (out - (m(x[torch.arange(len(x))]) if k == 20 else out.flip(0))).pow(2).sum(1).sqrt().mean()
        return F.cross_entropy(out, y) - 1e-3 * far

    return _poisoned(spoil)


@ill("nonfinite", "exploding", "update_ratio")
def diverges_to_nan() -> Training:
    model = mlp(10, 32, 32, 1)
    return plain(
        model, sgd(model, 0.5), lambda m, k: F.mse_loss(m(examples(k, 32, diabetes)[0]), examples(k, 32, diabetes)[1])
    )


@ill("spike", within=100)
def bad_batch() -> Training:
    """At step 100 one batch comes in other units."""
    model = mlp(64, 128, 64, 10)

    def loss(m: nn.Module, k: int) -> Tensor:
        x, y = examples(k)
        return F.cross_entropy(m(1000 * x if k == 100 else x), y)

    return plain(model, sgd(model, 0.05), loss)


@ill("shrunk", "weight_decay", within=100)
def weight_decay_too_strong() -> Training:
    model = mlp(64, 128, 64, 10)
    return plain(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=100.0), digit)
