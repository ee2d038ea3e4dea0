"""The tab as people use it: a real TensorBoard over real runs, in headless Chromium."""

import csv
import json
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest

import gradlens
from gradlens.records import Finding, Severity
from tests.dashboard.browsing import Page
from tests.store import made
from tests.writers.served import Server, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.xdist_group("browser")]

MINUS = "\N{MINUS SIGN}"
HOSTILE = "<img src=x onerror=alert(1)>"
ILL = ["vanishing", "exploding", "dead_relu", "nonfinite", "absent_branch"]
ROOT = Path(__file__).parents[2]


def train(run, case, steps=60):
    """A recorded training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradlens.watch(case.model, case.optimizer, run=run, keep="2.weight" if run.name == "healthy" else None) as lens:
            for step in range(steps):
                (loss,) = case.train(1, first=step)
                lens.observe(loss=loss)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """Healthy and sick trainings, a large model, a run with hostile names, and one whose files are damaged."""
    logdir = tmp_path_factory.mktemp("logs")
    train(logdir / "healthy", gradlens.testing.healthy())
    for name in ILL:
        train(logdir / "ill" / name, getattr(gradlens.testing, name)())
    many = [f"blocks.{i // 40}.{i // 4 % 10}.{'wb'[i % 2]}{i % 4}" for i in range(10_000)]
    large = made.parameters(many, [(3,)] * len(many))
    made.write(logdir / "large", [made.snapshot(step, of=large, detail=False) for step in range(4)])
    hostile = made.parameters((HOSTILE, "plain"), ((2,), (2,)))
    finding = Finding("r", 1, Severity.ERROR, HOSTILE, HOSTILE, (HOSTILE,), HOSTILE)
    made.write(logdir / "hostile", [*made.training(3, of=hostile), finding])
    made.write(logdir / "damaged", made.training(3))
    (next((logdir / "damaged" / "history").glob("*.parquet"))).write_bytes(b"PAR1" * 100)
    return logdir


@pytest.fixture(scope="module")
def server(logdir):
    server = Server(logdir, fast=True)
    wait_for(lambda: server.ask("plugin/gradlens/runs")["complete"], "TensorBoard with the tab")
    yield server
    server.close()


@pytest.fixture
def page(server, browser):
    """The tab; whatever a test does, the console stays free of errors."""
    browser._post("/window/rect", {"width": 1400, "height": 1000})
    browser.errors()
    page = Page(server, browser)
    yield page
    assert page.browser.errors() == []


def test_the_overview_has_everything_at_once(page):
    """The runs, the diagnosis, the loss, the map and the findings, on one page."""
    page.open(run="ill/vanishing")
    assert page.js("document.querySelectorAll('.run').length") == 4 + len(ILL)
    assert page.say(".verdict")
    assert "vanishing" in page.say(".findings")
    assert page.js("document.querySelector('.overview .chart canvas').width") > 100
    colours = page.js(
        "(() => { const c = document.querySelector('.map-canvas'), x = c.getContext('2d');"
        " const d = x.getImageData(0.4 * c.width, 0, 0.5 * c.width, c.height).data; const s = new Set();"
        " for (let i = 0; i < d.length; i += 4000) s.add(d.slice(i, i + 3).join()); return s.size; })()"
    )
    assert colours > 5


@pytest.mark.parametrize("name", ILL)
def test_the_illness_of_each_sick_training_is_seen_on_the_first_page(page, name):
    """Its rule is among the findings that are in view, and the verdict is not that nothing was found."""
    page.open(run=f"ill/{name}")
    rule = getattr(gradlens.testing, name)().rule
    assert rule in " ".join(page.all(".finding-head b"))
    assert page.js("document.querySelector('.verdict').dataset.severity") in ("warning", "error")
    assert page.js("document.querySelector('.finding-head').getBoundingClientRect().bottom < window.innerHeight")


def test_a_finding_moves_everything_to_its_parameter_and_step(page):
    """The address, the map and the pages that are opened next."""
    page.open(run="ill/vanishing")
    nth = page.all(".finding .where").index("0.weight")
    step = page.all(".finding-head .faint")[nth].removeprefix("step ")
    page.click(".finding-head", nth=nth)
    page.until("document.querySelector('.chosen button')")
    assert page.hash()["parameter"] == "0.weight"
    assert page.hash()["step"] == step
    assert page.all(".finding [aria-current=true] .where") == ["0.weight"]
    page.click("#tab-parameter")
    page.until("document.querySelector('.parameter-page output')?.textContent === " + json.dumps(step))


def test_a_finding_about_the_whole_model_moves_the_step_and_marks_no_parameter(page):
    """The origin of the vanishing gradient has no parameter: one that was chosen before is chosen no more."""
    page.open(run="ill/vanishing", parameter="4.weight")
    assert page.say(".finding .where") == "the whole model"
    step = page.say(".finding-head .faint").removeprefix("step ")
    page.click(".finding-head")
    wait_for(lambda: page.hash().get("step") == step, "the step in the address")
    assert "parameter" not in page.hash()
    assert page.all(".finding [aria-current=true] .where") == ["the whole model"]
    assert "open" not in page.say(".chosen")


def test_a_cell_of_the_map_moves_everything(page):
    """A click chooses parameter and step, a double click opens the parameter; the mouse reads values."""
    page.open(run="ill/vanishing")
    page.hover(".map-scroll", 0.7, 0.1)
    assert "rms of the partials: " in page.until("document.querySelector('.tip:not([hidden])')?.textContent")
    page.click(".map-scroll", 0.7, 0.1)
    page.until("document.querySelector('.chosen').textContent.includes('step')")
    assert page.hash()["parameter"].endswith(("weight", "bias"))
    assert 20 < int(page.hash()["step"]) < 50
    page.click(".map-scroll", 0.5, 0.1, count=2)
    page.until("document.querySelector('#tab-parameter').getAttribute('aria-selected') === 'true'")


def test_the_map_shows_every_quantity_and_folds(page):
    """Each colour has its scale; a module's row folds by a click and in the address."""
    page.open(run="ill/vanishing")
    for quantity in ("balance", "update_ratio", "cosine", "agreement"):
        page.js(
            f"(() => {{ const s = document.querySelector('#quantity'); s.value = '{quantity}';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        assert page.hash()["quantity"] == quantity
        page.settled()
        assert page.say(".legend")
    page.click(".map-scroll", 0.01, 0.02)
    wait_for(lambda: page.hash().get("fold") == "-0", "the fold in the address")


def test_the_table_searches_sorts_and_opens(page):
    """Plain words and regular expressions, any column, a row by mouse or keyboard."""
    page.open(run="ill/vanishing", view="table")
    page.until("document.querySelectorAll('tr[data-place]').length === 24")
    page.write("#search", "bias 1")
    wait_for(lambda: page.all("tr[data-place] th") == ["10.bias", "12.bias", "14.bias", "16.bias", "18.bias"], "the rows")
    page.click("input[type=checkbox]")
    page.write("#search", "^(0|2)\\.")
    wait_for(lambda: page.all("tr[data-place] th") == ["0.weight", "0.bias", "2.weight", "2.bias"], "the rows")
    page.write("#search", "(")
    page.until("document.querySelector('.wrong').textContent.includes('not a regular expression')")
    page.write("#search", "weight")
    page.until("document.querySelectorAll('tr[data-place]').length === 12")
    page.click("thead th:nth-child(6) button")
    page.until("document.querySelector('th[aria-sort=descending]')")
    values = [float(text.replace(MINUS, "-")) for text in page.all("tr[data-place] td:nth-child(6)")]
    assert values == sorted(values, reverse=True)
    assert page.js("document.querySelectorAll('.split[aria-label]').length") == 12
    first = page.say("tr[data-place] th")
    page.js("document.querySelector('.table-scroll').focus()")
    page.press("ArrowDown", "ArrowUp", "Enter")
    wait_for(lambda: page.hash().get("parameter") == first, "the parameter's page")


def test_ten_thousand_parameters_scroll(page):
    """Only rows in view are in the page, from first to last; those that stay in view stay, others are written again."""
    page.open(run="large", view="table")
    page.until("document.querySelectorAll('tr[data-place]').length > 20")
    most, kept = page.browser.run(
        "const s = document.querySelector('.table-scroll'), rows = () => document.querySelectorAll('tr[data-place]');"
        "let most = 0, kept = 0, before = new Set();"
        "return new Promise(done => { let n = 0; const step = () => { const now = [...rows()];"
        " most = Math.max(most, now.length); kept += now.filter(row => before.has(row)).length; before = new Set(now);"
        " s.scrollTop = 140 * ++n; n < 60 ? requestAnimationFrame(step) : done([most, kept]); };"
        " requestAnimationFrame(step); });"
    )
    assert most < 100
    assert kept > 1000
    assert page.js("(window.__rows = new Set(document.querySelectorAll('tr[data-place]'))).size") > 20
    page.js("document.querySelector('.table-scroll').scrollTop = 1e9")
    page.until("[...document.querySelectorAll('tr[data-place] th')].some(e => e.textContent === 'blocks.249.9.b3')")
    assert page.js("document.querySelectorAll('tr[data-place]').length") < 100
    assert page.js("[...document.querySelectorAll('tr[data-place]')].filter(row => !window.__rows.has(row)).length") < 10
    shown = page.all("tr[data-place] th")
    assert shown == [f"blocks.{i // 40}.{i // 4 % 10}.{'wb'[i % 2]}{i % 4}" for i in range(10_000)][-len(shown) :]
    page.until("[...document.querySelectorAll('canvas.spark')].every(each => each.style.visibility === '')")


def test_the_parameters_page_has_its_charts_histogram_and_weights(page):
    """Lines over steps, counts by size over time, the top weights with index, value, partial, direction, verdict."""
    page.open(run="healthy", view="parameter", parameter="2.weight")
    titles = page.js("[...document.querySelectorAll('.parameter-page .chart:not([hidden]) .title')].map(e => e.textContent)")
    assert len(titles) >= 6
    assert page.js("document.querySelector('canvas.histogram').width") > 100
    page.until("document.querySelectorAll('.weights tbody tr').length === 16")
    assert page.say(".weights tbody th").startswith("[")
    assert page.say(".weights .direction").split()[-1] in ("increase", "decrease")
    assert "verdict" in page.all(".weights thead th")
    verdicts = page.all(".weights td.sure")
    assert len(verdicts) == 16
    assert all(re.fullmatch(r"(increase|decrease|not sure)same sign on \d+ of \d+ kept steps?", each) for each in verdicts)
    assert "two-sided sign test" in page.js("document.querySelector('.weights .hint').title")
    page.hover("canvas.histogram", 0.5, 0.3)
    page.until("document.querySelector('.told').textContent.includes('weights with a partial of')")


def test_the_heat_map_shows_each_weight_at_each_kept_step(page, logdir):
    """Exact values under the mouse, partials, weights or directions, and a slider over the steps that were kept."""
    run = gradlens.open_run(logdir / "healthy")
    page.open(run="healthy", view="parameter", parameter="2.weight", step="20")
    page.hover("canvas.matrix", 0.5 / 32, 1.5 / 32)
    told = page.until("[...document.querySelectorAll('.told')].map(e => e.textContent).find(t => t.startsWith('[1, 0]'))")
    found = run.partials("2.weight", 20)
    assert float(told.split("partial ")[1].split(",")[0]) == found.partial[1, 0]
    assert float(told.rpartition(" ")[2]) == found.value[1, 0]
    before = page.js("document.querySelector('canvas.matrix').toDataURL()")
    page.js(
        "(() => { const s = document.querySelector('[aria-label=\"what the heat map shows\"]'); s.value = 'direction';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    assert page.js("document.querySelector('canvas.matrix').toDataURL()") != before
    page.js("document.querySelector('[aria-label=\"step of the heat map\"]').focus()")
    page.press("ArrowLeft")
    kept = run.kept()["2.weight"]
    wait_for(lambda: page.hash()["step"] == str(kept[kept.index(20) - 1]), "the kept step before")
    page.open(run="healthy", view="parameter", parameter="4.weight")
    assert 'keep=["4.weight"]' in page.until("document.querySelector('code.block')?.textContent")


def test_cursors_of_all_charts_move_together(page):
    """Pointing at a step in one chart shows the others' values of that step."""
    page.open(run="healthy", view="parameter", parameter="2.weight")
    page.hover(".u-over", 0.5, 0.5)
    steps = page.until(
        "(() => { const s = [...document.querySelectorAll('.charts .chart:not([hidden]) .u-series:first-child .u-value')]"
        ".map(e => e.textContent); return s.every(e => /^[0-9]+$/.test(e)) && s; })()"
    )
    assert len(set(steps)) == 1
    assert 25 <= int(steps[0]) <= 35


def test_zooming_one_chart_zooms_all(page):
    """Dragging sets the steps in the address and on every chart; a double click shows the whole run."""
    page.open(run="healthy", view="parameter", parameter="2.weight")
    page.drag(".u-over", (0.25, 0.5), (0.5, 0.5))
    wait_for(lambda: "from" in page.hash(), "the zoom in the address")
    start, stop = int(page.hash()["from"]), int(page.hash()["to"])
    assert 10 <= start < stop <= 35
    page.settled()
    assert int(page.js("document.querySelector('input[type=range]').min")) == start
    page.click(".u-over", 0.5, 0.5, count=2)
    wait_for(lambda: "from" not in page.hash(), "the whole run")


def test_the_slider_moves_the_step(page):
    """By keys, everywhere."""
    page.open(run="healthy", view="parameter", parameter="2.weight", step="30")
    page.js("document.querySelector('input[type=range]').focus()")
    page.press("ArrowLeft", "ArrowLeft")
    wait_for(lambda: page.hash()["step"] == "28", "the step in the address")


def test_two_runs_are_compared(page):
    """Both diagnoses, both lines of a parameter, and where parameters differ most."""
    page.open(run="healthy", view="compare")
    page.js(
        "(() => { const s = document.querySelector('.compare select'); s.value = 'ill/vanishing';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    page.until("document.querySelectorAll('.compare .wide-table tbody tr').length > 3")
    assert page.hash()["other"] == "ill/vanishing"
    assert len(page.all(".verdicts dd")) == 2
    page.settled()
    assert page.js("document.querySelectorAll('.compare .charts canvas').length") == 4
    page.click(".compare .wide-table tbody button", nth=1)
    wait_for(lambda: page.hash().get("parameter") == page.all(".compare .wide-table tbody th")[1], "the parameter")


def test_a_link_restores_the_view_and_back_goes_back(page):
    """What is looked at is in the address that people see."""
    page.open(run="ill/dead_relu", view="table", search="bias", sort="-rms", step="20")
    assert page.js("document.querySelector('#search').value") == "bias"
    assert page.js("document.querySelector('th[aria-sort=descending]').textContent").startswith("rms")
    assert "step 20" in page.until("document.querySelector('.toolbar').textContent")
    page.click("#tab-overview")
    page.until("document.querySelector('.overview')")
    page.js("window.parent.history.back()")
    page.until("document.querySelector('.table-page')")
    assert page.hash()["search"] == "bias"


def test_tensorboards_other_tabs_keep_the_place(page):
    """Whoever comes back from another tab finds what they looked at."""
    page.open(run="ill/dead_relu", view="table", search="bias")
    page.browser._post("/frame", {"id": None})
    tabs = "[...document.querySelectorAll('.mat-mdc-tab, [role=tab]')]"
    for name in ("scalars", "gradlens"):
        page.browser.run(f"{tabs}.find(e => e.textContent.trim().toLowerCase() === '{name}').click()")
        time.sleep(0.5)
    page.browser._post("/frame", {"id": 0})
    wait_for(lambda: page.hash().get("search") == "bias", "the address")
    assert page.js("document.querySelector('#search').value") == "bias"


def test_it_follows_tensorboards_dark_mode(page):
    """At once, without being loaded again; lines and maps are drawn in the theme's colours."""
    page.open(run="ill/vanishing", dark=True)
    assert page.js("document.documentElement.dataset.theme") == "dark"
    dark = page.js("getComputedStyle(document.body).backgroundColor")
    page.js("window.parent.document.body.classList.remove('dark-mode')")
    page.until("document.documentElement.dataset.theme === 'light'")
    assert page.js("getComputedStyle(document.body).backgroundColor") != dark


def test_the_keyboard_reaches_everything(page):
    """Digits change the view, `/` searches, brackets change the parameter, arrows walk the map, which says where it is."""
    page.open(run="ill/vanishing")
    page.js("document.querySelector('.map-scroll').focus()")
    page.press("ArrowDown", "ArrowRight", "ArrowRight")
    told = page.until("document.querySelector('.map [aria-live]').textContent")
    assert "0.weight, step 2, rms of the partials" in told
    page.press("Enter")
    wait_for(lambda: page.hash().get("parameter") == "0.weight", "the parameter")
    page.press("3")
    page.until("document.querySelector('.parameter-page')")
    page.press("]")
    wait_for(lambda: page.hash()["parameter"] == "0.bias", "the next parameter")
    page.press("/")
    page.until("document.activeElement.id === 'search'")
    page.js("document.activeElement.blur()")
    page.press("?")
    page.until("document.querySelector('dialog').open")


def test_a_run_that_grows_is_drawn_on_without_flicker(page, logdir):
    """New steps appear by themselves; the page's elements stay the same ones."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=logdir / "live") as lens:
        case.train(5)
        lens.flush()
        wait_for(lambda: "live" in [run["name"] for run in page.served("runs")["runs"]], "the run")
        page.open(run="live")
        page.until("document.querySelector('.status-line').textContent === 'live, step 4'")
        page.js("document.querySelector('.map-canvas').dataset.mark = 'same'")
        case.train(20, first=5)
        lens.flush()
        page.until("document.querySelector('.status-line').textContent === 'live, step 24'")
        page.until("document.querySelector('.map-scroll').getAttribute('aria-label').includes('25 columns')")
        assert page.js("document.querySelector('.map-canvas').dataset.mark") == "same"
    shutil.rmtree(logdir / "live")


def test_hostile_names_are_text(page):
    """In the table, the map, the findings and the parameter's page no name makes an element."""
    for view in ("overview", "table", "parameter"):
        page.open(run="hostile", view=view, parameter=HOSTILE)
        assert page.js("document.querySelectorAll('img').length") == 0
    page.open(run="hostile")
    assert HOSTILE in page.say(".findings")


def test_a_damaged_run_gives_a_message(page):
    """What does not read, and what to do; other runs are looked at as before."""
    page.open(run="damaged")
    message = page.until("document.querySelector('.problem:not([hidden])')?.textContent")
    assert "does not read" in message
    assert "Move it away" in message
    page.click("[data-run=healthy]")
    page.until("document.querySelector('.problem').hidden && document.querySelector('.overview')")


def test_an_empty_log_directory_says_what_to_do(browser, tmp_path):
    """The call to make, with the directory in it; the run appears when it is there."""
    server = Server(tmp_path, fast=True)
    try:
        wait_for(lambda: server.ask("plugin/gradlens/runs")["complete"], "TensorBoard")
        page = Page(server, browser)
        browser._post("/frame", {"id": None})
        browser.open(f"{server.url}/data/plugin_entry.html?name=gradlens")
        assert "gradlens.watch(" in page.until("document.querySelector('.empty')?.textContent")
        assert str(tmp_path) in page.say(".empty")
        made.write(tmp_path / "first", made.training(2))
        page.until("document.querySelector('.overview')", seconds=60)
    finally:
        server.close()


def test_tables_and_charts_are_saved(page, tmp_path):
    """The table as CSV with every digit, a chart as CSV, SVG and PNG."""
    page.browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.open(run="healthy", view="table", search="weight")
    page.until("document.querySelectorAll('tr[data-place]').length === 3")
    page.click(".table-page .toolbar > button")
    (path,) = wait_for(lambda: list(tmp_path.glob("*.csv")), "the table")
    rows = list(csv.DictReader(path.open()))
    table = {row["parameter"]: row for row in page_table(page)}
    assert [row["parameter"] for row in rows] == ["0.weight", "2.weight", "4.weight"]
    assert all(float(row["rms"]) == table[row["parameter"]]["rms"] for row in rows)
    page.open(run="healthy", view="parameter", parameter="2.weight")
    for kind, begin in (("CSV", b"step,rms"), ("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        page.click(f'.charts [aria-label$="as {kind}"]')
        pattern = f"size*.{kind.lower()}"
        wait_for(lambda pattern=pattern: list(tmp_path.glob(pattern)), kind)
        assert next(tmp_path.glob(pattern)).read_bytes().startswith(begin)


def page_table(page):
    """The last table of the healthy run, as `open_run` gives it."""
    logdir = Path(page.served("runs")["logdir"])
    return gradlens.open_run(logdir / "healthy").table().to_dict("records")


@pytest.mark.parametrize("size", [(420, 900), (760, 900), (1900, 1000)])
@pytest.mark.parametrize("view", ["overview", "table", "parameter", "compare"])
def test_nothing_sticks_out_of_the_page(page, view, size):
    """At the width of a phone, a tablet and a wide screen the page itself does not scroll sideways."""
    page.browser._post("/window/rect", {"width": size[0], "height": size[1]})
    page.open(run="ill/vanishing", view=view, parameter="0.weight", other="healthy")
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("view", ["overview", "table", "parameter", "compare"])
def test_axe_finds_nothing_to_complain_of(page, view, dark):
    """No violation of WCAG 2 A and AA that axe knows: names, roles, contrast, focus."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: make node_modules")
    page.open(run="ill/vanishing", view=view, parameter="0.weight", other="healthy", step="20", dark=dark)
    page.browser.run(AXE.read_text() + "\nwindow.axe = axe;")
    found = page.browser.run(
        "return axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
        ".then(r => r.violations.map(v => [v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)"
        " + ' ' + (n.any[0]?.message ?? ''))]))"
    )
    assert found == []
