"""The routes, over real runs of real trainings and over hostile ones."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest

import gradlens
from gradlens import fields
from gradlens.analysis.agreement import sign_test
from gradlens.dashboard import plugin as module
from gradlens.dashboard.views import CHARTS, TABLE
from gradlens.records import Finding, Severity, Top
from tests.dashboard.helpers import Tab
from tests.store import made

ROUTES = ("run", "map", "extreme", "table", "timelines", "scalars", "histogram", "weights", "partials")
#: What each route needs beside the run.
NEEDS = {
    "extreme": {"parameter": "0.weight", "from": 3, "to": 9},
    "timelines": {"parameter": "0.weight", "charts": ",".join(CHARTS)},
    "histogram": {"parameter": "0.weight"},
    "weights": {"parameter": "0.weight"},
    "partials": {"parameter": "0.weight"},
}


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """A healthy training and one whose first layers vanish."""
    logdir = tmp_path_factory.mktemp("logs")
    for name, case in (("healthy", gradlens.testing.healthy()), ("ill/vanishing", gradlens.testing.vanishing())):
        with gradlens.watch(case.model, case.optimizer, run=logdir / name, keep="0.weight") as lens:
            for step in range(40):
                (loss,) = case.train(1, first=step)
                lens.observe(loss=loss)
    return logdir


@pytest.fixture(scope="module")
def tab(logdir):
    return Tab(logdir)


@pytest.fixture(scope="module")
def run(logdir):
    return gradlens.open_run(logdir / "healthy")


# --- answers --------------------------------------------------------------------------------------------------------


def test_all_runs_are_listed(tab):
    """By name, with steps, parameters, findings by severity, and whether they are written."""
    answer = tab.ask("runs")
    assert answer["complete"]
    healthy, ill = answer["runs"]
    assert (healthy["name"], ill["name"]) == ("healthy", "ill/vanishing")
    assert healthy["steps"] == [0, 39]
    assert healthy["parameters"] == 6
    assert not healthy["live"]
    assert healthy["findings"]["error"] == 0
    assert sum(ill["findings"].values()) > 0


def test_the_overview_says_what_the_run_is(tab, run):
    """Names in model order, shapes, stages, settings, the diagnosis in words, findings worst first."""
    answer = tab.ask("run", run="healthy")
    assert answer["names"] == run.names()
    assert answer["shapes"]["0.weight"] == [32, 8]
    assert answer["stages"] == ["backward", "used"]
    assert answer["diagnosis"]["verdict"]
    ill = tab.ask("run", run="ill/vanishing")
    ranks = [Severity(finding["severity"]).rank for finding in ill["listed"]]
    assert any(finding["rule"] == "vanishing" for finding in ill["listed"])
    assert all(finding["seen"] and finding["remedy"] for finding in ill["listed"])
    assert max(ranks) == ranks[0] or ill["diagnosis"].get("origin")


def test_the_map_is_of_all_parameters_and_steps(tab, run):
    """One row a parameter in model order; where a column is a step, the numbers are those of the history."""
    header, arrays = tab.ask("map", run="healthy", quantity="rms", stage="used")
    assert (header["rows"], header["columns"], header["width"], header["first_step"]) == (6, 40, 1, 0)
    assert header["complete"]
    wide = run.history(stage="used").pivot(index="parameter", columns="step", values="rms").loc[run.names()]
    np.testing.assert_allclose(10.0 ** (arrays["values"] / 500), wide.to_numpy(), rtol=3e-3)


def test_the_extreme_of_a_cell_is_found(tab, run):
    """The step within a column of the map whose value is farthest from its neighbours'."""
    answer = tab.ask("extreme", run="healthy", quantity="rms", stage="used", parameter="2.bias", **{"from": 8, "to": 16})
    values = run.history(stage="used", parameters="2.bias")["rms"].to_numpy()
    middle = np.median(np.log10(values[0:24]))
    assert answer["step"] == 8 + np.argmax(np.abs(np.log10(values[8:16]) - middle))


