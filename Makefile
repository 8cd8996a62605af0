# Two commands: `make course` runs the course, `make test` proves it. Both do all set-up by themselves.
.DEFAULT_GOAL := help
.PHONY: help setup course test check lab docs bench results readme outputs measure clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# set-up is done again when what it depends on has changed: the requirements, or the place of this folder
STAMP := $(VENV)/.ready-$(shell { pwd; cat settings.ini setup.py; } | cksum | cut -d' ' -f1)
# Ray (417 MB) is needed by the tests of one lesson only, so `make test` installs it, and course and lab do without
SCALE_STAMP := $(STAMP:$(VENV)/.ready-%=$(VENV)/.scale-%)

export TF_CPP_MIN_LOG_LEVEL ?= 3
export TF_ENABLE_ONEDNN_OPTS ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
# nothing of the surroundings may stand in for what the set-up should have installed
unexport PYTHONPATH PYTHONHOME

help:
	@echo 'cxr_course: a chest X-ray deep-learning course that is also a library'
	@echo
	@echo '  make course    run every notebook on the built-in data and write the course as pages in _course/'
	@echo '  make test      prove it: layers, style, export, every notebook, the package in a fresh environment'
	@echo '  make lab       open JupyterLab at the first lesson'
	@echo '  make check     everything about one notebook, in under a minute: make check ONLY=07, ONLY=cam'
	@echo '  make docs      render the site in _site/ with Quarto'
	@echo '  make bench     speed against the usual ways, as ratios measured in one run'
	@echo '  make results   the chains of the five systems on real images: make results DATA=path/to/folder'
	@echo '  make readme    write README.md from nbs/index.ipynb'
	@echo '  make outputs   run the notebooks and store their results in them'
	@echo '  make measure   a table of the modules: lines, names, width, functions; REV=v1 for another revision'
	@echo '  make clean     remove what these commands made, and keep the environment'
	@echo
	@echo 'The first command you type sets everything up in .venv/ (a few minutes, about 3 GB); after it all of them work offline.'
	@echo 'It needs Python 3.11 or later.'
	@echo 'CXR_COURSE_SIZE=tiny make course    takes minutes, and its figures mean nothing; sample is the default; full takes a night'
	@echo 'make course ONLY="07 cam"           runs two notebooks, by number, topic, module or a part of the path'
	@echo 'make test ARGS="-k splits"           runs some tests'
	@echo 'make results DATA=folder LIST=1      says what would be run; ONLY="system_c system_d" SEEDS=1 for less'
	@echo 'make course PYTHON=/path/to/python  uses another Python'

setup: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo 'This course needs Python 3.11, 3.12 or 3.13, and found: $(or $(PYTHON),none).' >&2; \
	  echo 'Install one (https://www.python.org/downloads/, `apt install python3.11 python3.11-venv`, `brew install python@3.11`),' >&2; \
	  echo 'or name one: make $(or $(MAKECMDGOALS),course) PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'Setting up in $(VENV)/ (a few minutes, once) ...'
	@"$(PYTHON)" -m venv $(VENV) || { echo 'The environment could not be made. On Debian and Ubuntu: apt install python3.11-venv' >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet 'setuptools>=70.1,<81'
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]' || { echo 'The requirements could not be installed; the lines above say why. Run the same command again to try once more.' >&2; exit 1; }
	@rm -f $(VENV)/.ready-* && touch $@

course: $(STAMP)
	@$(BIN)/python -m tools.course $(ONLY)

$(SCALE_STAMP): $(STAMP)
	@echo 'Adding Ray for the tests of the lesson on several machines (417 MB, once) ...'
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev,scale]' || { echo 'Ray could not be installed; the lines above say why. Run the same command again to try once more.' >&2; exit 1; }
	@rm -f $(VENV)/.scale-* && touch $@

test: $(STAMP) $(SCALE_STAMP)
	@$(BIN)/python -m pytest tests --numprocesses 2 --dist loadgroup $(ARGS)

check: $(STAMP)
	@$(BIN)/python -m tools.check $(ONLY)

lab: $(STAMP)
	@$(BIN)/jupyter lab $(firstword $(sort $(wildcard nbs/lessons/*.ipynb)))

docs: $(STAMP)
	@command -v quarto >/dev/null || { \
	  echo 'The site is rendered by Quarto, which is not on this machine.' >&2; \
	  echo 'Get it from https://quarto.org/docs/get-started/ (1.4 or later) and run `make docs` again.' >&2; \
	  echo 'Everything else works without it; `make course` writes the notebooks as pages in _course/.' >&2; exit 1; }
	@$(MAKE) --no-print-directory readme
	@$(BIN)/nbdev_docs
	@echo 'open _site/index.html'

bench: $(STAMP)
	@for f in tests/bench_*.py; do echo "$$f"; $(BIN)/python $$f || exit 1; done

results: $(STAMP)
	@$(BIN)/python -m tools.results $(if $(DATA),"$(DATA)") $(if $(ONLY),--only $(ONLY)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(LIST),--list)

readme: $(STAMP)
	@$(BIN)/python -m tools.readme

outputs: $(STAMP)
	@$(BIN)/python -m tools.outputs $(ONLY)

measure: $(STAMP)
	@$(BIN)/python -m tools.measure $(if $(REV),--rev $(REV))

clean:
	@rm -rf _course _site _proc build dist *.egg-info .pytest_cache .ruff_cache nbs/.ipynb_checkpoints nbs/nbdev.yml
	@find nbs cxr_course tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
