# make serve   sets up everything, then serves the demo model on http://localhost:21002
# make test    sets up everything, then runs the checks and the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements$(shell $(PYTHON) -c 'import sys; print("" if sys.version_info >= (3, 11) else "-py310")').lock
STAMP := $(VENV)/.installed
CONFIG ?= serve_config.yaml
PYTEST_ARGS ?=

.PHONY: install serve test lint check browser-test load-test gpu-check demo-check train-demo lock clean

serve: $(STAMP)
	@$(BIN)/python -m deployments.preflight $(CONFIG)
	eval "$$($(BIN)/python -m deployments.ingress)"; RAY_USAGE_STATS_ENABLED=0 $(BIN)/serve run $(CONFIG)

test: lint check

check: $(STAMP)
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(STAMP)

# torch comes first and by itself: the lock's other packages must find it there, whichever build
# (CPU or CUDA) this machine's package index has.
$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("%s is Python %d.%d; 3.10 or newer is needed: make PYTHON=python3.11 ..." % (sys.executable, *sys.version_info[:2]))'
	@echo "Installing PyTorch, Ray and the rest into $(VENV), once; this takes some minutes"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $(LOCK))"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The playground in headless Chromium, which the system has to have (Debian: apt install chromium).
browser-test: $(STAMP)
	$(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

# guidellm asks the demo model about synthetic pictures through OpenAI's API. It has an environment of
# its own, since it pins what we do not; nothing but packages is downloaded.
GUIDELLM := $(VENV)-load/bin/guidellm
load-test: $(STAMP) $(GUIDELLM)
	$(BIN)/python -m benchmarks.load_test --guidellm $(GUIDELLM) $(LOAD_ARGS)

$(GUIDELLM):
	$(PYTHON) -m venv $(VENV)-load
	$(VENV)-load/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $(LOCK))"
	$(VENV)-load/bin/python -m pip install --quiet --disable-pip-version-check "guidellm[vision]==0.8.1"

# What one GPU can tell, within 20 minutes: the tests that need one, then everything that is measured
# (docs/gpu.md). Without a GPU: make gpu-check GPU_ARGS="--device cpu --scale tiny"
gpu-check: $(STAMP)
	$(BIN)/python -m pytest tests/unit/gpu $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m gpu tests/unit tests/parity --ignore tests/unit/gpu $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

# The gates of the demo model on thousands of held-out questions; minutes.
demo-check: $(STAMP)
	$(BIN)/python -m models.demo.evaluate

# From random weights to a demo checkpoint in ./llava-demo; 40 minutes on two cores.
train-demo: $(STAMP)
	$(BIN)/python -m models.demo.train

# Pins what is installed now.
lock: $(STAMP)
	{ grep '^#' $(LOCK); $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)

clean:
	rm -rf $(VENV) $(VENV)-load build *.egg-info .mypy_cache .ruff_cache .hypothesis
