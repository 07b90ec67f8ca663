"""Every family of the installed transformers is right with drafts, or refused with the reason that the table has.

`make test-families` runs all of them, `make models-page` renews the table and docs/models.md. CI runs the part that a
commit's hash selects.
"""

import json
import os
import time

import pytest
import transformers

from dovetail_plugin import compat

from . import outcomes, page, table, worker
from .discovery import FAMILIES
from .exceptions import NO_IMAGE, NOT_BUILT, ONE_TOKEN_A_PASS, REFUSED_ALTHOUGH_STOCK_IS_RIGHT

RENEW = "run `make models-page` and look at what changed in tests/model_table/table.json"
NAMES = {family.name for family in FAMILIES}
COMMITTED = table.load()
INSTALLED, WRITTEN_WITH = (compat.version_of(text) for text in (transformers.__version__, COMMITTED["transformers"]))
SAME_VERSION = INSTALLED == WRITTEN_WITH


@pytest.fixture(scope="module")
def process():
    process = worker.Worker()
    yield process
    process.close()


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "kind"), table.cases(FAMILIES))
def test_right_or_refused_as_the_table_says(name, kind, process):
    found = process.outcomes(name, kind)
    if INSTALLED < WRITTEN_WITH and found["plain"]:
        pytest.skip(f"nothing to compare with an older transformers: {found['plain']}")
    verdict = table.verdict(name, kind, found, older=INSTALLED < WRITTEN_WITH)
    if INSTALLED < WRITTEN_WITH and verdict == table.CAN_BE_BUILT:
        pytest.skip("the list of those that cannot be built is for the newest transformers")
    assert not verdict.startswith("fails"), verdict
    if SAME_VERSION:
        known = COMMITTED["verdicts"].get(name, {}).get(kind, "a new family")
        assert verdict == known, f"the table says: {known}; {RENEW}"


@pytest.mark.skipif(not SAME_VERSION, reason="the table is for another version of transformers")
def test_the_table_has_every_family_and_no_failure():
    assert set(COMMITTED["verdicts"]) == NAMES, RENEW
    failures = [
        n for n, by_kind in COMMITTED["verdicts"].items() if any(v.startswith("fails") for v in by_kind.values())
    ]
    assert not failures


@pytest.mark.skipif(not SAME_VERSION, reason="the table is for another version of transformers")
def test_exceptions_are_about_families_that_exist():
    assert set(NOT_BUILT) | set(NO_IMAGE) | set(REFUSED_ALTHOUGH_STOCK_IS_RIGHT) | set(ONE_TOKEN_A_PASS) <= NAMES


@pytest.mark.skipif(not SAME_VERSION, reason="the page names classes of another version of transformers")
def test_the_page_is_made_from_the_table():
    assert page.PAGE.read_text(encoding="utf-8") == page.text_of(COMMITTED), RENEW


# --- what the table accepts -----------------------------------------------------------------------------


def outcome(**changed):
    drafts = {"oracle": "right", "untrained": "right", "lookup": "right"} | changed.pop("drafts", {})
    return {"plain": "", "stock": "right", "drafts": drafts, "shape": "trees"} | changed


REFUSAL = dict.fromkeys(("oracle", "untrained", "lookup"), "refused: it has no cache")


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "trees"),
        ({"shape": "chains"}, "chains"),
        ({"drafts": REFUSAL, "stock": "error: no cache"}, "refused: it has no cache"),
        ({"drafts": REFUSAL}, "fails: prompt_lookup_num_tokens is right, but refused: it has no cache"),
        ({"drafts": {"untrained": "refused: no head"}, "stock": "different"}, "trees; DovetailDraft refused: no head"),
        ({"drafts": {"lookup": "different text from new token 3"}}, "fails: PromptLookupDraft: different text"),
        ({"drafts": {"oracle": "stopped: a warning"}}, "fails: long acceptances: stopped: a warning"),
        ({"drafts": {"oracle": "slow: acceptance length 1.2"}}, "fails: long acceptances: slow"),
        (
            {"drafts": {"oracle": "error: IndexError"}, "stock": "error: too"},
            "fails: long acceptances: error",
        ),
        ({"drafts": dict.fromkeys(REFUSAL, "error: no head")}, "fails: with every draft: error: no head"),
        ({"plain": "not built: TypeError"}, "fails: plain text: not built"),
        ({"plain": "encoder-decoder"}, "encoder-decoder"),
    ],
)
def test_verdicts(changed, verdict):
    assert table.verdict("a new family", "text", outcome(**changed)).startswith(verdict)


def test_families_leave_the_list_of_untested_ones_when_they_can_be_built():
    assert table.verdict("blip", "text", outcome(plain="no pixels")).startswith("untested: ")
    assert table.verdict("blip", "text", outcome()).startswith("fails: it can be built")
    assert table.verdict("blip", "image", outcome(plain="no pixels")).startswith("untested: ")


@pytest.mark.parametrize(
    ("family", "reason"),
    [(lambda *_: os._exit(1), "its process ended"), (lambda *_: time.sleep(60), "it takes more than 0.2 s")],
    ids=["crashes", "hangs"],
)
def test_a_family_that_crashes_or_hangs_costs_its_own_outcome(family, reason, monkeypatch):
    monkeypatch.setattr(outcomes, "outcomes_of", family)
    monkeypatch.setattr(worker, "SECONDS", 0.2)
    answer = json.loads(worker.answer("llama", "text"))
    assert answer["plain"] == reason
    assert table.verdict("llama", "text", answer) == f"fails: plain text: {reason}"
