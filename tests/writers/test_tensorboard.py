"""The TensorBoard writer, read back with TensorBoard's own loaders."""

import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

import gradlens
from gradlens import fields
from gradlens.activations import Activations
from gradlens.blocks import block_of, concatenate
from gradlens.errors import ArgumentError, RunDirectoryError
from gradlens.moments import Moments
from gradlens.records import Finding, Severity, Stage, Status
from gradlens.writers import tags
from gradlens.writers.base import Writer
from gradlens.writers.tensorboard import DETAIL, TensorBoard, buckets
from tests.writers.made import histogram, ill_run, net, snapshot
from tests.writers.reading import accumulated, events, points, scalars, steps, text

RANDOM = np.random.default_rng(0)
WEIGHTS = {"a.weight": RANDOM.normal(size=(4, 5)), "a.bias": RANDOM.normal(size=4), "b.weight": RANDOM.normal(size=(3, 4))}


def gradients(scale=1.0, seed=1):
    random = np.random.default_rng(seed)
    return {name: scale * random.normal(size=weight.shape) for name, weight in WEIGHTS.items()}


def step(number, *, clip=1.0, seed=None, previous=None, loss=None, rate=0.1, time=None, weights=WEIGHTS, **more):
    """The two snapshots of one step of gradient descent on clipped gradients."""
    given = gradients(seed=number + 1 if seed is None else seed)
    used = {name: clip * g for name, g in given.items()}
    moved = {name: -rate * g for name, g in used.items()}
    observed = {"scalars": {} if loss is None else {"loss": loss}, "time": time, **more}
    return [
        snapshot(number, Stage.BACKWARD, given, weights, previous, **observed),
        snapshot(number, Stage.USED, used, weights, None, moved, **observed),
    ]


def written(logdir, records, **arguments):
    """The path of the file that the records make."""
    writer = TensorBoard(logdir, **arguments)
    for record in records:
        writer.write(record)
    writer.close()
    return writer.path


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays.values()])


def finding(number, rule="vanishing", parameter="a.weight", severity=Severity.WARNING):
    return Finding(rule, number, severity, "it is tiny", parameter, ("depth",), "use ReLU")


# --- numbers --------------------------------------------------------------------------------------------------------


def test_the_models_numbers_are_those_of_its_partials(tmp_path):
    """Each of the model's twelve numbers is what numpy makes of the arrays themselves."""
    previous = gradients(seed=77)
    path = written(tmp_path, step(5, clip=0.5, previous=previous, loss=1.25))
    g, before = flat(gradients(seed=6)), flat(previous)
    weights = {name: g for name, g in gradients(seed=6).items() if name.endswith("weight")}
    rms = [np.sqrt((w**2).mean()) for w in weights.values()]
    ratios = [0.05 * np.linalg.norm(w) / np.linalg.norm(WEIGHTS[name]) for name, w in weights.items()]
    expected = {
        f"{tags.HEALTH}/loss": 1.25,
        f"{tags.HEALTH}/gradient_norm": np.linalg.norm(g),
        f"{tags.HEALTH}/layer_spread": abs(np.log10(rms[0] / rms[1])),
        f"{tags.HEALTH}/partials_nonfinite": 0,
        f"{tags.HEALTH}/parameters_absent": 0,
        f"{tags.DIRECTION}/increase_share": (g < 0).mean(),
        f"{tags.DIRECTION}/decrease_share": (g > 0).mean(),
        f"{tags.DIRECTION}/hold_share": 0,
        f"{tags.DIRECTION}/flip_share": (g * before < 0).mean(),
        f"{tags.UPDATE}/update_ratio": np.median(ratios),
        f"{tags.UPDATE}/alignment": 1,
        f"{tags.UPDATE}/loss_change": -0.1 * ((0.5 * g) ** 2).sum(),
    }
    assert set(expected) == set(tags.MODEL)
    read = points(path)
    for tag, value in expected.items():
        ((at, given),) = read[tag]
        assert at == 5
        assert given == pytest.approx(value, rel=1e-6, abs=1e-9), tag


def test_what_is_not_finite_and_what_is_absent_is_counted(tmp_path):
    """NaN and infinite partials are counted and leave the norm of the others; an absent parameter is no hold."""
    given = gradients()
    given["a.weight"][0, :3] = [np.nan, np.inf, -np.inf]
    given["b.weight"] = None
    path = written(tmp_path, [snapshot(0, Stage.BACKWARD, given, WEIGHTS)])
    rest = np.concatenate([given["a.weight"].ravel(), given["a.bias"]])
    rest = rest[np.isfinite(rest)]
    read = {tag: values[0][1] for tag, values in points(path).items()}
    assert read[f"{tags.HEALTH}/partials_nonfinite"] == 3
    assert read[f"{tags.HEALTH}/parameters_absent"] == 1
    assert read[f"{tags.HEALTH}/gradient_norm"] == pytest.approx(np.linalg.norm(rest), rel=1e-6)
    assert read[f"{tags.DIRECTION}/hold_share"] == 0


