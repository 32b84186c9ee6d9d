# make demo: a question about a long document, answered on this machine.   make test: all tests.
# Both set up .venv once. PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .demo/model
INSTALLED := $(VENV)/installed

.PHONY: demo test lint format clean

demo: $(INSTALLED) $(MODEL)/config.json
	@$(BIN)/sglang-apb demo --directory .demo $(ARGS)

test: $(INSTALLED) $(MODEL)/config.json
	@SGLANG_APB_MODEL=$(abspath $(MODEL)) $(BIN)/pytest $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy sglang_apb patches kernels

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo logs

$(INSTALLED): pyproject.toml
	@PYTHON=$(PYTHON) launch/install.sh $(VENV)
	@touch $@

$(MODEL)/config.json: | $(INSTALLED)
	@$(BIN)/sglang-apb model smollm2 $(MODEL)
