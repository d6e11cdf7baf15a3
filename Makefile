# Two commands are enough: `make demo` and `make test`. Both make the environment if it is missing.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
NOTEBOOKS := $(basename $(notdir $(sort $(wildcard notebooks/[0-9]*.ipynb))))

# Threads that wait sleep instead of spinning: several times faster where other programs share the
# cores, and no slower where none does.
export OMP_WAIT_POLICY ?= passive

# Ours, but broken, made half, or with the reidlib of another folder: it is not ready.
OURS := grep -qsF '$(CURDIR)/$(VENV)' $(VENV)/bin/activate
$(shell $(OURS) && ! $(PY) -Ic "import os, pip, reidlib as r; \
  assert os.path.samefile(r.__path__[0], 'reidlib')" 2>/dev/null && rm -f $(READY))

.PHONY: here help demo example gallery book book-alone book-run pages bench recompute test quick setup lab tensorboard notebooks lint format clean

help:           ## this list
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: setup     ## train and evaluate on the built-in data; scores and a ranked-list picture
	$(PY) -m reidlib run 03_train 04_evaluate -p recipe demo -p tag demo -p resume restart
	@$(PY) -m reidlib scores --baselines synthetic_batchhard_softplus_demo

example: setup  ## the committed run on the built-in data again, on one thread
	OMP_NUM_THREADS=1 $(PY) -m reidlib train --recipe demo --tag example --resume restart
	OMP_NUM_THREADS=1 $(PY) -m reidlib release synthetic_batchhard_softplus_example
	OMP_NUM_THREADS=1 $(PY) -m reidlib run 04_evaluate -p run synthetic_batchhard_softplus_example

gallery: setup  ## the README's pictures again, after `make demo`
	$(PY) -m reidlib run 04_evaluate 14_why_wrong -p run synthetic_batchhard_softplus_demo -p lists 1
	$(PY) docs/gallery.py synthetic_batchhard_softplus_demo

BOOK := OMP_NUM_THREADS=1 REID_OUTPUTS="$(CURDIR)/book/runs" $(PY)
ALONE := 00% 01% 02% 05% 11% 15% # need no run; the others take that of 03
book: setup $(VENV)/.book ## the notebooks, run on the built-in data, as a site: book/site/index.html
	rm -rf book docs/notebooks
	$(PY) -m reidlib data --dataset synthetic > /dev/null
	@$(MAKE) --no-print-directory -j2 book-alone book-run
	@$(MAKE) --no-print-directory pages

book-alone:
	$(BOOK) -m reidlib run $(filter $(ALONE),$(NOTEBOOKS)) --output docs/notebooks \
	  -p seeds 1 -p margins False -p ladder False -p queries 300 -p gallery_size 1000 -p batch 32

book-run:
	$(BOOK) -m reidlib run $(filter-out $(ALONE),$(NOTEBOOKS)) --output docs/notebooks \
	  -p run synthetic_batchhard_softplus

pages: setup $(VENV)/.book ## the book again, of notebooks that `make book` ran
	$(BOOK) docs/book.py
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -d book/doctrees docs book/site

$(VENV)/.book: pyproject.toml constraints.txt | $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book]"
	@touch $@

bench: setup $(VENV)/peers/.ready ## each part of the library beside its peers, as ratios
	$(PY) benchmarks/run.py

RUN ?= market1501_batchhard_softplus
recompute: setup $(VENV)/peers/.ready ## a released run's scores on Market-1501 by torchvision and torchreid
	$(PY) benchmarks/recompute.py $(RUN)

$(VENV)/peers/.ready: benchmarks/peers.txt $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/peers -r benchmarks/peers.txt
	@touch $@

test: setup     ## the whole test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

quick: setup    ## lint, unit tests, doctests and one kill-and-resume, in a minute or two: no kernel, no browser
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

setup: here $(READY) ## the environment alone, in .venv

here:
	@test ! -e $(VENV)/bin/activate || $(OURS) || \
	  { echo "$(VENV) was made in another folder and would run the code there: make clean removes it, make setup makes one for this folder."; exit 1; }

$(READY): pyproject.toml constraints.txt | here
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 setup"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { rm -rf $(VENV); echo "Python cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): on Linux this downloads several GB once, for torch with CUDA."
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $(READY)

lab: setup      ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

tensorboard: setup ## the four, the example and your runs side by side
	$(PY) -m tensorboard.main --samples_per_plugin images=100 \
	  --logdir "$$($(PY) -c 'from reidlib.look.board import overview; print(overview())')"

notebooks: setup ## every notebook headless, with the small parameters of the tests
	$(PY) -m reidlib run $(NOTEBOOKS) $$(cat tests/small_parameters.txt)

lint: setup     ## ruff on code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup   ## ruff's formatter, and notebooks stripped of their outputs, their figures' code folded
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) docs/fold.py notebooks/*.ipynb
	$(VENV)/bin/nbstripout --keep-id notebooks/*.ipynb

clean:          ## remove the environment, caches, the book and the built-in data; runs stay
	rm -rf $(VENV) book docs/notebooks data/synthetic data/people-* data/.cache .pytest_cache .ruff_cache *.egg-info
