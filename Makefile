# Two commands are all a newcomer needs:  make demo   make test
PYTHON ?= python3
EXTRAS ?= cpu
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test long faults parity targets gpu-check lint docs clean

demo: $(VENV)/installed-$(EXTRAS)
	$(BIN)/gspo-jax demo

test: $(VENV)/installed-test
	XLA_FLAGS="$(XLA_FLAGS) $(FAST)" $(BIN)/python -m pytest -n 2 --dist loadfile \
	  -m "not long and not faults and not parity and not gpu and not targets"

# Nearly all of `make test` is compiling: most programs run once, on arrays of a few numbers.
FAST := --xla_backend_optimization_level=0

# What takes more than some seconds: whole runs, whole networks, many devices.
long: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m long

# What breaks runs: kills, signals, full disks and bit flips by the dozen; most of an hour.
faults: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m faults

# What can only be checked beside others: transformers' own logits and greedy tokens, what lm-eval
# is told, reasoning-gym's problems; and that the documentation builds.
parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -n 2 -m parity

# What programs compiled for GPUs and TPUs say. None needs to be here, but 2.3 GB of compilers, in an
# environment of their own: in any other jax would look for their devices and tell that it found none.
targets:
	@$(MAKE) --no-print-directory VENV=.venv-targets .venv-targets/installed-targets
	.venv-targets/bin/python -m pytest -n 2 --dist loadgroup -m targets

# Tests and benchmarks that need a GPU, in any environment that has jax for it; at most 9 minutes.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

# The documentation as a site: open docs/_build/html/index.html.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): 1.4 GB or more with what it needs; a few minutes, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build
