# Every target that needs the environment makes it first; see tools/setup_env.sh.
PYTHON_VENV := .venv/bin/python
PYTEST := $(PYTHON_VENV) -m pytest
# Two at a time, see tests/conftest.py.
PYTEST_SHARE ?= -n 2 --dist loadscope
# More pytest flags: make test PYTEST_ARGS="-k index -x"
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-extended test-gpu test-faults test-megatron test-recipes coverage lint docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: ## make .venv with all packages and build the data engine
	@bash tools/setup_env.sh

demo: setup ## train a small model with data weighting, start to finish
	@bash examples/demo.sh

test: setup ## run the tests of every change (see test-extended, test-gpu)
	$(PYTEST) --durations=10 $(PYTEST_SHARE) $(PYTEST_ARGS) tests

test-unit: setup ## run the quick tests only
	$(PYTEST) $(PYTEST_SHARE) $(PYTEST_ARGS) tests/unit

test-extended: setup ## run all tests, and what `make test` leaves out, as it takes long
	MEGATRON_DWM_TEST_EXTENDED=1 $(PYTEST) --durations=10 $(PYTEST_SHARE) $(PYTEST_ARGS) tests

# A GPU that the driver lists and torch cannot use is a broken machine, not a reason to skip.
test-gpu: setup ## run the GPU tests; without a GPU say so and succeed
	@if $(PYTHON_VENV) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		MEGATRON_DWM_TEST_GPU=1 $(PYTEST) -m gpu -rs $(PYTEST_ARGS) tests/functional; \
	elif nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
		echo 'test-gpu: nvidia-smi lists a GPU, but torch cannot use it: compare the driver with the CUDA version of torch' >&2; \
		exit 1; \
	else \
		echo 'test-gpu: skipped, no GPU was found'; \
	fi

# Another seed: make test-faults FAULTS=500 FAULT_SEED=7; saves in the background: FAULT_ASYNC=1
FAULTS ?= 200
FAULT_SEED ?= 20250711
test-faults: setup ## kill a real run at 200 random instants and compare (FAULTS=n, FAULT_SEED=n)
	FAULTS=$(FAULTS) FAULT_SEED=$(FAULT_SEED) FAULT_ASYNC=$(FAULT_ASYNC) $(PYTEST) -s $(PYTEST_ARGS) tests/functional/test_faults.py

MEGATRON ?= 0.19.0
test-megatron: setup ## run the contract tests against another Megatron (MEGATRON=release or checkout)
	bash tools/test_megatron.sh $(MEGATRON)

test-recipes: setup ## run every public recipe of docs/recipes.md at toy size
	RECIPES=all $(PYTEST) $(PYTEST_ARGS) tests/recipes

coverage: setup ## run the same tests, and report which lines of the package they reach
	.venv/bin/coverage erase
	.venv/bin/coverage run -m pytest $(PYTEST_SHARE) $(PYTEST_ARGS) tests
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report

lint: setup ## check style, spelling, types and layers
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m codespell_lib
	$(PYTHON_VENV) -m mypy megatron_dwm
	.venv/bin/lint-imports

docs: setup ## build the documentation as a site in build/site; warnings are errors
	@bash tools/docs/build.sh

clean: ## remove .venv, builds, caches and the examples' output
	rm -rf .venv .venv.lock .transformer_engine .megatron build dist demo_out smollm2_out *.egg-info
	rm -rf .coverage .coverage.* .import_linter_cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f megatron_dwm/_data_engine.*.so megatron_dwm/_version.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
