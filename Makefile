# make says what there is; each target sets up what it needs, in .venv.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/installed
ARGS ?=

.DEFAULT_GOAL = help
.PHONY: help demo test lint docs slurm clean

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

# One thread per process, and one test after another: many have ranks of their own, which share the cores. Those of SLURM
# mostly wait, so tests that leave them a core run beside them; on two cores that is 12 minutes instead of 21.
RANKS = tests/distributed tests/end_to_end tests/fault_tolerance
test: export OMP_NUM_THREADS = 1
test: $(READY) ## every test; ARGS="tests/data -k order" chooses
ifdef ARGS
	$(PY) -m pytest $(ARGS)
else
	@$(PY) -m pytest $(RANKS); ranks=$$?; \
	$(PY) -m pytest tests/slurm > $(VENV)/slurm.txt 2>&1 & slurm=$$!; \
	$(PY) -m pytest $(addprefix --ignore=,$(RANKS) tests/slurm); rest=$$?; \
	wait $$slurm; slurm=$$?; cat $(VENV)/slurm.txt; exit $$((ranks | rest | slurm))
endif

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

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

clean: ## removes .venv and caches, never runs/
	rm -rf $(VENV) .site .mypy_cache .ruff_cache .pytest_cache
