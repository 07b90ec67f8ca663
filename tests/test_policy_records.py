"""What a policy remembers: measurements, the files that keep them, and what one generation leaves to the next."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.simulation import COMPUTERS, PROMPT, Pair, planner_on, play

from dovetail_plugin import TreeBudget, machine
from dovetail_plugin.drafts.config import BINS
from dovetail_plugin.policy import records
from dovetail_plugin.policy.device_split import LIMITS, DeviceSplitPolicy
from dovetail_plugin.policy.measurements import Measurements

MEASURED = COMPUTERS["rows cost a little"].measurements()


class Measure:
    """Counts how often the machine is measured."""

    def __init__(self):
        self.times = 0

    def __call__(self, settings) -> Measurements:
        self.times += 1
        return replace(MEASURED, draft_s=0.001 * self.times)  # so that each can be told from the others


def policy_in(directory, **options):
    return DeviceSplitPolicy(vram_budget=0, measured_in=directory, **options)


@pytest.mark.parametrize("threads", ["all", 4, None])
def test_unknown_choices_of_threads_are_refused(threads, tmp_path):
    with pytest.raises(ValueError, match=r'"auto" or "keep".*torch\.set_num_threads'):
        policy_in(tmp_path, threads=threads)


def test_sizes_of_a_target_are_counted_once(tmp_path):
    """Counting an exported graph's parameters takes fifty milliseconds, which no later generation pays."""
    policy, asked = policy_in(tmp_path), []
    for _ in range(3):
        policy.planner("a", temperature=0.0, shape=lambda: asked.append(1)).prepare(Measure())
    assert asked == [1]


def test_a_machine_is_measured_once(tmp_path):
    policy, measure = policy_in(tmp_path), Measure()
    first = policy.planner("a", temperature=0.0).prepare(measure)
    again = policy.planner("a", temperature=0.7).prepare(measure)
    assert measure.times == 1 and first == again


def test_measurements_are_found_by_later_processes(tmp_path):
    measure = Measure()
    first = policy_in(tmp_path).planner("a", temperature=0.0).prepare(measure)
    assert policy_in(tmp_path).planner("a", temperature=0.0).prepare(measure) == first
    assert measure.times == 1
    policy_in(tmp_path / "elsewhere").planner("a", temperature=0.0).prepare(measure)
    assert measure.times == 2


def test_measurements_are_kept_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "records"))
    DeviceSplitPolicy(vram_budget=0).planner("a", temperature=0.0).prepare(Measure())
    assert len(list((tmp_path / "records").iterdir())) == 1


def test_another_key_is_measured_anew(tmp_path):
    policy, measure = policy_in(tmp_path), Measure()
    for key in ("a", "b", "a"):
        policy.planner(key, temperature=0.0).prepare(measure)
    assert measure.times == 2
    assert policy.costs["a"].measured != policy.costs["b"].measured


def test_a_file_of_another_machine_is_not_used(tmp_path):
    """A directory that was copied: the name fits, the key inside does not."""
    measure = Measure()
    for key in ("this machine", "another machine"):
        policy_in(tmp_path / key).planner(key, temperature=0.0).prepare(measure)
    (own,), (other,) = (list((tmp_path / key).iterdir()) for key in ("this machine", "another machine"))
    shutil.copy(other, own)
    measured = policy_in(own.parent).planner("this machine", temperature=0.0).prepare(measure)
    assert measure.times == 3 and measured.draft_s == 0.003
    assert policy_in(own.parent).planner("this machine", temperature=0.0).prepare(measure) == measured
    assert measure.times == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": "a"}', '{"key": "a", "measurements": {}}'])
def test_a_broken_file_is_measured_anew(content, tmp_path, caplog):
    measure = Measure()
    policy_in(tmp_path).planner("a", temperature=0.0).prepare(measure)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        policy_in(tmp_path).planner("a", temperature=0.0).prepare(measure)
    assert measure.times == 2
    assert len(caplog.records) == 1 and str(file) in caplog.text and "measured again" in caplog.text
    policy_in(tmp_path).planner("a", temperature=0.0).prepare(measure)
    assert measure.times == 2  # and written anew


