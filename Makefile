# Two commands are all a newcomer needs:  make demo   make test
PYTHON ?= python3
EXTRAS ?= cpu
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test parity lint clean

demo: $(VENV)/installed-$(EXTRAS)
	$(BIN)/gspo-jax demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m "not parity"

# What can only be checked beside torch: transformers' own logits and greedy tokens.
parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -n 2 -m parity

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
