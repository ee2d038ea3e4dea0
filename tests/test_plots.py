"""Pictures by matplotlib: of a lens and of a run alike, with the numbers of their tables."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest

import gradlens
from gradlens import plots
from gradlens.errors import ArgumentError, GradlensError, NothingCapturedError

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A lens, still between backward and zero_grad, and its run."""
    case = gradlens.testing.healthy()
    path = tmp_path_factory.mktemp("run") / "run"
    lens = gradlens.watch(case.model, case.optimizer, run=path)
    case.train(6)
    lens.flush()
    yield lens, gradlens.open_run(path)
    lens.close()


@pytest.fixture(autouse=True)
def _closed():
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("kind", ["flow", "directions", "sizes", "updates"])
@pytest.mark.parametrize("source", [0, 1], ids=["lens", "run"])
def test_each_picture_of_a_lens_and_of_its_run_is_drawn(trained, source, kind):
    """Axes with a title, that matplotlib can draw."""
    axes = trained[source].plot(kind)
    axes.figure.canvas.draw()
    assert axes.get_title()


def test_gradient_flow_has_the_tables_numbers(trained):
    """The rms of each parameter, in model order."""
    lens, _ = trained
    axes = plots.gradient_flow(lens)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), lens.table()["rms"])
    assert [label.get_text() for label in axes.get_xticklabels()] == lens.names()


def test_directions_are_increase_less_decrease(trained):
    """A row a parameter, a column a step."""
    _, run = trained
    picture = plots.directions(run).images[0].get_array()
    table = run.table(5, stage="used")
    np.testing.assert_allclose(picture[:, -1], table["increase_share"] - table["decrease_share"])
    assert picture.shape == (len(run.names()), 6)


def test_a_weight_matrix_is_a_heat_map(trained):
    """Every weight at its place."""
    lens, _ = trained
    name = next(n for n in lens.names() if n.endswith("weight"))
    picture = plots.weight(lens, name, of="value").images[0].get_array()
    frame = lens.weights(name)
    for (row, column), value in zip(frame["index"][:20], frame["value"][:20], strict=True):
        assert picture[row, column] == pytest.approx(value)


def test_a_histogram_over_time_counts_every_weight(trained):
    """Each column's shares add up to what is not zero: one."""
    _, run = trained
    name = run.names()[0]
    shares = plots.histogram(run, name).collections[0].get_array()
    np.testing.assert_allclose(np.asarray(shares).sum(axis=0), 1)


def test_axes_of_the_users_are_drawn_into(trained):
    """`ax=` is used and returned."""
    _, ax = matplotlib.pyplot.subplots()
    assert trained[0].plot("updates", ax=ax) is ax


def test_what_cannot_be_drawn_is_said(trained, tmp_path):
    """Wrong names with their neighbours; what is not recorded with what records it."""
    lens, _ = trained
    with pytest.raises(ArgumentError, match="did you mean 'flow'"):
        lens.plot("flwo")
    with pytest.raises(ArgumentError, match="there is no parameter"):
        plots.weight(lens, "nothing")
    with pytest.raises(ArgumentError, match="run directories"):
        plots.histogram(lens, lens.names()[0])
    model = gradlens.testing.healthy().model
    with gradlens.watch(model) as empty, pytest.raises(NothingCapturedError):
        empty.plot("directions")


def test_without_matplotlib_the_error_says_how_to_install_it(trained, monkeypatch):
    """matplotlib is an extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(GradlensError, match="pip install"):
        trained[0].plot("flow")


def test_matplotlib_is_imported_when_a_picture_is_asked_for():
    """`import gradlens.plots` alone does not bring it."""
    code = "import sys, gradlens.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
