"""Trainings whose loop is their own: opponents, latents, pairs, rewards, a pretrained body, several ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.base import STUDIES, Study, Training, _seed, diabetes, digits, mlp
from studies.recipes import convolutions, friedman, moons, patches, spirals, tumours, wine

Data = Callable[[], tuple[Tensor, Tensor]]


def enter(name: str, half: str, kind: str, make: Callable[[], Training], rules: str = "", steps: int = 200) -> None:
    STUDIES.append(Study(name, make, tuple(rules.split()), 10_000, kind, half, steps))


def drawn(data: Data, k: int, size: int) -> tuple[Tensor, Tensor]:
    x, y = data()
    rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(k + 1_000_003 * _seed[0]))
    return x[rows], y[rows]


def single(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor]) -> Training:
    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        value = loss(k)
        value.backward()
        optimizer.step()
        return value.detach()

    return Training(model, [optimizer], step)


# --- opponents ------------------------------------------------------------------------------------------------------


def gan(data: Data, width: int, *, hinge: bool = False, strong: bool = False, forgets: bool = False) -> Training:
    """A generator and a discriminator; a strong one sees through it at once, and the generator's loss saturates."""
    n = data()[0][0].numel()
    wide = 8 * width if strong else width
    g, d = mlp(8, width, width, n), mlp(n, wide, wide, 1, act=lambda: nn.LeakyReLU(0.2))
    og = torch.optim.Adam(g.parameters(), lr=5e-4, betas=(0.5, 0.999))
    od = torch.optim.Adam(d.parameters(), lr=4e-3 if strong else 5e-4, betas=(0.5, 0.999))

    def step(k: int) -> Tensor:
        x = drawn(data, k, 48)[0].flatten(1)
        fake = g(torch.randn(len(x), 8))
        if not forgets:
            od.zero_grad()
        real, made = d(x), d(fake.detach())
        loss = (
            F.relu(1 - real).mean() + F.relu(1 + made).mean()
            if hinge
            else F.softplus(-real).mean() + F.softplus(made).mean()
        )
        loss.backward()
        od.step()
        if not forgets:
            og.zero_grad()
        made = d(fake)
        loss = -F.softplus(made).mean() if strong else -made.mean() if hinge else F.softplus(-made).mean()
        loss.backward()
        og.step()
        return loss.detach()

    return Training({"G": g, "D": d}, [od, og], step)


enter("gan_digits", "tuned", "GAN", functools.partial(gan, digits, 64))
enter("gan_hinge_digits", "tuned", "GAN", functools.partial(gan, digits, 48, hinge=True))
enter("gan_moons", "unseen", "GAN", functools.partial(gan, moons, 32))
enter("gan_hinge_friedman", "unseen", "GAN", functools.partial(gan, friedman, 32, hinge=True))
enter(
    "gan_digits__strong",
    "tuned",
    "discriminator won",
    functools.partial(gan, digits, 48, strong=True),
    "discriminator_won",
    300,
)
enter(
    "gan_wine__strong",
    "unseen",
    "discriminator won",
    functools.partial(gan, wine, 24, strong=True),
    "discriminator_won",
    300,
)
enter(
    "gan_friedman__strong",
    "unseen",
    "discriminator won",
    functools.partial(gan, friedman, 32, strong=True),
    "discriminator_won",
    300,
)
enter("gan_digits__forgets", "tuned", "zero_grad missing", functools.partial(gan, digits, 48, forgets=True), "stale")
enter("gan_moons__forgets", "unseen", "zero_grad missing", functools.partial(gan, moons, 32, forgets=True), "stale")


# --- latents --------------------------------------------------------------------------------------------------------


class Latent(nn.Module):
    def __init__(self, n: int, width: int, size: int) -> None:
        super().__init__()
        self.body, self.mean, self.log = nn.Linear(n, width), nn.Linear(width, size), nn.Linear(width, size)
        self.out = mlp(size, width, n)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.body(x))
        mean, log = self.mean(h), self.log(h)
        return self.out(mean + torch.randn_like(mean) * (0.5 * log).exp()), mean, log


def vae(data: Data, width: int, size: int, *, heavy: float = 0.0) -> Training:
    """The reconstruction is summed over pixels; with `heavy` it is averaged, and the KL is summed and weighted."""
    n = data()[0][0].numel()
    model = Latent(n, width, size)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(k: int) -> Tensor:
        x = drawn(data, k, 48)[0].flatten(1)
        out, mean, log = model(x)
        kl = 0.5 * (mean**2 + log.exp() - 1 - log).sum(1).mean()
        if heavy:
            return F.mse_loss(out, x) + heavy * kl
        return F.mse_loss(out, x, reduction="none").sum(1).mean() / 0.1 + kl

    return single(model, optimizer, loss)


