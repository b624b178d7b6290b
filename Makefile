# Everything a newcomer types. Works with nothing but make and Python 3.11+.
#
#   PYTHON=/path/to/python3   the Python that .venv is made from (default: python3, else python3.13, 3.12, 3.11)
#   TORCH=system              keep the torch that this Python already has (a cluster's module, a container)
#   TORCH_INDEX=URL           take torch from this package index, for example PyTorch's index of CPU builds
#   RANKS=N                   processes that `make demo` trains with (default: one per GPU; one without any)
#   DEMO_OPTIONS="--optim.lr 1e-3"   more options of train/pretrain.py for `make demo`
#   TESTS="tests/model -k x"  what `make test` runs (default: everything)
#   JOBS=N                    processes that `make test` runs in (default: one more than cores, 8 at most)
#   UV=                       install with pip also where uv is there (UV=/path/to/uv: with this one)
#   FREE_GIB=N                GiB that must be free before an installation (0: any)

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test test-slurm lint format site clean environment dev-environment

PYTHON ?=
TORCH ?=
TORCH_INDEX ?=
FREE_GIB ?=
UV ?= uv
# nproc takes OMP_NUM_THREADS for the number of cores
CORES := $(shell unset OMP_NUM_THREADS OMP_THREAD_LIMIT; \
	nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
# auto:8: of the demo's 16 sequences a step each process must get as many as the others
# without GPUs one: its threads share all that two processes would have twice
RANKS ?= $(shell [ -e /dev/nvidia0 ] || [ -e /dev/kfd ] && echo auto:8 || echo 1)
# one more than cores: many tests wait for processes, files and clocks
JOBS ?= $(shell [ $(CORES) -gt 7 ] && echo 8 || echo $$(($(CORES) + 1)))
TESTS ?=
DEMO_OPTIONS ?=

BIN := .venv/bin
MAKE_ENVIRONMENT = python=$$(sh setup/find_python.sh "$(PYTHON)") && "$$python" setup/environment.py \
	$(if $(PYTHON),--match-python) $(if $(TORCH),--torch "$(TORCH)") \
	$(if $(TORCH_INDEX),--torch-index "$(TORCH_INDEX)") $(if $(FREE_GIB),--free-gib "$(FREE_GIB)") --uv "$(UV)"
LAUNCHER = $(BIN)/python train/launch.py --standalone --nproc_per_node=$(RANKS)
LAUNCH = $(if $(filter 1,$(RANKS)),$(BIN)/python,$(LAUNCHER))
# a mistake in them is told before the corpus, which takes minutes
DEMO_CONFIG = $(BIN)/python train/pretrain.py --config train/configs/demo.yaml $(DEMO_OPTIONS) --print_config
CHECK_OPTIONS = $(DEMO_CONFIG) >/dev/null
# with options the run's folder is what they say, and a line too long to be shown
QUIET = $(if $(strip $(DEMO_OPTIONS)),@)
FOLDER_OF_CONFIG = import sys, yaml; run = yaml.safe_load(sys.stdin)["run"]; print(run["root"], run["name"], sep="/")
DEMO_RUN = $(if $(strip $(DEMO_OPTIONS)),"$$($(DEMO_CONFIG) | $(BIN)/python -c '$(FOLDER_OF_CONFIG)')",runs/demo)

help:  ## show this
	@echo "make TARGET [VARIABLE=value …]"
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo "variables:"
	@sed -n 's/^#   /  /p' Makefile

demo: environment  ## .venv, a corpus, a small GPT trained on it, samples, plot, summary: 5 to 10 minutes
	$(if $(strip $(DEMO_OPTIONS)),@$(CHECK_OPTIONS))
	$(BIN)/python data_prep/docstrings.py --tokenizer gpt2-8k --out data/demo
	$(LAUNCH) train/pretrain.py --config train/configs/demo.yaml $(DEMO_OPTIONS)
	$(QUIET)$(BIN)/python eval/plot_loss.py $(DEMO_RUN)
	$(QUIET)$(BIN)/python eval/summary.py $(DEMO_RUN) $(if $(strip $(DEMO_OPTIONS)),,--require-margin 1.0)
	@$(if $(strip $(DEMO_OPTIONS)),echo "With DEMO_OPTIONS the demo's margin of 1.0 nats is not asked for.",:)

test: dev-environment  ## the test suite (TESTS= for a part)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slurm" $(TESTS)

test-slurm: dev-environment  ## the tests on a Slurm cluster of this machine's own (root; slurm-wlm munge iproute2)
	$(BIN)/python -m pytest -n 2 -m slurm $(or $(TESTS),tests/slurm)

lint: dev-environment  ## style, types, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh' .ci/run)
	$(BIN)/hadolint Dockerfile

format: dev-environment  ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: dev-environment  ## docs/ as a site in site/, its links checked
	$(BIN)/mkdocs build --strict --quiet

clean:  ## delete .venv and caches; data/ and runs/ stay
	rm -rf .venv .cache site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@$(MAKE_ENVIRONMENT)

dev-environment:
	@$(MAKE_ENVIRONMENT) --dev
