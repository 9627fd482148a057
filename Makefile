# Everything a fresh machine needs: Python 3.11 or newer (PYTHON=... to choose one) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO := systems/alanine_dipeptide_vacuum/demo.yaml

.PHONY: demo test check bench notebooks clean

demo: $(VENV)/.installed  ## Alanine dipeptide from start to report
	$(BIN)/boltzgen run $(DEMO) --out runs/demo --overwrite
	@echo "The report: $(CURDIR)/runs/demo/report.html"

test: $(VENV)/.installed  ## The default test suite, on two cores; on more: make test WORKERS=8
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(VENV)/.installed  ## Style, types, import rules, tests, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p boltzgen
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest --doctest-modules boltzgen

bench: $(VENV)/.installed  ## Measured figures, printed and stored in benchmarks/results
	@set -e; for script in benchmarks/*.py; do case "$$script" in \
	  */reference_*|*/path_*|*/solute_paths.py|*/polymer_liquid.py|*/compare_profile.py|*/umbrella.py|*/hybrid_monte_carlo.py|*/liquid_order.py|*/stored.py|*/campaign_faults.py|*/calibration.py) ;; \
	  *) echo "== $$script"; $(BIN)/python "$$script" ;; \
	esac; done

notebooks: $(VENV)/.installed  ## Run the notebooks again, in place
	$(BIN)/python -c "import pathlib, nbformat; from nbclient import NotebookClient; \
	[(lambda book: (NotebookClient(book, timeout=1200, resources={'metadata': {'path': str(path.parent)}}).execute(), \
	nbformat.write(book, path)))(nbformat.read(path, as_version=4)) for path in sorted(pathlib.Path('notebooks').glob('*.ipynb'))]"

$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "boltzgen needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Choose another with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
