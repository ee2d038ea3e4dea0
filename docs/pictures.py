"""Takes the pictures of docs/tensorboard.md again: run `python docs/pictures.py`, with Chromium installed (some minutes).

A real TensorBoard reads trainings that are recorded here, and a headless Chromium looks at the tab as a reader would. Look
at the pictures before you commit them.
"""

import io
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import gradlens  # noqa: E402
from tests.dashboard.browsing import Page  # noqa: E402
from tests.writers.served import Browser, Server, wait_for  # noqa: E402

IMAGES = HERE / "images"
ILL = ("vanishing", "exploding", "dead_relu", "nonfinite", "absent_branch", "healthy")
STEPS = 120


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        logdir = Path(folder, "runs")
        record(logdir)
        server, browser = Server(logdir, fast=True), Browser(Path(folder, "profile"))
        try:
            wait_for(lambda: server.ask("plugin/gradlens/runs")["complete"], "the runs")
            take(Page(server, browser))
        finally:
            browser.close()
            server.close()


def record(logdir: Path) -> None:
    """One training of each kind, and a model of a thousand parameters."""
    for name in ILL:
        case = getattr(gradlens.testing, name)()
        keep = ["2.weight"] if name == "healthy" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with gradlens.watch(case.model, case.optimizer, run=logdir / name, keep=keep) as lens:
                for step in range(STEPS):
                    (loss,) = case.train(1, first=step)
                    lens.observe(loss=loss)
    deep(logdir / "thousand")


class Deep(nn.Module):
    """500 layers in 125 residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))) for _ in range(125))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + 0.05 * torch.tanh(block(x))
        return x


def deep(run: Path) -> None:
    """A model of a thousand parameters, trained to copy its inputs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # what is so small is slower on two
    model = Deep()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with gradlens.watch(model, optimizer, run=run, rules=()):
        for _ in range(STEPS // 4):
            x = torch.randn(32, 16)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()


def take(page: Page) -> None:
    """The four pictures."""
    size(page, 1400, 860)
    page.open(run="vanishing")
    save(picture(page), "tab-overview")
    page.open(run="thousand", view="table", dark=True)
    size(page, 1400, 660)
    save(picture(page), "tab-table")
    size(page, 1400, 1760)
    page.open(run="healthy", view="parameter", parameter="2.weight", step=STEPS // 2)
    save(picture(page), "tab-parameter")
    size(page, 210 + 2 * 600, 64 + 2 * 340)
    whole = Image.new("RGB", (2 * 750, 3 * 425))
    for place, name in enumerate(ILL):
        page.open(run=name)
        part = picture(page).crop((210, 64, 210 + 1200, 64 + 680)).resize((750, 425), Image.Resampling.LANCZOS)
        whole.paste(part, (place % 2 * 750, place // 2 * 425))
    save(whole, "tab-ill")


def size(page: Page, width: int, height: int) -> None:
    """What the page has, without the window's own frame."""
    page.browser.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)


def picture(page: Page) -> Image.Image:
    """What is in view."""
    page.settled()
    return Image.open(io.BytesIO(page.browser.screenshot())).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    """As a PNG of 256 colours, a quarter of the size."""
    image.quantize(256).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
