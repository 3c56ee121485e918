# Every target sets itself up: a machine needs Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
PARITY := .venv-parity/bin
# Turns off one of XLA's two CPU convolutions; an experimental flag, so never set in mljax itself.
XLA_CPU := --xla_cpu_experimental_ynn_fusion_type=-individual_convolution
# glibc keeps freed memory for the next step instead of having the kernel clear it anew (benchmarks/speed.md).
KEEP := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_ARENA_MAX=1

.PHONY: venv demo test slow timing torture parity bench notebook lint lock clean

venv: $(BIN)/.ready

$(BIN)/.ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

demo: venv
	XLA_FLAGS="$(XLA_CPU) $$XLA_FLAGS" $(BIN)/python -m mljax.main --config=configs/cmsg.py --workdir=runs/demo

# A file stays on one worker, so that what its tests share is compiled once.
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: venv
	$(BIN)/$(PYTEST)

slow: venv
	$(BIN)/$(PYTEST) -m "slow and not parity"

# Wall time and the slowest tests, from an empty compile cache; make timing TIMING=ci times all of .ci/run.
TIMING ?= test
timing: venv
	$(BIN)/python tools/timing.py $(if $(filter ci,$(TIMING)),.ci/run,$(MAKE) --no-print-directory $(TIMING))

# Reliability, counted (benchmarks/reliability.md), about 2 hours; a share of it: make torture TORTURE="--share=0.02"
TORTURE ?=
torture: venv
	$(BIN)/python -m benchmarks.torture $(TORTURE)

$(PARITY)/.ready: requirements.lock pyproject.toml
	test -x $(PARITY)/python || $(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers -c tools/parity-constraints.txt
	$(PARITY)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(PARITY)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

parity: $(PARITY)/.ready
	$(PARITY)/$(PYTEST) -m parity tests/parity

# Another config or machine: make bench BENCH="--config=configs/cmsg.py:voc2007 --dtype=bfloat16"
BENCH ?= --config=configs/baseline.py:voc2007 --batch=8 --size=224 --fold --against=torch
bench: $(PARITY)/.ready
	$(KEEP) XLA_FLAGS="$(XLA_CPU) $$XLA_FLAGS" $(PARITY)/python -m mljax.bench $(BENCH)

notebook: venv
	$(BIN)/python tools/run_notebook.py notebooks/tour.ipynb

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports --no-logo

lock:
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --no-annotate --generate-hashes --python-version 3.11 \
	  --extra test --extra notebooks --extra report pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .venv-parity runs
