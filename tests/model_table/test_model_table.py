"""Every family of the installed transformers is right with drafts, or refused with the reason that the table has.

`make test-families` runs all of them, `make models-page` renews the table and docs/models.md. CI runs the part that a
commit's hash selects.
"""

import pytest
import transformers

from . import page, table
from .discovery import FAMILIES
from .exceptions import NO_IMAGE, NOT_BUILT, REFUSED_ALTHOUGH_STOCK_IS_RIGHT
from .worker import Worker

RENEW = "run `make models-page` and look at what changed in tests/model_table/table.json"
NAMES = {family.name for family in FAMILIES}
COMMITTED = table.load()
SAME_VERSION = transformers.__version__.startswith(COMMITTED["transformers"] + ".")


@pytest.fixture(scope="module")
def worker():
    process = Worker()
    yield process
    process.close()


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "kind"), table.cases(FAMILIES))
def test_right_or_refused_as_the_table_says(name, kind, worker):
    verdict = table.verdict(name, kind, worker.outcomes(name, kind))
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
    assert set(NOT_BUILT) | set(NO_IMAGE) | set(REFUSED_ALTHOUGH_STOCK_IS_RIGHT) <= NAMES


@pytest.mark.skipif(not SAME_VERSION, reason="the page names classes of another version of transformers")
def test_the_page_is_made_from_the_table():
    assert page.PAGE.read_text(encoding="utf-8") == page.text_of(COMMITTED), RENEW
