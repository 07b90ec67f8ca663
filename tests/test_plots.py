"""The four panels of a benchmark's picture, drawn from given figures, and the sweep of fixed budgets."""

import sys
from dataclasses import replace

import pytest
import torch

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.bench.compare import BenchResult, Comparison, Run
from dovetail_plugin.bench.plot import check_file, draw, picture
from dovetail_plugin.bench.sweep import BUDGETS, Sweep, sweep
from dovetail_plugin.report import Round

RESULT = BenchResult(
    plain_tokens_per_s=10.0,
    draft_tokens_per_s=20.0,
    ratio=2.0,
    ratio_quartiles=(1.8, 2.2),
    acceptance_length=2.5,
    nodes_per_round=6.0,
    rounds=4,
    phase_ms_per_round={"draft": 3.0, "transfer": 0.0, "verify": 15.0, "accept": 1.5, "other": 0.5},
    round_ms=20.0,
    prompts=2,
    new_tokens=10,
    identical=2,
    ties=0,
    differences=0,
    settings={"target": "my-target", "dtype": "bfloat16", "draft_device": "cuda:0", "budget": "policy"},
)
SWEEP = Sweep(10.0, "policy", 21.0, {budget: 11.0 + number for number, budget in enumerate(BUDGETS)})


def a_round(emitted, depth, seconds=0.02, predicted=0.025, tokens=2.0):
    return Round(
        nodes=depth + 1,
        emitted=emitted,
        depth=depth,
        seconds={"draft": seconds / 4, "verify": 3 * seconds / 4},
        predicted_s=predicted,
        predicted_tokens=tokens,
    )


ROUNDS = [a_round(3, 2), a_round(1, 2, 0.04, 0.05), a_round(2, 1, 0.03, 0.03), a_round(1, 0, 0.01, 0.02, 1.0)]


def panels(result=RESULT, rounds=ROUNDS, tried=SWEEP):
    """The panels (phases, depths, seconds, budgets) and the figure."""
    figure = picture(result, rounds, tried)
    return figure.axes[:4], figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_phases_are_bars_with_shares():
    (phases, *_), _ = panels()
    assert [bar.get_width() for bar in phases.patches] == [3.0, 0.0, 15.0, 1.5, 0.5]
    assert texts(phases) == ["3.00 ms, 15.0%", "0.00 ms, 0.0%", "15.00 ms, 75.0%", "1.50 ms, 7.5%", "0.50 ms, 2.5%"]
    assert phases.get_title() == "Phases of a round of 20.00 ms (mean of 4)"
    assert phases.get_xlabel() == "ms per round"


def test_acceptance_by_depth():
    """Of four rounds, three drafted level 1 and two accepted it; two drafted level 2 and one accepted it."""
    (_, depths, *_), _ = panels()
    assert [bar.get_height() for bar in depths.patches] == [0.75, 0.5, 0.5, 0.25]
    assert texts(depths) == ["50%", "25%"]
    assert depths.get_title() == "Acceptance by depth: 1.75 tokens per round, 1.75 predicted"


def test_predicted_and_measured_seconds():
    (_, _, seconds, _), _ = panels()
    (points,) = seconds.collections
    assert points.get_offsets().tolist() == [
        pytest.approx(point) for point in ([25.0, 20.0], [50.0, 40.0], [30.0, 30.0], [20.0, 10.0])
    ]
    assert points.get_array().tolist() == [3, 3, 2, 1]
    assert "median error 20.0%" in seconds.get_title()
    (line,) = seconds.lines
    assert list(line.get_xdata()) == list(line.get_ydata())


def test_fixed_budgets_have_no_predictions():
    rounds = [replace(r, predicted_s=None, predicted_tokens=None) for r in ROUNDS]
    fixed = replace(RESULT, settings=RESULT.settings | {"budget": "8/4/4"})
    (_, depths, seconds, _), _ = panels(fixed, rounds)
    assert texts(seconds) == ["no predictions: every round used 8/4/4"]
    assert not seconds.collections
    assert depths.get_title() == "Acceptance by depth: 1.75 tokens per round"


def test_speed_by_budget():
    (*_, budgets), _ = panels()
    lines = {line.get_label(): line for line in budgets.lines}
    assert lines.keys() == {"chains", "trees", "policy: 21.0", "plain: 10.0"}
    assert list(lines["chains"].get_xdata()) == [b.nodes for b in BUDGETS if b.top_k == 1]
    assert list(lines["trees"].get_ydata()) == [SWEEP.tokens_per_s[b] for b in BUDGETS if b.top_k > 1]
    assert set(texts(budgets)) == {str(budget) for budget in BUDGETS}


