# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment in .venv, or take yours:
# `make test PYTHON=/path/to/python` installs fusae there and nothing else that it already has (also without network).

VENV   ?= .venv
PYTHON ?=
ifeq ($(PYTHON),)
  PY   := $(VENV)/bin/python
  ENV  := $(VENV)/.ready
else
  PY   := $(PYTHON)
  ENV  := $(VENV)/.given
endif
EXTRAS := test,triton,lm,text,report,tensorboard
RUN    ?= runs/demo
DEVICE ?= here

# On every core, where pytest-xdist is installed (it is in .venv).
ALL_CORES = $$($(PY) -c "import importlib.util as u; print('-n auto' if u.find_spec('xdist') else '')")

.PHONY: demo test test-kernels bench lint sanitize wheel clean

demo: $(ENV)
	OMP_WAIT_POLICY=passive $(PY) -m fusae demo --out $(RUN)

test: $(ENV)
	$(PY) -m pytest -q $(ALL_CORES) -m "not kernels"

test-kernels: $(ENV)
	$(PY) -m pytest -q -m kernels

bench: $(ENV)
	PYTHON=$(PY) bash benchmarks/all.sh --results benchmarks/results/$(DEVICE)

lint: $(ENV)
	$(PY) -m pip install -q ruff
	$(PY) -m ruff check python kernels tests benchmarks tools examples

# The CPU kernels under AddressSanitizer and UBSan, on the tests that reach them.
sanitize: $(ENV)
	bash tools/sanitize.sh $(PY)

wheel: $(ENV)
	$(PY) -m pip wheel . --no-deps -w dist

# The native sources are part of the rule: an edit there is rebuilt before anything runs.
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# An editable install does not see new files: their names are part of the rule too.
build/.names: always
	@mkdir -p build && find python kernels -name '*.py' | sort > $@.new
	@cmp -s $@ $@.new || cp $@.new $@; rm $@.new

.PHONY: always
always:

$(VENV)/.ready: $(NATIVE) build/.names tools/setup_env.sh
	bash tools/setup_env.sh $(VENV) "$(EXTRAS)"
	@touch $@

.PHONY: $(VENV)/.given
$(VENV)/.given:
	$(PYTHON) tools/install_here.py $(MAKECMDGOALS)

clean:
	rm -rf build dist $(VENV)/.ready