def test_nothing_is_written_of_what_is_not_known(tmp_path):
    """Without a loss, an optimizer or a last gradient there is no point that would have to be NaN."""
    path = written(tmp_path, [snapshot(0, Stage.BACKWARD, gradients(), WEIGHTS)])
    model = {tag for tag in points(path) if tag in tags.MODEL}
    missing = {f"{tags.HEALTH}/loss", f"{tags.DIRECTION}/flip_share", *(t for t in tags.MODEL if t.startswith(tags.UPDATE))}
    assert model == set(tags.MODEL) - missing
    assert not any(np.isnan(value) for tag in model for _, value in points(path)[tag])


def test_the_change_of_the_loss_is_that_of_what_was_moved(tmp_path):
    """A parameter that no optimizer owns adds nothing; one that moved by an unknown share of its gradient hides the sum."""
    given = gradients()
    moved = {"a.weight": -0.1 * given["a.weight"], "b.weight": -0.1 * given["b.weight"]}
    used = snapshot(0, Stage.USED, given, WEIGHTS, None, moved)
    expected = -0.1 * sum((given[name] ** 2).sum() for name in moved)
    tag = f"{tags.UPDATE}/loss_change"
    assert points(written(tmp_path / "a", [used]))[tag] == [(0, pytest.approx(expected))]
    used.columns["update_loss_dot"][2] = np.nan
    assert tag not in points(written(tmp_path / "b", [used]))


def test_a_norm_beyond_float32_is_infinite(tmp_path):
    """A number that TensorBoard cannot hold is shown as infinite, and breaks nothing."""
    path = written(tmp_path, [snapshot(0, Stage.BACKWARD, gradients(scale=1e60), WEIGHTS)])
    assert points(path)[f"{tags.HEALTH}/gradient_norm"] == [(0, np.inf)]


def test_a_few_weights_have_numbers_of_their_own(tmp_path):
    """They lie evenly along the model, its first and last weight included, and stay the same all the run."""
    weights = net(layers=20)
    given = {name: np.full(weight.shape, 10.0 ** -(i % 7)) for i, (name, weight) in enumerate(weights.items())}
    moved = {name: 0.01 * weight for name, weight in weights.items()}
    records = [
        s
        for n in range(3)
        for s in (snapshot(n, "backward", given, weights), snapshot(n, "used", given, weights, None, moved))
    ]
    read = points(written(tmp_path, records))
    chosen = sorted(tag.partition("/")[2] for tag in read if tag.startswith(tags.RMS))
    assert len(chosen) == 8
    assert chosen[0] == "000 embed.weight"
    assert chosen[-1] == "042 head.weight"
    assert all(name.endswith(".weight") for name in chosen)
    order = {name: i for i, name in enumerate(weights)}
    for name in chosen:
        place, _, parameter = name.partition(" ")
        assert order[parameter] == int(place)
        assert read[f"{tags.RMS}/{name}"] == [(n, pytest.approx(-(int(place) % 7), abs=1e-6)) for n in range(3)]
        assert read[f"{tags.RATIO}/{name}"] == [(n, pytest.approx(-2, abs=1e-6)) for n in range(3)]


def test_plain_variables_are_chosen_too(tmp_path):
    """Where nothing has two axes every parameter counts as a weight."""
    variables = {"x": np.array([2.0]), "y": np.array([3.0])}
    read = points(written(tmp_path, [snapshot(0, "backward", {"x": np.array([12.0]), "y": np.array([31.0])}, variables)]))
    assert read[f"{tags.RMS}/000 x"] == [(0, pytest.approx(np.log10(12)))]
    assert read[f"{tags.RMS}/001 y"] == [(0, pytest.approx(np.log10(31)))]


def test_what_a_user_observes_is_shown(tmp_path):
    """Scalars given to `observe` have tags of their own, whatever they are called."""
    scalars = {"loss": 0.5, "accuracy": 0.75, "val/f1": 0.25}
    read = points(written(tmp_path, [snapshot(3, "backward", gradients(), WEIGHTS, scalars=scalars)]))
    assert read[f"{tags.HEALTH}/loss"] == [(3, 0.5)]
    assert read[f"{tags.OBSERVED}/accuracy"] == [(3, 0.75)]
    assert read[f"{tags.OBSERVED}/val\\x2ff1"] == [(3, 0.25)]


