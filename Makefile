# Three commands: `make demo` shows what Rung does, `make test` runs everything CI runs, `make bench` compares its speed.
.PHONY: demo test coverage oldest soak browser bench install dev clean
.DEFAULT_GOAL := demo

VENV := .venv
PEERS := .venv-peers
RUNG := $(VENV)/bin/rung

demo: install
	@HF_HUB_OFFLINE=1 $(RUNG) climb examples/finance/climb.yaml
	@echo "        (rung is in $(VENV)/bin: source $(VENV)/bin/activate)"

test: dev
	@scripts/check

# A third slower. Lines and branches of what runs in the tests' own processes; below 90 % it fails.
coverage: dev
	@scripts/check --cov=rung --cov-branch --cov-report=term --cov-fail-under=90

soak: dev
	@scripts/check -m soak

# The pages in a browser: Playwright and axe, with a Chromium of this machine (apt-get install chromium, or CHROMIUM=PATH).
browser: dev
	@PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 scripts/install $(VENV) browser
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -rs tests/browser

# The tests with the oldest versions that pyproject.toml allows, in an environment of their own.
oldest:
	@CONSTRAINTS=constraints-oldest.txt scripts/install $(VENV)-oldest dev
	@OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

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
	rm -rf $(VENV) $(VENV)-oldest $(PEERS) .mypy_cache .pytest_cache .ruff_cache
