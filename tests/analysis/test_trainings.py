"""Whole trainings, as people write them: nothing is said of those that are well, and what is wrong of those that are ill."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from gradlens.records import Severity

pytest.importorskip("sklearn")

PATH = Path(__file__).parents[2] / "benchmarks" / "trainings.py"
SPEC = importlib.util.spec_from_file_location("trainings", PATH)
trainings = importlib.util.module_from_spec(SPEC)
sys.modules["trainings"] = trainings
SPEC.loader.exec_module(trainings)

#: Those whose steps take milliseconds; the others are run by the benchmark.
SLOW = (
    "transformer",
    "cnn",
    "resnet",
    "lstm",
    "gru",
    "rnn",
    "recurrent",
    "fine_tuning",
    "one_cycle",
    "observed",
    "rate_too_low_adam",
)
QUICK = [study for study in trainings.STUDIES if not any(word in study.name for word in SLOW) and study.within <= 30]
STEPS = 32


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("study", [study for study in QUICK if not study.rules], ids=lambda study: study.name)
def test_a_training_that_is_well_hears_nothing(study):
    """No warning and no error; an info at most."""
    findings, _ = trainings.studied(study, STEPS)
    assert [str(finding) for finding in findings if finding.severity != Severity.INFO] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* are not the model's")  # watch() says it at once of a head that was replaced
@pytest.mark.parametrize("study", [study for study in QUICK if study.rules], ids=lambda study: study.name)
def test_a_training_that_is_ill_hears_of_what(study):
    """From one of the rules that can know, in time, with causes and what to do."""
    findings, _ = trainings.studied(study, 110 if "unstepped" in study.rules else STEPS)
    right = [finding for finding in findings if finding.rule in study.rules]
    assert right, [str(finding) for finding in findings]
    assert min(finding.step for finding in right) <= study.within
    assert all(finding.causes and finding.remedy for finding in right)
