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

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parent.parent
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
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


@pytest.mark.skipif(tomllib is None, reason="reads pyproject.toml with tomllib, which Python 3.10 does not have")
def test_installing_never_downgrades_transformers():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    transformers = next(line for line in dependencies if line.startswith("transformers"))
    assert "<" not in transformers and "==" not in transformers and "~" not in transformers


def test_the_source_distribution_is_complete(built):
    files = built.sdist_files()
    missing = set()
    for folder in ("dovetail_plugin", "adapters", "tests", "docs", "examples", "benchmarks", ".github", ".ci"):
        for file in (ROOT / folder).rglob("*"):
            relative = file.relative_to(ROOT)
            generated = {"__pycache__", ".pytest_cache"} & set(relative.parts)
            if file.is_file() and not generated and str(relative) not in files:
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
