"""How fast the TensorBoard tab answers on large runs, in a real browser before a real TensorBoard.

    python benchmarks/store.py write 1000x10000 DIR/thousand     # runs to look at
    python benchmarks/store.py write 10000x1000 DIR/tenthousand
    python benchmarks/dashboard.py DIR [--csv FILE]

For each run under DIR:

    tensorboard_s        from opening the address to the tab's frame: TensorBoard's own page
    first_view_s         from there to the diagnosis on the page
    map_begun_s          to the first matrix on the page; map_s: to the whole of it
    switch_s             from one parameter's page to the next, all charts drawn, the median of five
    table_s              to the rows of the parameter table
    scroll_ms            processor time of the page's thread a frame, while the table is scrolled by five rows a frame;
                         a frame has 16.7 ms, and what other programs do meanwhile does not count
    page_mb, server_mb   the page's JavaScript memory, and the server's resident memory, afterwards
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.dashboard.browsing import Page
from tests.writers.served import Browser, Server, wait_for


def opened(page: Page, until: str, **state: str) -> tuple[float, float]:
    """Seconds until TensorBoard has opened the tab's frame at an address, and from there until something is true of it."""
    page.browser._post("/frame", {"id": None})
    begin = time.perf_counter()
    address = "&".join(f"p.gradlens.{name}={value}" for name, value in state.items())
    page.browser.open(f"{page.server.url}/#gradlens&{address}")
    while not page.browser.run("return document.querySelector('iframe') !== null"):
        time.sleep(0.02)
    framed = time.perf_counter()
    page.browser._post("/frame", {"id": 0})
    while not page.js(f"Boolean({until})"):
        time.sleep(0.02)
    return framed - begin, time.perf_counter() - framed


def switched(page: Page, names: list[str]) -> list[float]:
    """Seconds from the key that changes the parameter until its charts are drawn."""
    seconds = []
    for name in names:
        begin = time.perf_counter()
        page.press("]")
        title = f"document.querySelector('.parameter-page h2').textContent === {name!r}"
        while not page.js(f"{title} && !document.querySelector('main[aria-busy]')"):
            time.sleep(0.02)
        page.settled()
        seconds.append(time.perf_counter() - begin)
    return seconds


FRAMES = 60
SCROLL = (
    "const s = document.querySelector('.table-scroll');"
    "return new Promise(done => { let n = 0; const step = () => { s.scrollTop = 140 * ++n;"
    f" n < {FRAMES} ? requestAnimationFrame(step) : done(); }}; requestAnimationFrame(step); }});"
)


def scrolled(page: Page) -> float:
    """Milliseconds of the processor that the page's own thread takes a frame, the median of five times."""
    page.browser.command("Performance.enable", timeDomain="threadTicks")

    def spent() -> float:
        metrics = page.browser.command("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    found = []
    for _ in range(5):
        page.js("document.querySelector('.table-scroll').scrollTop = 0")
        time.sleep(0.5)
        before = spent()
        page.browser.run(SCROLL)
        found.append(1000 * (spent() - before) / FRAMES)
    return statistics.median(found)


def measured(server: Server, browser: Browser, run: str) -> dict[str, Any]:
    """All numbers of one run."""
    page = Page(server, browser)
    overview = page.served("run", run=run)
    result: dict[str, Any] = {"run": run, "parameters": overview["parameters"], "steps": overview["steps"][1] + 1}
    result["tensorboard_s"], result["first_view_s"] = opened(
        page, "document.querySelector('.verdict')?.textContent", run=run
    )
    result["map_begun_s"] = opened(page, "document.querySelector('.map .ramp')", run=run, quantity="cosine")[1]
    page.until("document.querySelector('.map progress').hidden", seconds=600)
    whole = "document.querySelector('.map .ramp') && document.querySelector('.map progress').hidden"
    result["map_s"] = opened(page, whole, run=run, quantity="agreement")[1]
    names = overview["names"][:6]
    opened(page, "document.querySelector('.parameter-page .chart canvas')", run=run, view="parameter", parameter=names[0])
    page.settled()
    page.click(".run-title")  # keys go to the frame
    result["switch_s"] = statistics.median(switched(page, names[1:]))
    result["table_s"] = opened(page, "document.querySelectorAll('tr[data-place]').length > 5", run=run, view="table")[1]
    page.settled()
    result["scroll_ms"] = scrolled(page)
    result["page_mb"] = page.js("performance.memory.usedJSHeapSize") / 1e6
    status = Path(f"/proc/{server._process.pid}/status").read_text()
    result["server_mb"] = int(status.partition("VmRSS:")[2].split()[0]) / 1000
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in result.items()}


def main() -> None:
    """Measure each run of a log directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    lines = []
    server = Server(args.logdir, fast=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            wait_for(lambda: server.ask("plugin/gradlens/runs")["complete"], "TensorBoard")
            for run in [each["name"] for each in server.ask("plugin/gradlens/runs")["runs"]]:
                lines.append(measured(server, browser, run))
                print(lines[-1], flush=True)
        finally:
            browser.close()
            server.close()
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
