# Two commands: `make quickstart` trains a model, `make test` checks everything. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart text-quickstart test lint format clean

quickstart: .venv/.installed
	$(BIN)/python -m causalrn.fit --config configs/copy/quickstart.yaml

text-quickstart: .venv/.installed
	$(BIN)/python -m causalrn.fit --config configs/text/quickstart.yaml

test: .venv/.installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info causalrn/ops/_kernels.so

# torch first: on its own a package that needs it would bring the newest CUDA build.
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard causalrn/ops/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
