# make quickstart   fresh machine → a distilled student and a report
# make test         fresh machine → every check green
# make test PYTHON=python3.12    the same under another Python, without torch and TensorFlow

PYTHON ?= python3
SEED ?= 0
WORKERS ?= 2
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN = $(VENV)/bin
# The pinned set of everything holds for Python 3.11; newer Pythons get the core and what is lighter than torch.
FULL := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))')

export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-slow lint clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omniopd_jax needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/dev: $(BIN)/python pyproject.toml requirements.txt
ifeq ($(FULL),1)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
endif
	touch $@

quickstart: $(VENV)/core
	$(BIN)/python -m experiments.quickstart --seed=$(SEED) --workdir=runs/quickstart $(QUICKSTART_FLAGS)

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not browser'

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m 'slow or browser'

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
ifeq ($(FULL),1)
	# Types are checked against the pinned set; without torch and TensorFlow their imports could not be resolved.
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python
endif

clean:
	rm -rf .venv .venv-* runs build *.egg-info
