# Everything runs in .venv, made by uv from the pins in constraints.txt; nothing but Python 3.11+ and make is needed beforehand.
# Commands are called as .venv/bin/…, never through `uv run`, which would make Ray rebuild the environment for each worker.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell for name in python3.11 python3.12 python3; do $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && { echo $$name; break; }; done)
EXTRAS ?= cpu,dalle2,clip-retrieval,ingest,s3,optuna,studio,text-metrics,docs,dev
UV_VERSION := 0.13.8
comma := ,
BIN := .venv/bin
STAMP := .venv/.installed
# Where Python may not write bytecode, each Ray worker would spend 7 s of CPU on compiling torch, Ray and transformers again.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
# Scripts of benchmarks/: those that stand beside a peer or count, two to three hours; those that learn, paint, are killed or are of published
# size, longer; and the arguments of each.
BENCH ?= kernels sd_steps overhead trainers text ingest resume verbs reorder embed dedup scale simulate memory
LONG = prompts clip_vit coca pictures_sd sd_lora pictures_dalle2 kills real_sizes
PROMPTS ?= ../shared/data/prompts.txt
SIZES ?= clip
# A folder with packages of peers, and the checkout of a former commit of ours whose start is measured beside this one's.
PEERS ?=
BEFORE ?=
MINUTES ?= 10
ARGS_clip_vit = runs/bench-clip_vit
ARGS_coca = runs/bench-coca
ARGS_dedup = --rows 10000 31600 100000 --repeat 3
ARGS_embed = ../shared/data/pomological --repeat 2 --count 256 --times 1 2 4
ARGS_gpu = runs/bench-gpu --compile
ARGS_ingest = --images 4000 --repeat 2 --size 512 1024 --shards ../shared/data/pomological/shards $(addprefix --peers ,$(PEERS))
ARGS_kills = runs/bench-kills
ARGS_memory = runs/bench-memory --minutes $(MINUTES)
ARGS_overhead = runs/bench-overhead --seconds 3.5 --starts 2 --repeat 7 $(addprefix --before ,$(BEFORE))
ARGS_pictures_dalle2 = runs/bench-pictures_dalle2
ARGS_pictures_sd = runs/bench-pictures_sd
ARGS_prompts = $(PROMPTS) runs/bench-prompts
ARGS_real_sizes = $(SIZES) runs/bench-real_sizes
ARGS_reorder = --rows 100000 1000000 10000000 --repeat 3
ARGS_resume = runs/bench-resume $(addprefix --peers ,$(PEERS))
ARGS_sd_lora = runs/bench-pictures_sd
ARGS_sd_steps = runs/bench-sd_steps --starts 2 --repeat 4 --seconds 6
ARGS_simulate = runs/bench-simulate --repeat 2
ARGS_text = $(PROMPTS) runs/bench-text
ARGS_trainers = runs/bench-trainers --seconds 3.5 --starts 2 --repeat 6
ARGS_verbs = runs/bench-verbs --repeat 2
ARGS_page =
# Where figures are recorded; RESULTS= records nothing.
RESULTS ?= benchmarks/results
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test test-all lint format bench bench-long docs pins clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .uv/bin/uv  ## Make or update the environment in .venv (EXTRAS=gpu,… chooses the extras)
	test -x $(BIN)/python || .uv/bin/uv venv --quiet --python "$(PYTHON)" .venv
	.uv/bin/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt $(COMPILE) --editable ".[$(EXTRAS)]"
	@touch $(STAMP)

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# The other targets make the environment if it is missing or if what it is made from has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install

demo: $(STAMP)  ## The main job end to end on generated data (5 minutes on 2 cores)
	$(BIN)/diptych demo

test: $(STAMP)  ## Unit and integration tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## Every test, the slow ones too
	$(PYTEST)

lint: $(STAMP)  ## ruff, mypy, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Speed beside the peers, at scale and in memory, then the page of all figures (BENCH="ingest scale" chooses)
	@failed=; for name in $(BENCH); do $(MAKE) --no-print-directory bench-$$name || failed="$$failed $$name"; done; \
	$(BIN)/python benchmarks/page.py $(if $(RESULTS),--results $(RESULTS)) || exit; \
	test -z "$$failed" || { echo "failed, or missed a goal:$$failed" >&2; exit 1; }

bench-long: $(STAMP)  ## What takes hours: learning, painting, kills, published sizes; then the page
	@$(MAKE) --no-print-directory bench BENCH="$(LONG)"

bench-%: $(STAMP)
	$(BIN)/python benchmarks/$*.py $(ARGS_$*) $(if $(RESULTS),--results $(RESULTS))

docs: $(STAMP)  ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pins: .uv/bin/uv  ## Renew constraints.txt after a change of dependencies (UPGRADE=--upgrade for newer versions)
	@sed '/^#/!d' constraints.txt > .constraints.new
	.uv/bin/uv pip compile --quiet --python-version 3.11.0 --no-annotate --no-header --no-emit-index-url $(UPGRADE) \
		$(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) --output-file constraints.txt pyproject.toml
	@cat .constraints.new constraints.txt > .constraints.all && mv .constraints.all constraints.txt && rm .constraints.new

clean:  ## Remove caches and built files (not .venv, not runs)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
