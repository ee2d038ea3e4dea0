"""The pictures: their pixels are looked at."""

import io

import numpy as np
import pytest
from PIL import Image

from gradlens.records import Status
from gradlens.writers import heatmap
from gradlens.writers.grid import Grid
from gradlens.writers.heatmap import ABOVE, DIRECTION, HEIGHT, LEFT, MAGNITUDE, MIDDLE, WIDTH
from tests.writers.made import snapshot


def made(partials, steps=1, start=0, every=1):
    """A grid of parameters with these partials at each step; None for an absent one."""
    grid = Grid()
    for step in range(start, start + steps * every, every):
        weights = {name: np.ones(4) for name in partials}
        grid.add(snapshot(step, "backward", partials, weights))
    return grid


def pixels(chart, grid, marks=None):
    """The picture as `[height, width, 3]`."""
    png, size = heatmap.draw(chart, grid, marks)
    image = Image.open(io.BytesIO(png))
    assert image.size == size == (WIDTH, ABOVE + HEIGHT + heatmap.BELOW)
    return np.asarray(image.convert("RGB")).astype(int)


def cell(picture, row, rows, span=0, spans=1):
    """The colour in the middle of a cell."""
    return tuple(picture[ABOVE + HEIGHT * (2 * row + 1) // (2 * rows), LEFT + MIDDLE * (2 * span + 1) // (2 * spans)])


def colour(text):
    return tuple(int(text[i : i + 2], 16) for i in (0, 2, 4))


def near(given, expected):
    return max(abs(a - b) for a, b in zip(given, expected, strict=True)) <= 4


SIZES = {"a": np.full(4, 1e-6), "b": np.full(4, 1.0), "c": np.zeros(4), "d": None, "e": np.array([1.0, np.nan, 1.0, 1.0])}


def test_small_is_dark_and_large_is_bright():
    """The ends of the range have the ends of the palette; zeros, NaN and what is absent have colours of their own."""
    grid = made(SIZES)
    picture = pixels(MAGNITUDE, grid)
    assert near(cell(picture, 0, 5), colour(heatmap.VIRIDIS[0]))
    assert near(cell(picture, 1, 5), colour(heatmap.VIRIDIS[-1]))
    assert cell(picture, 2, 5) == heatmap.ZERO
    assert cell(picture, 3, 5) == heatmap.WHITE
    assert cell(picture, 4, 5) == heatmap.NONFINITE


def test_increase_is_orange_and_decrease_is_blue():
    """All to increase, all to decrease and half of each have the ends and the middle of the palette."""
    partials = {
        "up": np.full(4, -1.0),
        "down": np.full(4, 1.0),
        "both": np.array([1.0, -1.0, 2.0, -2.0]),
        "hold": np.zeros(4),
    }
    picture = pixels(DIRECTION, made(partials))
    assert near(cell(picture, 0, 4), colour(heatmap.BLUE_ORANGE[-1]))
    assert near(cell(picture, 1, 4), colour(heatmap.BLUE_ORANGE[0]))
    assert near(cell(picture, 2, 4), colour(heatmap.BLUE_ORANGE[3]))
    assert cell(picture, 3, 4) == heatmap.ZERO


def test_the_palettes_do_not_hold_the_plain_colours():
    """No shade of a palette can be taken for zero, NaN or nothing."""
    for chart in (MAGNITUDE, DIRECTION):
        shades = chart.scale(np.array([0.1, 0.9])).colours()
        for plain in (heatmap.ZERO, heatmap.NONFINITE, heatmap.WHITE):
            assert np.abs(shades - plain).max(axis=1).min() > 12


def test_a_step_has_its_column():
    """What happens at one step is seen at its place on the axis, and nowhere else."""
    grid = Grid()
    for step in range(10):
        grid.add(snapshot(step, "backward", {"a": np.full(4, 1e3 if step == 7 else 1e-3)}, {"a": np.ones(4)}))
    picture = pixels(MAGNITUDE, grid)
    row = [cell(picture, 0, 1, span, 10) for span in range(10)]
    assert near(row[7], colour(heatmap.VIRIDIS[-1]))
    assert len(set(row)) == 2
    assert row.count(row[7]) == 1


def test_steps_that_were_not_observed_look_like_the_last_that_was():
    """Between two observed steps the picture has no holes."""
    grid = made({"a": np.full(4, 1e-3)}, steps=5, every=10)
    picture = pixels(MAGNITUDE, grid)
    band = picture[ABOVE + HEIGHT // 2, LEFT : LEFT + MIDDLE]
    assert len(np.unique(band, axis=0)) == 1
    assert tuple(band[0]) != heatmap.WHITE


def test_the_range_is_whole_decades():
    """At least six, around what was seen; what is beyond 1e-12 and 1e4 takes the last colour."""
    for seen, low, high in [([-3.2, -1.5], -7, -1), ([-9.5, 0.3], -10, 1), ([-30.0, 20.0], -12, 4), ([], -12, -6)]:
        scale = MAGNITUDE.scale(np.array(seen))
        assert (scale.low, scale.high) == (low, high)
        assert 4 <= len(scale.ticks) <= 8
        assert all(scale.low <= value <= scale.high for value, _ in scale.ticks)


@pytest.mark.parametrize(("shares", "half"), [([0.48, 0.52], 0.1), ([0.4, 0.75], 0.3), ([0.0, 1.0], 0.5), ([], 0.1)])
def test_shares_lie_around_one_half(shares, half):
    """The middle of the palette is one half, whatever was seen."""
    scale = DIRECTION.scale(np.array(shares))
    assert (scale.low, scale.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_a_finding_is_red():
    """A section with a finding has its name and the word in red; without findings nothing is red."""
    grid = made({"a": np.ones(4), "b": np.ones(4)})

    def red(picture, x):
        return (np.abs(picture[:, x] - heatmap.ALARM).max(axis=2) < 8).any(axis=1)

    left, right = slice(0, LEFT), slice(LEFT + MIDDLE, None)
    healthy, ill = pixels(MAGNITUDE, grid), pixels(MAGNITUDE, grid, {"b": "exploding"})
    assert not red(healthy, left).any()
    assert not red(healthy, right).any()
    upper, lower = slice(ABOVE, ABOVE + HEIGHT // 2), slice(ABOVE + HEIGHT // 2, ABOVE + HEIGHT)
    for side in (left, right):
        assert not red(ill, side)[upper].any()
        assert red(ill, side)[lower].any()


def test_names_do_not_touch():
    """However many sections there are, names that are written have a line each, and findings come before others."""
    names = {f"layers.{i}.weight": np.ones(4) for i in range(90)}
    grid = made(names)
    sections = heatmap._sections(MAGNITUDE, grid, {"layers.41.weight": "exploding"})
    kept = heatmap._with_room(sections)
    centres = sorted(section.y for section in kept)
    assert len(sections) == 90
    assert len(kept) >= HEIGHT // heatmap.LINE - 3
    assert min(np.diff(centres)) >= heatmap.LINE
    assert [section.found for section in kept].count("exploding") == 1


def test_what_a_section_is_now():
    """The numbers beside the cells are those of the last span that was seen, in words where there is no number."""
    now = [section.now for section in heatmap._sections(MAGNITUDE, made(SIZES), {})]
    assert now == ["1e-6", "1e0", "zero", "none", "NaN"]
    grid = Grid()
    for step in range(40):
        partials = {"a": np.full(4, 2e-3), "b": np.ones(4) if step < 5 else None}
        grid.add(snapshot(step, "backward", partials, {"a": np.ones(4), "b": np.ones(4)}))
    assert [section.now for section in heatmap._sections(MAGNITUDE, grid, {})] == ["2e-3", "none"]


@pytest.mark.parametrize("name", ["层.权重", "a\nb", "x" * 10_000, "\ud800", "<b>", "", ".", "é" * 500])
def test_any_name_can_be_drawn(name):
    """Names that the font lacks are spelled, long ones cut; the picture keeps its size."""
    pixels(MAGNITUDE, made({name: np.ones(4), "b": np.ones(4)}), {name: name})


@pytest.mark.parametrize("width", [300, 335, 370, 500])
def test_a_minus_is_seen_in_a_small_picture(width):
    """Where a dashboard leaves out pixels to make the picture fit, 2e-9 does not become 2e 9, wherever it stands."""
    for y in range(20, 30):
        canvas = heatmap._Canvas(60, MAGNITUDE.scale(np.array([0.0])))
        canvas.text(100, y, "-", anchor="lm")
        image = Image.open(io.BytesIO(canvas.png())).convert("L")
        small = image.resize((width, 60 * width // WIDTH), Image.Resampling.NEAREST)
        assert np.asarray(small).min() < 128, (y, width)


def test_an_empty_grid_is_an_empty_picture():
    """Before anything is known there is a title and a legend."""
    picture = pixels(MAGNITUDE, Grid())
    assert (picture[ABOVE : ABOVE + HEIGHT] == 255).all()


def test_a_dead_parameter_is_drawn_as_zero():
    """A row of status `zero` is grey, and one of status `absent` white, though both hold zeros."""
    partials = {"a": np.ones(4), "b": np.zeros(4)}
    dead = snapshot(0, "backward", partials, {"a": np.ones(4), "b": np.ones(4)}, status=[Status.OK, Status.ZERO])
    grid = Grid()
    grid.add(dead)
    assert cell(pixels(MAGNITUDE, grid), 1, 2) == heatmap.ZERO


def test_axis_steps_are_round():
    """Ticks are 1, 2 or 5 times a power of ten apart, and large numbers are short."""
    assert [heatmap._round_up(n) for n in (0.2, 1, 1.5, 3, 7, 80, 201, 999)] == [1, 1, 2, 5, 10, 100, 500, 1000]
    assert [heatmap._thousands(n) for n in (0, 999, 1000, 1250, 12_500, 2_000_000)] == [
        "0",
        "999",
        "1k",
        "1250",
        "12.5k",
        "2M",
    ]
