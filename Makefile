# `make demo` and `make test` set everything up by themselves in .venv, with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
# Where this is set, each of the many processes that tests start would compile every module again.
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
DEMO_OUTPUT ?= demo
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: bench-abuse bench-million demo test test-long check bench bench-serve bench-cost parity kernels wheel fuzz photos nvidia odir transfer study clean

demo: $(VENV)/.installed-train  ## synthetic photos -> train -> engine -> screen -> report
	@$(BIN)/fastfundus demo --output $(DEMO_OUTPUT) --overwrite

test: $(VENV)/.installed-dev $(VENV)/.installed-bindings  ## the default tests; pass more with ARGS="-k name"
	@$(PYTEST) $(ARGS)

test-long: $(VENV)/.installed-dev  ## the slow tests (four to six minutes); CI runs them, too
	@$(PYTEST) -m long $(ARGS)

check: $(VENV)/.installed-dev  ## format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

SUITES ?= prepare sample loader train engine screen
bench: $(VENV)/.installed-dev  ## against peers, interleaved (an hour; SUITES="sample loader" ten minutes); prepare, screen need FASTFUNDUS_DATA
	@for suite in $(SUITES); do \
		$(BIN)/python -m pytest bench/suites/bench_$$suite.py -m '' --benchmark-enable --benchmark-only --benchmark-json=$(VENV)/bench.json $(ARGS) && \
		$(BIN)/python -m bench.tables.report $$suite $(VENV)/bench.json || exit 1; done

bench-serve: $(VENV)/.installed-dev  ## memory of long runs, the server under load (twenty minutes)
	@$(BIN)/python -W ignore -m bench.suites.bench_serve && $(BIN)/python -m bench.tables.report

bench-abuse: $(VENV)/.installed-dev  ## the server among hostile clients (six minutes)
	@$(BIN)/python -W ignore -m bench.suites.bench_abuse

bench-million: $(VENV)/.installed-dev  ## listing, joining and splitting a million photos (three minutes)
	@$(BIN)/python -W ignore -m bench.suites.bench_million

bench-cost: $(VENV)/.installed-dev  ## scaling, and a check of the cost model on unseen networks and photos (ten minutes); needs FASTFUNDUS_DATA
	@$(BIN)/python -W ignore -m bench.suites.bench_cost && $(BIN)/python -m bench.tables.report

parity: $(VENV)/.installed-dev  ## differences between executors on the same photos (ten minutes); needs FASTFUNDUS_DATA
	@TRITON_INTERPRET=1 $(BIN)/python -m bench.evidence.parity && $(BIN)/python -m bench.tables.report

kernels:  ## the CUDA kernels, by nvcc, into csrc/build
	@$(MAKE) -C csrc fatbin library

wheel: $(VENV)/.installed-dev  ## sdist, and a wheel built from that sdist, in dist/
	@rm -rf dist build && $(BIN)/python -m build --outdir dist .

fuzz: $(VENV)/.installed-dev  ## damaged files for some minutes; EXAMPLES=3000 per test
	@FASTFUNDUS_FUZZ_EXAMPLES=$(or $(EXAMPLES),3000) $(BIN)/python -m pytest tests/photo/test_fuzz.py $(ARGS)

photos: $(VENV)/.installed-dev  ## field and quality on drawn and real photographs; needs FASTFUNDUS_DATA
	@$(BIN)/python -m bench.evidence.photos && $(BIN)/python -m bench.tables.report

nvidia: $(VENV)/.installed-dev  ## what NVIDIA's builder makes of every graph and precision (five minutes)
	@$(BIN)/python -W ignore -m bench.evidence.nvidia && $(BIN)/python -m bench.tables.report

odir: $(VENV)/.installed-dev  ## slow evidence on real photographs (about 15 minutes); needs FASTFUNDUS_DATA
	@$(BIN)/python -m bench.evidence.odir && $(BIN)/python -m bench.tables.report

transfer: $(VENV)/.installed-dev  ## upstream, then DR and vessels, from both starts (an hour); needs FASTFUNDUS_DATA
	@$(BIN)/python -m bench.evidence.transfer && $(BIN)/python -m bench.tables.report

study: $(VENV)/.installed-dev  ## the paper's question on real photographs (an hour); needs FASTFUNDUS_DATA
	@$(BIN)/python -m bench.evidence.study && $(BIN)/python -m bench.tables.report

# One stamp file per extra: the virtual environment is made once and grows when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fastfundus[$*] into $(VENV) (a minute or two the first time)"
	@$(PIP) --editable '.[$*]'
	@touch $@

# TensorRT's own bindings, two versions beside each other, against which our calls are checked; they are never
# executed.
TENSORRT_VERSIONS := tests/engines/tensorrt_versions.txt
$(VENV)/.installed-bindings: $(TENSORRT_VERSIONS) | $(VENV)/.installed-dev
	@for version in $$(cat $(TENSORRT_VERSIONS)); do rm -rf $(VENV)/tensorrt/$$version && $(PIP) --no-deps \
		--target $(VENV)/tensorrt/$$version tensorrt-cu13-bindings==$$version || exit 1; done
	@touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info
