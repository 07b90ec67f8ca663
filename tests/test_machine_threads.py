"""Blocks of `machine.thread_count` in several threads: each has its own number, and afterwards all is as before."""

import os
import random
from contextlib import ExitStack

import pytest
import torch
from helpers import run_python
from support.workers import in_new_thread, workers

from dovetail_plugin import machine
from dovetail_plugin.policy import probe
from dovetail_plugin.policy.settings import PolicySettings

number = torch.get_num_threads

several_processors = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(machine.cpus()) < 2, reason="needs two processors and bindings"
)


def affinities():
    return {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}


class Blocks:
    """The blocks that one thread has open, the newest last."""

    def __init__(self, worker):
        self.worker, self.open, self.numbers = worker, [], [worker(number)]

    def enter(self, threads):
        stack = ExitStack()
        self.worker(stack.enter_context, machine.thread_count(threads))
        self.open.append(stack)
        self.numbers.append(threads or self.numbers[-1])

    def leave(self):
        self.worker(self.open.pop().close)
        self.numbers.pop()


@pytest.mark.parametrize("seed", range(6))
def test_blocks_open_and_end_in_any_order(seed):
    """After every step, each thread has the number of its own newest block, and a new thread the number of before."""
    rng, before = random.Random(seed), in_new_thread(number)
    with workers(3) as threads:
        all_blocks = [Blocks(worker) for worker in threads]
        for step in range(30):
            blocks = rng.choice(all_blocks)
            if blocks.open and (step >= 20 or rng.random() < 0.5):
                blocks.leave()
            elif step < 20:
                blocks.enter(rng.choice([None, 1, 2, 3]))
            assert [each.worker(number) for each in all_blocks] == [each.numbers[-1] for each in all_blocks]
            assert in_new_thread(number) == number() == before
        for blocks in all_blocks:
            while blocks.open:
                blocks.leave()
            assert blocks.worker(number) == before
        assert in_new_thread(number) == before
    assert machine.alone()


def test_a_thread_that_is_born_in_a_block_keeps_the_number_of_before():
    before = in_new_thread(number)
    with workers(1) as (born,), machine.thread_count(before + 1):
        assert born(number) == before
        with machine.thread_count(before + 2):
            assert number() == before + 2
        assert number() == before + 1
        assert born(number) == before
    assert number() == before


def test_a_number_that_a_user_sets_meanwhile_stays():
    before = number()
    with workers(1) as (other,):
        with machine.thread_count(before + 1):
            other(torch.set_num_threads, before + 3)
        assert number() == before
        assert other(number) == in_new_thread(number) == before + 3
    torch.set_num_threads(before)
    assert in_new_thread(number) == before


def test_a_block_that_is_interrupted_while_it_opens_leaves_nothing(monkeypatch):
    before, real = number(), torch.set_num_threads

    def interrupted(threads):
        real(threads)
        if threads == before + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_num_threads", interrupted)
    with pytest.raises(KeyboardInterrupt), machine.thread_count(before + 1):
        pytest.fail("the block began")
    assert number() == in_new_thread(number) == before
    with workers(1) as (other,):
        assert other(machine.alone)


def test_the_number_stays_where_no_thread_can_be_started(monkeypatch):
    before = number()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(machine.threading.Thread, "start", refuse)
        with machine.thread_count(before + 1):
            assert number() == before
    assert in_new_thread(number) == before


# --- what the policy may change --------------------------------------------------------------------


def test_a_thread_is_alone_until_another_opens_a_block():
    with workers(1) as (other,), machine.thread_count(None):
        assert machine.alone() and not other(machine.alone)
        undisturbed, stack = machine.watch(), ExitStack()
        with machine.thread_count(None):  # a nested block of the same thread
            assert machine.alone() and undisturbed()
        other(stack.enter_context, machine.thread_count(None))
        assert not machine.alone() and not undisturbed()
        meanwhile = machine.watch()
        other(stack.close)
        assert machine.alone()
        assert not undisturbed() and not meanwhile()  # not all of the time
        assert machine.watch()()


def test_a_choice_is_skipped_while_others_generate():
    before = number()
    with workers(1) as (other,), machine.thread_count(None):
        stack = ExitStack()
        other(stack.enter_context, machine.thread_count(None))
        assert not machine.use(before + 1) and number() == before
        assert probe.choose_threads(lambda: pytest.fail("a pass was run"), PolicySettings()) == (before, None, None)
        other(stack.close)
        assert machine.use(before + 1) and number() == before + 1
    assert number() == before


def test_a_choice_ends_when_another_thread_begins(monkeypatch):
    """In the middle of the second turn, at the third pass: the current number is kept and nothing more is tried."""
    monkeypatch.setattr(machine, "numa_nodes", lambda: [[0]])
    passes = []
    with workers(1) as (other,), machine.thread_count(4), ExitStack() as stack:

        def run():
            passes.append(number())
            if len(passes) == 3:
                other(stack.enter_context, machine.thread_count(None))
            return 1.0 / len(passes)

        assert probe.choose_threads(run, PolicySettings()) == (4, None, None)
        assert passes == [4, 3, 2] and number() == 4
        other(stack.close)


@several_processors
@pytest.mark.parametrize("first_ends_first", [True, False])
def test_bindings_end_when_another_thread_begins(first_ends_first):
    """Also those of threads that were born meanwhile. The rest of the process is as it was all along."""
    one = {machine.cpus()[0]}
    with workers(3) as (first, second, born):
        first(number), second(number)
        before, own = affinities(), os.sched_getaffinity(0)
        blocks = [ExitStack(), ExitStack()]
        first(blocks[0].enter_context, machine.thread_count(None))
        assert first(machine.use, 1, tuple(one))
        born(number)
        assert set(map(frozenset, affinities().values())) == {frozenset(one)}
        for worker in (first, second, born):  # keys of measurements name the processors
            assert worker(machine.cpus) == sorted(own)
        second(blocks[1].enter_context, machine.thread_count(None))
        assert before.items() <= affinities().items() and born(os.sched_getaffinity, 0) == own
        assert not first(machine.use, 1, tuple(one)) and not second(machine.use, 1, tuple(one))
        for block in (0, 1) if first_ends_first else (1, 0):
            (first, second)[block](blocks[block].close)
            assert before.items() <= affinities().items()
        assert born(os.sched_getaffinity, 0) == own


@several_processors
def test_nested_blocks_put_back_the_binding_around_them():
    first, second = machine.cpus()[:2]
    before = affinities()
    with machine.thread_count(None):
        machine.use(1, (first,))
        with machine.thread_count(None):
            machine.use(1, (second,))
            assert os.sched_getaffinity(0) == {second}
        assert os.sched_getaffinity(0) == {first}
    assert before.items() <= affinities().items()


@several_processors
def test_a_binding_that_a_thread_chose_itself_meanwhile_stays():
    first, second = machine.cpus()[:2]
    with workers(1) as (other,):
        with machine.thread_count(None):
            machine.use(1, (first,))
            other(os.sched_setaffinity, 0, {second})
        assert other(os.sched_getaffinity, 0) == {second}


FORK = """
import os, threading
from dovetail_plugin import machine
opened, end = threading.Event(), threading.Event()
def hold():
    with machine.thread_count(None), machine._lock:
        opened.set(); end.wait()
other = threading.Thread(target=hold); other.start(); opened.wait()
child = os.fork()
if child == 0:
    with machine.thread_count(None):
        os._exit(0 if machine.alone() else 1)
end.set(); other.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert machine.alone()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_none_of_the_other_threads(tmp_path):
    """Not even where one of them held the lock at that moment."""
    result = run_python("-c", FORK, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
