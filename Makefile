# Everything runs from a virtual environment of its own; only python3 (3.11 or newer) has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled modules are kept, also where the environment says otherwise: tests start hundreds of interpreters.
PYTEST := PYTHONDONTWRITEBYTECODE= WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test check mutants long bench docs install clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

install: $(VENV)/.installed

# Train the demo model on a local Ray. Ray stays up for the next command; `down` ends it.
demo: install
	$(BIN)/python -m orchestrator submit experiment=demo --yes
	@echo 'Ray is still up: `$(BIN)/python -m orchestrator down` ends it.'

# Files of tests side by side, the long ones first; then those with a real Ray, which lie in three places.
RAY_TESTS := tests/cluster tests/orchestrator/test_cases_ray.py tests/test_namespaces.py
test: install
	$(PYTEST) -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not cluster'
	$(PYTEST) -q -n 2 --dist loadfile --no-loadscope-reorder -m cluster $(RAY_TESTS)

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -q tests/test_architecture.py tests/test_budgets.py tests/test_knobs.py tests/test_words.py tests/test_documentation.py

# Plants every defect of tests/mutants alone, and wants each found by its test.
mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# What takes longer than `test` may: all mutants, layouts and pairs of layouts, and stops, kills, culprits and crashes in numbers.
long: mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trainer.grid
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trainer.stop_and_go
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faulttol.grid
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faulttol.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faulttol.culprits --count 100
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.orchestrator.crashpoints
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster.crashes
	MEGARAY_LONG=1 $(PYTEST) -q -m long
	MEGARAY_LONG=1 $(PYTEST) -q tests/trainer/engines/test_engines.py

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench

docs: install
	$(BIN)/python -m tests.write_docs

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
