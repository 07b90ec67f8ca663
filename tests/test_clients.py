"""Libraries that call `generate` for people: the programs of docs/clients.md draft, and print what they print without.

Runs in the environment of `make test-clients`. Each block of the page is a program. It runs in an empty folder where
the ids that it names are directories with the bundled pair in fp32, once as it is and once without drafts.
"""

import ast
import asyncio
import json
import re
import shlex
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from support.bundled import DRAFT, TARGET
from support.pages import blocks_of
from support.programs import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft, TreeBudget

pytest.importorskip("lm_eval")
import datasets
import httpx
import lm_eval.evaluator
import uvicorn
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.usefixtures("fixed_budget")

ROOT = Path(__file__).parent.parent
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"), flags=re.M)[1:]
PAGE = {section.partition("\n")[0]: blocks_of(section) for section in SECTIONS}
TARGET_ID, DRAFT_ID = "Qwen/Qwen3-8B", "RedHatAI/Qwen3-8B-speculator.eagle3"
QUESTIONS = ["A pen costs 3 dollars. How much do 12 pens cost?", "How much is 17 times 3?"]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A folder with the bundled pair in fp32, where plain and drafted text are equal, under the ids of the page."""
    folder = tmp_path_factory.mktemp("pair")
    for name, kind, source in ((TARGET_ID, AutoModelForCausalLM, TARGET), (DRAFT_ID, DovetailDraft, DRAFT)):
        kind.from_pretrained(source, dtype=torch.float32).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(pair, tmp_path, monkeypatch):
    """The working directory: an empty folder with the pair and, for lm-eval, the page's task with questions."""
    for name in (TARGET_ID, DRAFT_ID):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(pair / name)
    (tmp_path / "questions.yaml").write_text(only(PAGE["lm-eval"], "yaml"))
    rows = [json.dumps({"question": question, "answer": "36"}) for question in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # asks pip and lscpu, which takes seconds
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only(blocks, language):
    [code] = [block.code for block in blocks if block.language == language]
    return code


def assert_drafted(outcome):
    assert outcome.reports and not any(report.warnings for report in outcome.reports)
    assert all(report.rounds and report.acceptance_length > 1 for report in outcome.reports)


# --- the page ----------------------------------------------------------------------------------------


PROGRAMS = [name for name in PAGE if name not in ("FastAPI", "Jupyter")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_page_drafts_and_prints_what_it_prints_without(name, folder):
    code = only(PAGE[name], "python")
    assert "dovetail_plugin" in code  # it is imported here already
    outcome = run(code)
    assert outcome.drafted == outcome.plain and outcome.drafted.strip()
    assert_drafted(outcome)
    if name in ("outlines", "xgrammar", "llguidance"):
        assert json.loads(outcome.drafted).keys() == {"unit", "number"}


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "lm-eval"])
def test_a_program_takes_a_draft_also_the_other_way(name, folder):
    """As an object where the page passes a text, and as a text where it passes an object."""
    code, text = only(PAGE[name], "python"), f'"{DRAFT_ID}"'
    loaded = f'DovetailDraft.from_pretrained({text}, device_map="auto")'
    other = code.replace(loaded, text) if loaded in code else code.replace(text, f"dovetail_plugin.{loaded}")
    assert other != code
    outcome = run(other)
    assert outcome.drafted == outcome.plain and outcome.drafted.strip()
    assert_drafted(outcome)


def test_lm_eval_takes_the_name_of_a_draft_on_its_command_line(folder):
    python, flag, code, *arguments = shlex.split(only(PAGE["lm-eval"], "bash").replace("\\\n", " "))
    assert (python, flag) == ("python", "-c") and "import dovetail_plugin" in code
    assert_drafted(run(code, *arguments))
    answers = [lines.read_text().splitlines() for lines in sorted(folder.glob("results/**/samples_questions_*.jsonl"))]
    drafted, plain = [[json.loads(line)["resps"] for line in lines] for lines in answers]
    assert drafted == plain and len(drafted) == len(QUESTIONS)


