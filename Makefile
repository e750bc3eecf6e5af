# Two commands do all the set-up on a fresh machine, each on its own: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test lint format bench scale claims docs clean

# torch first and alone, so that nothing else decides which build of it is installed
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# One thread: the model is too small to gain from more, and threads that wait for a busy core cost far more than they give.
demo: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/moekit demo --output out/demo --overwrite

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Paging needs 30 GB of disk in WORK.
WORK ?= out/scale
bench: .venv/.ready
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/paging.py --work $(WORK)/paging

# Needs 40 GB of disk in WORK.
scale: .venv/.ready
	$(BIN)/python benchmarks/scale.py --work $(WORK)

# Hours of one core. A claim that does not hold is a result, not an error.
claims: .venv/.ready
	for key in $$($(BIN)/python -c 'from moekit.lab.experiments import available; print(*available())'); do \
		$(BIN)/moekit reproduce $$key || [ $$? = 1 ] || exit 2; done
	MOEKIT_SLOW=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/plan/test_fit_cap.py
	$(BIN)/python benchmarks/fit_frontier.py
	$(BIN)/python benchmarks/compression.py

docs: .venv/.ready
	$(BIN)/python -m moekit.cli.docs

clean:
	rm -rf .venv out