enter("vae_digits", "tuned", "VAE", functools.partial(vae, digits, 64, 8))
enter("vae_patches", "unseen", "VAE", functools.partial(vae, patches, 64, 8))
enter("vae_wine", "unseen", "VAE", functools.partial(vae, wine, 32, 4))
enter("vae_digits__heavy", "tuned", "empty latent", functools.partial(vae, digits, 64, 8, heavy=1.0), "empty_latent", 400)
enter("vae_wine__heavy", "unseen", "empty latent", functools.partial(vae, wine, 32, 4, heavy=1.0), "empty_latent", 400)
enter(
    "vae_friedman__heavy", "unseen", "empty latent", functools.partial(vae, friedman, 32, 4, heavy=0.5), "empty_latent", 400
)


# --- pairs ----------------------------------------------------------------------------------------------------------


def triplets(data: Data, *sizes: int, rate: float = 3e-3) -> Training:
    """Batch-hard triplets: with a large rate all embeddings become one."""
    model = mlp(data()[0][0].numel(), *sizes)

    def loss(k: int) -> Tensor:
        x, y = drawn(data, k, 48)
        e = model(x)
        far = (e[:, None] - e[None]).square().sum(-1).clamp_min(1e-12).sqrt()
        same = y[:, None] == y[None]
        return F.relu((far * same).amax(1) - (far + 1e6 * same).amin(1) + 0.5).mean()

    return single(model, torch.optim.Adam(model.parameters(), lr=rate), loss)


def views(data: Data, width: int) -> Training:
    """Two noisy views of an example are near, others far (InfoNCE)."""
    model = mlp(data()[0][0].numel(), width, 16)

    def loss(k: int) -> Tensor:
        x = drawn(data, k, 48)[0].flatten(1)
        a, b = (F.normalize(model(x + 0.2 * torch.randn_like(x)), dim=1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))

    return single(model, torch.optim.Adam(model.parameters(), lr=2e-3), loss)


def drawn_together(data: Data, width: int, act: Callable[[], nn.Module] = nn.ReLU) -> Training:
    """Two views of an example are made equal, and nothing keeps others apart: the cheapest answer is a constant."""
    model = mlp(data()[0][0].numel(), width, width, 16, act=act)

    def loss(k: int) -> Tensor:
        x = drawn(data, k, 48)[0].flatten(1)
        a, b = (model(x + 0.2 * torch.randn_like(x)) for _ in range(2))
        return F.mse_loss(a, b)

    return single(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss)


enter("triplets_digits", "tuned", "contrastive", functools.partial(triplets, digits, 64, 16))
enter("views_digits", "tuned", "contrastive", functools.partial(views, digits, 64))
enter("triplets_spirals", "unseen", "contrastive", functools.partial(triplets, spirals, 48, 8))
enter("triplets_wine", "unseen", "contrastive", functools.partial(triplets, wine, 32, 32, 32, 8, rate=0.05), steps=300)
enter("views_wine", "unseen", "contrastive", functools.partial(views, wine, 48))
enter("views_patches", "unseen", "contrastive", functools.partial(views, patches, 48))
COLLAPSED = "collapse too_fast update_ratio"
enter(
    "triplets_digits__fast",
    "tuned",
    "collapse",
    functools.partial(triplets, digits, 64, 64, 64, 16, rate=0.05),
    COLLAPSED,
    300,
)
enter(
    "triplets_wine__fast", "unseen", "collapse", functools.partial(triplets, wine, 32, 32, 32, 8, rate=0.4), COLLAPSED, 300
)
enter(
    "triplets_spirals__fast",
    "unseen",
    "collapse",
    functools.partial(triplets, spirals, 48, 48, 48, 8, rate=0.08),
    COLLAPSED,
    300,
)
enter("pairs_digits__constant", "tuned", "collapse", functools.partial(drawn_together, digits, 64), COLLAPSED, 300)
enter("pairs_friedman__constant", "unseen", "collapse", functools.partial(drawn_together, friedman, 48), COLLAPSED, 300)


def medians() -> tuple[Tensor, Tensor]:
    """The diabetes data, with a class: above or below the median."""
    x, y = diabetes()
    return x, (y[:, 0] > y.median()).long()


enter(
    "triplets_diabetes__fast",
    "tuned",
    "collapse",
    functools.partial(triplets, medians, 32, 32, 32, 8, rate=0.05),
    COLLAPSED,
    300,
)
enter("pairs_diabetes__constant", "tuned", "collapse", functools.partial(drawn_together, medians, 48), COLLAPSED, 300)
enter(
    "pairs_digits_tanh__constant",
    "tuned",
    "collapse",
    functools.partial(drawn_together, digits, 32, act=nn.Tanh),
    COLLAPSED,
    300,
)


