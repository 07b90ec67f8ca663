"""Code, docs and scripts are in plain English: phrasings that read as translated do not come back."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = (
    *("README.md", "docs/**/*.md", "dovetail_plugin/**/*.md", "dovetail_plugin/**/*.py", "adapters/**/*.py"),
    *("benchmarks/*.md", "benchmarks/*.py", "examples/*.md", "examples/*.py"),
)
FILES = sorted({str(file.relative_to(ROOT)) for pattern in PATTERNS for file in ROOT.glob(pattern)})

PHRASES = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|better\b|worse\b|larger\b)[\w`]+": "is not",
    r"\btold (?:by|apart|from)\b": "determined by, distinguished",
    r"\btells? (?:which|what|how|where|whether|that|of)\b": "contains, shows",
    r"\blet be\b": "left unchanged",
    r"\bby lot\b": "at random",
    r"\bdearer\b": "slower, more expensive",
    r"\bas ever\b": "as before",
    r"\bto go on with\b": "to continue with",
    r"\bwhat is known of\b": "what is known about",
    r"\bwho gets\b": "which part gets",
    r"\bof (?:its|their) own\b": "its own ...",
    r"\bmisshapen\b": "of the wrong shape",
    r"\bknows? no\b": "does not know",
    r"\b(?:Enters|Leaves): ": "a sentence about arguments and results",
    r"\b(?:learnt|licences?|behaviours?|neighbours?|colours?|favour\w*)\b": "US spelling",
    r"\b(?:recogn|initial|normal|optim|organ|summar|quant|general|minim|maxim)is(?:e|ing|ation)": "US: z",
}
BAD_STARTS = ("Of ", "What ", "As `", "Whoever ", "Whatever ")


def flat(text: str) -> str:
    """The text on one line, without the signs at the start of comment lines."""
    return re.sub(r"\s*\n\s*(?:# )?", " ", text)


def first_words(source: str) -> list[str]:
    """Starts of the docstrings of modules, classes, functions and attributes."""
    strings = [
        n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    return [s.value.strip()[:40] for s in strings if isinstance(s.value, str)]


@pytest.mark.parametrize("name", FILES)
def test_reads_as_plain_english(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [f"{m.group()!r}: {hint}" for p, hint in PHRASES.items() for m in re.finditer(p, flat(text), re.IGNORECASE)]
    if name.endswith(".py"):
        found += [f"docstring starts with {start!r}" for start in first_words(text) if start.startswith(BAD_STARTS)]
    assert not found


def test_messages_name_pages_that_an_installed_copy_lacks_with_their_place():
    """A wheel does not hold the documentation. Docstrings and comments are for readers of the source."""
    for name in (name for name in FILES if name.startswith(("dovetail_plugin", "adapters")) and name.endswith(".py")):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                said = flat(node.value)
                assert not re.search(r"docs/\S+\.md\b(?! (?:of a checkout|in the source))", said), f"{name}: {said}"