ACTIVATIONS = tuple(f"{tags.HEALTH}/activations_{name}" for name in ("least_spread", "most_dead", "most_saturated"))


def made(step, spread, dead, saturated, backward=0):
    """One pass of two modules, of 10 units and 8 examples: the first has nothing that stands out."""
    sums = [[80, 0, 4.0, 4.0, 10, 0, math.nan], [80, 0, 2.0, 2 * spread, 10, 10 * dead, 80 * saturated]]
    return Activations(step, backward, 0.0, ("a", "b"), ("Linear", "Tanh"), (1, 1), np.array(sums))


def test_what_stands_out_in_what_modules_make(tmp_path):
    """Three numbers a step: the least spread, the most dead and saturated of the first pass; none that is unknown."""
    writer = TensorBoard(tmp_path)
    writer.write_activations([made(0, 0.25, 0.5, 0.75), made(0, 0.0, 1.0, 1.0, backward=1), made(1, 0.5, 0.0, math.nan)])
    for record in [*step(0), *step(1)]:
        writer.write(record)
    writer.write_activations([made(2, math.nan, 0.125, 0.0)])
    for record in step(2):
        writer.write(record)
    writer.close()
    spread, dead, saturated = (scalars(tmp_path, tag) for tag in ACTIVATIONS)
    assert spread == [(0, 0.25), (1, 0.5), (2, 1.0)]
    assert dead == [(0, 0.5), (1, 0.0), (2, 0.125)]
    assert saturated == [(0, 0.75), (2, 0.0)]


def test_many_steps_that_come_at_once_keep_their_activations(tmp_path):
    """A fast run hands over hundreds of steps together; what is over is not kept."""
    writer = TensorBoard(tmp_path)
    first = [snapshot for n in range(300) for snapshot in step(n, time=float(n))]
    blocks = [(block_of(each), 0) for each in first]
    writer.write_activations([made(n, 0.5, n / 512, 0.0) for n in range(300)])
    writer.write_moments(blocks)
    writer.write_activations([])
    assert len(writer._made) <= 1
    writer.close()
    dead = dict(scalars(tmp_path, ACTIVATIONS[1]))
    assert dead.keys() == dict(scalars(tmp_path, f"{tags.HEALTH}/gradient_norm")).keys()
    assert len(dead) >= 200
    assert all(value == n / 512 for n, value in dead.items())


def test_a_watched_training_shows_its_activations(tmp_path):
    """From the modules to the event file: the numbers are those of `lens.activations()`; without the feature, none."""
    for name, features in (("with", "activations"), ("without", ())):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Tanh())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        writer = TensorBoard(tmp_path / name)
        with gradlens.watch(model, optimizer, features=features, writers=[writer], rules=()) as lens:
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(16, 4)).square().mean().backward()
                optimizer.step()
            if features:
                frame = lens.activations().groupby("step")
                told = (frame["spread"].min(), frame["dead"].max(), frame["saturated"].max())
    for tag, series in zip(ACTIVATIONS, told, strict=True):
        assert scalars(tmp_path / "with", tag) == [(n, pytest.approx(value, rel=1e-6)) for n, value in series.items()]
        assert tag not in points(next((tmp_path / "without").glob("events*")))


# --- stages and steps -----------------------------------------------------------------------------------------------


def test_a_step_is_one_event(tmp_path):
    """However many snapshots a step has, and whatever is due, its values are in one event with its step and time."""
    path = written(tmp_path, [record for n in range(6) for record in step(n, loss=1.0, time=1000.0 + n)])
    head, *rest = events(path)
    assert head.file_version == "brain.Event:2"
    assert [(event.step, event.wall_time) for event in rest] == [(n, 1000.0 + n) for n in range(6)]
    for event in rest:
        assert set(tags.MODEL) - {f"{tags.DIRECTION}/flip_share"} <= {value.tag for value in event.summary.value}


def test_size_is_that_before_clipping(tmp_path):
    """The gradient's norm is the loss's own, whatever the optimizer was given of it."""
    path = written(tmp_path, step(0, clip=1e-3))
    norm = np.linalg.norm(flat(gradients(seed=1)))
    assert points(path)[f"{tags.HEALTH}/gradient_norm"] == [(0, pytest.approx(norm))]