def test_the_table_is_that_of_the_run(tab, run):
    """Every number bit for bit, of the last step, of a step, of the nearest where there was none."""
    header, arrays = tab.ask("table", run="healthy")
    frame = run.table()
    assert header["step"] == 39
    for name in TABLE:
        np.testing.assert_array_equal(arrays[name], frame[name].to_numpy(np.float64))
    assert [run.names()[row] for row in arrays["row"]] == list(frame["parameter"])
    assert [header["statuses"][code] for code in arrays["status"]] == list(frame["status"])
    assert tab.ask("table", run="healthy", step=12)[0]["step"] == 12
    assert tab.ask("table", run="healthy", step=5000)[0]["step"] == 39


def test_the_timelines_are_those_of_the_history(tab, run):
    """Each chart's lines over all steps while these are few; between two steps if asked."""
    header, arrays = tab.ask("timelines", run="healthy", parameter="2.weight", stage="used", charts="size,shares")
    frame = run.history(stage="used", parameters="2.weight")
    np.testing.assert_array_equal(arrays["size.step"], frame["step"])
    np.testing.assert_array_equal(arrays["size.rms"], frame["rms"])
    np.testing.assert_array_equal(arrays["shares.hold_share"], frame["hold_share"])
    assert header["meanings"]["rms"] == fields.meaning("rms")
    between = {"from": 5, "to": 8}
    _, arrays = tab.ask("timelines", run="healthy", parameter="2.weight", stage="used", charts="size", **between)
    assert arrays["size.step"].tolist() == [5, 6, 7, 8]


def test_the_loss_is_first_among_the_scalars(tab, run):
    """As observed."""
    header, arrays = tab.ask("scalars", run="healthy")
    assert header["names"][0] == "loss"
    np.testing.assert_array_equal(arrays["0.value"], run.scalars()["loss"])


def test_the_histogram_counts_every_weight(tab, run):
    """Of each step that has one, buckets and zeros add up to the parameter's finite entries."""
    header, arrays = tab.ask("histogram", run="healthy", parameter="0.weight", stage="used")
    assert len(arrays["steps"]) > 10
    np.testing.assert_array_equal(arrays["counts"].sum(axis=1) + arrays["zero"], np.full(len(arrays["steps"]), 256))
    assert header["buckets"] == fields.BUCKETS


def test_the_top_weights_are_those_that_were_kept(tab, run):
    """With index, value, partial and direction, of the last step that has them, or one before."""
    answer = tab.ask("weights", run="healthy", parameter="0.weight")
    frame = run.weights("0.weight")
    assert [tuple(each["index"]) for each in answer["weights"]] == list(frame["index"])
    assert [each["partial"] for each in answer["weights"]] == list(frame["partial"])
    assert {each["direction"] for each in answer["weights"]} <= {"increase", "decrease"}
    assert answer["step"] == 39
    assert tab.ask("weights", run="healthy", parameter="0.weight", step=7)["step"] <= 7


def test_each_top_weight_has_a_verdict_over_the_steps_that_kept_it(tab, run):
    """What the route says is what the kept partials say, counted one by one; and how the verdict is made."""
    answer = tab.ask("weights", run="healthy", parameter="0.weight")
    signs = {}
    for snapshot in run.snapshots(parameters="0.weight", stage=answer["stage"]):
        for index, partial in zip(snapshot.top.index[0], snapshot.top.partial[0], strict=True) if snapshot.top else ():
            signs.setdefault(tuple(np.unravel_index(index, run.shapes()["0.weight"])), []).append(np.sign(partial))
    for each in answer["weights"]:
        seen = signs[tuple(each["index"])]
        same = seen.count(np.sign(each["partial"]))
        assert each["agreement"] == f"same sign on {same} of {len(seen)} kept step{'s' * (len(seen) != 1)}"
        sure = same >= 8 and same > len(seen) / 2 and sign_test(same, len(seen)) < 0.05
        assert each["verdict"] == (each["direction"] if sure else "not sure")
    assert answer["columns"][-2:] == ["verdict", "agreement"]
    assert "two-sided sign test" in answer["meaning"]
    assert "no independent sample" in answer["meaning"]


