# Two commands from a bare clone: `make demo` and `make test`. Each installs what it needs into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= runs/demo

.PHONY: demo test lint test-gpu sanitize test-matrix timm-suite docs wheel install clean
.DEFAULT_GOAL := test

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[lm,harness,deploy,dev]'
	touch $@

# Two ablations on real data, four to six minutes on two cores; start it again and it goes on where it was.
demo: $(INSTALLED)
	$(BIN)/chela ablate digits bytes --out $(OUT)

# The Triton kernels' own tests run here under the interpreter; with a GPU there is test-gpu.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m 'not gpu'

# Fails without a device, and names what it skipped (peers that are not installed).
test-gpu:
	$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make test-gpu needs a CUDA device')"
	$(PYTHON) -m pytest -q -rs -m gpu tests/gpu tests/mixers

# Every Triton kernel at small shapes under compute-sanitizer, on a GPU; then a look at what ptxas made of them.
sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/gpu/sanitizer_cases.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tests/gpu/sanitizer_cases.py
	$(PYTHON) tests/compiler_faults.py

# Versions that CI doesn't run: oldest and newest, Python 3.10 and 3.13 (noxfile.py).
test-matrix: $(INSTALLED)
	$(BIN)/nox

# timm's own tests/test_models.py, unchanged, over our models (tests/vision/timm_suite.py). TIMM is a checkout of timm at
# the tag of the installed version; without one the source distribution of that version is fetched, once.
TIMM_VERSION = $(shell $(BIN)/python -c "from importlib.metadata import version; print(version('timm'))")
TIMM ?= build/timm-$(TIMM_VERSION)

timm-suite: $(INSTALLED)
	test -d $(TIMM) || { mkdir -p build/sdist && \
	    $(BIN)/python -m pip download --quiet --no-deps --no-binary timm --dest build/sdist timm==$(TIMM_VERSION) && \
	    tar -xzf build/sdist/timm-$(TIMM_VERSION).tar.gz -C build; }
	OMP_NUM_THREADS=1 PYTHONPATH=tests/vision $(BIN)/python -m pytest -q -n auto -p timm_suite -p no:cacheprovider \
	    -W ignore $(TIMM)/tests/test_models.py

# import-linter sees the package as users get it, so it looks at an installed copy.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build/installed build/lib
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed .
	cd build/installed && $(abspath $(BIN))/lint-imports --config ../../pyproject.toml --no-cache

# The documentation's site, in site/.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	rm -rf build/installed build/lib
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed .
	$(BIN)/python -m mkdocs build --strict

# What a user gets: the wheel alone in a clean venv, without the checkout.
wheel: $(INSTALLED)
	rm -rf dist build/clean
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --upgrade pip
	build/clean/bin/python -m pip install --quiet dist/*.whl
	cd build/clean && bin/python -c "import timm; model = timm.create_model('chela_vit_small'); print(type(model).__module__, sum(p.numel() for p in model.parameters()))"
	cd build/clean && bin/chela mixers
	rm -rf build/clean

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
