# make train    install, train recipes/adder.yaml, show what it learned   (RECIPE=... ARGS="--section.key=value")
# make test     install, run every test but those of the extras, JOBS=2 at a time
# make extras   install other clients, trackers and the demo's page, run the tests of them
# make quality  check style and types
# make style    fix style
# make soak     run the long proofs
# make docs     install the site's tools, build the site into site/, every link checked

PYTHON ?= python3
RECIPE ?= recipes/adder.yaml
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
TRANSFORMERS := transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)

.PHONY: train test extras soak docs quality style install

train: $(INSTALLED) $(if $(findstring chat_adder,$(RECIPE)),data/chat_adder/train.jsonl)
	$(BIN)/python train.py $(RECIPE) $(ARGS)

test: $(INSTALLED) .venv/$(TRANSFORMERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not soak and not extras"

extras: .venv/extras .venv/transformers-4/installed
	$(BIN)/python -m pytest -m "extras and not soak"

soak: $(INSTALLED) .venv/$(TRANSFORMERS)
	$(BIN)/python -m pytest -m soak

.venv/extras: $(INSTALLED)
	$(INSTALL) ".[clients,trackers,demo,docs,slurm]"
	@touch $@

# Clients that need transformers 4 have an environment of their own.
.venv/transformers-4/installed: $(INSTALLED) tests/older_clients.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/older_clients.txt
	@touch $@

# transformers' own model tests come with its source distribution, not with its wheel.
.venv/$(TRANSFORMERS): $(INSTALLED)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest .venv \
		$(subst transformers-,transformers==,$(TRANSFORMERS))
	tar --extract --gzip --directory .venv --file .venv/$(TRANSFORMERS).tar.gz
	@touch $@

docs: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/docs: $(INSTALLED)
	$(INSTALL) ".[docs]"
	@touch $@

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

data/chat_adder/train.jsonl: scripts/make_conversations.py
	$(PYTHON) $< $(@D)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON: expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[dev]"
	@touch $@
