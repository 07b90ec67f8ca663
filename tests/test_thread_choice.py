"""The number of threads and the processors that passes run on: how they are chosen, tried and restored."""

import json
import os
from dataclasses import replace

import pytest
import torch

from dovetail_plugin import machine
from dovetail_plugin.policy import probe
from dovetail_plugin.policy.settings import PolicySettings

SETTINGS = PolicySettings()


@pytest.fixture
def used(monkeypatch):
    """What `machine.use` was asked for, newest last, on a machine of four threads without NUMA nodes."""
    asked = []

    def use(threads, processors=None):
        asked.append((threads, processors))
        return True

    monkeypatch.setattr(machine, "use", use)
    monkeypatch.setattr(machine, "numa_nodes", lambda: [[0, 1, 2, 3]])
    with machine.thread_count(4):
        yield asked


def choose(used, seconds):
    threads, processors, best_s = probe.choose_threads(lambda: seconds[used[-1]], SETTINGS)
    assert best_s == seconds[threads, processors]
    return threads, processors


@pytest.mark.parametrize(
    ("all_s", "three_s", "two_s", "best"),
    [
        (1.0, 1.1, 1.2, 4),
        (1.0, 0.96, 1.2, 4),  # not by five per cent
        (1.0, 0.94, 1.2, 3),
        (1.0, 0.94, 0.9, 2),
        (1.0, 0.9, 0.94, 3),
    ],
)
def test_fewer_threads_must_win_by_five_per_cent(used, all_s, three_s, two_s, best):
    seconds = {(4, None): all_s, (3, None): three_s, (2, None): two_s}
    assert choose(used, seconds) == (best, None)
    assert set(used) == seconds.keys() and used[-1] == (best, None)  # left in force


@pytest.mark.parametrize(
    ("first_s", "second_s", "best"),
    [(0.9, 0.8, (2, (2, 3))), (0.8, 0.9, (2, (0, 1))), (0.98, 0.99, (4, None)), (2.0, 2.0, (4, None))],
)
def test_one_numa_node_must_win_too(used, monkeypatch, first_s, second_s, best):
    monkeypatch.setattr(machine, "numa_nodes", lambda: [[0, 1], [2, 3]])
    seconds = {(4, None): 1.0, (3, None): 1.1, (2, None): 1.1, (2, (0, 1)): first_s, (2, (2, 3)): second_s}
    assert choose(used, seconds) == best
    assert set(used) == seconds.keys() and used[-1] == best


def test_one_slow_moment_does_not_choose_the_threads(used):
    """Whatever is tried first runs beside another process the first time."""
    seconds = iter([2.0, 1.2, 1.3, 1.0, 1.2, 1.3])
    assert probe.choose_threads(lambda: next(seconds), SETTINGS) == (4, None, 1.0)
    assert len(used) == 3 * SETTINGS.thread_turns + 1


def test_slow_passes_are_tried_once(used):
    slow = replace(SETTINGS, thread_turn_s=-1.0)
    seconds = iter([1.0, 0.9, 1.3])
    assert probe.choose_threads(lambda: next(seconds), slow) == (3, None, 0.9)


def test_nothing_is_tried_where_there_is_no_choice(used):
    torch.set_num_threads(1)
    assert probe.choose_threads(lambda: pytest.fail("a pass was run"), SETTINGS) == (1, None, None)


several_processors = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(machine.cpus()) < 2, reason="needs two processors and bindings"
)


@several_processors
def test_bindings_are_tried_and_undone(monkeypatch):
    """Two nodes of one processor each; the second is the fastest."""
    first, second = machine.cpus()[:2]
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(machine, "numa_nodes", lambda: [[first], [second]])
    seen = []

    def run():
        seen.append((torch.get_num_threads(), frozenset(os.sched_getaffinity(0))))
        return 0.5 if os.sched_getaffinity(0) == {second} else 1.0

    with machine.thread_count(2):
        assert probe.choose_threads(run, SETTINGS) == (1, (second,), 0.5)
        assert os.sched_getaffinity(0) == {second} and torch.get_num_threads() == 1
        for thread in os.listdir("/proc/self/task"):
            assert os.sched_getaffinity(int(thread)) == {second}
    whole = frozenset(before)
    assert seen == SETTINGS.thread_turns * [(2, whole), (1, whole), (1, frozenset({first})), (1, frozenset({second}))]
    for thread in os.listdir("/proc/self/task"):
        assert os.sched_getaffinity(int(thread)) == before
    assert torch.get_num_threads() == 1  # as the tests have it


@several_processors
def test_threads_are_restored_after_an_error():
    before, own = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="half-way"), machine.thread_count(None):
        machine.use(before + 1, (machine.cpus()[0],))
        assert torch.get_num_threads() == before + 1 and os.sched_getaffinity(0) == {machine.cpus()[0]}
        raise RuntimeError("half-way")
    assert torch.get_num_threads() == before and os.sched_getaffinity(0) == own


@pytest.mark.parametrize("threads", [0, -2])
def test_no_threads_are_refused(threads):
    with pytest.raises(ValueError, match=f"at least 1, got {threads}"), machine.thread_count(threads):
        pass


# --- the machine -----------------------------------------------------------------------------------


def sysfs(directory, **nodes):
    for name, cpus in nodes.items():
        (directory / name).mkdir()
        (directory / name / "cpulist").write_text(cpus + "\n")
    return directory


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ({"node0": "0-3", "node1": "4-7"}, [[0, 1, 2, 3], [4, 5, 6]]),
        ({"node0": "0-1,4-5", "node1": "2,3,6"}, [[0, 1, 4, 5], [2, 3, 6]]),
        ({"node0": "0-15"}, [[0, 1, 2, 3, 4, 5, 6]]),
        ({"node0": "0-6", "node1": ""}, [[0, 1, 2, 3, 4, 5, 6]]),  # memory without processors
        ({"node0": "0-6", "node1": "8-15"}, [[0, 1, 2, 3, 4, 5, 6]]),  # processors that we may not use
        ({"possible": "0-1", "node0": "0,6"}, [[0, 6]]),
        ({}, [[0, 1, 2, 3, 4, 5, 6]]),
    ],
)
def test_numa_nodes(tmp_path, monkeypatch, nodes, found):
    monkeypatch.setattr(machine, "cpus", lambda: list(range(7)))
    assert machine.numa_nodes(sysfs(tmp_path, **nodes)) == found


def test_this_machine_has_a_name():
    described = machine.describe()
    assert described["cpu"] and described["cores"] >= 1 and described["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(described)) == described
    assert machine.cpus() == sorted(set(machine.cpus())) != []
