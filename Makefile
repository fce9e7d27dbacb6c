# make demo: compare three schemes on the built-in corpus, in five minutes
# make sweep-demo: nine short runs, killed once on the way and resumed, and their report with statistics
# make test: the test suite
# make test-clients: the tests with other libraries (PEFT, TRL, lm-eval, torchao, ONNX, a server, Triton, Ray, gradio), which it
#   installs, then the matrix of clients beside Llama, into docs/clients.md; the page is tested where there is a Chromium.
#   VLLM_PYTHON names the Python of scripts/check_vllm.py
# make test-hf: transformers' own suites over the family and four of its own; writes docs/conformance.md
# make docs: the guides as a site, in the folder site, and the notebooks
# make release: the wheel and the sdist, in the folder dist, installed in a new environment and used in an empty folder
# All make a virtual environment in .venv first, with the versions that constraints.txt pins. The oldest versions that are
# supported: make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

.PHONY: demo sweep-demo test test-clients test-hf docs release

demo: $(VENV)/installed-sample
	rm -rf demo
	$(BIN)/hf-relpos compare --schemes none rotary linear_cpb --train_length 128 --run_length 1024 --budget 5min \
	    --output_dir demo

SWEEP := $(BIN)/python scripts/sweep.py --experiment experiments/demo.yaml --output_dir demo/sweep

sweep-demo: $(VENV)/installed-sample
	rm -rf demo/sweep demo/report
	timeout --signal=KILL 45 $(SWEEP); [ $$? -eq 137 ]
	@echo "killed after 45 seconds; the same command resumes:"
	$(SWEEP)
	$(BIN)/python scripts/report.py --sweep demo/sweep --output_dir demo/report --title "Three schemes, three seeds"

# one thread in each of two processes: two threads in one would leave the second core idle in most tests
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(VENV)/installed-test
	$(PYTEST)

# bertviz asks for boto3, of which it uses nothing and whose dependencies are older than ours
test-clients: $(VENV)/installed-test $(VENV)/installed-clients
	$(PYTEST) tests/test_clients.py tests/test_adapters.py tests/inference tests/model/test_triton.py tests/benchmarks/test_triton_compile.py \
	    tests/model/test_x_transformers.py tests/experiments tests/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps bertviz==1.4.1
	OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py

test-hf: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools wheel parameterized
	$(BIN)/python tests/hf_suite/run.py $(if $(TRANSFORMERS_REPO),--transformers_repo $(TRANSFORMERS_REPO))

docs: $(VENV)/installed-docs
	$(BIN)/python scripts/notebooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "wrote site/index.html"

release: $(VENV)/installed-release
	$(BIN)/python scripts/release.py --output_dir dist

# a marker per extra, older than what it was made from after a pull that changes the requirements
$(VENV)/installed-%: setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), this takes a minute or two"
	$(INSTALL) ".[$*]"
	@touch $@
