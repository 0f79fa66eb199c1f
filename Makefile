# Every target sets the environment up first; that takes no time once it is done.

# Overridable: make PYTHON=... STACK=openmmlab
STACK ?= maintained
# A candidate must run, not only be found: version managers leave shims that only print an error.
# Python 3.11 comes first: the pinned stacks are used with it most.
RUNS := -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1
INTERPRETER := $(or $(PYTHON),$(shell for python in python3.11 python3.12 python3.10 python3 python; do \
	"$$python" $(RUNS) && echo "$$python" && break; done))
# Where tools/setup_env.py makes the environment of a stack.
VENV := .venv
ifneq ($(STACK),maintained)
VENV := .venv-$(STACK)-py$(shell '$(INTERPRETER)' -c 'import sys; print("%d%d" % sys.version_info[:2])')
endif
VENV_PYTHON := $(VENV)/bin/python
# Where it is set, each of the many processes below compiles all that it imports: 10 seconds, not 5.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup test stress lint docs demo golden clean

help:
	@echo "make setup             make .venv with the pinned stack (PYTHON=... picks the interpreter;"
	@echo "                       STACK=openmmlab: the upstream stack, in its own environment)"
	@echo "make test              run the tests (ARGS='-k masking' goes to pytest)"
	@echo "make stress            the long tests: 2,000 damaged checkpoints, many examples of the"
	@echo "                       properties, 20 times kill -9, a run of 3,500 steps (an hour and more)"
	@echo "make lint              ruff check and ruff format --check"
	@echo "make docs              build the site of docs/ into work_dirs/site"
	@echo "make demo              run the demo (QUICK=1 for the short one, MODEL=swinv2 for Swin V2,"
	@echo "                       ARGS=... goes to it)"
	@echo "make golden FILE=...   compare with a file of reference results"
	@echo "make clean             remove caches and build leftovers (ALL=1: work_dirs as well)"
	@echo "make help              this list"

setup:
	@if [ -z '$(INTERPRETER)' ]; then \
		echo "error: no Python 3.10, 3.11 or 3.12 in PATH. Install one (Debian/Ubuntu:" >&2; \
		echo "       apt-get install python3.11 python3.11-venv python3.11-dev), or name one:" >&2; \
		echo "       make setup PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi
	@'$(INTERPRETER)' tools/setup_env.py --stack '$(STACK)'

# Tests are many and small: two processes of one thread each beat one of two threads.
test: setup
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# One after the other: two cores are little, and time is one of the things that are measured.
stress: setup
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) tools/analysis/fuzz_checkpoints.py --cases 2000
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q --hypothesis-profile=stress \
		tests/test_ops/test_ops_properties.py tests/test_models/test_model_properties.py \
		tests/test_checkpoint/test_checkpoint_properties.py
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) tools/analysis/stress_interruption.py --kills 20
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) tools/analysis/long_run.py --pretrain 3000 --detect 500

lint: setup
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

# Strict: a link that leads nowhere is an error. The theme's notice on MkDocs' future is none.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --quiet --strict
	@echo "work_dirs/site/index.html"

demo: setup
	@$(VENV_PYTHON) tools/demo.py $(if $(QUICK),--quick) $(if $(MODEL),--model '$(MODEL)') $(ARGS)

golden:
	@test -n '$(FILE)' || { echo "error: FILE is not set; use make golden FILE=path" >&2; exit 2; }
	@test -f '$(FILE)' || { echo "error: FILE='$(FILE)' does not exist" >&2; exit 2; }
	@$(MAKE) --no-print-directory setup
	@$(VENV_PYTHON) -m pytest -q tests/golden --golden '$(FILE)' $(ARGS)

# work_dirs holds checkpoints that took long to train, so it goes only when asked for.
clean:
	@find . \( -path './.venv*' -o -path ./.git -o -path ./data -o -path ./work_dirs \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache build dist *.egg-info
	@$(if $(ALL),rm -rf work_dirs)
