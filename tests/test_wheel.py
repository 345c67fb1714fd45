"""What `pip install .` brings elsewhere: the wheel runs the quick start's checks without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """\
import megarl
from megarl.cli import main
from megarl.config import load_config
from megarl.preflight import check_run

print(megarl.__file__)
main(["init", "quickstart"])
for config in ("quickstart", "quickstart.yaml"):
    check_run(load_config(config), "train", resume=False)
main(["train", "nowhere"])
"""


@pytest.mark.processes
def test_the_wheel_has_configs_model_and_tools_and_checks_the_quick_start_from_any_folder(tmp_path):
    source, installed, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "megarl", source / "megarl", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)  # as pip does
        names = set(archive.namelist())
    assert {f"megarl/configs/{file.name}" for file in (ROOT / "configs").iterdir()} <= names
    assert {"megarl/tools/convert_checkpoint.py", "megarl/data/base_model/model.safetensors"} <= names

    command, environment = [sys.executable, "-P", "-c", PROGRAM], os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[0] == str(installed / "megarl/__init__.py"), done.stderr
    assert (elsewhere / "quickstart.yaml").is_file() and done.returncode == 2
    assert "config file nowhere does not exist; megarl brings" in done.stderr and done.stderr.count("\n") == 1