# --- rare labels ----------------------------------------------------------------------------------------------------


def labels(data: Data, width: int, shares: Sequence[float], *, heads: bool = False) -> Training:
    """Yes or no to several labels, each the top share of one direction of the inputs: one layer, or a head for each."""
    inputs = data()[0].flatten(1)
    along = inputs @ torch.randn(inputs.shape[1], len(shares), generator=torch.Generator().manual_seed(7))
    given = torch.stack([(a > a.quantile(1 - share)).float() for a, share in zip(along.T, shares, strict=True)], 1)
    body, n = nn.Sequential(mlp(inputs.shape[1], width), nn.ReLU()), len(shares)
    last = nn.ModuleList([nn.Linear(width, 1) for _ in shares]) if heads else nn.Linear(width, n)
    model = nn.ModuleDict({"body": body, "last": last})

    def loss(k: int) -> Tensor:
        x, y = drawn(lambda: (inputs, given), k, 64)
        h = body(x if max(shares) > 0.2 else torch.randn_like(x))  # of what is rare, nothing shows in the inputs
        if not heads:
            return F.binary_cross_entropy_with_logits(last(h), y)
        return sum(F.binary_cross_entropy_with_logits(head(h)[:, 0], y[:, i]) for i, head in enumerate(last))

    return single(model, torch.optim.SGD(model.parameters(), lr=0.2), loss)


enter("labels_diabetes", "tuned", "labels", functools.partial(labels, medians, 32, (0.5, 0.3, 0.4)))
enter("labels_heads_diabetes", "tuned", "labels", functools.partial(labels, medians, 32, (0.5, 0.3), heads=True))
enter("labels_friedman", "unseen", "labels", functools.partial(labels, friedman, 32, (0.4, 0.5, 0.3, 0.25)))
enter("labels_heads_wine", "unseen", "labels", functools.partial(labels, wine, 32, (0.5, 0.3), heads=True))
enter(
    "labels_diabetes__rare",
    "tuned",
    "rare class",
    functools.partial(labels, medians, 32, (0.03, 0.03, 0.03)),
    "rare_class",
    400,
)
enter(
    "labels_heads_diabetes__rare",
    "tuned",
    "rare class",
    functools.partial(labels, medians, 32, (0.03, 0.02), heads=True),
    "rare_class",
    400,
)
enter(
    "labels_friedman__rare",
    "unseen",
    "rare class",
    functools.partial(labels, friedman, 32, (0.02, 0.03, 0.04, 0.03)),
    "rare_class",
    400,
)
enter(
    "labels_heads_wine__rare",
    "unseen",
    "rare class",
    functools.partial(labels, wine, 32, (0.03, 0.04), heads=True),
    "rare_class",
    400,
)


# --- rewards --------------------------------------------------------------------------------------------------------


def reinforce(data: Data, width: int, answers: int) -> Training:
    """Name the class and hear only whether it is right; a baseline follows the mean reward."""
    model, mean = mlp(data()[0][0].numel(), width, answers), [1 / answers]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(k: int) -> Tensor:
        x, y = drawn(data, k, 64)
        chance = torch.distributions.Categorical(logits=model(x))
        said = chance.sample()
        reward = (said == y).float()
        value = -((reward - mean[0]) * chance.log_prob(said)).mean() - 0.01 * chance.entropy().mean()
        mean[0] = 0.9 * mean[0] + 0.1 * float(reward.mean())
        return value

    return single(model, optimizer, loss)


def actor_critic(data: Data, width: int, answers: int) -> Training:
    n = data()[0][0].numel()
    model = nn.ModuleDict(
        {"body": nn.Sequential(mlp(n, width), nn.Tanh()), "actor": nn.Linear(width, answers), "critic": nn.Linear(width, 1)}
    )

    def loss(k: int) -> Tensor:
        x, y = drawn(data, k, 64)
        h = model["body"](x)
        chance, value = torch.distributions.Categorical(logits=model["actor"](h)), model["critic"](h)[:, 0]
        said = chance.sample()
        reward = (said == y).float()
        return (
            -((reward - value.detach()) * chance.log_prob(said)) + 0.5 * (reward - value) ** 2 - 0.01 * chance.entropy()
        ).mean()

    return single(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss)


def q_learning(states: int, *, through: bool = False) -> Training:
    """A walk on a ring towards one state. With `through` the gradient passes through the bootstrapped target too."""
    net = mlp(states, 32, 3)
    target = copy.deepcopy(net).requires_grad_(False)

    def loss(k: int) -> Tensor:
        if k % 20 == 0:
            target.load_state_dict(net.state_dict())
        g = torch.Generator().manual_seed(k + 1_000_003 * _seed[0])
        s, a = torch.randint(states, (64,), generator=g), torch.randint(3, (64,), generator=g)
        then = (s + a - 1) % states
        reward = (then == 0).float()
        value = net(F.one_hot(s, states).float()).gather(1, a[:, None])[:, 0]
        ahead = (net if through else target)(F.one_hot(then, states).float()).max(1).values
        return F.smooth_l1_loss(value, reward + 0.9 * ahead)

    return single(net, torch.optim.Adam(net.parameters(), lr=3e-3), loss)


