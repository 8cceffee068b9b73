# Every target makes what it needs: `make demo` and `make test` work on a fresh clone. PYTHON chooses the interpreter of the
# environment; the variables of setup.py (RLHF_KERNELS_CUDA, RLHF_KERNELS_CPU, CXX, ...) reach the build through the environment.
PYTHON ?= python3
VENV ?= .venv
RESULTS_DIR ?= benchmarks/results
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES = pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-slow bench bench-scaling bench-check gpu lint peers clean

demo: $(VENV)/.ready
	$(RUN) -m rlhf demo

test: $(VENV)/.ready
	$(RUN) -m pytest -m "not slow"

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

# The ops at fixed sizes: table, JSON, CSV in Liger's columns and plots, 12 minutes on two cores; and over growing sizes,
# until peers would run out of memory or time, 25 minutes. Peers take part where `make peers` has made their environment.
BENCH_RUN = $(if $(wildcard .venv-peers/.ready),.venv-peers/bin/python,$(RUN))
BENCHED = ours products eager compile torch fused_fp32 trl liger cce verl
BENCH = $(BENCH_RUN) -m benchmarks --device cpu --providers $(BENCHED) --plots $(RESULTS_DIR)/plots
BENCH_FILE = $(RESULTS_DIR)/cpu-$$(date +%F)

bench: $(VENV)/.ready
	mkdir -p $(RESULTS_DIR)
	$(BENCH) --seconds 2 --json $(BENCH_FILE).json --csv $(BENCH_FILE).csv

bench-scaling: $(VENV)/.ready
	mkdir -p $(RESULTS_DIR)
	$(BENCH) scaling --json $(BENCH_FILE)-scaling.json --csv $(BENCH_FILE)-scaling.csv

# Fails where an op is slower against eager than benchmarks/regressions.json says of this machine; STORE=1 adds to it.
bench-check: $(VENV)/.ready
	STORE_RATIOS=$(STORE) $(RUN) -m pytest benchmarks/test_regressions.py -n0 --benchmark-enable --benchmark-columns=min,median,rounds

# For a machine with a GPU and no network: builds, tests and times with the interpreter and the packages that are there.
gpu:
	$(PYTHON) -m benchmarks.gpu --results-dir $(RESULTS_DIR)

lint: $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# torch first, at the version of constraints.txt: the build uses it, hence no isolation, and pip does not fetch another.
$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel ninja pybind11
	$(PIP) --no-build-isolation --editable ".[train,plots,test]"
	touch $@

# Other projects' formulas (tests/test_peers.py) and PPO trainer (benchmarks/peers) in environments of their own. The
# constraints keep their torch at ours; trl 1.12.0 is the trainer that the figures compare with. verl and OpenRLHF ask for
# vLLM, flash-attention and DeepSpeed: they come alone, and what the modules of theirs import that are compared.
peers: .venv-peers/.ready .venv-trl/.ready

.venv-peers/.ready: RUN = .venv-peers/bin/python
.venv-peers/.ready: $(SOURCES)
	$(PYTHON) -m venv .venv-peers
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel ninja pybind11
	$(PIP) --no-build-isolation --editable .
	$(PIP) "trl==1.16.*" liger-kernel cut-cross-entropy triton pytest matplotlib
	$(PIP) --no-deps "verl==0.9.*" "openrlhf==0.11.*"
	$(PIP) ray tensordict hydra-core codetiming orjson peft torchdata pylatexenc pillow
	touch $@

.venv-trl/.ready: RUN = .venv-trl/bin/python
.venv-trl/.ready: constraints.txt
	$(PYTHON) -m venv .venv-trl
	$(PIP) torch
	$(PIP) trl==1.12.0 transformers accelerate datasets rich
	touch $@

$(VENV)/.lint: $(VENV)/.ready
	$(PIP) ruff clang-format
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis rlhf_kernels/*.so rlhf_kernels/_build.json
	rm -rf $(VENV) .venv-peers .venv-trl