def test_the_verdict_of_a_weight_that_always_agreed_is_its_direction(tmp_path):
    """Twelve kept steps of one sign, a name that looks like a pattern beside one that it fits; a scalar; a complex entry."""
    names, shapes, dtypes = ["w[ab]", "wa", "s", "z"], [(4, 4), (4, 4), (), (2, 3)], ["float32"] * 3 + ["complex64"]
    of = made.parameters(names, shapes, dtypes)
    records = []
    for step in range(12):
        record = made.snapshot(step, "used", of=of)
        index, partial = np.full((4, fields.TOP), -1), np.full((4, fields.TOP), np.nan)
        index[:, 0], partial[:, 0] = [15, 15, 0, 11], [-1.0, 1.0 if step % 2 else -1.0, 2.0, -3.0]
        records.append(dataclasses.replace(record, top=Top(index, partial, np.ones_like(partial))))
    made.write(tmp_path / "run", records)
    tab = Tab(tmp_path)
    told = []
    for name in names:
        (each,) = tab.ask("weights", run="run", parameter=name)["weights"]
        told.append((each["index"], each["verdict"], each["agreement"]))
    assert told == [
        ([3, 3], "increase", "same sign on 12 of 12 kept steps"),
        ([3, 3], "not sure", "same sign on 6 of 12 kept steps"),
        ([], "decrease", "same sign on 12 of 12 kept steps"),
        ([1, 2, 1], "increase", "same sign on 12 of 12 kept steps"),
    ]


def test_a_matrix_that_was_kept_is_served(tmp_path):
    """Every partial and weight of a step, or the last before it; where none was kept the answer says how to have it."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep="2.weight"):
        case.train(30)
    tab, run = Tab(tmp_path), gradlens.open_run(tmp_path / "run")
    assert tab.ask("run", run="run")["kept"] == run.kept()
    header, arrays = tab.ask("partials", run="run", parameter="2.weight", step=8)
    found = run.partials("2.weight", 8)
    assert (header["step"], header["rows"], header["columns"], header["reduced"]) == (8, 32, 32, 1)
    np.testing.assert_array_equal(arrays["partial"], found.partial)
    np.testing.assert_array_equal(arrays["value"], found.value)
    assert "2.weight" in tab.ask("partials", run="run", parameter="0.weight")["error"]


def test_a_large_matrix_keeps_its_largest_partials(tmp_path, monkeypatch):
    """No more cells than a screen has, each the largest of its neighbours, with the index of that weight."""
    monkeypatch.setattr("gradlens.dashboard.views.MAX_SIDE", 10)
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep="2.weight"):
        case.train(3)
    header, arrays = Tab(tmp_path).ask("partials", run="run", parameter="2.weight")
    found = gradlens.open_run(tmp_path / "run").partials("2.weight").partial
    assert (header["rows"], header["columns"], header["reduced"]) == (8, 8, 4)
    assert np.abs(arrays["partial"]).max() == np.abs(found).max()
    np.testing.assert_array_equal(found.ravel()[arrays["index"].ravel()], arrays["partial"].ravel())


def test_a_run_that_is_being_written_is_answered(tmp_path):
    """Before the first step there are runs without numbers; then those that are on disk, marked as live."""
    case = gradlens.testing.healthy()
    tab = Tab(tmp_path)
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "live") as lens:
        lens.flush()
        assert tab.ask("run", run="live")["steps"] is None
        assert tab.ask("map", run="live")[0]["columns"] == 0
        assert "nothing" in tab.ask("table", run="live")["error"]
        case.train(3)
        lens.flush()
        assert tab.ask("run", run="live")["steps"] == [0, 2]
        assert tab.ask("run", run="live")["live"]
        assert tab.ask("map", run="live")[0]["columns"] == 3
        case.train(4, first=3)
        lens.flush()
        assert tab.ask("map", run="live")[0]["columns"] == 7


def test_ranks_are_pooled(tmp_path):
    """Two ranks' rows of shards are one row a parameter in every answer."""
    names, shapes = ("a", "b"), ((4, 2), (3,))
    for rank in (0, 1):
        of = made.parameters(names, shapes, pieces=(f"{2 * rank}:{2 * rank + 2},0:2", f"{rank}:{2 * rank + 1}"))
        made.write(tmp_path / "run", made.training(5, of=of, rank=rank), rank=rank, settings={"ranks": 2})
    tab, run = Tab(tmp_path), gradlens.open_run(tmp_path / "run")
    assert tab.ask("run", run="run")["ranks"] == [0, 1]
    _, arrays = tab.ask("table", run="run")
    assert arrays["numel"].tolist() == run.table()["numel"].tolist()
    assert len(arrays["numel"]) == 2


