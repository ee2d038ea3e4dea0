"""The page on the run directory says what the code does."""

import re
from pathlib import Path

import numpy as np
import pytest

import gradlens
from gradlens import fields
from gradlens.store import tables

PAGE = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the page's blocks leave, run from top to bottom in an empty directory; and the `norms` of each tool."""
    for module in ("polars", "duckdb"):
        pytest.importorskip(module)
    names, norms = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in BLOCKS:
            exec(block, names)
            if "norms" in block:
                norms[re.search(r"import (\w+)", block)[1]] = names["norms"]
        names["lens"].close()
        return {**names, "norms": norms, "run": gradlens.open_run(Path.cwd() / "runs" / "digits")}


def test_the_blocks_of_the_page_agree(ran):
    """pandas, polars and DuckDB find the same norms in the files, and those are the ones that the lens saw."""
    norms = ran["norms"]
    assert set(norms) == {"pandas", "polars", "duckdb"}
    assert norms["pandas"].index.tolist() == list(range(200))
    np.testing.assert_allclose(norms["polars"]["norm"].to_numpy(), norms["pandas"].to_numpy(), rtol=1e-12)
    np.testing.assert_allclose([norm for _, norm in norms["duckdb"]], norms["pandas"].to_numpy(), rtol=1e-12)
    before = ran["run"].history(superseded=True).query("segment == 0 and stage == 'used'")
    np.testing.assert_allclose(before.groupby("step")["l2"].apply(np.linalg.norm), norms["pandas"], rtol=1e-12)


def test_the_other_files_of_the_page_have_their_rows(ran):
    """As many lines as rows: 50 steps, two snapshots, six parameters; live ones too, and the last 20 snapshots."""
    place = ran["run"].path.parents[1]
    lines = {name: len((place / name).read_text().splitlines()) for name in ("digits.csv", "live.csv", "digits.jsonl")}
    assert lines["digits.csv"] == 1 + 50 * 2 * 6
    assert lines["live.csv"] == 1 + 30 * 2 * 6
    assert lines["digits.jsonl"] == 200 * 2 * 6 + 200  # and the losses
    assert ran["last"].frame["step"].unique().tolist() == list(range(20, 30))


def test_the_resumed_steps_of_the_page_are_replaced(ran):
    """Steps 150 to 199 are there twice, and only those."""
    assert ran["replaced"]["step"].unique().tolist() == list(range(150, 200))
    assert ran["run"].scalars()["step"].max() == 249  # each backward's loss is recorded


def test_the_page_names_every_table_and_column():
    """The tables and their columns are those of the code; the fields of history are on another page."""
    listed = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE))
    assert set(listed) == set(tables.TABLES)
    (keys,) = re.findall(r"The keys are `([^`]+)`", PAGE)
    keys = {*keys.split(", "), "name"}
    for table, columns in tables.TABLES.items():
        named = {word for span in re.findall(r"`([^`]+)`", listed[table]) for word in re.split(r", ", span)}
        own = set(columns) - keys - set(fields.BY_NAME) - set(fields.QUANTILES)
        assert own <= named, table


def test_the_numbers_of_the_page_are_those_of_the_code():
    """Bounds that the page states."""
    from gradlens.store import compaction, rows, store
    from gradlens.writers import inbox

    assert f"({compaction.ROLL:,} rows; all of them" in PAGE
    assert f"{compaction.ROLL:,} rows or {store.FRAMES:,} frames" in PAGE
    assert (compaction.FAN_IN, "eight neighbouring parts" in PAGE) == (8, True)
    assert (store.INTERVAL, "within the last second" in PAGE) == (1.0, True)
    assert f"list of {inbox.ITEMS:,} steps or {inbox.BYTES >> 20} MB" in PAGE
    assert f"take {rows.MAX_BYTES >> 30} GB at most" in PAGE
    assert f"the {fields.TOP} most sensitive weights" in PAGE
