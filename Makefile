VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUNS := $(VENV)/.octavo-runs
TESTS := $(VENV)/.octavo-tests
CHECK_FLAGS ?= -n 2 -q

.PHONY: demo test quick lint docs clean

demo: $(RUNS)           ## the headline case on the embedded CLIP
	$(BIN)/octavo demo

test: lint              ## everything
	$(BIN)/python -m pytest $(CHECK_FLAGS)

quick: lint             ## what is run all the time
	$(BIN)/python -m pytest $(CHECK_FLAGS) -m "not slow"

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# tensorrt is not made for every system: its tests are left out where it does not install.
# torch goes first and by its exact version, so that no other package chooses one.
$(RUNS): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[all]"
	touch $@

$(TESTS): $(RUNS)
	$(BIN)/python -m pip install -q -e ".[dev]"
	-$(BIN)/python -m pip install -q -e ".[tensorrt]"
	touch $@

clean:
	rm -rf $(VENV)
