# Every task of the project. CI calls these and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Spinning OpenMP threads slow everything tenfold as soon as two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

INSTALLED := $(VENV)/.installed
PACKAGES := server linker_core analysis configs

.PHONY: install check fix test clients postgresql gpu-check demo serve bench clean
.DEFAULT_GOAL := install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two files at a time, since tests of servers mostly wait. `PYTEST_ARGS=tests/test_project.py` runs one.
PYTEST_ARGS ?= -n 2 --dist loadfile

test: $(INSTALLED)
	@$(MAKE) --no-print-directory postgresql
	$(BIN)/pytest $(PYTEST_ARGS)

# Real clients, each in an environment of its own outside of here, against two servers.
clients: $(INSTALLED)
	PYTHON=$(BIN)/python tests/clients/install.sh
	$(BIN)/pytest -m client tests/clients

# The registry is tested on PostgreSQL, too. Tests start their own server of these programs.
postgresql:
	@if command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then \
		true; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq --no-install-recommends postgresql \
		|| echo "PostgreSQL cannot be installed: its tests are skipped." >&2; \
	else \
		echo "No PostgreSQL here: its tests are skipped. On Debian: sudo make postgresql" >&2; \
	fi

# On a machine with a CUDA device; torch, transformers, accelerate, numba and pytest suffice.
gpu-check:
	$(PYTHON) -m pytest -o addopts= -m gpu tests/gpu

demo: $(INSTALLED)
	$(BIN)/linker demo $(ARGS)

serve: $(INSTALLED)
	$(BIN)/linker serve --config configs/default.yaml $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