def test_of_several_backwards_the_whole_counts(tmp_path):
    """Under accumulation no micro-batch stands for the step: the accumulated gradient does, or else the used one."""

    def norm(logdir, *stages):
        records = [snapshot(0, stage, gradients(scale), WEIGHTS, backward=backward) for stage, backward, scale in stages]
        return points(written(logdir, records))[f"{tags.HEALTH}/gradient_norm"][0][1]

    unit = np.linalg.norm(flat(gradients()))
    micro = [(Stage.BACKWARD, 0, 1.0), (Stage.BACKWARD, 1, 2.0)]
    assert norm(tmp_path / "a", *micro) == pytest.approx(2 * unit)
    assert norm(tmp_path / "b", *micro, (Stage.USED, 1, 3.0)) == pytest.approx(3 * unit)
    both = [(Stage.ACCUMULATED, 0, 1.0), (Stage.ACCUMULATED, 1, 5.0)]
    assert norm(tmp_path / "c", *micro, *both, (Stage.USED, 1, 3.0)) == pytest.approx(5 * unit)
    assert norm(tmp_path / "d", *micro[:1], (Stage.REDUCED, 0, 7.0), (Stage.USED, 0, 3.0)) == pytest.approx(7 * unit)


def test_parts_of_a_step_are_one_model(tmp_path):
    """Two optimizers that read their own parameters make one number of the model, and one picture."""
    whole = snapshot(0, Stage.BACKWARD, gradients(), WEIGHTS)
    parts = [whole.take([0, 1]), whole.take([2])]
    a, b = (points(written(tmp_path / str(i), records)) for i, records in enumerate(([whole], parts)))
    assert set(a) == set(b)
    for tag in (*tags.MODEL, *tags.IMAGES):
        assert np.array_equal(a.get(tag, [])[0:1] and a[tag][0][1], b.get(tag, [])[0:1] and b[tag][0][1]), tag


def test_a_step_that_was_left_behind_is_not_written(tmp_path):
    """A snapshot of an older step than the open one adds no point out of order."""
    path = written(tmp_path, [*step(4), *step(5), *step(4), *step(6)])
    assert [event.step for event in events(path)[1:]] == [4, 5, 6]


def test_flush_shows_the_open_step_and_each_value_once(tmp_path):
    """What was taken can be read after a flush; what the step gets later follows, and nothing is written twice."""
    writer = TensorBoard(tmp_path)
    backward, used = step(0, loss=2.0)
    writer.write(backward)
    writer.flush()
    read = points(writer.path)
    assert read[f"{tags.HEALTH}/loss"] == [(0, 2.0)]
    assert f"{tags.UPDATE}/alignment" not in read
    writer.flush()
    writer.write(used)
    writer.flush()
    assert points(writer.path)[f"{tags.UPDATE}/alignment"] == [(0, 1.0)]
    for record in step(1):
        writer.write(record)
    writer.close()
    for tag in (f"{tags.HEALTH}/loss", f"{tags.HEALTH}/gradient_norm", f"{tags.UPDATE}/alignment"):
        assert [at for at, _ in points(writer.path)[tag]] == sorted({at for at, _ in points(writer.path)[tag]})


def test_it_is_a_writer_and_closes_once(tmp_path):
    """It has the three methods of a writer; a second close does nothing; a run without records leaves a readable file."""
    writer = TensorBoard(tmp_path)
    assert isinstance(writer, Writer)
    writer.flush()
    writer.close()
    writer.close()
    assert len(events(writer.path)) == 1
    assert accumulated(tmp_path).Tags()["scalars"] == []


# --- now and then ---------------------------------------------------------------------------------------------------


def numbered(tmp_path, steps, seconds, found=()):
    """The steps of which a run of so many, each of so many seconds, has numbers."""
    writer = TensorBoard(tmp_path, chosen=0)
    record = snapshot(0, Stage.BACKWARD, {"x": np.ones(1)}, {"x": np.ones(1)}, time=0.0)
    for number in range(steps):
        writer.write(replace(record, step=number, time=number * seconds, histogram=None))
        if number in found:
            writer.write(finding(number))
    writer.close()
    return [event.step for event in events(writer.path)[1:] if len(event.summary.value) > 2]


def test_numbers_are_thinned_only_in_a_long_run(tmp_path):
    """Every step up to the 1,000th has its numbers; from there on they lie ever further apart, but for findings."""
    at = numbered(tmp_path, 5000, 1.0, found=[4995])
    assert at[:1000] == list(range(1000))
    later = [step for step in at if step >= 1000]
    assert 1200 <= len(later) <= 1300  # half of 1000 * ln 2 up to the 2,000th, where steps are whole numbers
    assert 4995 in at
    assert all(late <= 1.001 * early + 2 for early, late in pairwise(later))


