"""The folders are the architecture: imports go only to folders further down, and never in circles."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dovetail_plugin"
FOLDERS = [
    "ground",
    "kernels",
    "targets",
    "drafts",
    "planning",
    "policy",
    "generation",
    "bench",
    "training",
    "adapters",
    "cli",
]
"""From the bottom up. Ground: the files at the top of the package, and `GROUND_FOLDERS`."""
GROUND_FOLDERS = {"compat"}
FACE = {"__init__", "__main__", "hf"}
"""Files at the top that are no ground: they put the package together, and nothing below imports them."""
MOST_GROUND_FILES = 12
FORBIDDEN = {"verify": {"torch", "transformers"}, "report": {"torch", "transformers"}, "tree": {"transformers"}}

FILES = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
FILES |= {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in (ROOT / "adapters").rglob("*.py")}
MODULES = sorted(FILES)


def folder_of(module: str) -> str:
    folder = module.split(".")[0]
    return folder if "." in module and folder not in GROUND_FOLDERS else "ground"


def module_named(name: str) -> str | None:
    """`name`, as a file or as a package."""
    return next((m for m in (name, f"{name}.__init__".lstrip(".")) if m in FILES), None)


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """(modules of the package, top-level names from elsewhere) imported anywhere in a module."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
            continue
        if not isinstance(node, ast.ImportFrom):
            continue
        source = node.module or ""
        if node.level == 0 and source.split(".")[0] != PACKAGE.name:
            outside.add(source.split(".")[0])
            continue
        if node.level == 0:
            name = source.removeprefix(PACKAGE.name).lstrip(".")
        else:
            name = ".".join([*module.split(".")[: -node.level], *source.split(".")]).strip(".")
        for alias in node.names:
            found = module_named(f"{name}.{alias.name}".strip(".")) or module_named(name)
            assert found is not None, f"{module} imports {name}, which is no module here"
            inside.add(found)
    return inside, outside


def test_every_folder_has_its_place():
    assert {folder_of(module) for module in MODULES} == set(FOLDERS)
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_GROUND_FILES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    inside, outside = imports_of(module)
    if module not in FACE:
        place = FOLDERS.index(folder_of(module))
        assert not {other for other in inside if FOLDERS.index(folder_of(other)) > place}
        assert not inside & FACE or folder_of(module) in ("adapters", "cli")
    assert not outside & FORBIDDEN.get(module, set())


def test_no_circles():
    """Within folders too."""
    below = {module: imports_of(module)[0] - {module} for module in MODULES if not module.endswith("__init__")}
    while ready := [module for module, others in below.items() if not others & set(below)]:
        for module in ready:
            del below[module]
    assert not below, f"modules that import each other are among {sorted(below)}"


def test_architecture_lists_the_folders_in_their_order():
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    named = [line.split("`")[1].rstrip("/") for line in lines if line.startswith("| `") and "/`" in line.split("|")[1]]
    assert named == FOLDERS[1:]
    ground = next(line for line in lines if line.startswith("| ground"))
    files = {file.name for file in PACKAGE.glob("*.py") if file.stem not in FACE}
    assert files | {f"{folder}/" for folder in GROUND_FOLDERS} == {
        name for name in ground.split("|")[2].split("`")[1::2] if name.endswith((".py", "/"))
    }


def test_import_needs_only_the_main_dependencies():
    """Optional packages are not imported with the package."""
    code = (
        "import sys, dovetail_plugin; "
        "loaded = {m.split('.')[0] for m in sys.modules}; "
        "print(sorted(loaded & {'openvino', 'onnxruntime', 'vllm', 'optimum', 'matplotlib', 'hypothesis', 'scipy'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    # transformers itself may import scipy where it is installed; nothing else may appear.
    assert set(ast.literal_eval(result.stdout.strip().splitlines()[-1])) <= {"scipy"}


def test_a_checkout_takes_its_own_adapters(tmp_path):
    """Also where another copy is installed: `PYTHONPATH` decides."""
    copied = tmp_path / "copy"
    for folder in ("dovetail_plugin", "adapters"):
        shutil.copytree(ROOT / folder, copied / folder)
    code = "import dovetail_plugin.adapters as a, dovetail_plugin as d; print(a.__file__); print(d.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(copied)}
    )
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(copied)) for line in result.stdout.strip().splitlines()[-2:])