def test_a_directory_that_cannot_be_written_is_ignored(tmp_path):
    (tmp_path / "file").write_text("in the way")
    policy, measure = policy_in(tmp_path / "file" / "records"), Measure()
    assert policy.planner("a", temperature=0.0).prepare(measure) == policy.planner("a", temperature=0.0).prepare(
        measure
    )
    assert measure.times == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_temperatures_learn_apart_and_generations_together(tmp_path):
    policy = policy_in(tmp_path)
    calibration = {"greedy": [0.3] * BINS, "sampling": [0.1] * BINS}
    greedy = policy.planner("a", temperature=0.0, calibration=calibration)
    hot = policy.planner("a", temperature=1.0, calibration=calibration)
    assert policy.planner("a", temperature=0.0).switch is greedy.switch
    assert policy.planner("a", temperature=1.0).switch is hot.switch is not greedy.switch
    assert policy.planner("b", temperature=0.0).switch is not greedy.switch
    scores = np.log([0.2, 0.9])
    assert greedy.switch.curve(scores).tolist() == pytest.approx([0.3, 0.3])
    assert hot.switch.curve(scores).tolist() == pytest.approx([0.1, 0.1])


def test_later_generations_use_what_earlier_ones_learned(tmp_path):
    computer, pair = COMPUTERS["rows cost a little"], Pair(quality=((0, 0.0),))
    policy = policy_in(tmp_path)
    for _ in range(2):
        planner = policy.planner("a", temperature=1.0)
        planner.prepare(lambda _: computer.measurements())
        played = play(planner, pair, {0: computer}, 100)
    assert sum(one.drafted for one in played) <= 4  # at most a trial or two, where the first took five rounds and more


@pytest.mark.parametrize("bound", [TreeBudget(1, 1, 1), TreeBudget(5, 2, 3), TreeBudget(4, 3, 1)], ids=str)
def test_plans_stay_within_the_bound(bound, tmp_path):
    planner = planner_on(COMPUTERS["passes cost, rows hardly do"], tmp_path)
    plan = planner.plan(PROMPT, bound)
    assert plan.budget == bound
    assert (plan.judge is None) == (bound.nodes == 1)
    if plan.judge:
        assert 1 < plan.judge.rows(np.log(np.linspace(0.9, 0.3, 20))) <= bound.nodes
        assert 1 <= plan.judge.width(np.log([0.6, 0.3, 0.02, 0.01])) <= bound.top_k


def test_plans_follow_a_bound_that_changes(tmp_path):
    """Near the end of a text trees get smaller, and larger again in the next one."""
    computer = COMPUTERS["passes cost, rows hardly do"]
    planner = planner_on(computer, tmp_path)
    likely = np.log(np.linspace(0.95, 0.5, 40))
    for bound in (LIMITS, TreeBudget(5, 2, 3), LIMITS):
        play(planner, Pair(), {0: computer}, 1)
        assert planner.drafting
        plan = planner.plan(PROMPT, bound)
        assert plan.budget == bound and plan.judge is not None
        rows = plan.judge.rows(likely)
        assert (rows > 5) == (bound == LIMITS)


# --- measurements as JSON


@pytest.mark.parametrize(
    "measured",
    [MEASURED, Measurements({1: 0.1}, {1: 0.1}, 0.0, 0.001, 7, threads=6, processors=(0, 2, 4))],
    ids=["free", "bound"],
)
def test_measurements_survive_json(measured):
    assert Measurements.from_dict(json.loads(json.dumps(measured.as_dict()))) == measured