def test_a_fast_run_has_no_more_numbers_than_a_screen_shows(tmp_path):
    """After the first 200 steps they lie 20 ms and a two-hundredth of the run apart, at least."""
    at = numbered(tmp_path, 8000, 0.001)
    assert at[:200] == list(range(200))
    assert all(late - early >= max(20, late // 200) for early, late in pairwise(at[200:-1]))
    assert 500 <= len(at) <= 540  # 200, 190 up to the 4,000th, 200 * ln 2 from there


def test_pictures_and_histograms_get_ever_rarer(tmp_path):
    """A run of a thousand steps has some dozens of pictures and histograms, its first and last step among them."""
    records = [replace(record, time=100.0 * record.step) for n in range(1000) for record in step(n, seed=1)]
    read = points(written(tmp_path, records))
    for tag, most in ((f"{tags.LAYERS}/gradient_rms", 60), (f"{tags.PARTIALS}/000 a.weight", 32)):
        at = [number for number, _ in read[tag]]
        assert at[0] == 0
        assert at[-1] == 999
        assert most // 2 < len(at) <= most
        assert all(late <= 1.25 * early + 2 for early, late in pairwise(at))


def test_pictures_wait_for_the_interval(tmp_path):
    """In a fast run pictures are drawn at most once in so many seconds of its time, and at the end."""
    records = [replace(record, time=record.step / 10) for n in range(100) for record in step(n, seed=1)]
    read = points(written(tmp_path / "a", records, interval=3.0))
    assert [at for at, _ in read[f"{tags.LAYERS}/increase_share"]] == [0, 30, 60, 90, 99]
    back = [replace(record, time=-record.time) for record in records]
    assert len(points(written(tmp_path / "b", back, interval=3.0))[f"{tags.LAYERS}/increase_share"]) > 3


def test_a_picture_can_be_opened(tmp_path):
    """What TensorBoard gets is a PNG of the size that it is told."""
    read = points(written(tmp_path, step(0)))
    for tag in tags.IMAGES:
        wide, high, png = read[tag][0][1].tolist()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int(wide), int(high)) == tuple(int.from_bytes(png[at : at + 4], "big") for at in (16, 20))


def test_a_finding_that_stands_for_several_marks_them_all(tmp_path):
    """The pictures are the same whether a rule names its parameters one by one or in one finding; an info marks nothing."""

    def picture(name, *found):
        return points(written(tmp_path / name, [*step(0), *found]))[f"{tags.LAYERS}/gradient_rms"][-1][1].tolist()[2]

    one_by_one = picture("a", finding(0), finding(0, parameter="b.weight"))
    together = picture("b", replace(finding(0, parameter=None), parameters=("a.weight", "b.weight")))
    assert one_by_one == together
    assert together != picture("c", finding(0))
    assert picture("d", finding(0, severity=Severity.INFO)) == picture("e")


# --- histograms -----------------------------------------------------------------------------------------------------


def exact(values):
    """Buckets of an array, as the writer makes them."""
    values = np.asarray(values, np.float64)
    counts = fields.ascending(histogram(values)[None], np.array([(values == 0).sum()]))[0]
    finite = values[np.isfinite(values)]
    return buckets(counts, finite.min(), finite.max())


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=1000),
        np.random.default_rng(0).normal(size=1000) * 1e-12,
        np.random.default_rng(0).lognormal(0, 9, size=1000),
        [0.0, 0.0], [1.0], [-3.0], [0.0, 5.0], [-5.0, 0.0], [1e30, -1e30, 1e-30], [1e-40], [2.0**-96, 2.0**-95],
        [1, 2, 4, 8], [np.nan, 1.0, np.inf, -2.0],
    ],
)  # fmt: skip
def test_buckets_hold_what_lies_between_their_edges(values):
    """Counts are exact: as many as values lie between the edges, all finite ones are counted, the extremes are the ends."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    made = exact(values)
    assert made[:, 2].sum() == len(finite)
    assert (made[0, 0], made[-1, 1]) == (finite.min(), finite.max())
    assert (made[1:, 0] == made[:-1, 1]).all()
    assert (made[:, 0] <= made[:, 1]).all()
    assert made[0, 2] > 0
    assert made[-1, 2] > 0
    assert len(made) <= 2 * DETAIL + 3
    for left, right, count in made:
        assert ((finite > left) & (finite < right)).sum() <= count <= ((finite >= left) & (finite <= right)).sum()


def defined(counts, low, high):
    """What `buckets` says, bucket by bucket."""
    powers, there = fields.POWERS.tolist(), np.flatnonzero(counts)
    edges = [*zip([-p for p in powers[:0:-1]], [-p for p in powers[-2::-1]], strict=True), (0.0, 0.0)]
    edges += list(pairwise(powers))
    merged = max(*(abs(int(at) - fields.BUCKETS) for at in there), DETAIL) - DETAIL
    small = [i for i in range(len(counts)) if abs(i - fields.BUCKETS) <= merged]
    rows = [[*edges[i], counts[i]] for i in range(small[0])]
    rows += [[-edges[small[-1]][1], edges[small[-1]][1], sum(counts[small])]]
    rows += [[*edges[i], counts[i]] for i in range(small[-1] + 1, len(counts))]
    while not rows[0][2]:
        rows.pop(0)
    while not rows[-1][2]:
        rows.pop()
    rows[0][0], rows[-1][1] = low, high
    return rows


@given(st.dictionaries(st.integers(0, 2 * fields.BUCKETS), st.integers(1, 10**12), min_size=1, max_size=6))
@example({fields.BUCKETS: 1})
@example({fields.BUCKETS - 1: 2, fields.BUCKETS + 30: 5})
def test_buckets_are_what_their_definition_says(found):
    """Wherever the values lie: what is small is one bucket, empty ends are left out, the outer edges are the extremes."""
    counts = np.zeros(2 * fields.BUCKETS + 1)
    counts[list(found)] = list(found.values())
    assert buckets(counts, -7.0, 9.0).tolist() == defined(counts, -7.0, 9.0)


def test_parameters_that_share_a_row_share_a_histogram(tmp_path):
    """Of more parameters than there are rows each module's are added up, wherever they stand among the others."""
    random = np.random.default_rng(0)
    shapes = {f"m{i % 70}.p{i // 70}": random.normal(size=5) * 10.0 ** (i % 7) for i in range(210)}
    weights = {name: values + 1 for name, values in shapes.items()}
    path = written(tmp_path, [snapshot(0, Stage.BACKWARD, shapes, weights)])
    read = {tag: values for tag, values in points(path).items() if tag.startswith(tags.PARTIALS)}
    assert len(read) == 70
    for i in (0, 1, 69):
        together = np.concatenate([shapes[f"m{i}.p{k}"] for k in range(3)])
        ((_, made),) = read[f"{tags.PARTIALS}/{tags.numbered(i, f'm{i}')}"]
        np.testing.assert_array_equal(made, exact(together))


