# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
# one process per GPU, as many as deal the quickstart's 128 images evenly; without a GPU two processes on the CPU
PROCESSES ?= $(shell $(BIN)/python -c "import torch; print(1 << (torch.cuda.device_count() or 2).bit_length() - 1)" \
    2>/dev/null || echo 2)
LAUNCH = $(BIN)/accelerate launch --config_file launch/ddp.yaml --num_processes $(PROCESSES)

.PHONY: install quickstart test test-all soak test-slurm test-browser lint bench clean
.DELETE_ON_ERROR:

install: .venv/run  ## sptnet and what it needs into .venv, nothing else

quickstart: $(RUN)/kmeans/metrics.json $(RUN)/sptnet/finished  ## shard digits, train SimGCD then SPTNet, look
	@$(BIN)/sptnet report $(RUN)/kmeans $(RUN)/simgcd $(RUN)/sptnet --html $(RUN)/page.html
	@echo
	@echo "Open $(RUN)/page.html in a browser: what was discovered, as pictures."
	@echo "The runs are in $(RUN)/: metrics.jsonl has every step, predictions.npz every image."
	@echo "Next: $(BIN)/sptnet eval $(RUN)/sptnet   evaluates again;"
	@echo "      README.md, 'Sort your own photographs', takes yours in one command."

test: .venv/dev  ## the tests, with the environment they need (some 10 minutes on 2 cores)
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-all: .venv/dev  ## the tests that are marked slow too: more strategies and world sizes
	$(BIN)/pytest -m "not soak and not slurm and not browser"

soak: .venv/dev  ## a run killed a hundred times, and one continued from each strategy under each
	$(BIN)/pytest -m soak

test-slurm: .venv/dev  ## slurm/ and launch/slurm_node.sh on a Slurm cluster that is started for it (root, Debian)
	@echo "== installing Debian's Slurm"
	apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	    slurmctld slurmd slurm-client munge iproute2 util-linux shellcheck
	$(BIN)/pytest -m slurm tests/slurm

test-browser: .venv/dev  ## the page of a run in a real browser, without a network (root, Debian)
	@echo "== installing Debian's Chromium"
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver
	$(BIN)/pytest -m browser tests/browser

lint: .venv/dev  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

bench: .venv/run  ## time of a prompt step and a model step, beside the same steps written plainly
	$(BIN)/python benchmarks/steps.py

clean:  ## remove what the commands above made, the environment excepted
	rm -rf $(RUN) data/digits

.venv/run: pyproject.toml constraints.txt
	@echo "== installing into .venv (torch is large: minutes, about 6 GB)"
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is older than Python 3.11: make PYTHON=python3.11, or another")' \
	    && $(PYTHON) -m venv --clear .venv; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/run
	@echo "== installing what the tests need"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@mkdir -p .venv/typing && ln -sfn ../../shards .venv/typing/sptnet_shards
	@touch $@

data/digits/manifest.json: | .venv/run
	@echo "== sharding scikit-learn's handwritten digits into data/digits"
	$(BIN)/python shards/make_shards.py digits data/digits

$(RUN)/kmeans/metrics.json: data/digits/manifest.json
	@echo "== semi-supervised k-means on the pixels"
	$(BIN)/sptnet kmeans data/digits $(RUN)/kmeans

$(RUN)/simgcd/finished: data/digits/manifest.json
	@echo "== stage 1: SimGCD on $(PROCESSES) processes"
	$(LAUNCH) -m sptnet train configs/quickstart_simgcd.yaml

$(RUN)/sptnet/finished: $(RUN)/simgcd/finished
	@echo "== stage 2: SPTNet on $(PROCESSES) processes"
	$(LAUNCH) -m sptnet train configs/quickstart.yaml
