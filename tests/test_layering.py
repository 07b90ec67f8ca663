"""Imports go only downwards, and the package needs only its declared dependencies to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dovetail_plugin"

# From the bottom up; a module may import only from earlier lines.
LAYERS = [
    {"_version", "report", "tree", "cache", "curve", "machine", "shapes", "device_plan"},
    {"assistants", "cost"},
    {"verify", "target", "acceptance", "records"},
    {"configuration", "rounds"},
    {"blocks", "formats", "fitting"},
    {"engine", "draft_configs", "loading"},
    {"modeling"},
    {"drafting", "text", "graph_rows", "placement", "writers"},
    {"lookup", "small_model"},
    {"pairing"},
    {"graph_runner", "sizes"},
    {"counting"},
    {"claims"},
    {"plan"},
    {"policy"},
    {"probe", "benchmark"},
    {"decoding"},
    {"generation", "candidates"},
    {"hf"},
    {"sweep", "synthetic"},
    {"plots"},
    {"__init__"},
    {"adapters.common"},
    {"adapters.openvino_graph", "adapters.onnxruntime_graph"},
    {"adapters.openvino_states", "adapters.onnxruntime_states"},
    {
        "adapters.openvino_draft",
        "adapters.onnxruntime_weights",
        "adapters.onnxruntime_session",
        "adapters.openvino_session",
    },
    {"adapters.openvino", "adapters.onnxruntime", "adapters.vllm"},
    {"adapters.vllm_model"},
    {"adapters.__init__"},
    {"training.config", "training.data"},
    {"training.features", "training.losses"},
    {"training.calibration"},
    {"training.loop"},
    {"training.__init__"},
    {"cli.common"},
    {"cli.generate", "cli.bench", "cli.train", "cli.export", "cli.plan", "cli.convert"},
    {"cli.__init__"},
    {"__main__"},
]
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
ADAPTERS = PACKAGE.parent / "adapters"  # installed as dovetail_plugin.adapters
FILES = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
FILES |= {f"adapters.{f.stem}": f for f in ADAPTERS.glob("*.py")}
MODULES = sorted(FILES)
FORBIDDEN = {"verify": {"torch", "transformers"}, "report": {"torch", "transformers"}, "tree": {"transformers"}}


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """(modules of the package, top-level names from elsewhere) imported anywhere in a module."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
            inside.add((node.module or "").removeprefix(f"{PACKAGE.name}."))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level]
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                options = [f"{name}.{alias.name}".strip("."), name, f"{name}.__init__".strip(".")]
                inside.add(next(option for option in options if option in MODULES))
    return inside, outside


def test_every_module_has_a_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    inside, outside = imports_of(module)
    upwards = {other for other in inside if RANK[other] >= RANK[module]}
    assert not upwards
    assert not outside & FORBIDDEN.get(module, set())


def test_import_needs_only_the_main_dependencies():
    """Optional packages are not imported with the package."""
    code = (
        "import sys, dovetail_plugin; "
        "loaded = {m.split('.')[0] for m in sys.modules}; "
        "print(sorted(loaded & {'openvino', 'onnxruntime', 'vllm', 'optimum', 'matplotlib', 'hypothesis', 'scipy'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    # transformers itself may import scipy where it is installed; nothing else may appear.
    assert set(ast.literal_eval(result.stdout.strip().splitlines()[-1])) <= {"scipy"}
