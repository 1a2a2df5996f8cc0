# Needs Python >= 3.11 and make; everything else is installed into .venv, pinned by the lock file.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Most tests wait for a server as much as they compute; those of one file share theirs.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test check format bench soak

run: $(INSTALLED)  ## serve the embedded model on http://127.0.0.1:8000
	CACHER_MODEL_NAME=$${CACHER_MODEL_NAME:-cacher-tiny} $(BIN)/cacher serve

test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

check: $(INSTALLED)  ## lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

format: $(INSTALLED)  ## format and sort
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## one table of ratios against plain transformers and plain sqlite3
	$(BIN)/python -m benchmarks

soak: $(INSTALLED)  ## the long versions of the tests of crashes and faults (SOAK_KILLS=500)
	SOAK=1 $(BIN)/python -m pytest --timeout 0 tests/end_to_end -m soak
	SOAK=1 $(BIN)/python -m pytest --timeout 0 tests/faults

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(INSTALLED)
