# Everything runs in .venv, which the first target that needs it makes.
#   make PYTHON=python3.12 tour     another Python (3.11 to 3.13)
#   make tour QUICK=1 DATA=fashion_mnist
#   make test WORKERS=4 ARGS="-k rope"

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DATA ?= openmoji
QUICK ?=
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HYGIENE := --keep-output --keep-count --keep-id \
	--extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution"

.DEFAULT_GOAL := help
.PHONY: help env tour lab test lint floors mutants kills fuzz bench race site badges

help:  ## this list
	@awk -F ':.*##' '/^[a-z]+:.*##/ {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY)  ## make .venv, or bring it up to date with pyproject.toml

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); \
	sys.exit(None if ok else f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 to 3.13 is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

tour: $(READY)  ## the main job: two small models, image sizes never trained on; QUICK=1 for a short one
	$(BIN)/hjepa tour --data $(DATA) $(if $(QUICK),--quick)

lab: $(READY)  ## JupyterLab on this machine only, with a token
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=$(CURDIR) \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

test: $(READY)  ## the tests, and every notebook compared with its saved outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout 300 \
		--numprocesses $(WORKERS) --dist loadfile $(ARGS)

lint: $(READY)  ## style, types, notebooks without stray metadata
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify $(HYGIENE) notebooks/*.ipynb

floors: $(READY)  ## a short test on the oldest versions that pyproject.toml declares
	$(PYTHON) -m venv $(VENV)-floors
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
		> "$$($(VENV)-floors/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(VENV)-floors/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement tests/floors.txt
	PYTHONPATH=. OMP_NUM_THREADS=1 timeout 240 $(VENV)-floors/bin/python tests/floors.py

mutants: $(READY)  ## break the code on purpose, and see that the tests notice
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(ARGS)

kills: $(READY)  ## kill training, sweep and tour at random moments, and see that nothing is lost
	$(BIN)/python tests/kills.py $(ARGS)

fuzz: $(READY)  ## feed damaged and random input to everything that reads input
	$(BIN)/python tests/fuzz.py $(ARGS)

bench: $(READY)  ## time the package against its peers
	$(BIN)/python -m benchmarks $(ARGS)

race: $(READY)  ## minutes of training until a probe of photographs reads .50, as a row of benchmarks/race.csv
	$(BIN)/python -m benchmarks.race $(ARGS)

site: $(READY)  ## build the site into docs/_build/html
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

badges: $(READY)  ## first cells and badges of the notebooks, as [project.urls] of pyproject.toml says
	$(BIN)/python notebooks/hosted.py