def test_each_parameter_has_its_histogram(tmp_path):
    """TensorBoard reads each parameter's buckets, in model order; a parameter without gradient has none."""
    given = {**gradients(), "a.bias": None}
    path = written(tmp_path, [snapshot(2, Stage.BACKWARD, given, WEIGHTS)])
    read = {tag: values for tag, values in points(path).items() if tag.startswith(tags.PARTIALS)}
    assert set(read) == {f"{tags.PARTIALS}/000 a.weight", f"{tags.PARTIALS}/002 b.weight"}
    for name, tag in (("a.weight", "000 a.weight"), ("b.weight", "002 b.weight")):
        ((at, made),) = read[f"{tags.PARTIALS}/{tag}"]
        assert at == 2
        np.testing.assert_array_equal(made, exact(given[name]))


def test_many_parameters_are_put_together_by_module(tmp_path):
    """A model of 1,000 parameters has no more histograms than the pictures have rows, each of all partials of its module."""
    names = [f"blocks.{i}.{m}.{p}" for i in range(125) for m in ("a", "b", "c", "d") for p in ("weight", "bias")]
    given = {name: np.random.default_rng(i).normal(size=5) for i, name in enumerate(names)}
    path = written(tmp_path, [snapshot(0, Stage.BACKWARD, given, dict.fromkeys(names, np.ones(5)))])
    read = {tag: values for tag, values in points(path).items() if tag.startswith(tags.PARTIALS)}
    assert len(read) == 125
    np.testing.assert_array_equal(
        read[f"{tags.PARTIALS}/007 blocks.7"][0][1], exact(np.concatenate([given[n] for n in names[56:64]]))
    )


# --- words ----------------------------------------------------------------------------------------------------------


def test_findings_are_a_page_that_is_rewritten(tmp_path):
    """Each new finding gives a new page with all of them; the same again does not repeat it."""
    records = [*step(0), finding(0), *step(1), *step(2), finding(2, "exploding", "b.weight", Severity.ERROR), *step(3)]
    pages = points(written(tmp_path, records, interval=0.0))[tags.FINDINGS]
    assert [at for at, _ in pages] == [0, 2]
    assert "vanishing" in text(pages[0])
    assert "exploding" not in text(pages[0])
    assert text(pages[1]).index("exploding") < text(pages[1]).index("vanishing")


def test_pages_wait_for_the_interval_and_the_last_is_complete(tmp_path):
    """Many findings in a short time are few pages; the one at the end has them all."""
    records = [r for n in range(50) for r in (*step(n, seed=1, time=n / 10), finding(n, parameter=f"p{n}"))]
    pages = points(written(tmp_path, records, interval=2.0))[tags.FINDINGS]
    assert [at for at, _ in pages] == [0, 20, 40, 49]
    assert "vanishing at 50 parameters" in text(pages[-1])


