# Every target sets up what it needs, once: a virtual environment in .venv with locked versions.
#   make demo    watch a tiny model improve by self-play (SEED=0)
#   make test    all tests with coverage
#   make lint    ruff and mypy
#   make chaos   every role dies at every point of a run, three times each, in sync and in async
#   make fuzz    a million damaged inputs against everything that reads files, configurations and verdicts
#   make bench   benchmarks: ratios of two things measured in one run
#   make lock    resolve requirements/*.txt anew

PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
READY := .venv/.ready
TRL := .venv-trl/.ready
UV := $(BIN)/uv
# uv does not read pip's find-links. Where none is set, PyTorch's own CPU index is the place for the CPU build.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH_FROM := $(if $(UV_FIND_LINKS),,--torch-backend cpu)
COMPILE := $(UV) pip compile pyproject.toml --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --upgrade

.PHONY: setup demo test lint format chaos fuzz bench lock clean

setup: $(READY)

$(READY): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "agon needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	@echo "installing into .venv (about 4 GB, once)"
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(TORCH_FROM) -r requirements/dev.txt
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: $(READY)
	$(BIN)/agon run seed=$(SEED)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=85

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(READY)
	$(BIN)/python -m tests.chaos
	$(BIN)/python -m tests.chaos --mode async

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --inputs 1000000 --seed $(SEED)

bench: $(READY) $(TRL)
	$(BIN)/python -m benchmarks

# The peer that the learner is compared with, in an environment of its own.
$(TRL): requirements/trl.txt | $(READY)
	@$(PYTHON) -m venv .venv-trl
	@$(UV) pip install --quiet --compile-bytecode --python .venv-trl/bin/python $(TORCH_FROM) -r requirements/trl.txt
	@touch $@

lock: $(READY)
	$(COMPILE) --extra cpu -o requirements/cpu.txt
	$(COMPILE) --extra cpu --extra dev -o requirements/dev.txt
	$(UV) pip compile requirements/trl.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --upgrade -o requirements/trl.txt
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS $(COMPILE) --extra gpu -o requirements/gpu.txt

clean:
	rm -rf .venv .venv-trl build dist *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache
