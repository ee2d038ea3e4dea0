"""Whole trainings, as people write them: nothing is said of those that are well, and what is wrong of those that are ill."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import gradlens
from gradlens.analysis import patterns
from gradlens.findings import CATALOGUE
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
WRITTEN = [study for study in trainings.STUDIES if study.kind == "written by hand"]
QUICK = [study for study in WRITTEN if not any(word in study.name for word in SLOW) and study.within <= 30]
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


def test_the_halves_are_large_and_apart():
    """A hundred trainings of each sort at least, named once each; the unseen half shares no model with the tuned one."""
    ill, well = ([s for s in trainings.STUDIES if bool(s.rules) == broken] for broken in (True, False))
    assert len(ill) >= 100
    assert len(well) >= 100
    assert min(len([s for s in some if s.half == half]) for some in (ill, well) for half in ("tuned", "unseen")) >= 50
    assert len({study.name for study in trainings.STUDIES}) == len(trainings.STUDIES)
    models = {half: {s.name.partition("__")[0] for s in trainings.STUDIES if s.half == half} for half in ("tuned", "unseen")}
    assert not models["tuned"] & models["unseen"]
    known = {*CATALOGUE, *(rule.name for rule in gradlens.rules.DEFAULT)}
    known |= {pattern.rule for pattern in patterns.PATTERNS}
    assert {rule for study in ill for rule in study.rules} <= known


#: By mistake, trainings of a second or two whose diagnosis must begin with the cause.
NAMED = (
    "digits_mlp__schedule_stepped_for_each_batch",
    "digits_mlp__zeroed_for_each_micro_batch",
    "digits_mlp__weights_all_the_same",
    "diabetes_mlp__prediction_squeezed",
    "threes__rectifier_on_the_logits",
    "digits_tanh__weights_all_zero",
    "gan_digits__forgets",
    "q_learning_ring__through",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_the_diagnosis_begins_with_the_cause(name):
    """Not with what follows from it."""
    study = next(study for study in trainings.STUDIES if study.name == name)
    lens, _ = trainings.watched(study, study.steps, 0)
    assert trainings.result(study, lens.diagnosis(), lens.findings()) == "named"