@pytest.mark.parametrize("name", ["verify_s", "level_s", "draft_s", "transfer_s", "context", "threads", "processors"])
def test_incomplete_measurements_are_refused(name):
    values = MEASURED.as_dict()
    del values[name]
    with pytest.raises(ValueError, match=name):
        Measurements.from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verify_s", {}),
        ("verify_s", None),
        ("verify_s", [0.1, 0.2]),
        ("verify_s", {"one": 0.1}),
        ("verify_s", {"1": "slow"}),
        ("verify_s", {"1": None}),
        ("verify_s", {"1": float("nan")}),
        ("verify_s", {"1": 0.1, "2": float("inf")}),
        ("verify_s", {"1": -0.1}),
        ("verify_s", {"0": 0.1}),
        ("verify_s", {"-4": 0.1, "1": 0.1}),
        ("level_s", {}),
        ("level_s", {"1": -1e-3}),
        ("level_s", {"0": 0.1}),
        ("transfer_s", {"1024": float("nan")}),
        ("transfer_s", "slow"),
        ("transfer_s", None),
        ("transfer_s", -1.0),
        ("draft_s", "fast"),
        ("draft_s", None),
        ("draft_s", -1.0),
        ("context", None),
        ("context", float("inf")),
        ("threads", "many"),
        ("threads", 0),
        ("processors", 3),
        ("processors", ["first"]),
    ],
)
def test_unusable_measurements_are_refused(name, value):
    with pytest.raises(ValueError, match=r"measurements|invalid literal|could not convert|cannot convert"):
        Measurements.from_dict(MEASURED.as_dict() | {name: value})


@pytest.mark.parametrize("values", [None, [], "measured", 3])
def test_measurements_that_are_not_a_dictionary_are_refused(values):
    with pytest.raises(ValueError, match="incomplete measurements"):
        Measurements.from_dict(values)


OLD_RECORD = """{"key": "a", "measurements": {
    "verify_s": {"1": 0.0131, "8": 0.0183, "4": 0.0162, "16": 0.0241, "2": 0.0149, "32": 0.0402, "48": 0.0571},
    "level_s": {"1": 0.0011, "2": 0.0012, "4": 0.0014, "8": 0.0019}, "draft_s": 0.0042,
    "transfer_s": {"16384": 0.0000271, "1048576": 0.0001083}, "context": 34, "threads": 2, "processors": null}}"""
"""A file that version 0.1.0 wrote: `transfer_s` maps bytes to seconds."""


def test_files_of_version_0_1_0_still_load(tmp_path):
    records.store("a", MEASURED, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(OLD_RECORD)
    measured = records.load("a", tmp_path)
    assert measured is not None and measured.transfer_s == 0.0000271
    assert (measured.verify_s[48], measured.level_s[8], measured.draft_s) == (0.0571, 0.0019, 0.0042)
    assert (measured.context, measured.threads, measured.processors) == (34, 2, None)
    assert Measurements.from_dict(json.loads(OLD_RECORD)["measurements"] | {"transfer_s": {}}).transfer_s == 0.0


# --- files


def test_records_come_back(tmp_path):
    records.store("a", MEASURED, tmp_path / "new" / "directory")
    assert records.load("a", tmp_path / "new" / "directory") == MEASURED
    assert [file.suffix for file in (tmp_path / "new" / "directory").iterdir()] == [".json"]  # nothing half-written


def test_records_of_other_keys_are_not_used(tmp_path, caplog):
    assert records.load("a", tmp_path) is None
    assert records.load("a", tmp_path / "missing") is None
    records.store("a", MEASURED, tmp_path)
    assert records.load("b", tmp_path) is None
    assert not caplog.records  # nothing to warn about


def test_records_are_replaced(tmp_path):
    newer = Measurements({1: 0.3}, {1: 0.01}, 0.02, 0.0, 18)
    records.store("a", MEASURED, tmp_path)
    records.store("a", newer, tmp_path)
    assert records.load("a", tmp_path) == newer
    assert len(list(tmp_path.iterdir())) == 1


def test_keys_name_the_machine_and_all_parts(monkeypatch):
    keys = {records.key_of(model="m", draft="d"), records.key_of(model="m", draft="e"), records.key_of(model="m")}
    with machine.thread_count(torch.get_num_threads() + 1):
        keys.add(records.key_of(model="m", draft="d"))
    monkeypatch.setattr(machine, "cpus", lambda: [0, 1, 99])
    keys.add(records.key_of(model="m", draft="d"))
    monkeypatch.setattr(machine, "cpu_name", lambda: "another one")
    keys.add(records.key_of(model="m", draft="d"))
    assert len(keys) == 6
    assert records.key_of(draft="d", model="m") == records.key_of(model="m", draft="d")  # in any order


def test_default_directory_of_records(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path))
    assert records.default_directory() == tmp_path
    monkeypatch.delenv("DOVETAIL_CACHE")
    assert records.default_directory().name == "dovetail"