def test_a_finding_shows_without_any_snapshot(tmp_path):
    """A run that captured nothing still says what was found."""
    pages = points(written(tmp_path, [finding(7)]))[tags.FINDINGS]
    assert [at for at, _ in pages] == [7]


def test_help_and_layout_come_once(tmp_path):
    """The first step brings the page that explains the tags, and the layout of the Custom Scalars page."""
    read = points(written(tmp_path, [record for n in range(5) for record in step(n)]))
    ((at, _),) = read[tags.HELP]
    assert at == 0
    ((_, layout),) = read["custom_scalars__config__"]
    assert Layout.FromString(layout.item()) == tags.layout()


def test_a_tag_is_described_once_a_file(tmp_path):
    """The first point of a tag says what it means, as TensorBoard shows beside the chart; later ones are short."""
    path = written(tmp_path, [record for n in range(3) for record in step(n, loss=1.0)])
    told = [v.metadata.summary_description for e in events(path) for v in e.summary.value if v.tag == f"{tags.HEALTH}/loss"]
    assert told == [tags.MODEL[f"{tags.HEALTH}/loss"], "", ""]


def test_hostile_names_are_safe(tmp_path):
    """Names with slashes, line breaks, markup and what no font has make tags that TensorBoard lists, one each."""
    names = ["a/b/c", "x\ny", "<script>", "层.weight", "\ud800", "é" * 400, "a/b\\c", " ", "{}", "%s"]
    given = {name: np.ones((2, 2)) * (i + 1) for i, name in enumerate(names)}
    records = [snapshot(0, "backward", given, dict.fromkeys(names, np.ones((2, 2))))]
    records += [finding(0, parameter=name) for name in names]
    written(tmp_path, records, chosen=20)
    known = accumulated(tmp_path).Tags()
    own = [tag for tag in known["scalars"] if tag.startswith(tags.RMS)]
    assert len(own) == len(names)
    assert {tag.count("/") for tag in known["scalars"] + known["tensors"] if tag.startswith("gradlens")} == {1}
    assert sum(tag.startswith(tags.PARTIALS) for tag in known["tensors"]) == len(names)


# --- lives of a run -------------------------------------------------------------------------------------------------


def test_a_resumed_run_replaces_what_came_after(tmp_path):
    """TensorBoard drops the points from `purge_step` on, of every tag, and shows those of the resumed run."""
    written(tmp_path, [record for n in range(10) for record in step(n, loss=float(n))])
    written(tmp_path, [record for n in range(6, 8) for record in step(n, loss=100.0 + n)], purge_step=6)
    assert scalars(tmp_path, f"{tags.HEALTH}/loss") == [*((n, float(n)) for n in range(6)), (6, 106.0), (7, 107.0)]
    for tag in (f"{tags.LAYERS}/gradient_rms", f"{tags.PARTIALS}/000 a.weight", f"{tags.HEALTH}/gradient_norm"):
        at = steps(tmp_path, tag)
        assert at == sorted(set(at))
        assert at[-2:] == [6, 7]
        assert at[0] == 0


def test_without_purge_nothing_is_dropped(tmp_path):
    """A second file that does not restart the run only adds to it."""
    written(tmp_path, [record for n in range(3) for record in step(n, loss=float(n))])
    path = written(tmp_path, [record for n in range(3, 5) for record in step(n, loss=float(n))])
    assert scalars(tmp_path, f"{tags.HEALTH}/loss") == [(n, float(n)) for n in range(5)]
    assert not any(event.session_log.status == SessionLog.START for event in events(path))


