# make quickstart   installs into .venv, fine-tunes MoV on the bundled base model and evaluates it;
#                   METHOD=molora (or ia3, lora, full, …): the same with another method, in
#                   quickstart/molora
# make test         lint, types, the documentation and the fast tests
# make test-all     the same with the slow tests
# make t5x          adds T5X, at a tested commit;  make test-t5x: the tests inside T5X
# make docs         builds the documentation site in site/, and fails at a broken link
# make faults       kills runs, fills their disk, damages files and settings: about 20 minutes.
#                   For fewer cases: KILLS=1 (kills of each method), WRITES=2 (failing writes of
#                   each command), CASES=60 (damaged files of each reader, and odd settings)
# make soak         trains, evaluates and resumes in one process for an hour; MINUTES=5: for less
# make claims       runs the sweep of docs/reproduction.md, with results in /tmp/claims: one to two
#                   hours on two cores
# make bench-peers  installs torch with PEFT, and T5X, for `make bench`
# make bench        measures against them on a CPU, a quarter of an hour
PYTHON ?= python3
VENV ?= .venv
METHOD ?= mov
KILLS ?= 6
WRITES ?= 100
CASES ?= 2000
MINUTES ?= 60
BIN = $(VENV)/bin
# Python keeps compiled modules even if the environment forbids it: many processes of the tests
# import TensorFlow, and compiling its modules takes each of them 5 s.
unexport PYTHONDONTWRITEBYTECODE
# A variable, because a literal comma would end the argument of `call`.
T5X = .[test,t5x]

.PHONY: quickstart claims test test-all docs faults soak lint clean t5x t5x-install test-t5x bench bench-peers

quickstart: $(VENV)/.installed
	$(BIN)/pemoe train --gin_file=methods/$(METHOD).gin --gin_file=runs/quickstart.gin --gin.MODEL_DIR=quickstart/$(METHOD)
	$(BIN)/pemoe evaluate --gin_file=runs/quickstart_evaluate.gin --gin.MODEL_DIR=quickstart/$(METHOD) --gin.EVAL_OUTPUT_DIR=quickstart/$(METHOD)/results

claims: $(VENV)/.installed
	test -e quickstart/sentences || $(BIN)/pemoe embed --gin_file=runs/quickstart_embed.gin
	$(BIN)/pemoe sweep @sweeps/claims.txt --output=/tmp/claims --jobs=2

test: lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults/kills.py --record --each=$(KILLS)
	$(BIN)/python tests/faults/disk_faults.py --record --writes=$(WRITES)
	$(BIN)/python tests/faults/damaged_files.py --record --cases=$(CASES)
	$(BIN)/python tests/faults/odd_settings.py --record --cases=$(CASES)

soak: $(VENV)/.installed-test
	$(BIN)/python tests/faults/soak.py --record --minutes=$(MINUTES)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*
	$(BIN)/mypy

# Does nothing if T5X is installed. VENV=… selects another environment.
t5x:
	@$(BIN)/python -m pemoe_jax.t5x_bridge --check 2>/dev/null || $(MAKE) --no-print-directory t5x-install

t5x-install:
	$(call install,$(T5X))
	@$(BIN)/python -m pemoe_jax.t5x_bridge --requirements > $(VENV)/t5x.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $(VENV)/t5x.txt
	@$(BIN)/python -m pemoe_jax.t5x_bridge --check

test-t5x: t5x
	$(BIN)/python -m pytest tests/t5x_bridge

# Measures the rows of benchmarks/RESULTS.md that need no GPU. Run it on an idle machine.
bench: $(VENV)/.installed-test
	for script in molora_against_lora mov_against_ia3 mov_layer molora_formulation step_against_peft torch_mixture step_against_t5x score_choices api_rank sparse_step sparse_routing sparse_load startup; do \
	  $(BIN)/python benchmarks/$$script.py --json benchmarks/results/$$script.json || exit 1; done
	$(BIN)/python benchmarks/results.py

# Installs the peers: torch with PEFT, T5X, and flaxformer, which sparse_step.py measures.
# PEMOE_TORCH_PYTHON and PEMOE_T5X_PYTHON select other interpreters for them.
bench-peers: .venv-torch/.installed
	$(MAKE) t5x VENV=.venv-t5x
	.venv-t5x/bin/python -m pip install --quiet --disable-pip-version-check --no-deps aqtp==0.9.0 \
	  flaxformer@git+https://github.com/google/flaxformer@399ea3a85e9807ada653fd0de1a9de627eb0acde

.venv-torch/.installed: benchmarks/environments/torch.txt
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf $(VENV) .venv-torch .venv-t5x build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The environment is rebuilt when its sources change. --no-compile: modules are compiled when they
# are first imported, which saves 20 s of installation.
$(VENV)/.installed: setup.py constraints.txt pyproject.toml
	$(call install,.)
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt pyproject.toml
	$(call install,.[test])
	@touch $(VENV)/.installed $@

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; name another: make PYTHON=python3.11 ...")'
	@echo "Installing into $(VENV): a minute or two, about 3.3 GB"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '$(1)'
endef
