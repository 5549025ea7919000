# `make run` and `make test` are all the set-up there is: Python 3.10 or newer, and make.

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
CLIENTS := build/clients/ready
STORE := $(CURDIR)/.run
BASE := build/base.tar
STORAGE := build/storage.conf

.DEFAULT_GOAL := help
.PHONY: help setup clients run test test-fast test-all test-image image-report rollouts soak soak-serve soak-cache soak-kills fuzz lint bench \
  wheelhouse base-image lock clean

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1	\2/' | expand -t 16

setup: $(READY)  ## Create .venv with everything that running and testing need

$(READY): requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

clients: $(CLIENTS)  ## Create build/clients with clients of others, which need other versions than .venv has

$(CLIENTS): tests/clients/kserve.txt $(READY)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $<
	@touch $@

run: $(READY)  ## Log a small model, download it with download.py, serve it on PORT (8000)
	@mkdir -p $(STORE)
	MLFLOW_TRACKING_URI=sqlite:///$(STORE)/mlflow.db $(BIN)/python examples/log_iris.py $(STORE)/artifacts
	MLFLOW_TRACKING_URI=sqlite:///$(STORE)/mlflow.db MODEL_URI=models:/iris@champion OUTPUT_PATH=$(STORE)/models \
	  $(BIN)/python download.py
	@printf '\nOnce the log says that the model is ready, try in another terminal:\n\n  %s\n\n' \
	  "$$($(BIN)/python examples/curl_line.py $(STORE)/models $(PORT))"
	MODEL_LOCAL_PATH=$(STORE)/models MODEL_NAME=iris PORT=$(PORT) $(BIN)/python darwin_serve.py

# A process takes a file at a time, since tests of a file share servers.
JOBS := $(shell nproc)
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY) $(CLIENTS)  ## Run all tests, with the coverage floor; ARGS="-k cache" for some of them, without it
	@rm -f .coverage .coverage.*
ifdef ARGS
	$(BIN)/coverage run -m pytest $(ARGS)
else
	$(BIN)/coverage run -m pytest $(SPREAD) -m "not alone"
	$(BIN)/coverage run -m pytest -m alone
endif
	@$(BIN)/python -m tests.torn_coverage
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report $(if $(ARGS),--fail-under=0)

test-fast: $(READY)  ## Run the tests that start no process, without coverage, in two minutes
	$(BIN)/pytest -n $(JOBS) --dist worksteal --fast -rfE $(ARGS)

test-all:  ## Run all tests with each Python that is supported, an hour and a half
	for python in 3.10 3.11 3.12 3.13; do $(MAKE) test PYTHON=python$$python VENV=build/python$$python || exit 1; done

wheelhouse: $(READY)  ## Gather all that the image is built from, for building it without a network; ARGS="--help" says more
	$(BIN)/python -m image.wheelhouse $(ARGS)

base-image: $(BASE)  ## Make build/base.tar, a base image from a Debian mirror, as root, where no registry can be reached

$(BASE): image/base.sh
	image/base.sh $@

# Images that tests and the report make are none of the user's.
$(STORAGE):
	@mkdir -p $(@D)
	printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "/run/darwin-images"\n' $(CURDIR)/build/images > $@

test-image image-report: export CONTAINERS_STORAGE_CONF := $(CURDIR)/$(STORAGE)

# No network but loopback, of its own: whatever is built, pulled and asked there comes from this machine.
test-image: $(READY) $(BASE) $(STORAGE)  ## Build the image, and run its roles as containers, as root, without a network; ARGS as for test
	$(BIN)/python -m image.wheelhouse --model-requirements tests/image/requirements.txt
	unshare --net sh -c 'ip link set lo up && exec $(BIN)/pytest tests/image $(ARGS)'

image-report: $(READY) $(BASE) $(STORAGE)  ## Compare the image's size and packages with what others install, as root
	$(BIN)/python -m image.report

rollouts: $(READY)  ## Restart servers under load 20 times, RESTARTS says otherwise; no request may fail
	RESTARTS=$(or $(RESTARTS),20) $(BIN)/pytest tests/roles/test_rollout.py $(ARGS)

soak: soak-cache soak-kills soak-serve  ## Run these three

soak-serve: $(READY)  ## Serve mixed traffic for half an hour, MINUTES says otherwise; nothing may grow
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30)

soak-cache: $(READY)  ## Run the cache's simulation for a million steps, STEPS and SEED say otherwise
	$(BIN)/python -m tests.simulation --steps $(or $(STEPS),1000000) --seed $(or $(SEED),1)
	$(BIN)/python -m tests.simulation --steps $(or $(STEPS),1000000) --seed $(or $(SEED),1) --no-locks

soak-kills: $(READY)  ## Kill downloads and cleanups at every step, and at 300 random times; ask 100,000 mixed requests
	SHARE=1 $(BIN)/pytest tests/storage/test_crash.py tests/protocols/test_mixed_clients.py

fuzz: $(READY)  ## Feed a million inputs to all that reads requests, and try properties at length; RUNS and EXAMPLES say otherwise
	$(BIN)/python -m tests.fuzz all --runs $(or $(RUNS),1000000)
	EXAMPLES=$(or $(EXAMPLES),5000) $(BIN)/pytest -q tests/protocols/test_properties.py

lint: $(READY)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## Compare with other servers on two cores, an hour and a half; ARGS="--cases logistic-32" for some of it
	$(BIN)/python -m bench $(ARGS)

lock: $(READY)  ## Pin and hash dependencies, keeping what is pinned already; UPGRADE=1 takes the newest that pyproject.toml allows
	$(COMPILE) pyproject.toml $(addprefix --extra ,$(TESTED)) --group dev -o requirements/dev.txt
	$(call without,databricks-sdk) -o requirements/runtime.txt
	for flavor in $(TESTED) $(UNTESTED); do \
	  $(call without,databricks-sdk) --extra $$flavor -o requirements/$$flavor.txt || exit 1; done
	$(call without) --extra databricks -o requirements/databricks.txt
	$(COMPILE) --group sbom -o requirements/sbom.txt
	$(BIN)/python -m bench.lock $(if $(UPGRADE),--upgrade)
	for peer in original mlflow; do $(COMPILE) image/peers/$$peer.in -o image/peers/$$peer.txt || exit 1; done
	$(COMPILE) tests/clients/kserve.in -o tests/clients/kserve.txt

# The runtime and the flavors get the versions that the tests ran with. The untested are too large for every change.
TESTED := sklearn lightgbm xgboost catboost
UNTESTED := onnx pytorch tensorflow
COMPILE := $(BIN)/uv pip compile --quiet $(if $(UPGRADE),--upgrade) --universal --python-version 3.10 --generate-hashes \
  --no-annotate --no-header
# What packages ask for and import only where it is not needed here: CatBoost to plot, MLflow to look into git
# repositories and to talk to Databricks, which has a flavor of its own.
without = printf '%s\n' graphviz matplotlib plotly gitpython $(1) | \
  $(COMPILE) pyproject.toml -c requirements/dev.txt --excludes /dev/stdin

clean:  ## Remove everything that make made
	rm -rf $(VENV) $(STORE) build wheelhouse/*.whl .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
