"""The page in a real browser: drawn, wide and on a phone, light and dark, with names that are markup."""

import pytest

from gradlens.page.comparison import Comparison
from gradlens.page.html import render, render_comparison
from gradlens.page.summary import Summary
from gradlens.store.run import open_run
from tests.page.made import trained
from tests.page.test_html import EVIL
from tests.store import made
from tests.writers.served import Browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(Browser.missing()), reason=Browser.missing()),
]


def _open(browser, tmp_path, **options):
    page = tmp_path / "page.html"
    page.write_text(render(Summary.of(open_run(trained(tmp_path / "run", **options)))), encoding="utf-8")
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.command("Emulation.clearDeviceMetricsOverride")
    browser.open(page.as_uri())
    assert browser.run("return document.documentElement.dataset.drawn") == "yes"


def _painted(browser, element):
    """How many colours a canvas has."""
    return browser.run(
        f"const c = document.querySelector('{element}');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const seen = new Set(); for (let i = 0; i < d.length; i += 4) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);"
        "return seen.size"
    )


def test_everything_is_drawn_offline(browser, tmp_path):
    """Charts, map, tables and words; no error on the console, no request for anything."""
    _open(browser, tmp_path, findings=[made.finding(3, "exploding", parameter="blocks.0.weight", causes=("a", "b"))])
    text = browser.shows(["exploding", "Likely: a; b", "blocks.0.weight", "Wish versus deed", "20 steps, 0 to 19"])
    assert "NaN" not in text
    assert browser.run("return document.querySelectorAll('.uplot').length") == 7
    assert _painted(browser, "#map-canvas") > 20
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.errors() == []


def test_a_name_does_nothing(browser, tmp_path):
    """A parameter called like a script is shown as it is called."""
    _open(browser, tmp_path, names=[EVIL, "plain"], findings=[made.finding(1, EVIL, parameter=EVIL)])
    assert EVIL in browser.run("return document.body.innerText")
    assert browser.run("return document.title") == "run - gradlens"
    assert browser.errors() == []


def test_a_click_on_the_map_shows_that_parameter(browser, tmp_path):
    """The row under the pointer, also after filtering; arrows go on from there."""
    _open(browser, tmp_path, parameters=8)
    click = (
        "const c = document.getElementById('map-canvas'), b = c.getBoundingClientRect();"
        "const at = {clientX: b.left + b.width - 20, clientY: b.top + 4 + 22 * %s, bubbles: true};"
        "c.dispatchEvent(new MouseEvent('click', at));"
        "return document.getElementById('parameter').selectedOptions[0].textContent"
    )
    assert browser.run(click % 3.5) == "blocks.1.bias"
    browser.run("const f = document.getElementById('filter'); f.value = 'bias'; f.dispatchEvent(new Event('input'))")
    assert browser.run(click % 3.5) == "blocks.3.bias"
    assert browser.run("return document.querySelectorAll('#parameter-table tbody tr').length") == 4
    browser.run("document.getElementById('map-canvas').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowUp'}))")
    chosen = "return document.getElementById('parameter').selectedOptions[0].textContent"
    assert browser.run(chosen) == "blocks.2.bias"


def test_the_map_shows_direction_and_updates_too(browser, tmp_path):
    """Its buttons change what is drawn and say so."""
    _open(browser, tmp_path)
    for name, words in (("balance", "should increase"), ("update_ratio", "how far each step moved")):
        browser.run(f"document.querySelector('[data-map={name}]').click()")
        assert words in browser.run("return document.getElementById('map').innerText")
        assert browser.run(f"return document.querySelector('[data-map={name}]').getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize("parameters", [10, 1000])
def test_it_fits_a_phone(browser, tmp_path, parameters):
    """Nothing is wider than the screen."""
    _open(browser, tmp_path, parameters=parameters, steps=6)
    browser.command("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    browser.run("window.dispatchEvent(new Event('resize'))")
    wide = browser.run(
        "return new Promise(done => setTimeout(() => done([document.documentElement.scrollWidth, innerWidth]), 400))"
    )
    assert wide == [390, 390]


def test_dark_is_dark_and_paper_is_white(browser, tmp_path):
    """The page follows the system's choice, and is light in print."""
    _open(browser, tmp_path)
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(background)
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run(background) != light
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run(background) == light
    browser.run("window.dispatchEvent(new Event('afterprint'))")


def test_a_run_without_records_opens(browser, tmp_path):
    """The page says that there is nothing."""
    _open(browser, tmp_path, steps=0)
    assert browser.errors() == []


def test_two_runs_are_drawn_side_by_side(browser, tmp_path):
    """Both losses, the curve of a parameter, what differs; nothing is fetched, and no error."""
    a, b = (Summary.of(open_run(trained(tmp_path / name, scale=scale))) for name, scale in (("a", 1.0), ("b", 50.0)))
    page = tmp_path / "compare.html"
    page.write_text(render_comparison(Comparison.of(a, b)), encoding="utf-8")
    browser.command("Emulation.clearDeviceMetricsOverride")
    browser.open(page.as_uri())
    assert browser.run("return document.documentElement.dataset.drawn") == "yes"
    browser.shows(["the runs part at step 0", "A a", "B b", "blocks.0.weight"])
    assert browser.run("return document.querySelectorAll('.uplot').length") == 2
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.errors() == []