def test_every_block_of_the_page_is_run_and_versions_are_those_that_are_installed():
    kinds = [(name, [block.language for block in blocks]) for name, blocks in PAGE.items()]
    assert all(
        languages == (["bash", "yaml", "python"] if name == "lm-eval" else ["python"]) for name, languages in kinds
    )
    assert not any(block.reason for blocks in PAGE.values() for block in blocks)
    for blocks in PAGE.values():
        ast.parse(only(blocks, "python"))
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    packages = "langchain-huggingface llama-index-llms-huggingface lm-eval smolagents outlines xgrammar llguidance"
    for package in (*packages.split(), "fastapi", "uvicorn", "ipykernel", "nbclient"):
        assert re.search(rf"\b{re.escape(version(package))}\b", page), package


# --- a client that goes away, and an interrupt -------------------------------------------------------


@pytest.fixture
def app(folder):
    """The namespace of the page's server, whose target takes 50 ms for a pass."""
    namespace = {"__name__": "app"}
    exec(compile(only(PAGE["FastAPI"], "python"), "app.py", "exec"), namespace)
    namespace["draft"].budget = TreeBudget(4, 3, 2)
    namespace["target"].register_forward_hook(lambda *_: time.sleep(0.05))
    return namespace


@pytest.fixture
def address(app):
    """Where the page's server listens."""
    server = uvicorn.Server(uvicorn.Config(app["app"], port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/generate"
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()


def wait_until(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def generating():
    return any(
        thread is not threading.main_thread() and "(generate)" in thread.name for thread in threading.enumerate()
    )


def test_a_server_streams_the_text_of_plain_generation(app, address):
    target, tokenizer = app["target"], app["tokenizer"]
    with httpx.stream("POST", address, params={"prompt": QUESTIONS[0]}, timeout=120) as response:
        text = "".join(response.iter_text())
    report = app["draft"].report
    assert report.acceptance_length > 1 and not report.warnings
    inputs = tokenizer(QUESTIONS[0], return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(plain, skip_special_tokens=True)


def test_generation_ends_soon_after_a_client_goes_away(app, address):
    app["target"].generation_config.eos_token_id = None  # would go on for all 256 tokens
    with httpx.stream("POST", address, params={"prompt": QUESTIONS[0]}, timeout=120) as response:
        for number, _ in enumerate(response.iter_text()):
            if number == 2:
                break
    wait_until(lambda: not generating())
    assert app["draft"].report.rounds and not app["draft"].report.warnings
    assert sum(one.emitted for one in app["draft"].report.rounds) < 100


SLOW = "target.register_forward_hook(lambda *_: __import__('time').sleep(0.5))"
SHOWN = "print(tokenizer.decode(out[0]))"


class Impatient(NotebookClient):
    """Interrupts its second cell when that has shown something."""

    interrupt = None

    def process_message(self, message, cell, index):
        if index == 1 and message["msg_type"] == "stream" and self.interrupt is None:
            self.interrupt = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(message, cell, index)


def test_an_interrupted_notebook_goes_on_with_the_right_text(folder):
    """The cells are the page's program: loading, a call that is interrupted, and the call again, drafted and plain."""
    loading, call = only(PAGE["Jupyter"], "python").split("\ninputs = ")
    call = f"inputs = {call}"
    plain = call.replace("assistant_model=draft, ", "")
    checked = f"{SHOWN}; print(draft.report.acceptance_length > 1, draft.report.warnings)"
    sources = (f"{loading}\nhook = {SLOW}", call, f"hook.remove()\n{call}{checked}", f"{plain}{SHOWN}")
    cells = [new_code_cell(source) for source in sources]
    Impatient(new_notebook(cells=cells), timeout=120, allow_errors=True, kernel_name="python3").execute()
    errors = [[output["ename"] for output in cell.outputs if output.output_type == "error"] for cell in cells]
    assert errors == [[], ["KeyboardInterrupt"], [], []]
    drafted, undrafted = [
        "".join(o["text"] for o in cell.outputs if o.output_type == "stream" and o["name"] == "stdout")
        for cell in cells[2:]
    ]
    assert drafted == undrafted + "True []\n" and QUESTIONS[0] in undrafted
