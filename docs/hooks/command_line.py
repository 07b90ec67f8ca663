"""mkdocs hook: puts the help of every `dovetail` command into the command line reference.

The environment of the documentation has no torch. `DOVETAIL_PYTHON` names the Python that has the
package; `make docs` sets it.
"""

import json
import os
import subprocess
import sys
from typing import Any

PAGE = "reference/command-line.md"
MARK = "<!-- command line -->"
PRINT_HELP = """
import contextlib, io, json, re
from dovetail_plugin.cli import main

def help_of(*command):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue()

overview = help_of()
names = re.search(r"\\{([\\w,-]+)\\}", overview)[1].split(",")
print(json.dumps({"dovetail": overview} | {f"dovetail {name}": help_of(name) for name in names}))
"""
"""Prints a JSON object of command -> help. One process for all of them, because importing torch takes seconds."""


def helps() -> dict[str, str]:
    """Return command -> help text, 100 columns wide; the names come from the usage line of `dovetail --help`."""
    python = os.environ.get("DOVETAIL_PYTHON", sys.executable)
    env = {**os.environ, "COLUMNS": "100", "PYTHON_COLORS": "0"}
    done = subprocess.run([python, "-c", PRINT_HELP], stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the mark on the command line page; mkdocs calls this for every page."""
    if page.file.src_uri != PAGE:
        return markdown
    sections = [f"## {command}\n\n```text\n{text}```" for command, text in helps().items()]
    return markdown.replace(MARK, "\n\n".join(sections))
