# setup, quickstart and test are all a newcomer needs; each is idempotent.
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup quickstart test test-all slurm-packages test-slurm test-slurm-all lint bench

setup: $(READY)

$(READY): pyproject.toml .ci/constraints.txt .ci/setup
	@bash .ci/setup && touch $@

quickstart: setup
	@time $(BIN)/patchmill quickstart

test: setup
	@time $(BIN)/pytest -m "not slow"

test-all: setup
	@time $(BIN)/pytest

# What tests/slurm starts a cluster of; without it they skip, as they do unless root runs them.
slurm-packages:
	@bash .ci/slurm-packages

test-slurm: setup
	@time $(BIN)/pytest -rs -m "not slow" tests/slurm

test-slurm-all: setup
	@time $(BIN)/pytest -rs tests/slurm

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The loader against FFCV's stock pipeline and PIL, on the quickstart's images.
bench: setup
	OMP_NUM_THREADS=1 $(BIN)/patchmill bench data runs/quickstart/data/train.beton runs/quickstart/data/train.jsonl --size 32
