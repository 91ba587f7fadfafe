"""Versions that CI does not run by default: `make test-matrix`, and `nox -s wheel`: the wheel without the checkout.

`oldest` installs the lower bounds of pyproject.toml, which this file reads; `newest` what the index has. Both on Python
3.10 and 3.13. Each session is the CPU suite in an environment of its own and takes 5 GB and some ten minutes.
"""

import re
import shutil
from pathlib import Path

import nox

PYPROJECT = nox.project.load_toml("pyproject.toml")
HOSTS = {"torch", "timm", "transformers", "flash-linear-attention"}
TOOLS = ["pytest", "pytest-xdist", "hypothesis"]
BESIDE_TESTS = ["tests", "docs", "benchmarks", "README.md", "mkdocs.yml", "CHANGELOG.md"]  # what tests read
nox.options.sessions = ["matrix"]
nox.options.default_venv_backend = "venv"


def lower_bounds(only: set[str] | None = None) -> list[str]:
    """'torch==2.8' for 'torch>=2.8', of the dependencies and the extra lm; `only` names some of them."""
    project = PYPROJECT["project"]
    found = []
    for line in [*project["dependencies"], *project["optional-dependencies"]["lm"]]:
        name, _, bound = re.fullmatch(r"([\w.-]+)(\[.*\])?>=([\w.]+).*", line).groups()
        if only is None or name in only:
            found.append(f"{name}=={bound}")
    return found


def suite(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", "-q", "-n", "2", "-m", "not gpu", env={"OMP_NUM_THREADS": "1"})


@nox.session(python=["3.10", "3.13"])
@nox.parametrize("versions", ["oldest", "newest"])
def matrix(session: nox.Session, versions: str) -> None:
    """The suite on the oldest and the newest versions that are promised."""
    # On Python 3.13 the oldest of the small dependencies have no wheels; 3.10 holds all lower bounds together.
    # The interpreter of the Triton that goes with the oldest torch turns arrays of one number into scalars, which numpy
    # refuses since 2.4; a GPU's kernels are not concerned.
    pins = [] if versions == "newest" else [*lower_bounds(None if session.python == "3.10" else HOSTS), "numpy<2.4"]
    # Editable: the checkout's chela_plugin/, which the tests' folder brings before the installed one, lacks the folders
    # that are part of the package only there (registry, kernels, configs).
    session.install(*pins, *TOOLS, "--editable", ".[lm,harness,deploy]")
    session.run("python", "-m", "pip", "list")
    suite(session)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel alone passes the tests: copied away from the checkout, they find the installed package only."""
    session.install("build")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), ".")
    built = next((folder / "dist").glob("*.whl"))
    session.install(*TOOLS, f"chela-plugin[lm,harness,deploy] @ {built.as_uri()}")
    # In an environment that is used again (nox -r), pip takes a wheel of the same version for the one it has.
    session.install("--no-deps", "--force-reinstall", str(built))
    away = folder / "away"
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir()
    for name in BESIDE_TESTS:
        source = Path(name)
        shutil.copytree(source, away / name) if source.is_dir() else shutil.copy(source, away / name)
    session.chdir(away)
    (away / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib\nmarkers = gpu: needs a CUDA device\n"
    )
    suite(session)
