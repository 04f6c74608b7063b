# One command to set up, one to check. `make demo` and `make test` work on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

CASES ?= 1700
KILLS ?= 60
SEED ?= 0

.PHONY: demo test slow fuzz conformance check docs format clean

$(STAMP): pyproject.toml constraints.txt tests/conformance/vision_operators.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "idap needs Python 3.11 or newer, found $$($(PYTHON) --version); run make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,vision,text,diffusion,onnx,tensorboard,test,check,docs]'
	$(BIN)/python tests/conformance/vision_operators.py  # torchvision beside a CPU build of torch
	touch $(STAMP)

demo: $(STAMP)  ## train two small networks on handwritten digits and compress them
	$(BIN)/idap demo

test: $(STAMP)  ## what must hold after each change, in under 10 minutes
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(STAMP)  ## what takes longer: pages run as a reader does, launched processes, kills, whole architectures
	$(BIN)/python -m pytest -n 2 -m slow

fuzz: $(STAMP)  ## 10,000 changed files that idap must refuse or read rightly, and 60 kills; about a quarter of an hour on two cores
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)
	$(BIN)/python -m tests.fuzz.kills --kills $(KILLS) --seed $(SEED)

conformance: $(STAMP)  ## every architecture, and what Torch-Pruning does with it; takes hours, writes docs/coverage.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m tests.conformance.run
	$(BIN)/python -m tests.conformance.run --peer
	$(BIN)/python -m tests.conformance.report

check: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation, into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
