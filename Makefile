# Two commands: `make demo` shows what Rung does, `make test` runs everything CI runs.
.PHONY: demo test soak install dev clean
.DEFAULT_GOAL := demo

VENV := .venv
RUNG := $(VENV)/bin/rung

demo: install
	@HF_HUB_OFFLINE=1 $(RUNG) climb examples/finance/climb.yaml
	@echo "        (rung is in $(VENV)/bin: source $(VENV)/bin/activate)"

test: dev
	@scripts/check

soak: dev
	@scripts/check -m soak

install: $(VENV)/.installed

dev: $(VENV)/.dev

$(VENV)/.installed: constraints.txt pyproject.toml scripts/install
	@scripts/install $(VENV)

$(VENV)/.dev: constraints.txt pyproject.toml scripts/install
	@scripts/install $(VENV) dev

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
