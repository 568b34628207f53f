# make demo: virtual environment, install; the shipped models speak, two small models learn, one page to open.
# make test: the default tests. make lint: style and types. make docs: the documentation as pages, in site/.
# make clean: start afresh (runs, data and reports stay). CPU=1: torch without CUDA, whose libraries are 2.7 GB.

PYTHON ?= python3
VENV := .venv
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock
EXTRAS := --extra agent --extra av --extra dev --extra docs --extra play --extra test --extra wandb
NO_CPU_INDEX := no builds for CPUs only from $(CPU_INDEX): taking the usual ones

.PHONY: demo test lint docs lock clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m ct_audio demo

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.installed-docs
	rm -rf site_source && mkdir site_source
	git ls-files -z '*.md' '*.ipynb' '*.png' '*.yaml' '*.yml' '*.lock' '*.tsv' LICENSE | tar --null -T - -cf - | tar -xf - -C site_source
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.installed: setup.py requirements.lock
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
ifdef CPU
	$(PIP) --retries 1 --timeout 20 --index-url $(CPU_INDEX) torch torchaudio || echo '$(NO_CPU_INDEX)'
endif
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) --editable '.[$*]'
	touch $@

lock: # exact versions for all systems and all extras but rllib, which holds others back; UPGRADE=--upgrade takes the newest
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip compile setup.py $(EXTRAS) --universal --python-version 3.11 --no-annotate --no-header \
		--quiet $(UPGRADE) --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist site site_source *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
