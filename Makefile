# make demo      installs latentcore into .venv and lets the bundled model speak
# make test      installs what the tests need and runs them
# make check     format, lint, types, import rules
# make sanitize  the native library's tests with AddressSanitizer and UndefinedBehaviorSanitizer
# make drift     breaks the contract in many ways, one at a time: each has to be noticed before any
#                weight is read
# make wheel     builds dist/latentcore-*.whl
# make clean     removes .venv and everything built

PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
# An index of PyTorch's builds without CUDA, where pip's own gives the large ones.
TORCH_INDEX ?=

NATIVE := CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
PACKAGE := pyproject.toml constraints.txt README.md LICENSE $(NATIVE) \
  $(shell find src -type f -not -name '*.py[cod]' -not -name '_C*' -not -path '*/.*')
CHECKED := src tests tools $(wildcard demo benchmarks)

unexport PYTHONPATH PYTHONHOME
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
MAKEFLAGS += --no-print-directory

.PHONY: demo test sanitize drift check format wheel clean install
.DELETE_ON_ERROR:

demo: $(STAMPS)/package
	@tools/demo.sh $(BIN)/latentcore

test: $(STAMPS)/test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

sanitize: $(STAMPS)/test
	tools/sanitize.sh $(BIN)/python $(PYTEST_ARGS)

drift: $(STAMPS)/dev
	$(BIN)/python tests/drift/run.py

check: $(STAMPS)/dev
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_ops_calls.py src
	$(BIN)/clang-format --dry-run --Werror $(filter-out CMakeLists.txt,$(NATIVE))

format: $(STAMPS)/dev
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/clang-format -i $(filter-out CMakeLists.txt,$(NATIVE))

wheel: $(STAMPS)/build
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

install: $(STAMPS)/package

clean:
	rm -rf $(VENV) build dist

$(STAMPS)/torch: constraints.txt tools/install_torch.sh
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"error: latentcore needs Python 3.11 or later, $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	tools/install_torch.sh $(BIN)/python '$(TORCH_INDEX)'
	@touch $@

$(STAMPS)/build: $(STAMPS)/torch pyproject.toml
	$(PIP) install -qq --upgrade $$($(BIN)/python tools/build_requires.py)
	@touch $@

# The library is built in build/, so that a second install compiles what changed and nothing else.
$(STAMPS)/package: $(STAMPS)/build $(PACKAGE)
	$(PIP) install -qq --no-build-isolation .
	@touch $@

$(STAMPS)/test: $(STAMPS)/package
	$(PIP) install -qq "latentcore[test]"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/package
	$(PIP) install -qq "latentcore[dev]"
	@touch $@
