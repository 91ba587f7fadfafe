"""What is released: the wheel and the source distribution hold what they should and nothing else."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# where a folder of the checkout is inside the installed package
FOLDERS = {"chela_plugin": "", "registry": "registry/", "kernels": "kernels/", "configs": "configs/"}
NOT_RELEASED = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}  # of the repository, not of the project

pytestmark = [
    pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no checkout"),
    pytest.mark.skipif(
        find_spec("build") is None or int(version("setuptools").split(".")[0]) < 77,
        reason="needs build and setuptools 77",
    ),
]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the project: known to git or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory) -> Path:
    """A folder with both, built as `python -m build` does but with the setuptools that is here, from a copy."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return out


def test_the_wheel_holds_every_source_file_of_the_package_and_nothing_else(tracked, built):
    wanted = set()
    for name in tracked:
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and name.endswith((".py", ".yaml", ".json", "py.typed")):
            wanted.add(f"chela_plugin/{FOLDERS[folder]}{rest}")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if not name.endswith("/")}
        about = {name for name in held if re.match(r"chela_plugin-[\w.]+\.dist-info/", name)}
        metadata = wheel.read(next(name for name in about if name.endswith("METADATA"))).decode()
        points = wheel.read(next(name for name in about if name.endswith("entry_points.txt"))).decode()
    assert held - about == wanted, sorted((held - about) ^ wanted)
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "LICENSE"} <= {name.rsplit("/", 1)[-1] for name in about}
    assert "chela_plugin/py.typed" in held
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "chela_plugin = chela_plugin.autoload:install" in points


def test_the_source_distribution_holds_the_whole_project(tracked, built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        held -= {member.name.split("/", 1)[-1] for member in archive.getmembers() if member.isdir()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("chela_plugin.egg-info/")}
    wanted = {name for name in tracked if name.split("/")[0] not in NOT_RELEASED}
    assert held - made == wanted, sorted((held - made) ^ wanted)


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version("chela-plugin")
    assert "2406.08128" in str(citation["references"])
