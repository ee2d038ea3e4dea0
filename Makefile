# Two commands on a fresh machine with Python 3.11, make and a C compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

$(INSTALLED): pyproject.toml constraints.txt setup.py gradlens/kernels/native.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gradlens needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py --run runs/digits

# The tab's types and its accessibility are checked where there is npm; nothing that runs needs it.
node_modules: package.json
	if command -v npm >/dev/null; then npm install --no-package-lock --no-audit --no-fund --silent; fi
	mkdir -p $@ && touch $@

test: $(INSTALLED) node_modules lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) node_modules build *.egg-info runs
