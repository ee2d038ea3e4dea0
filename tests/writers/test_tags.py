"""Tags: few, in reading order, and safe whatever a parameter is called."""

import re

from hypothesis import given
from hypothesis import strategies as st

from gradlens.writers import tags


def test_the_model_has_about_twelve_numbers():
    """The whole model is told in twelve numbers, in groups that sort in reading order."""
    assert len(tags.MODEL) == 12
    groups = [tags.LAYERS, tags.HEALTH, tags.DIRECTION, tags.UPDATE, tags.RMS, tags.RATIO, tags.PARTIALS, tags.OBSERVED]
    assert groups == sorted(groups)
    assert {tag.partition("/")[0] for tag in tags.MODEL} == {tags.HEALTH, tags.DIRECTION, tags.UPDATE}


@given(st.text(max_size=300))
def test_a_name_stays_in_its_group(name):
    """A name in a tag opens no group of its own, holds nothing that cannot be printed, and is not long."""
    tag = f"group/{tags.numbered(3, name)}"
    assert tag.count("/") == 1
    assert tag.isprintable()
    assert len(tag) <= 120
    tag.encode()


def test_names_that_differ_have_tags_that_differ():
    """Escaping does not make one name of two, and two names that are too long differ by their number."""
    names = ["a/b", "a\\x2fb", "a\nb", "a\\nb", "a b", "a_b"]
    assert len({tags.escape(name) for name in names}) == len(names)
    long = "x" * 300
    assert tags.numbered(1, long) != tags.numbered(2, long)
    assert tags.escape("encoder.layers.0.weight") == "encoder.layers.0.weight"


def test_each_tag_says_what_it_means():
    """Every tag of the model, the pictures and the groups is described, and the help page has them all."""
    page = tags.page()
    for tag in [*tags.MODEL, *tags.IMAGES, f"{tags.RMS}/000 a", f"{tags.RATIO}/000 a", f"{tags.PARTIALS}/000 a"]:
        assert tags.about(tag) in page
        assert tags.about(tag)
    assert tags.about("somebody/else") == ""


def test_each_chart_finds_its_tags():
    """The charts of the Custom Scalars page match tags that are written, and leave no number of the model out."""
    written = [*tags.MODEL, f"{tags.RMS}/000 a.weight", f"{tags.RATIO}/000 a.weight"]
    shown = set()
    for category in tags.layout().category:
        for chart in category.chart:
            found = {tag for pattern in chart.multiline.tag for tag in written if re.match(pattern, tag)}
            assert found, chart.title
            shown |= found
    assert shown == set(written)
