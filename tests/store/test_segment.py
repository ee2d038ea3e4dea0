"""What is said of a segment comes back, and nothing that is wrong is believed."""

import json
import math

import numpy as np
import pytest

from gradlens.errors import CorruptRunError, RunDirectoryError
from gradlens.records import Severity
from gradlens.store import segment
from gradlens.store.segment import Segment
from gradlens.store.tables import Key
from tests.store import made


def write(folder, **changes):
    (folder / "segments").mkdir(exist_ok=True)
    parameters = [("w", (3, 4), "float32", "0:2,0:4"), ("b", (), "float16", "")]
    known = Segment(Key(2, 1), {"rank": 1, "ranks": 4}, {"numpy": "2"}, 12.5, 7, parameters, ["loss"])
    known.write(folder / "segments")
    path = folder / "segments" / "0002-rank1.json"
    if changes:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return known


def test_a_segment_comes_back(tmp_path):
    """Settings, versions, parameters with shape, dtype and piece."""
    known = write(tmp_path)
    assert segment.segments(tmp_path) == [known]
    assert known.ranks == 4
    assert [path.name for path in (tmp_path / "segments").iterdir()] == ["0002-rank1.json"]


@pytest.mark.parametrize("ranks", [0, -1, True, "4", None, 2.5])
def test_a_number_of_ranks_that_is_none_is_unknown(ranks):
    """It is a setting, which anybody may have written."""
    assert Segment(Key(0, 0), {"ranks": ranks}, {}, 0.0).ranks is None


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": 3},
        {"parameters": [["w", [3], "float32"]]},
        {"parameters": [["w", [3.5], "float32", ""]]},
        {"parameters": [["w", [-1], "float32", ""]]},
        {"parameters": [["w", [True], "float32", ""]]},
        {"parameters": [["w", [1 << 40, 1 << 40], "float32", ""]]},
        {"parameters": [["w", [1] * 40, "float32", ""]]},
        {"parameters": [[None, [3], "float32", ""]]},
        {"parameters": [["w", [3], 7, ""]]},
        {"parameters": [["w", [3], "float32", "0:2,0:2"]]},
        {"parameters": [["w", [3], "float32", "2:1"]]},
        {"parameters": [["w", [3], "float32", "0:4"]]},
        {"parameters": [["w", [3], "float32", "all"]]},
        {"parameters": [["w", [2, 3], "float32", "@4:7"]]},
        {"parameters": [["w", [2, 3], "float32", "@1:2,0:3"]]},
        {"parameters": [["w", [2, 3], "float32", "@~2"]]},
        {"settings": []},
        {"versions": None},
        {"started": "soon"},
        {"started": 10**400},
        {"first_step": 1.5},
        {"first_step": True},
        {"scalars": [3]},
        {"scalars": None},
    ],
    ids=str,
)
def test_what_describes_no_segment_is_an_error(tmp_path, changes):
    """Each value is checked, and the file is named."""
    write(tmp_path, **changes)
    with pytest.raises(CorruptRunError, match=r"0002-rank1\.json does not describe a segment"):
        segment.segments(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"NaN"], ids=lambda c: c[:8]
)
def test_what_is_no_json_is_an_error(tmp_path, content):
    """Broken, of another kind, nested without end."""
    write(tmp_path)
    (tmp_path / "segments" / "0002-rank1.json").write_bytes(content)
    with pytest.raises(CorruptRunError, match="does not read"):
        segment.segments(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    """The bound is in bytes, before anything is parsed."""
    write(tmp_path)
    monkeypatch.setattr(segment, "MAX_BYTES", 100)
    with pytest.raises(CorruptRunError, match="larger"):
        segment.segments(tmp_path)


def test_a_newer_schema_is_refused(tmp_path):
    """It may mean other things by the same words."""
    segment.mark(tmp_path, {"created": 1.0, "schema": 99})
    with pytest.raises(RunDirectoryError, match="newer gradlens"):
        segment.marked(tmp_path)
    segment.mark(tmp_path, {"created": 1.0})
    assert segment.marked(tmp_path)["created"] == 1.0


@pytest.mark.parametrize("content", ['{"format": "other", "schema": 1}', '{"format": "gradlens-run"}', "{}"])
def test_another_programs_file_is_refused(tmp_path, content):
    """A `run.json` of somebody else."""
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CorruptRunError, match="not that of a run"):
        segment.marked(tmp_path)


def test_findings_come_back(tmp_path):
    """Line by line; what is not finite reads as nothing."""
    known = [
        made.finding(3, parameter="w", causes=("a", "b\n"), remedy="é", stage="used", value=0.5, parameters=("w", "b")),
        made.finding(4, value=math.inf),
    ]
    (tmp_path / "f.jsonl").write_text("".join(map(segment.finding_line, known)))
    found, torn = segment.findings(tmp_path / "f.jsonl")
    assert found[0] == known[0]
    assert (found[1].value, found[1].severity, torn) == (None, Severity.WARNING, 0)
    assert segment.findings(tmp_path / "none.jsonl") == ([], 0)


def test_a_torn_line_is_left_out(tmp_path):
    """A killed writer may leave half a finding at the end."""
    line = segment.finding_line(made.finding(3))
    (tmp_path / "f.jsonl").write_text(line + line[:30])
    assert segment.findings(tmp_path / "f.jsonl") == ([made.finding(3)], 30)


@pytest.mark.parametrize(
    "changes",
    [{"step": "3"}, {"step": True}, {"severity": "fatal"}, {"seen": 3}, {"value": "1"}, {"causes": [3]}, {"causes": 3},
     {"parameter": 3}, {"parameters": None}],
    ids=str,
)  # fmt: skip
def test_what_is_no_finding_is_an_error(tmp_path, changes):
    """Each value is checked, and the file is named."""
    line = json.loads(segment.finding_line(made.finding(3))) | changes
    (tmp_path / "f.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(CorruptRunError, match=r"f\.jsonl has a line that is no finding"):
        segment.findings(tmp_path / "f.jsonl")


@pytest.mark.parametrize("column", ["entry", "stage", "status", "bucket"])
@pytest.mark.parametrize("value", [-1, 1000])
def test_rows_refer_to_what_is_there(tmp_path, column, value):
    """A row of a parameter, a stage, a status or a bucket that is not there is an error before it is looked up."""
    known = write(tmp_path)
    known.check(tmp_path / "part", "history", {column: np.array([0, 1])})
    known.check(tmp_path / "part", "history", {column: np.array([], int)})
    with pytest.raises(CorruptRunError, match=f"part has the {column} {value} of"):
        known.check(tmp_path / "part", "history", {column: np.array([0, value])})