# --- transfer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_what_has_not_changed_is_not_sent_again(tab, route):
    """The same question gets the same ETag, and 304 when it is given back."""
    query = {"run": "healthy", **NEEDS.get(route, {})}
    first = tab.get(route, **query)
    assert first.headers["ETag"]
    again = tab.get(route, headers={"If-None-Match": first.headers["ETag"]}, **query)
    assert again.status_code == 304
    assert not again.get_data()
    other = tab.get(route, headers={"If-None-Match": first.headers["ETag"]}, **{**query, "run": "ill/vanishing"})
    assert other.status_code == 200


def test_large_answers_travel_compressed(tab):
    """Where the browser takes it."""
    plain = tab.get("map", run="ill/vanishing")
    packed = tab.get("map", headers={"Accept-Encoding": "gzip"}, run="ill/vanishing")
    assert packed.headers["Content-Encoding"] == "gzip"
    assert len(packed.get_data()) < len(plain.get_data())


# --- security -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..", "../..", "/etc", "healthy/..", "ill", "", "healthy/../healthy", "\0", "ill\\vanishing"]
)
@pytest.mark.parametrize("route", ROUTES)
def test_only_runs_under_the_log_directory_are_served(tab, name, route):
    """Anything else is not found, and the answer says which there are."""
    answer = tab.get(route, run=name, **NEEDS.get(route, {}))
    assert answer.status_code == 404
    assert "there is no run" in json.loads(answer.get_data())["error"]


@pytest.mark.parametrize(
    "path", ["../plugin.py", "..%2fplugin.py", "/etc/passwd", "", "index.html", "vendor", "vendor/../../plugin.py"]
)
def test_only_the_pages_own_files_are_served(tab, path):
    """Files that were there at the start, by their names alone."""
    assert tab.get("static/*", path=f"/data/plugin/gradlens/static/{path}").status_code == 404
    found = tab.get("static/*", path="/data/plugin/gradlens/static/vendor/uplot/uPlot.esm.js")
    assert found.status_code == 200
    assert "javascript" in found.content_type


@pytest.mark.parametrize(
    ("route", "query"),
    [
        ("map", {}),
        ("timelines", {"run": "healthy"}),
        ("timelines", {"run": "healthy", "charts": "size", "parameter": "x" * 5000}),
        ("table", {"run": "healthy", "step": "x"}),
        ("table", {"run": "healthy", "step": "-1"}),
        ("table", {"run": "healthy", "step": "9" * 30}),
        ("scalars", {"run": "healthy", "points": 10**9}),
    ],
)
def test_wrong_questions_are_refused(tab, route, query):
    """With what was expected."""
    answer = tab.get(route, **query)
    assert answer.status_code == 400
    assert json.loads(answer.get_data())["error"]