def test_title_names_models_and_marks_simulations():
    _, figure = panels()
    title = figure.get_suptitle()
    assert title == "my-target, bfloat16, draft on cuda:0, plain 10.0, with the draft 20.0 tokens/s: ratio 2.00"
    marked = replace(RESULT, synthetic_acceptance=0.7, settings=RESULT.settings | {"weights": "random weights"})
    _, figure = panels(marked)
    first, second = figure.get_suptitle().splitlines()
    assert first.startswith("my-target, random weights, bfloat16")
    assert second == "SYNTHETIC: acceptance simulated at 0.70"


@pytest.mark.parametrize("rounds", [[], ROUNDS[3:], ROUNDS * 30], ids=["none", "one plain", "many"])
def test_writes_each_format(tmp_path, rounds):
    few = Sweep(10.0, "8/4/4", 21.0, {TreeBudget(8, 4, 4): 12.0})
    for name in ("a.png", "b.svg", "c.PDF"):
        draw(tmp_path / name, RESULT, rounds, few)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "c.PDF").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_refuses_before_drawing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'plot\.bmp' is not a valid plot file.*\.png, \.pdf, \.svg"):
        check_file(tmp_path.relative_to(tmp_path) / "plot.bmp")
    with pytest.raises(ValueError, match=r"nowhere' is not a directory.*a\.png"):
        check_file(tmp_path / "nowhere" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]'"):
        draw(tmp_path / "a.png", RESULT, ROUNDS, SWEEP)
    assert not list(tmp_path.iterdir())


# --- the sweep -------------------------------------------------------------------------------------


@pytest.fixture
def timed(llama, draft, monkeypatch):
    """A comparison whose runs are not executed, the list of its calls, and the speeds to return."""
    calls, speeds = [], {}

    def run(self, input_ids, *, drafted, number=0, **changes):
        assert not changes
        name = str(draft.budget or "policy") if drafted else "plain"
        calls.append((number, name))
        return Run(100, 100 / speeds.get((number, name), 1.0), input_ids)

    monkeypatch.setattr(Comparison, "run", run)
    return Comparison(llama, draft, {}), calls, speeds


def test_sweep_takes_medians_and_alternates_the_order(timed):
    comparison, calls, speeds = timed
    comparison.draft.budget = None
    budgets = [TreeBudget(2, 1, 1), TreeBudget(8, 4, 4)]
    speeds |= {(0, "2/1/1"): 5.0, (1, "2/1/1"): 7.0, (2, "2/1/1"): 100.0, (1, "policy"): 9.0, (2, "policy"): 8.0}
    speeds |= {(0, "plain"): 3.0, (1, "plain"): 2.0, (2, "plain"): 4.0}
    found = sweep(comparison, [torch.zeros(1, 3, dtype=torch.int64)] * 3, budgets)
    assert found == Sweep(3.0, "policy", 8.0, {budgets[0]: 7.0, budgets[1]: 1.0})
    assert found.as_dict() == {"plain": 3.0, "2/1/1": 7.0, "8/4/4": 1.0, "policy": 8.0}
    names = ["policy", "2/1/1", "8/4/4"]
    for number, order in enumerate((names, names[::-1], names)):
        assert [name for n, name in calls if n == number] == ["plain", *order]
    assert comparison.pairs == [] and comparison.draft.budget is None


def test_sweep_restores_the_budget(timed, monkeypatch):
    comparison, _, _ = timed
    own = comparison.draft.budget = TreeBudget(3, 2, 1)
    assert sweep(comparison, [torch.zeros(1, 3)]).own == "3/2/1"
    assert comparison.draft.budget is own

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Comparison, "run", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        sweep(comparison, [torch.zeros(1, 3)])
    assert comparison.draft.budget is own


def test_sweep_uses_every_budget(llama):
    """The reports of the draft show which budget was used."""
    draft = DovetailDraft.for_target(llama)
    draft.budget = TreeBudget(4, 2, 2)
    comparison = Comparison(llama, draft, {"max_new_tokens": 6, "do_sample": False})
    found = sweep(comparison, [torch.tensor([[5, 6, 7]])], [TreeBudget(3, 2, 1), TreeBudget(1, 1, 1)])
    assert draft.report.nodes_per_round == 1  # the last budget
    assert all(speed > 0 for speed in found.as_dict().values())
