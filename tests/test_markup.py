"""Values as HTML: every text is text, numbers are short, long tables end."""

import math
from html.parser import HTMLParser

import pandas as pd
import pytest

import gradlens
from gradlens import markup
from gradlens.records import Finding, Severity
from gradlens.store.run import open_run
from tests.page.made import trained
from tests.store import made

EVIL = "<script>alert(1)</script>\"'&"


class _Tags(HTMLParser):
    """The tags of a page, each closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], set()
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        if tag not in ("br", "progress"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        if tag != "progress":
            assert self.open.pop() == tag


def test_a_finding_is_sentences_and_nothing_it_says_is_markup():
    """Rule, place, what was seen, causes and remedy, all escaped."""
    found = Finding(EVIL, 3, Severity.ERROR, EVIL, parameter=EVIL, causes=(EVIL,), remedy=EVIL)
    shown = found._repr_html_()
    assert "script" not in _Tags(shown).seen
    assert shown.count("&lt;script&gt;") == 5


def test_a_run_shows_its_steps_its_loss_and_its_findings(tmp_path):
    """Well-formed, with the loss as a line."""
    shown = open_run(trained(tmp_path / "run", findings=[made.finding(2, EVIL, parameter=EVIL)]))._repr_html_()
    tags = _Tags(shown).seen
    assert {"svg", "polyline"} <= tags
    assert "script" not in tags
    assert "20 steps, 0 to 19" in shown


def test_an_empty_run_is_shown_too(tmp_path):
    """Without a loss and without a step."""
    assert "no step yet" in open_run(made.write(tmp_path / "run", []))._repr_html_()


def test_a_lens_shows_a_row_a_parameter():
    """Before anything was captured, while it watches, and after it was closed."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer) as lens:
        assert "Nothing was captured" in lens._repr_html_()
        case.train(3)
        shown = lens._repr_html_()
        assert not lens.closed
    assert lens.closed
    assert "table" in _Tags(shown).seen
    assert all(name in shown for name in lens.names())
    assert "step 2" in lens._repr_html_()


def test_a_diagnosis_is_its_sentence_and_its_origin(tmp_path):
    """How sure it is, the origin in full, and by name what follows from it; a run begins with the sentence."""
    found = [made.finding(2, "vanishing", parameter=EVIL), made.finding(9, "fading", causes=(EVIL,))]
    run = open_run(trained(tmp_path / "run", findings=found))
    shown = run.diagnosis()._repr_html_()
    assert "script" not in _Tags(shown).seen
    assert "% sure" in shown
    assert "<b>fading</b>" in shown
    assert "follows from it:</i> vanishing" in shown
    assert markup.words(run.diagnosis().verdict) in run._repr_html_()
    nothing = open_run(made.write(tmp_path / "none", [])).diagnosis()
    assert nothing.verdict in nothing._repr_html_()


def test_what_an_audit_and_a_trace_found_is_shown():
    """Both as their text, in HTML and on one line."""
    case = gradlens.testing.healthy()
    audit = gradlens.audit(case.loss(case.model, case.batch(0)), case.model, case.optimizer)
    trace = gradlens.trace_nonfinite(case.model, case.loss, case.batch(0))
    for result in (audit, trace):
        assert markup.words(str(result)) in result._repr_html_()
        assert repr(result) == f"<{type(result).__name__}: {str(result).splitlines()[0]}>"


def test_a_long_model_is_cut(tmp_path):
    """Twenty parameters, and how many more there are."""
    case = gradlens.testing.healthy()
    model = gradlens.testing.torch.nn.Sequential(*(gradlens.testing.nn.Linear(2, 2) for _ in range(30)))
    del case
    with gradlens.watch(model) as lens:
        model(gradlens.testing.torch.ones(1, 2)).sum().backward()
        shown = lens._repr_html_()
    assert shown.count("<tr>") == 1 + markup.ROWS
    assert "and 40 more" in shown


def test_a_probes_result_is_its_text_and_its_table():
    """A survey in HTML has verdicts by parameter; its plain representation is one line."""
    case = gradlens.testing.healthy()
    verdicts = gradlens.survey(case.model, case.loss, list(case.batches(8)))
    shown = verdicts._repr_html_()
    assert {"pre", "table"} <= _Tags(shown).seen
    assert "coverage" in shown
    assert repr(verdicts).startswith("<Survey: a direction is known for ")
    assert "\n" not in repr(verdicts)
    check = gradlens.check_partials(case.model, lambda model: case.loss(model, case.batch(0)), k=4)
    assert "pre" in _Tags(check._repr_html_()).seen
    assert repr(check).startswith("<PartialsCheck: ")


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "-"), (None, "-"), (1234567, "1,234,567"), (0.00012345, "0.000123")]
)
def test_numbers_are_short(value, shown):
    """Three digits, and a dash for none."""
    assert markup.number(value) == shown


def test_a_frame_is_cut_and_escaped():
    """Its column names and cells are texts."""
    shown = markup.frame(pd.DataFrame({EVIL: [EVIL] * 10}), rows=2)
    assert "script" not in _Tags(shown).seen
    assert "and 8 more" in shown


@pytest.mark.parametrize("values", [[], [1.0], [math.nan, math.nan], [math.inf, 1.0]])
def test_a_course_of_less_than_two_numbers_is_no_line(values):
    """Nothing is drawn, and nothing fails."""
    assert markup.curve(values) == ""
