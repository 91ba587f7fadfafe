"""Every Python block of the README and of docs/ runs, and every path and link between pages exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
GPU = (
    "<!-- needs a GPU -->"  # stands on the line before a block that is not run here, where readers of the source see it
)
OWN_TEST = {"README.md", "compare-your-mixer.md"}  # tests/test_readme.py, tests/harness/test_walkthrough.py
SKETCH = "        ...\n"  # README's outline of a mixer: a body left out
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```python\n(?P<code>.*?)```", re.DOTALL)


def runnable(page: Path) -> str:
    blocks = BLOCK.findall("\n" + page.read_text(encoding="utf-8"))
    return "\n".join(code for before, code in blocks if before.strip() != GPU and SKETCH not in code)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OWN_TEST], ids=lambda page: page.name)
def test_the_pages_python_runs_from_top_to_bottom(page, tmp_path):
    code = runnable(page)
    if not code:
        pytest.skip("it has no Python")
    if "fla.models" in code:
        pytest.importorskip("fla")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3_000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text(encoding="utf-8")):
        drawn = page.name == "benchmarks.md" and target.endswith(".png")
        assert drawn or (page.parent / target).exists(), target


def test_every_page_is_in_the_sites_navigation():
    listed = re.findall(r"^  - .*: (.+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in PAGES if path.parent.name == "docs")
