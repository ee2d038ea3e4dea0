"""A run in which much goes wrong, as TensorBoard serves it with either of its loaders, and as a browser shows it."""

import pytest

from gradlens.records import Finding, Severity
from gradlens.writers import tags
from gradlens.writers.tensorboard import TensorBoard
from tests.writers.made import ill_run
from tests.writers.served import Server

HOSTILE = "<img src=x onerror=alert(1)>/[a](b)|`c`"
RESUMED = 300
NORM = f"{tags.HEALTH}/gradient_norm"

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """A run of 400 steps, observed each 10th, that was stopped at step 350 and resumed from a checkpoint of step 300."""
    logdir = tmp_path_factory.mktemp("runs")
    records = list(ill_run(every=10))
    first = TensorBoard(logdir / "ill")
    for record in records:
        if record.step < 350:
            first.write(record)
    first.close()
    second = TensorBoard(logdir / "ill", purge_step=RESUMED)
    second.write(Finding("hostile", RESUMED, Severity.INFO, HOSTILE, HOSTILE, (HOSTILE,), HOSTILE))
    for record in records:
        if isinstance(record, Finding) or record.step >= RESUMED:
            second.write(record)
    second.close()
    return logdir


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "slow"])
def either(request, logdir):
    """A server of either kind that has read the run."""
    server = Server(logdir, fast=request.param)
    yield server.loaded("ill", NORM, 390)
    server.close()


@pytest.fixture(scope="module")
def server(logdir):
    """The server as it is by default."""
    server = Server(logdir, fast=True)
    yield server.loaded("ill", NORM, 390)
    server.close()


def test_both_loaders_drop_what_the_resumed_run_replaced(either):
    """Numbers, pictures, histograms and texts have each step once, those of the resumed run from where it began."""
    numbers = either.ask("plugin/scalars/scalars", run="ill", tag=NORM)
    assert [step for _, step, _ in numbers] == list(range(0, 400, 10))
    pictures = either.ask("plugin/images/images", run="ill", tag=f"{tags.LAYERS}/gradient_rms", sample=0)
    histograms = either.ask("plugin/histograms/histograms", run="ill", tag=f"{tags.PARTIALS}/001 layers.0.weight")
    assert [point[1] for point in histograms][-3:] == [360, 380, 390]
    for steps in ([point["step"] for point in pictures], [point[1] for point in histograms]):
        assert steps == sorted(set(steps))
        assert steps[-1] == 390


def test_both_loaders_tell_what_tags_mean(either):
    """The description of each of the model's numbers reaches the page that shows it."""
    known = either.ask("plugin/timeseries/tags")
    assert set(tags.MODEL) <= set(known["scalars"]["tagDescriptions"])
    assert set(tags.IMAGES) == set(known["images"]["tagDescriptions"])
    assert "Must be 0" in known["scalars"]["tagDescriptions"][f"{tags.HEALTH}/partials_nonfinite"]


def test_both_loaders_have_the_layout_and_the_texts(either):
    """The Custom Scalars page gets its charts, the Text page its findings, in which names are text."""
    layout = either.ask("plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == [
        "gradlens: health", "gradlens: direction", "gradlens: update",
    ]  # fmt: skip
    charts = either.ask(
        "plugin/custom_scalars/scalars", run="ill", tag=layout["category"][0]["chart"][0]["multiline"]["tag"][0]
    )
    assert len(charts["tag_to_events"]) == 8
    *_, last = either.ask("plugin/text/text", run="ill", tag=tags.FINDINGS)
    assert last["step"] == 360
    assert "<img" not in last["text"]
    assert "nonfinite" in last["text"]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("page", "words"),
    [
        (
            "timeseries",
            [tags.LAYERS, tags.HEALTH, tags.DIRECTION, "/gradient_rms", "/increase_share", "/gradient_norm"],
        ),
        ("scalars", [tags.HEALTH, tags.DIRECTION, tags.UPDATE, tags.RMS, tags.RATIO, NORM, f"{tags.HEALTH}/layer_spread"]),
        ("images", [f"{tags.LAYERS}/gradient_rms", f"{tags.LAYERS}/increase_share"]),
        ("histograms", [tags.PARTIALS, "000 embed.weight", "001 layers.0.weight"]),
        ("distributions", [tags.PARTIALS, "000 embed.weight", "001 layers.0.weight"]),
        (
            "text",
            ["1 error", "ERROR: nonfinite", "vanishing at 10 parameters", "layers.11.bias", "Start with the two pictures"],
        ),
        ("custom_scalars", ["gradlens: health", "size of the gradient along the model", "Matches (8)"]),
    ],
)
def test_the_pages_show_the_run(browser, server, page, words):
    """Each of TensorBoard's pages shows what it should of a real run in a real browser."""
    browser.open(f"{server.url}/#{page}")
    browser.shows(words)


@pytest.mark.browser
def test_the_first_page_begins_with_the_pictures(browser, server):
    """Whoever opens the dashboard sees both pictures first, without scrolling, at a size that shows them whole."""
    browser.open(server.url)
    browser.shows(["/gradient_rms", "/increase_share"])
    pictures = browser.run(
        "return [...document.querySelectorAll('image-card img')].map(i => {"
        "  const r = i.getBoundingClientRect();"
        "  return [i.naturalWidth, r.width / r.height, r.bottom <= window.innerHeight];"
        "});"
    )
    assert len(pictures) == 2
    for width, shape, seen in pictures:
        assert width == 1000
        assert seen
        assert shape > 1


@pytest.mark.browser
def test_hostile_names_do_nothing_in_a_browser(browser, server):
    """A name that is markup is shown on the Text page as it is, and makes no element of its own."""
    browser.open(f"{server.url}/#text")
    browser.shows([HOSTILE])
    assert browser.run("return document.querySelectorAll('img[src=x]').length") == 0
