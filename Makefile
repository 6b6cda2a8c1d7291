# make demo    the main job: a real S3 server, a cold load, a warm load, a picture
# make test    the tests that take seconds at most; ten minutes on two cores
# make test-all   all of them, as CI does: half an hour
# make check   lint, formatting, types
# make bench   weightstream against its peers
# make bench-swarm   N nodes on shaped links; root
# make bench-serve   starts, moves, scaling and compaction of Ray Serve replicas; root
# make build   wheel and source archive, in dist/
#
# Each verb makes what it needs in .venv first. Arguments: make test ARGS="-k store -x"

PYTHON ?= python3
ARGS ?=
# What pip installs for torch; may hold options too. It goes in first, so that no dependency pulls
# another build: a plain `torch` may bring gigabytes of CUDA. A build of your own: TORCH="./my.whl".
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
export PYTHON

.PHONY: help demo test test-all check bench bench-swarm bench-serve build docs clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.demo
	$(BIN)/weightstream demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

bench: $(VENV)/.bench
	$(BIN)/weightstream bench $(ARGS)

bench-swarm: $(VENV)/.bench
	$(BIN)/python -m weightstream.bench.cluster.run $(ARGS)
	$(BIN)/python -m weightstream.bench.cluster.pair
	$(BIN)/python -m weightstream.bench.agent

bench-serve: $(VENV)/.bench
	$(PIP) install --editable '.[serve]'
	$(BIN)/python -m weightstream.bench.serve.run $(ARGS)
	$(BIN)/python -m weightstream.bench.serve.fleet
	$(BIN)/python -m weightstream.bench.serve.burst
	$(BIN)/python -m weightstream.bench.serve.planner

build: $(VENV)/.test
	$(BIN)/python -m build --no-isolation --outdir dist .

docs: $(VENV)/.test
	$(BIN)/python -m weightstream.cli.docs docs/CONFIGURATION.md

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --group needs pip 25.1; Debian 12 has 23.
$(VENV)/.base: scripts/need
	@scripts/need ensurepip=python3-venv
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("weightstream needs Python 3.11 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) install --editable '.[torch,demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	@scripts/need nginx=nginx-light curl=curl ip=iproute2 openssl=openssl fusermount3=fuse3 || echo 'the tests that need them are skipped' >&2
	$(PIP) install --editable '.[torch,demo]' --group dev
	@touch $@

$(VENV)/.bench: $(VENV)/.base pyproject.toml
	@scripts/need nginx=nginx-light tc=iproute2 curl=curl fusermount3=fuse3 s3fs=s3fs || echo 'the scenarios that need them are left out' >&2
	$(PIP) install --editable '.[torch,demo,bench]'
	$(PIP) install 'fuse-python>=1.0.9' || echo 'the driver fuse-python is left out' >&2
	@touch $@
