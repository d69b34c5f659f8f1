# `make demo` trains and reports, `make test` runs every check; `make setup` is all they need, once.
# TORCH_INDEX: an index with CPU builds of torch, if the default one has only CUDA builds.
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3.11
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test setup clean

demo: .venv/run.stamp
	$(BIN)/polyak train $(DEMO_FLAGS)

test: .venv/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

setup: .venv/dev.stamp

# torch first: any package that depends on it would otherwise install the CUDA build.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) pip
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

.venv/run.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[all]'
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(PIP) --group dev
	touch $@

clean:
	rm -rf .venv build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
