# make demo: a LoRA trained on the embedded model, in demo-output/.   make test: the tests.   make quick: those that are not slow (AGENTS.md).   Both make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick check docs site release clean

demo: $(READY)
	$(BIN)/chroma-trainer demo

# Bytecode is stored whatever the environment says: without it every process compiles all modules again (docs/decisions/0095).
test quick: export PYTHONDONTWRITEBYTECODE :=

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

quick: $(READY)
	$(BIN)/python -m pytest -m "not slow and not comfyui" -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/chroma_trainer  # pyproject.toml, [tool.pyright]
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/node_docs.py --check
	$(BIN)/python tools/locales.py --check
	$(BIN)/python tools/memory_page.py --check
	$(BIN)/python tools/architecture.py --check

docs: $(READY)
	$(BIN)/python tools/node_docs.py

site: $(VENV)/.ready-docs
	$(BIN)/mkdocs build --strict

release: $(READY)
	$(BIN)/python tools/release.py --out dist

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch -c constraints.txt
	$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	touch $(READY)

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install -q -e ".[docs]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) demo-output site
