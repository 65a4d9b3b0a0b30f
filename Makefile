# What can be done with a checkout of runfs. `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
# `make demo S3=1`: the second store is a SeaweedFS S3 server instead of a directory.
S3 ?=
# Test files run at a time: most of a test's time is waiting for disks and deadlines.
WORKERS ?= 4
# `make soak MINUTES=60`: how long.
MINUTES ?= 10
# `make bench QUICK=1` takes a few minutes; B holds more options of it.
QUICK ?=
B ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# One section of requirements.lock, installed exactly: every hash must match, and nothing that is not in the file comes along.
install-section = sed -n '/^\# section: $(1)$$/,/^\# section: /p' requirements.lock >$(VENV)/requirements-$(1).txt \
	&& $(PIP) install --quiet --no-deps --require-hashes -r $(VENV)/requirements-$(1).txt

.DEFAULT_GOAL := help
.PHONY: help install test test-large soak check audit demo bench lock clean system

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

install: $(VENV)/.runtime  ## system packages that are missing, .venv, and the runfs command in it
	@echo "Installed. Next: $(VENV)/bin/runfs mount MOUNTPOINT --project DIR --store URL   (or see it work: make demo)"

test: $(VENV)/.test  ## all tests, several files at a time (T='-k words' or T=tests/test_x.py picks some)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(T)

test-large: $(VENV)/.test  ## objects of 5 GiB and listings of a million names, against real servers (minutes, 25 GB)
	RUNFS_TEST_LARGE=1 $(VENV)/bin/python -m pytest tests/stores/test_large.py tests/stores/test_remote.py -k "large or very_many" --durations=8

soak: $(VENV)/.test  ## readers, writers, evictions and faults together for MINUTES=n; then more of the model, kills and power cuts
	$(VENV)/bin/python -m tests.soak $(MINUTES)
	MODEL_EXAMPLES=$$(( $(MINUTES) * 4 )) CRASH_ROUNDS=$$(( $(MINUTES) * 2 )) POWER_CUTS=$$(( $(MINUTES) * 5 )) \
		$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/model tests/crash

check: $(VENV)/.test  ## lint (security rules too), format, types, imports from daemon to vfs only, dependencies locked
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/test_architecture.py tests/test_dependencies.py

audit: $(VENV)/.test  ## ask the advisory service of PyPI about what is locked (needs the network; not a part of check)
	$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-audit
	sed '/^#/d' requirements.lock >$(VENV)/requirements-all.txt
	$(VENV)/audit/bin/pip-audit --require-hashes --disable-pip --requirement $(VENV)/requirements-all.txt

demo: $(VENV)/.demo  ## the main job on a small real project, step by step (S3=1: against a real S3 server)
	$(VENV)/bin/python -m daemon.demo $(if $(filter-out 0,$(S3)),--s3)

bench: $(VENV)/.bench  ## runfs beside the native file system, bare S3, rclone, JuiceFS and s3fs (QUICK=1: a few minutes; B='--only cold')
	$(VENV)/bin/python -m tests.bench $(if $(filter-out 0,$(QUICK)),--quick) $(B)

lock: $(VENV)/.runtime  ## write requirements.lock anew from pyproject.toml (UPGRADE=1: with the newest versions)
	$(PYTHON) -m venv $(VENV)/lock && $(VENV)/lock/bin/python -m pip install --quiet uv
	UPGRADE=$(UPGRADE) .ci/lock $(VENV)/lock/bin/uv

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

system:
	@.ci/system-packages $(PYTHON)

$(VENV)/.runtime: requirements.lock pyproject.toml | system
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing what runfs needs into $(VENV)"
	@$(call install-section,runtime)
	@$(PIP) install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.runtime
	@echo "Installing what the demo needs into $(VENV)"
	@$(call install-section,demo)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@.ci/system-packages $(PYTHON) tests
	@echo "Installing what the tests need into $(VENV)"
	@$(call install-section,test)
	@$(PIP) check
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@.ci/system-packages $(PYTHON) bench
	@echo "Installing what the benchmarks need into $(VENV)"
	@$(call install-section,bench)
	@touch $@
