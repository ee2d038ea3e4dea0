"""Mistakes that people make, each a change of one piece of a training, and habits that are none.

A mistake lists the trainings that it is tried on, of both halves, and the findings that name it. What a mistake does to a
training may be found by several rules: all that say the cause, not the symptom alone, are accepted.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.base import STUDIES, Study, Training
from studies.parts import USUAL, Parts, assembled
from studies.recipes import RECIPES, SGD, Adam, AdamW

Change = Callable[[Parts], None]


@dataclass(frozen=True)
class Mistake:
    """A change, and what it should be called."""

    name: str
    kind: str
    rules: tuple[str, ...]
    on: tuple[str, ...]
    change: Change
    steps: int = 0


MISTAKES: list[Mistake] = []
HABITS: list[tuple[str, tuple[str, ...], Change]] = []


def mistake(kind: str, rules: str, on: str, steps: int = 0) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        MISTAKES.append(Mistake(change.__name__, kind, tuple(rules.split()), tuple(on.split()), change, steps))
        return change

    return add


def habit(on: str) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        HABITS.append((change.__name__, tuple(on.split()), change))
        return change

    return add


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear]


def faster(p: Parts, factor: float) -> None:
    """Multiply the learning rate."""
    p.optimizer = functools.partial(p.optimizer, lr=p.rate * factor)


# --- the loss -------------------------------------------------------------------------------------------------------


@mistake("softmax or sigmoid twice", "softmax-twice", "digits_tanh digits_vit wine_mlp patches_batchnorm majorities_gru")
def softmax_before_cross_entropy(p: Parts) -> None:
    p.output = functools.partial(torch.softmax, dim=-1)


@mistake("softmax or sigmoid twice", "softmax-twice", "characters_lstm sums_transformer")
def softmax_before_cross_entropy_of_tokens(p: Parts) -> None:
    p.output = functools.partial(torch.softmax, dim=-1)


@mistake("softmax or sigmoid twice", "sigmoid-twice", "threes tumours_mlp tumours_leaky")
def sigmoid_before_logits_loss(p: Parts) -> None:
    p.output = torch.sigmoid


@mistake("softmax or sigmoid twice", "sigmoid-twice", "digits_mlp spirals_momentum")
def sigmoid_before_cross_entropy(p: Parts) -> None:
    p.output = torch.sigmoid


@mistake("clamped logits", "clamped-logits", "threes digits_cnn tumours_leaky moons_selu patches_groupnorm")
def rectifier_on_the_logits(p: Parts) -> None:
    p.output = torch.relu


@mistake("clamped logits", "clamped-logits", "digits_mlp wine_mlp")
def logits_clamped_to_one(p: Parts) -> None:
    p.output = functools.partial(torch.clamp, min=-1, max=1)


@mistake("wrong axis", "softmax-over-batch", "digits_mlp wine_mlp patches_cnn")
def log_softmax_over_the_batch(p: Parts) -> None:
    p.loss = lambda o, y: F.nll_loss(F.log_softmax(o, dim=0), y)


@mistake("wrong axis", "softmax-wrong-axis softmax-over-batch", "characters_transformer sums_lstm")
def log_softmax_over_time(p: Parts) -> None:
    p.loss = lambda o, y: F.nll_loss(F.log_softmax(o, dim=1).flatten(0, 1), y.flatten())


@mistake("no log", "no-log", "digits_cnn moons_selu patches_resnet_plain")
def probabilities_in_nll_loss(p: Parts) -> None:
    p.loss = lambda o, y: F.nll_loss(F.softmax(o, dim=1), y)


@mistake("no log", "no-log", "digits_mlp majorities_transformer")
def logits_in_nll_loss(p: Parts) -> None:
    p.loss = F.nll_loss


@mistake("broadcast", "broadcast", "diabetes_mlp diabetes_sgd friedman_mlp waves_tanh")
def target_without_its_axis(p: Parts) -> None:
    p.loss = lambda o, y: F.mse_loss(o, y[:, 0])


@mistake("broadcast", "broadcast", "diabetes_sgd friedman_gelu")
def difference_without_its_axis(p: Parts) -> None:
    p.loss = lambda o, y: (o - y[:, 0]).abs().mean()


@mistake("broadcast", "broadcast", "diabetes_mlp friedman_mlp")
def prediction_squeezed(p: Parts) -> None:
    p.loss = lambda o, y: ((o[:, 0] - y) ** 2).mean()


@mistake("cut from the model", "cut", "digits_cnn friedman_gelu patches_resnet_plain")
def loss_made_again(p: Parts) -> None:
    usual = USUAL[p.task]
    p.loss = lambda o, y: torch.tensor(float(usual(o, y)), requires_grad=True)


@mistake("cut from the model", "cut", "digits_mlp tumours_mlp")
def output_detached(p: Parts) -> None:
    p.output = lambda o: o.detach().requires_grad_(True)


@mistake("cut from the model", "absent", "digits_cnn patches_autoencoder patches_cnn")
def first_layers_under_no_grad(p: Parts) -> None:
    assert isinstance(p.model, nn.Sequential)
    children = list(p.model)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(*children[:4]), nn.Sequential(*children[4:])

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.body(x)
            return self.head(h)

    p.model = Half()


class Listed(nn.Module):
    """Layers in a Python list."""

    def __init__(self, first: nn.Module, hidden: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.first, self.hidden, self.last = first, hidden, last

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.last(x)


@mistake("layers that nobody has", "unregistered", "digits_mlp wine_mlp friedman_mlp")
def layers_in_a_list(p: Parts) -> None:
    first, last = linears(p.model)[0], linears(p.model)[-1]
    p.model = Listed(
        first, [nn.Linear(first.out_features, first.out_features), nn.Linear(first.out_features, last.in_features)], last
    )


@mistake("layers that nobody has", "unregistered", "digits_tanh tumours_mlp")
def layers_in_a_dict(p: Parts) -> None:
    model = p.model
    width = linears(model)[0].in_features

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.extra = model, {"mix": nn.Linear(width, width), "gate": nn.Linear(width, width)}

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + torch.sigmoid(self.extra["gate"](x)) * self.extra["mix"](x))

    p.model = Gated()


@mistake("target with a gradient", "target-with-gradient", "diabetes_mlp friedman_gelu")
def target_requires_grad(p: Parts) -> None:
    p.loss = lambda o, y: F.mse_loss(o, y.clone().requires_grad_(True))


@mistake("one output, softmax", "softmax-of-one", "threes tumours_mlp")
def cross_entropy_of_one_output(p: Parts) -> None:
    p.loss = lambda o, y: F.cross_entropy(o, torch.zeros(len(o), dtype=torch.long))


@mistake("one output, softmax", "softmax-of-one", "threes tumours_leaky")
def softmax_of_one_output(p: Parts) -> None:
    p.loss = lambda o, y: F.binary_cross_entropy(torch.softmax(o, dim=1), y)


@mistake("summed loss", "summed-loss too_fast exploding update_ratio", "digits_tanh friedman_mlp patches_batchnorm")
def loss_summed(p: Parts) -> None:
    kind = F.mse_loss if p.task == "values" else F.cross_entropy
    p.loss = functools.partial(kind, reduction="sum")
    p.optimizer, p.rate = functools.partial(SGD, lr=0.1, momentum=0.9), 0.1


# --- NaN ------------------------------------------------------------------------------------------------------------

NAN = "nonfinite edge masked-row"


@mistake("NaN from the loss", NAN, "digits_autoencoder patches_autoencoder")
def root_of_an_exact_answer(p: Parts) -> None:
    """From some step on, an example is blank, and the model has no bias: it is reconstructed exactly."""
    for module in p.model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_parameter("bias", None)
    p.x = p.x.clone()
    p.x[::40] = 0
    p.y = p.x
    p.loss = lambda o, y: F.mse_loss(o, y, reduction="none").flatten(1).mean(1).sqrt().mean()


@mistake("NaN from the loss", NAN, "threes tumours_mlp")
def log_of_a_sure_probability(p: Parts) -> None:
    p.loss = lambda o, y: -(y * torch.sigmoid(120 * o).log() + (1 - y) * (1 - torch.sigmoid(120 * o)).log()).mean()


@mistake("NaN from the loss", NAN, "diabetes_mlp friedman_mlp")
def arccos_of_a_cosine(p: Parts) -> None:
    """The angle between prediction and target, vectors of one entry: the cosine is 1 or -1."""
    p.loss = lambda o, y: torch.acos(F.cosine_similarity(o, y)).mean()


@mistake("NaN from the loss", NAN, "digits_mlp wine_mlp")
def norm_of_a_zero_difference(p: Parts) -> None:
    usual = USUAL[p.task]
    p.loss = lambda o, y: usual(o, y) + 0.1 * ((o - o.roll(0, 0)) ** 2).sum(1).sqrt().mean()


@mistake("NaN from the data", NAN, "digits_cnn characters_transformer wine_mlp friedman_gelu")
def not_a_number_in_the_data(p: Parts) -> None:
    if p.x.is_floating_point():
        p.x = p.x.clone()
        p.x[::97] = float("nan")
    else:
        usual, count = USUAL[p.task], itertools.count()
        p.loss = lambda o, y: usual(o, y) * (float("nan") if next(count) == 20 else 1.0)


@mistake("masked row", NAN, "digits_vit majorities_transformer")
def attention_to_nothing(p: Parts) -> None:
    model = p.model
    layer = model.blocks.layers[0]
    attend, count = layer.self_attn.forward, itertools.count()

    def masked(q: Tensor, k: Tensor, v: Tensor, **more: object) -> object:
        more["key_padding_mask"] = torch.zeros(q.shape[:2], dtype=torch.bool)
        if next(count) > 10:
            more["key_padding_mask"][3] = True
        more["need_weights"] = True
        more.pop("is_causal", None)
        return attend(q, k, v, **more)

    layer.self_attn.forward = masked
    layer.self_attn.batch_first = True


# --- settings -------------------------------------------------------------------------------------------------------


@mistake("learning rate gone", "lr_gone", "digits_mlp characters_transformer wine_mlp patches_cnn sums_transformer")
def schedule_stepped_for_each_batch(p: Parts) -> None:
    p.schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 6, 0.1)


@mistake("learning rate gone", "lr_gone", "digits_cnn friedman_mlp majorities_gru")
def exponential_schedule_for_each_batch(p: Parts) -> None:
    p.schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8)


@mistake(
    "learning rate too small",
    "too_slow update_ratio",
    "digits_mlp digits_cnn wine_mlp spirals_momentum friedman_mlp patches_resnet_plain",
)
def rate_too_small(p: Parts) -> None:
    faster(p, 1e-3)


@mistake("learning rate too small", "too_slow update_ratio vanishing", "digits_tanh tumours_leaky waves_tanh")
def loss_times_a_small_number(p: Parts) -> None:
    usual = USUAL[p.task]
    p.loss = lambda o, y: 1e-5 * usual(o, y)


LARGE = "too_fast update_ratio exploding spike nonfinite"


@mistake(
    "learning rate too large",
    LARGE,
    "digits_mlp digits_cnn digits_resnet characters_transformer "
    "wine_mlp patches_groupnorm sums_transformer patches_resnet_batchnorm",
)
def rate_too_large(p: Parts) -> None:
    faster(p, 300)


@mistake("learning rate too large", LARGE, "diabetes_sgd waves_tanh tumours_leaky")
def momentum_with_a_large_rate(p: Parts) -> None:
    p.optimizer = functools.partial(SGD, lr=2.0, momentum=0.95)


@mistake("weight decay", "weight_decay shrunk", "digits_tanh digits_cnn wine_mlp spirals_momentum", steps=300)
def decay_too_strong(p: Parts) -> None:
    p.optimizer = functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.15)


@mistake("weight decay", "weight_decay shrunk", "digits_mlp tumours_mlp moons_selu", steps=300)
def decay_in_adam(p: Parts) -> None:
    p.optimizer = functools.partial(Adam, lr=3e-3, weight_decay=2.0)


@mistake("eps in float16", "eps", "digits_mlp wine_mlp friedman_mlp")
def eps_that_is_zero(p: Parts) -> None:
    p.model = p.model.half()
    p.width = torch.float16
    p.optimizer = functools.partial(Adam, lr=1e-3)


FOREIGN = "foreign-parameters unmoved"


@mistake("parameters of another model", FOREIGN, "digits_mlp diabetes_mlp wine_mlp patches_cnn")
def head_replaced_after_the_optimizer(p: Parts) -> None:
    last = linears(p.model)[-1]
    old = list(p.model.parameters())
    fresh = nn.Linear(last.in_features, last.out_features)
    for module in p.model.modules():
        for name, child in list(module.named_children()):
            if child is last:
                setattr(module, name, fresh)
    p.trained = lambda _: old


@mistake("parameters of another model", FOREIGN, "digits_tanh tumours_mlp friedman_gelu")
def optimizer_of_a_copy(p: Parts) -> None:
    import copy

    other = copy.deepcopy(p.model)
    p.trained = lambda _: list(other.parameters())


@mistake("part without an optimizer", "unmoved", "digits_cnn wine_mlp patches_groupnorm")
def middle_forgotten(p: Parts) -> None:
    def some(model: nn.Module) -> list[Tensor]:
        every = list(model.parameters())
        return every[:2] + every[4:]

    p.trained = some


@mistake("part without an optimizer", "unmoved", "digits_tanh friedman_mlp")
def thawed_after_the_optimizer(p: Parts) -> None:
    body = list(p.model.parameters())[:2]
    for q in body:
        q.requires_grad_(False)
    p.trained = lambda model: [q for q in model.parameters() if q.requires_grad]

    def thaw(k: int) -> None:
        if k == 40:
            for q in body:
                q.requires_grad_(True)

    p.before = thaw


# --- the loop -------------------------------------------------------------------------------------------------------


@mistake("zero_grad missing", "stale", "digits_tanh characters_lstm wine_mlp waves_tanh patches_resnet_plain")
def never_zeroed(p: Parts) -> None:
    p.order = ("backward", "step")


@mistake("gradient lost", "lost", "digits_mlp spirals_momentum majorities_gru")
def zeroed_before_the_step(p: Parts) -> None:
    p.order = ("backward", "zero", "step")


@mistake("never stepped", "unstepped", "digits_cnn moons_selu")
def never_stepped(p: Parts) -> None:
    p.order = ("zero", "backward")


@mistake("accumulation", "last_only", "digits_mlp digits_cnn wine_mlp friedman_gelu")
def zeroed_for_each_micro_batch(p: Parts) -> None:
    p.micro, p.zero_each, p.size = 4, True, 12


@mistake("accumulation", "undivided", "digits_tanh waves_tanh patches_batchnorm")
def micro_batches_not_divided(p: Parts) -> None:
    p.micro, p.divide, p.size = 8, False, 12
    p.optimizer = functools.partial(SGD, lr=0.3, momentum=0.9)


@mistake("evaluation mode", "eval_mode", "digits_cnn_batchnorm digits_resnet patches_batchnorm majorities_transformer")
def left_in_evaluation_mode(p: Parts) -> None:
    def validate(k: int) -> None:
        if k % 40 == 20:
            p.model.eval()

    p.before = validate


@mistake("evaluation mode", "batchnorm-of-one", "digits_cnn_batchnorm patches_resnet_batchnorm")
def batches_of_one(p: Parts) -> None:
    p.size = 1


@mistake("loss scale", "clipped_scaled", "digits_mlp spirals_momentum patches_groupnorm")
def clipped_before_unscale(p: Parts) -> None:
    p.unscaled, p.clip = "wrong", 1.0


@mistake("loss scale", "loss_scaled exploding update_ratio too_fast nonfinite", "digits_tanh waves_tanh")
def stepped_with_scaled_gradients(p: Parts) -> None:
    p.unscaled = "never"


@mistake("rounded away", "rounded_away", "digits_mlp characters_transformer wine_mlp friedman_gelu")
def all_in_bfloat16(p: Parts) -> None:
    p.model = p.model.to(torch.bfloat16)
    p.width = torch.bfloat16
    p.optimizer = functools.partial(AdamW, lr=5e-5)


# --- the model and its data -----------------------------------------------------------------------------------------


@mistake("constant weights", "identical dead", "digits_mlp wine_mlp friedman_mlp")
def weights_all_the_same(p: Parts) -> None:
    for layer in linears(p.model):
        nn.init.constant_(layer.weight, 0.05)
        nn.init.zeros_(layer.bias)


@mistake("constant weights", "identical dead", "digits_tanh tumours_mlp")
def weights_all_zero(p: Parts) -> None:
    for layer in linears(p.model):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@mistake("inputs not normalised", "input_scale", "digits_cnn diabetes_sgd patches_cnn tumours_leaky waves_tanh")
def inputs_in_thousands(p: Parts) -> None:
    p.x = 1500 * p.x
    p.optimizer = functools.partial(SGD, lr=0.02, momentum=0.9)


@mistake(
    "labels of other inputs", "disagreement", "digits_mlp digits_cnn friedman_gelu patches_cnn spirals_momentum", steps=260
)
def labels_shuffled(p: Parts) -> None:
    p.y = p.y[torch.randperm(len(p.y), generator=torch.Generator().manual_seed(11))]


@mistake("labels of other inputs", "disagreement", "digits_tanh tumours_mlp moons_selu", steps=260)
def inputs_sorted_alone(p: Parts) -> None:
    p.x = p.x[p.x.flatten(1).sum(1).argsort()]
    p.y = p.y[torch.randperm(len(p.y), generator=torch.Generator().manual_seed(12))]


def deep(p: Parts, act: Callable[[], nn.Module], gain: float | None = None, depth: int = 8) -> None:
    first, last = linears(p.model)[0].in_features, linears(p.model)[-1].out_features
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((first, *[40] * depth, last)):
        layers += [nn.Linear(a, b), act()]
    p.model = nn.Sequential(*layers[:-1])
    if gain is not None:
        for layer in linears(p.model):
            nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
    p.optimizer = functools.partial(SGD, lr=0.05)


FADES = "fading vanishing"


@mistake("fades over depth", FADES, "digits_mlp wine_mlp moons_selu", steps=240)
def deep_default_initialisation(p: Parts) -> None:
    deep(p, nn.ReLU)


@mistake("fades over depth", FADES, "digits_tanh spirals_momentum friedman_gelu", steps=240)
def deep_sigmoids(p: Parts) -> None:
    deep(p, nn.Sigmoid)


@mistake("grows over depth", "exploding fading update_ratio too_fast nonfinite", "digits_mlp wine_mlp friedman_mlp")
def deep_large_weights(p: Parts) -> None:
    deep(p, nn.ReLU, gain=5.0)


@mistake("dead units", "dead update_ratio too_fast", "digits_cnn digits_mlp wine_mlp patches_cnn")
def rectifiers_die(p: Parts) -> None:
    p.optimizer = functools.partial(Adam, lr=0.5)


@mistake("dead units", "dead", "digits_tanh diabetes_mlp digits_cnn friedman_mlp patches_groupnorm")
def rectifiers_shut(p: Parts) -> None:
    first, last = linears(p.model)[-2], linears(p.model)[-1]
    p.model = nn.Sequential(p.model, nn.Linear(last.out_features, 24), nn.ReLU(), nn.Linear(24, last.out_features))
    nn.init.constant_(p.model[1].bias, -50.0)
    assert first is not last


@mistake("rare class", "rare_class", "diabetes_mlp friedman_gelu", steps=400)
def one_in_sixty_is_positive(p: Parts) -> None:
    p.y = (p.y > p.y.quantile(1 - 1 / 60)).float()
    p.task, p.size = "binary", 64
    p.optimizer = functools.partial(SGD, lr=0.05)


@mistake("one bad batch", "spike", "digits_mlp friedman_mlp spirals_momentum")
def one_bad_batch(p: Parts) -> None:
    usual, count = USUAL[p.task], itertools.count()
    p.loss = lambda o, y: usual(o * (4000.0 if next(count) == 100 else 1.0), y)


# --- habits that are good ------------------------------------------------------------------------------------------


@habit("digits_mlp digits_cnn characters_lstm wine_mlp patches_cnn sums_transformer friedman_mlp")
def clipped(p: Parts) -> None:
    p.clip = 1.0


@habit("digits_cnn digits_vit diabetes_mlp spirals_momentum friedman_gelu majorities_gru patches_groupnorm tumours_leaky")
def accumulated(p: Parts) -> None:
    p.micro, p.size = 4, p.size // 3


@habit("digits_resnet digits_mlp patches_batchnorm sums_transformer wine_mlp waves_tanh")
def cosine_schedule(p: Parts) -> None:
    p.schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 170)


@habit("characters_transformer digits_vit majorities_transformer patches_resnet_plain sums_lstm")
def warmed_up(p: Parts) -> None:
    p.schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.05, total_iters=40)


@habit("digits_cnn_batchnorm digits_mlp patches_resnet_batchnorm moons_selu friedman_mlp")
def autocast_to_bfloat16(p: Parts) -> None:
    p.autocast = torch.bfloat16


@habit("digits_resnet threes tumours_mlp patches_cnn waves_tanh")
def usual_weight_decay(p: Parts) -> None:
    p.optimizer = functools.partial(p.optimizer, weight_decay=5e-4)


@habit("digits_mlp digits_cnn wine_mlp patches_groupnorm spirals_momentum")
def scaled_and_clipped_rightly(p: Parts) -> None:
    p.unscaled, p.clip = "right", 1.0


@habit("digits_cnn_batchnorm digits_vit patches_batchnorm majorities_transformer patches_resnet_batchnorm")
def validated_now_and_then(p: Parts) -> None:
    def validate(k: int) -> None:
        if k % 40 == 39:
            p.model.eval()
            with torch.no_grad():
                p.model(p.x[:64])
            p.model.train()

    p.before = validate


@habit("digits_mlp diabetes_mlp friedman_mlp patches_cnn wine_mlp")
def other_optimizer(p: Parts) -> None:
    p.optimizer = functools.partial(random.Random(p.size).choice([torch.optim.NAdam, torch.optim.Adagrad]), lr=5e-3)


@habit("digits_cnn digits_tanh patches_resnet_plain tumours_leaky")
def first_layer_frozen(p: Parts) -> None:
    for q in list(p.model.parameters())[:2]:
        q.requires_grad_(False)
    p.trained = lambda model: [q for q in model.parameters() if q.requires_grad]


@habit("digits_mlp friedman_gelu patches_autoencoder moons_selu")
def batches_of_a_few(p: Parts) -> None:
    p.size = 6


def _study(name: str, recipe: str, change: Change, kind: str, rules: tuple[str, ...], steps: int) -> Study:
    def make() -> Training:
        parts = RECIPES[recipe].make()
        change(parts)
        return assembled(parts)

    found = RECIPES[recipe]
    return Study(f"{recipe}__{name}", make, rules, 10_000, kind, found.half, steps or found.steps)


def family(recipe: str) -> str:
    """Of a model, in a word."""
    words = ("resnet", "transformer", "vit", "lstm", "gru", "autoencoder", "cnn", "groupnorm", "batchnorm")
    found = next((word for word in words if word in recipe), "")
    task = RECIPES[recipe].make().task
    return {"vit": "transformer", "gru": "recurrent", "lstm": "recurrent", "groupnorm": "cnn", "batchnorm": "cnn"}.get(
        found, found or ("regression" if task == "values" else "perceptron")
    )


for _recipe in RECIPES:
    STUDIES.append(_study("as_it_is", _recipe, lambda p: None, family(_recipe), (), 0))
for _name, _on, _change in HABITS:
    STUDIES.extend(_study(_name, _recipe, _change, family(_recipe), (), 0) for _recipe in _on)
for _m in MISTAKES:
    STUDIES.extend(_study(_m.name, _recipe, _m.change, _m.kind, _m.rules, _m.steps) for _recipe in _m.on)
