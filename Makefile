# Two commands: `make demo` and `make test`. Each sets up .venv by itself, once.
# TORCH_INDEX: an index that holds CPU builds of torch, where the default one holds CUDA builds.
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3.11
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check setup clean

demo: .venv/run.stamp
	$(BIN)/polyak train $(DEMO_FLAGS)

test: .venv/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

setup: .venv/dev.stamp

# torch first: anything that depends on it would otherwise bring the CUDA build.
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
	rm -rf .venv build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
