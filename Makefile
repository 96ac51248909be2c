# Every task of the project. CI calls these and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Spinning OpenMP threads slow everything tenfold as soon as two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

INSTALLED := $(VENV)/.installed
PACKAGES := server linker_core analysis configs

.PHONY: install check fix test clients programs dashboards screenshots gpu-check demo serve bench clean
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
	@$(MAKE) --no-print-directory programs
	$(BIN)/pytest $(PYTEST_ARGS)

# Real clients, each in an environment of its own outside of here, against two servers.
clients: $(INSTALLED)
	PYTHON=$(BIN)/python tests/clients/install.sh
	$(BIN)/pytest -m client tests/clients

# Programs that tests start: a registry in PostgreSQL, a Prometheus that scrapes, a browser that looks
# at the page. Where one is missing its tests are skipped, but with CI=true they fail.
programs:
	@missing=""; \
	command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
		|| missing="$$missing postgresql"; \
	command -v promtool >/dev/null || missing="$$missing prometheus"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	if test -z "$$missing"; then \
		true; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq --no-install-recommends $$missing \
		|| echo "These cannot be installed, and their tests are skipped:$$missing" >&2; \
	else \
		echo "Not here, and their tests are skipped:$$missing. On Debian: sudo make programs" >&2; \
	fi

# Grafana's dashboards, which are checked in; a test fails where they are not what this writes.
dashboards: $(INSTALLED)
	$(BIN)/python -m configs.grafana.generator

# The documentation's pictures of the page, over the demo's family.
screenshots: $(INSTALLED)
	@$(MAKE) --no-print-directory programs
	$(BIN)/python -m tests.browser.gallery

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
