# Three commands: `make demo` shows what Rung does, `make test` runs everything CI runs, `make bench` compares its speed.
.PHONY: demo test soak bench install dev clean
.DEFAULT_GOAL := demo

VENV := .venv
PEERS := .venv-peers
RUNG := $(VENV)/bin/rung

demo: install
	@HF_HUB_OFFLINE=1 $(RUNG) climb examples/finance/climb.yaml
	@echo "        (rung is in $(VENV)/bin: source $(VENV)/bin/activate)"

test: dev
	@scripts/check

soak: dev
	@scripts/check -m soak

# Three hours and more: nothing else should run beside it. BENCH="--only a,b --pairs 5 --resume" passes options on.
bench: install $(PEERS)/.installed
	@$(VENV)/bin/python -m benchmarks.bench $(BENCH)
	@$(if $(BENCH),,$(VENV)/bin/python -m benchmarks.groups)

install: $(VENV)/.installed

dev: $(VENV)/.dev

$(VENV)/.installed: constraints.txt pyproject.toml scripts/install
	@scripts/install $(VENV)

$(VENV)/.dev: constraints.txt pyproject.toml scripts/install
	@scripts/install $(VENV) dev

$(PEERS)/.installed: benchmarks/constraints-peers.txt scripts/install-peers
	@scripts/install-peers $(PEERS)

clean:
	rm -rf $(VENV) $(PEERS) .mypy_cache .pytest_cache .ruff_cache
