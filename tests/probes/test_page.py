"""The page on evidence says what the code does."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()


def test_the_code_on_the_page_runs(capsys):
    """The blocks run from top to bottom, and what they print bears out the text around them."""
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), names)
    printed = capsys.readouterr().out
    assert "12.0  decrease" in printed
    assert "partials are right: 32 of 32" in printed
    assert "mixed partials are equal" in printed
    assert printed.count("predicted change") == 2
    assert names["survey"].coverage > 0.2
    assert "noise scale: " in printed
    assert names["lens"].noise_scale().unit == "examples"
    assert "2 / lr = 20 at lr = 0.1" in printed
    step = names["step"]
    assert step.causes["momentum"] > step.against / 2
    assert abs(step.path.missing) < 0.01 * abs(step.actual)