@pytest.mark.distributed
def test_a_killed_run_reads_and_can_be_resumed(tmp_path):
    """After `kill -9` every step but the open one is there; a resumed run goes on in a new file."""
    code = f"""
        import os, signal
        from tests.writers.test_tensorboard import step
        from gradlens.writers.tensorboard import TensorBoard
        writer = TensorBoard({str(tmp_path)!r})
        for n in range(20):
            for record in step(n, loss=float(n)):
                writer.write(record)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert killed.returncode == -9
    assert scalars(tmp_path, f"{tags.HEALTH}/loss") == [(n, float(n)) for n in range(19)]
    (torn,) = tmp_path.iterdir()
    with torn.open("r+b") as file:
        file.truncate(torn.stat().st_size - 7)
    written(tmp_path, [record for n in range(18, 20) for record in step(n, loss=-1.0)], purge_step=18)
    assert scalars(tmp_path, f"{tags.HEALTH}/loss") == [*((n, float(n)) for n in range(18)), (18, -1.0), (19, -1.0)]


def test_parameters_that_come_later_are_taken_in(tmp_path):
    """A model that grows keeps its tags, and the new parameter has a histogram of its own."""
    first = [snapshot(0, "backward", gradients(), WEIGHTS)]
    more = {**WEIGHTS, "c.weight": np.ones((2, 2))}
    later = [snapshot(1, "backward", {**gradients(), "c.weight": np.ones((2, 2))}, more)]
    read = points(written(tmp_path, [*first, *later]))
    assert [at for at, _ in read[f"{tags.RMS}/000 a.weight"]] == [0, 1]
    assert [at for at, _ in read[f"{tags.PARTIALS}/003 c.weight"]] == [1]


def test_a_first_step_without_gradients_chooses_nothing_yet(tmp_path):
    """Weights are chosen at the first step on which any has a gradient."""
    absent = dict.fromkeys(WEIGHTS)
    records = [snapshot(0, "backward", absent, WEIGHTS), snapshot(1, "backward", gradients(), WEIGHTS)]
    read = points(written(tmp_path, records))
    assert [at for at, _ in read[f"{tags.RMS}/000 a.weight"]] == [1]
    assert read[f"{tags.HEALTH}/parameters_absent"] == [(0, 3.0), (1, 0.0)]


def test_a_snapshot_without_histogram_still_counts(tmp_path):
    """Records that were read back without their largest part give numbers and pictures."""
    read = points(written(tmp_path, [snapshot(0, "backward", gradients(), WEIGHTS).without_histogram()]))
    assert f"{tags.HEALTH}/gradient_norm" in read
    assert f"{tags.LAYERS}/gradient_rms" in read
    assert not any(tag.startswith(tags.PARTIALS) for tag in read)


def test_a_skipped_step_is_shown(tmp_path):
    """A step whose gradients were not finite has its count, and breaks no later step."""
    bad = {name: np.full(weight.shape, np.nan) for name, weight in WEIGHTS.items()}
    still = {name: np.zeros(weight.shape) for name, weight in WEIGHTS.items()}
    status = [Status.NONFINITE] * 3
    records = [
        snapshot(0, "backward", bad, WEIGHTS, status=status),
        snapshot(0, "used", bad, WEIGHTS, None, still, status=status),
        *step(1),
    ]
    read = points(written(tmp_path, records))
    assert read[f"{tags.HEALTH}/partials_nonfinite"] == [(0, 36.0), (1, 0.0)]
    assert [at for at, _ in read[f"{tags.HEALTH}/gradient_norm"]][-1] == 1


# --- cost and errors ------------------------------------------------------------------------------------------------


def test_the_file_stays_small(tmp_path):
    """A run of 44 parameters and 400 steps is under 3 MB: 0.9 KB of numbers a step, pictures and histograms now and then."""
    path = written(tmp_path, ill_run(width=8))
    assert path.stat().st_size < 3 << 20
    plain = [len(event.SerializeToString()) for event in events(path) if 5 < len(event.summary.value) < 40]
    assert np.median(plain) < 1400
    assert len(plain) > 300


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    """The error names the directory and says what to do."""
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"file/run.*give a directory"):
        TensorBoard(tmp_path / "file" / "run")


def test_a_negative_number_of_weights_is_an_error(tmp_path):
    """The error says what is allowed, and no file is made."""
    with pytest.raises(ArgumentError, match="chosen=-1"):
        TensorBoard(tmp_path, chosen=-1)
    assert not list(tmp_path.iterdir())


def test_it_does_not_matter_how_many_moments_come_at_once(tmp_path):
    """One after the other, some, or all together: the file says the same."""
    stages = zip(*(step(n, time=n / 1000) for n in range(300)), strict=True)
    blocks = [concatenate(list(map(block_of, snapshots))) for snapshots in stages]
    moments = Moments(blocks, np.tile([0, 1], 300), np.repeat(np.arange(300), 2))
    found = {242: finding(120), 520: finding(259, "dead")}  # behind so many moments

    def written(size):
        writer = TensorBoard(tmp_path / str(size))
        ends = sorted({*range(size, 600, size), *found, 600})
        for first, last in pairwise([0, *ends]):
            writer.write_moments(moments[first:last])
            if last in found:
                writer.write(found[last])
        writer.close()
        return [(event.step, event.summary.SerializeToString()) for event in events(writer.path) if event.summary.value]

    one = written(1)
    assert written(7) == one
    assert written(600) == one
    assert {120, 259} <= {number for number, _ in one}
    assert 200 < len(one) < 240