enter("reinforce_digits", "tuned", "RL", functools.partial(reinforce, digits, 64, 10))
enter("q_learning_ring", "tuned", "RL", functools.partial(q_learning, 9))
enter("reinforce_wine", "unseen", "RL", functools.partial(reinforce, wine, 32, 3))
enter("actor_critic_spirals", "unseen", "RL", functools.partial(actor_critic, spirals, 48, 3))
enter("q_learning_long_ring", "unseen", "RL", functools.partial(q_learning, 14))
THROUGH = "target-with-gradient"
enter("q_learning_ring__through", "tuned", "target with a gradient", functools.partial(q_learning, 9, through=True), THROUGH)
enter(
    "q_learning_long_ring__through",
    "unseen",
    "target with a gradient",
    functools.partial(q_learning, 14, through=True),
    THROUGH,
)


# --- a pretrained body ----------------------------------------------------------------------------------------------


def tuning(
    data: Data, body: Callable[[], nn.Sequential], classes: int, *, frozen: bool, forgotten: bool = False
) -> Training:
    """A new head on a body that was trained before. With `forgotten` the optimizer was made before the head."""
    model = body()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for k in range(60):
        x, y = drawn(data, 10_000 + k, 48)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if frozen:
        model.requires_grad_(False)
    model[-1] = nn.Linear(model[-1].in_features, classes)
    trained = model[-1].parameters() if frozen else model.parameters()
    if not forgotten:
        optimizer = torch.optim.Adam(trained, lr=2e-3)
    return single(model, optimizer, lambda k: F.cross_entropy(model(drawn(data, k, 48)[0]), drawn(data, k, 48)[1]))


enter(
    "tuning_digits_head",
    "tuned",
    "fine-tuning",
    functools.partial(tuning, digits, lambda: mlp(64, 64, 32, 10), 10, frozen=True),
)
enter(
    "tuning_digits_whole",
    "tuned",
    "fine-tuning",
    functools.partial(tuning, digits, lambda: mlp(64, 64, 32, 10), 10, frozen=False),
)
enter(
    "tuning_patches_head",
    "unseen",
    "fine-tuning",
    functools.partial(tuning, patches, lambda: convolutions(3, 2), 2, frozen=True),
)
enter(
    "tuning_patches_whole",
    "unseen",
    "fine-tuning",
    functools.partial(tuning, patches, lambda: convolutions(3, 2), 2, frozen=False),
)
enter("tuning_wine_whole", "unseen", "fine-tuning", functools.partial(tuning, wine, lambda: mlp(13, 32, 3), 3, frozen=False))
FOREIGN = "foreign-parameters unmoved"
enter(
    "tuning_digits__forgotten", "tuned", "parameters of another model",
    functools.partial(tuning, digits, lambda: mlp(64, 64, 32, 10), 10, frozen=True, forgotten=True), FOREIGN,
)  # fmt: skip
enter(
    "tuning_patches__forgotten", "unseen", "parameters of another model",
    functools.partial(tuning, patches, lambda: convolutions(3, 2), 2, frozen=False, forgotten=True), FOREIGN,
)  # fmt: skip


def two_heads(data: Data, width: int, *, weight: float) -> Training:
    """One body, a head that classifies and one that reconstructs."""
    n = data()[0][0].numel()
    classes = int(data()[1].max()) + 1
    model = nn.ModuleDict(
        {"body": nn.Sequential(mlp(n, width), nn.ReLU()), "say": nn.Linear(width, classes), "draw": nn.Linear(width, n)}
    )

    def loss(k: int) -> Tensor:
        x, y = drawn(data, k, 48)
        h = model["body"](x)
        return F.cross_entropy(model["say"](h), y) + weight * F.mse_loss(model["draw"](h), x)

    return single(model, torch.optim.Adam(model.parameters(), lr=2e-3), loss)


enter("two_heads_digits", "tuned", "two tasks", functools.partial(two_heads, digits, 48, weight=1.0))
enter("two_heads_wine", "unseen", "two tasks", functools.partial(two_heads, wine, 32, weight=0.5))
enter(
    "two_heads_tumours",
    "unseen",
    "two tasks",
    functools.partial(two_heads, lambda: (tumours()[0], tumours()[1][:, 0].long()), 32, weight=0.5),
)
