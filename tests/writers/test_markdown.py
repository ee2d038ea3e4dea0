"""The page of findings, as TensorBoard renders it."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html

from gradlens.records import Finding, Severity
from gradlens.writers import markdown


def shown(page):
    """The page's words, without the tags of HTML."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", markdown_to_safe_html(page))).split())


def finding(rule="vanishing", parameter="a.weight", severity=Severity.WARNING, step=1, **more):
    return Finding(rule, step, severity, more.pop("seen", "tiny"), parameter, **more)


HOSTILE = [
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://a/b.png)", "**bold**", "__init__", "`code`",
    "# head", "a | b", "- item", "&amp;", "1. one", "\\*", "<b>", "~~~", "a_b_c", "$x$", "http://a.b/c", "x@y.z",
]  # fmt: skip


def test_hostile_names_are_shown_as_they_are():
    """Markdown and HTML in the names of parameters and rules are text, and make no links, images or markup."""
    for name in HOSTILE:
        page = markdown.findings([finding(rule=name, parameter=name, seen=name, causes=(name,), remedy=name)])
        rendered = markdown_to_safe_html(page)
        assert shown(page).count(html.unescape(name) if "&" not in name else name) >= 5, (name, rendered)
        assert not re.search(r"<(a|img|script|code|b|h1|table|ol|del)\b", rendered), (name, rendered)


@given(st.text(min_size=1, max_size=40))
def test_any_text_is_shown_literally(text):
    """What a page shows of a text is the text, its blanks as single ones, what cannot be printed as a mark."""
    words = " ".join(text.split())
    expected = "".join(c if c.isprintable() else "\ufffd" for c in words)
    assert shown("x " + markdown.escape(text) + " x") == " ".join(f"x {expected} x".split())


def test_the_worst_comes_first():
    """Sections go by severity, then by step; the first line counts them."""
    page = markdown.findings(
        [
            finding("skipped", None, Severity.INFO, 1),
            finding("vanishing", "b", Severity.WARNING, 9),
            finding("absent", "c", Severity.WARNING, 5),
            finding("nonfinite", "d", Severity.ERROR, 30),
        ]
    )
    assert shown(page).startswith("1 error, 2 warnings, 1 info : nonfinite, absent, vanishing, skipped")
    assert re.findall(r"#### (\w+): (\w+)", page) == [
        ("ERROR", "nonfinite"), ("WARNING", "absent"), ("WARNING", "vanishing"), ("INFO", "skipped"),
    ]  # fmt: skip


def test_one_advice_is_given_once():
    """What a rule says of many parameters is one section that names them all and says once what to do."""
    found = [finding(parameter=f"layers.{i}.weight", step=i, remedy="use ReLU", causes=("depth",)) for i in range(9)]
    page = shown(markdown.findings(found))
    assert page.count("use ReLU") == page.count("depth") == 1
    assert "vanishing at 9 parameters" in page
    for i in range(9):
        assert f"layers.{i}.weight" in page


def test_a_page_is_bounded():
    """Ten thousand findings make a page that a browser shows at once, and that says how many it left out."""
    same = markdown.findings([finding(parameter=f"p{i}") for i in range(10_000)])
    apart = markdown.findings([finding(remedy=f"do {i}") for i in range(10_000)])
    assert max(len(same), len(apart)) < 20_000
    assert "9956 more" in same
    assert "9970 more" in apart


def test_nothing_found_is_said():
    """An empty page says that it is empty."""
    assert markdown.findings([]) == "No findings so far."
