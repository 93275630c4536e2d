VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.octavo-ready

.PHONY: demo test quick lint setup clean

demo: setup          ## the headline case on the embedded CLIP
	$(BIN)/octavo demo

test: setup lint     ## everything
	$(BIN)/python -m pytest -n 2 -q

quick: setup lint    ## under two minutes
	$(BIN)/python -m pytest -n 2 -q -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(READY)

# torch goes first and by its exact version, so that no other package chooses one.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV)