@pytest.mark.parametrize(
    ("route", "query", "word"),
    [
        ("map", {"quantity": "rmss"}, "rms"),
        ("map", {"stage": "usde"}, "used"),
        ("timelines", {"parameter": "0.wieght", "charts": "size"}, "0.weight"),
        ("timelines", {"parameter": "0.weight", "charts": "sizes"}, "size"),
        ("histogram", {"parameter": "nothing"}, "there is no parameter"),
    ],
)
def test_unknown_words_are_answered_with_those_that_are_there(tab, route, query, word):
    """As an error that the page shows."""
    assert word in tab.ask(route, run="healthy", **query)["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_but_reading_is_answered(tab, method):
    """The tab changes nothing."""
    assert tab.get("runs", method=method).status_code == 405


HOSTILE = '<img src=x onerror="alert(1)">'


def test_hostile_names_travel_as_text(tmp_path):
    """Names of parameters and words of findings come out of JSON as they are."""
    of = made.parameters((HOSTILE, "a\u2028b", "x" * 3000), ((2,), (2,), (2,)))
    records = [made.snapshot(0, of=of), Finding("r", 0, Severity.ERROR, HOSTILE, HOSTILE, (HOSTILE,), HOSTILE)]
    made.write(tmp_path / "run", records)
    tab = Tab(tmp_path)
    answer = tab.ask("run", run="run")
    assert answer["names"][0] == HOSTILE
    assert answer["listed"][0]["seen"] == HOSTILE
    assert tab.get("run", run="run").content_type.startswith("application/json")
    assert tab.ask("timelines", run="run", parameter=HOSTILE, stage="backward", charts="size")[0]["steps"] == 1


def damages():
    """Ways in which a run's files may be hostile."""
    yield "run.json", b'{"format": "other"}'
    yield "run.json", b"[" * 100_000
    yield "segments/0000-rank0.json", b"{}"
    yield "segments/0000-rank0.json", b"\xff\xfe"
    yield "findings/0000-rank0.jsonl", b"no json\n"
    yield "findings/0000-rank0.jsonl", b'{"rule": 1}\n'
    yield "history/0000-rank0-000000-000000.parquet", b"PAR1"
    yield "history/_0000-rank0-000001.tail", b"GRADLENS" + b"x" * 5000
    yield "scalars/0000-rank0-000000-000000.parquet", bytes(range(256)) * 20
    yield "weights/9999-rank7-000000-000000.parquet", b"PAR1"


@pytest.mark.parametrize(("path", "content"), list(damages()))
def test_hostile_files_give_a_message_and_never_a_server_error(tmp_path, path, content):
    """Every route answers: with numbers, where the file does not matter to it, or with an error that says what to do."""
    good = made.write(tmp_path / "logs" / "good", made.training(3))
    bad = made.write(tmp_path / "logs" / "bad", made.training(3))
    assert good.exists()
    (bad / path).write_bytes(content)
    tab, errors = Tab(tmp_path / "logs"), 0
    for route in ROUTES:
        response = tab.get(route, run="bad", **{**NEEDS.get(route, {}), "parameter": "head.weight"})
        assert response.status_code == 200
        if response.content_type.startswith("application/json"):
            errors += "error" in json.loads(response.get_data())
    listed = {each["name"]: each for each in tab.ask("runs")["runs"]}
    assert listed["good"]["parameters"] == 5
    assert errors or "error" in listed["bad"] or path == "run.json"


def test_an_answer_is_bounded_in_memory(tmp_path, monkeypatch):
    """A question whose rows would take too much is answered with how to ask for less."""
    made.write(tmp_path / "run", made.training(200))
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    assert "ask for less" in Tab(tmp_path).ask("timelines", run="run", parameter="scale", charts="size")["error"]


# --- at home in TensorBoard -----------------------------------------------------------------------------------------


def test_tensorboard_finds_the_plugin():
    """By its entry point, which names this class."""
    (found,) = {each for each in metadata.entry_points(group="tensorboard_plugins") if each.name == "gradlens"}
    assert found.load() is module.GradlensPlugin


def test_the_tab_is_there_when_there_is_a_run(tmp_path):
    """Not active without one; other people's log directories stay as they were."""
    tab = Tab(tmp_path)
    assert not tab.plugin.is_active()
    assert not Tab("").plugin.is_active()
    assert not Tab("gs://bucket/logs").plugin.is_active()
    made.write(tmp_path / "run", made.training(1))
    assert Tab(tmp_path).plugin.is_active()
    assert tab.plugin.frontend_metadata().tab_name == "GradLens"


def test_the_plugin_imports_no_torch():
    """TensorBoard starts as fast as without it."""
    code = "import sys, gradlens.dashboard.plugin; assert not {'torch', 'pandas', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_hundred_runs_are_listed_at_once(tmp_path):
    """The list comes within two seconds, complete when asked again, and then at once."""
    for i in range(100):
        made.write(tmp_path / f"run{i:03d}", made.training(1))
    tab, begin = Tab(tmp_path), time.monotonic()
    answer = tab.ask("runs")
    assert len(answer["runs"]) == 100
    assert time.monotonic() - begin < 2 * (module.SECONDS + 2)
    for _ in range(60):
        if tab.ask("runs")["complete"]:
            break
    assert tab.ask("runs")["complete"]


def test_no_page_loads_anything_from_elsewhere():
    """No file names another host in an import, a style or a request."""
    for path in module.STATIC.rglob("*"):
        if path.suffix in (".js", ".css") and "vendor" not in path.parts:
            found = re.findall(r"https?://[^\s\"')]+", path.read_text())
            assert all(each.startswith("http://www.w3.org/") for each in found), path
