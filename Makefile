# make says what there is; each target sets up what it needs, in .venv.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/installed
ARGS ?=

.DEFAULT_GOAL = help
.PHONY: help demo test test-all lint docs slurm clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^=#]*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

# The GPUs that are there decide the layout; without any, two ranks share the CPU.
demo: $(READY) ## trains a small Llama here, in about two minutes, and draws its loss curve
	@gpus=$$($(PY) -c 'import torch; print(torch.cuda.device_count())'); \
	case $$gpus in \
	  0|2|3) layout="parallel=fsdp2" ;; \
	  1) layout="parallel=single" ;; \
	  4|5|6|7) layout="parallel=fsdp4" ;; \
	  *) layout="parallel=fsdp8" ;; \
	esac; \
	set -x; $(PY) launch.py experiment=demo $$layout $(ARGS)

# One thread per process, for many tests have ranks of their own. One process of tests more than there are cores: tests of
# SLURM and of replica groups mostly wait. Each takes whole files, those of SLURM as one (tests/conftest.py).
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
SIDE_BY_SIDE = --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
test test-all: export OMP_NUM_THREADS = 1
test: $(READY) ## the suite; ARGS="tests/data -k order" chooses
ifdef ARGS
	$(PY) -m pytest $(ARGS)
else
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow"
endif

test-all: $(READY) ## every test: also the long programs and the largest products of layouts and options, marked slow
	$(PY) -m pytest $(SIDE_BY_SIDE)

# A SLURM of three pretend nodes on this machine, until Ctrl-C; it says what to type. Needs root, slurm-wlm and munge.
slurm: $(READY) ## a SLURM of three pretend nodes on this machine, until Ctrl-C
	$(PY) -m tests.slurm.cluster

lint: $(READY) ## ruff, ruff format and mypy (strict)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Without a network; a link that leads nowhere is an error. No analytics, no fonts, nothing from elsewhere is in a page.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY) ## the documentation as a site in .site, every link checked
	$(PY) -m mkdocs build --strict --quiet

# Without --no-compile pip translates 21,500 modules on one core, 100 s; Python does it with those that are imported.
$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --no-compile --requirement requirements.txt
	touch $@

clean: ## removes .venv and caches, never runs/
	rm -rf $(VENV) .site .mypy_cache .ruff_cache .pytest_cache
