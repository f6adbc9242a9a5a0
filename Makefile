# Each target sets up everything it needs: Python 3.11 or later and make are enough.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= quickstart
SCENES ?= runs/scenes
BIN := $(VENV)/bin
READY := $(VENV)/ready
LOWEST := $(VENV)-lowest

.PHONY: help quickstart test test-all test-lowest test-diffusers-versions ablate docs bench bench-loading bench-mixers bench-operators bench-ordering bench-noise bench-depth bench-pixart bench-planner bench-training testbed testbed-second testbed-scenes text-to-image fuzz gpu release lint clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt diffusers_graft_cli.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment could be made. Where ensurepip is missing (Debian, Ubuntu): apt install python3-venv"; exit 1; }
	@# torch on its own, before anything else can ask for a larger build of it
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	@touch $@

quickstart: $(READY) ## From a pretrained model to a shared graft, in a few minutes
	$(BIN)/diffusers-graft quickstart --output $(OUTPUT)

test: $(READY) ## The test suite
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-all: $(READY) ## The test suite with the long tests
	$(BIN)/python -m pytest -q -m 'long or not long'

test-lowest: ## The tests of sites, operators, grafts and files under the lowest versions that are declared
	@[ -f $(LOWEST)/ready ] || { $(PYTHON) -m venv $(LOWEST) && \
		$(LOWEST)/bin/pip install -q --disable-pip-version-check -r tests/lowest_versions.txt && \
		$(LOWEST)/bin/pip install -q --disable-pip-version-check --no-deps -e . && touch $(LOWEST)/ready; }
	$(LOWEST)/bin/python -m pytest -q tests/core tests/inspection tests/planning tests/operators tests/injection tests/serialization

test-diffusers-versions: $(READY) ## The zoo under diffusers 0.36, 0.40 and the newest
	@for version in 0.36.0 0.40.0 newest; do \
		folder=$(VENV)/diffusers-$$version; \
		pin=$$([ $$version = newest ] && echo diffusers || echo diffusers==$$version); \
		[ -d $$folder ] || { $(BIN)/pip install -q --target $$folder --no-deps $$pin && $(BIN)/pip install -q --target $$folder httpx; } || exit 1; \
		PYTHONPATH=$$folder $(BIN)/python -c 'import diffusers; print("diffusers", diffusers.__version__)' || exit 1; \
		PYTHONPATH=$$folder $(BIN)/python -m pytest -q tests/inspection tests/injection || exit 1; \
	done

bench: $(READY) ## Forward latency of original and grafted models
	$(BIN)/python -m benchmarks models --output examples/benchmarks/forward-cpu.md

bench-loading: $(READY) ## Loading a graft against reading its bytes and installing it
	$(BIN)/python -m benchmarks loading --output examples/benchmarks/loading-cpu.md

bench-operators: $(READY) ## Every operator by itself, on a CPU (goes on where it stopped; peers need the extra bench)
	$(BIN)/python -m benchmarks operators --output examples/benchmarks/operators-cpu.md

gpu: $(READY) ## All that one CUDA device alone can show, in under ten minutes and one file
	$(BIN)/python -m benchmarks gpu --output examples/benchmarks/gpu.md

bench-pixart: $(READY) ## PixArt-Sigma at 2,048 x 2,048 (needs one CUDA device)
	$(BIN)/python -m benchmarks pixart --output examples/benchmarks/pixart-sigma.md

bench-training: $(READY) ## Stage one against the least it could cost, and reuse of the teacher's passes
	$(BIN)/python -m benchmarks training --output examples/benchmarks/training-cpu.md

bench-depth: $(READY) ## Half the depth on the testbed: side by side, removed, from scratch (an hour on one core; goes on where it stopped)
	$(BIN)/python -m benchmarks depth --output examples/benchmarks/depth

bench-mixers: $(READY) ## Every mixer on the letters after the same seconds, and its latency (hours on one core; goes on where it stopped)
	$(BIN)/python -m benchmarks mixers --output examples/benchmarks/mixers

bench-noise: $(READY) ## The benchmark's own noise, and break-even sizes against the stored table
	$(BIN)/python -m benchmarks noise --rounds 21 --output examples/benchmarks/noise-cpu.md

bench-ordering: $(READY) ## Which half of the self-attentions to replace, on the testbed (half an hour on one core; goes on where it stopped)
	$(BIN)/python -m benchmarks ordering --output examples/benchmarks/ordering

bench-planner: $(READY) ## Plans under a budget on the testbed (an hour and a half on one core; goes on where it stopped)
	$(BIN)/python -m benchmarks planner --output examples/benchmarks/planner

fuzz: $(READY) ## A thousand hostile files: no hang, no raw error, memory within the budget (ten minutes)
	$(BIN)/python -m benchmarks.fuzz --files 1000

ablate: $(READY) ## Recipes at equal seconds, each beside its control (hours on one core; goes on where it stopped)
	$(BIN)/python -m benchmarks ablate --output examples/ablation

text-to-image: $(READY) ## The paper's text-to-image run on the scenes, one seed, then the graft in use (goes on where it stopped)
	$(BIN)/python examples/text_to_image.py --output runs/text_to_image --seeds 0
	$(BIN)/python examples/use_grafted_pipeline.py --graft runs/text_to_image/rows/neighborhood_9_x_9_interleaved-0 --output runs/uses

testbed: $(READY) ## Train the testbed's model and its judge from scratch (hours on two cores)
	$(BIN)/python -m diffusers_graft.testbed.classifier --output runs/testbed
	$(BIN)/python -m benchmarks.testbed.pretrain --output runs/testbed
	$(BIN)/python -m benchmarks.testbed.card --output runs/testbed

testbed-second: $(READY) ## Train a second model of letters: another width, seed and prediction (20 minutes on one core; goes on where it stopped)
	$(BIN)/python -m benchmarks.testbed.pretrain --output runs/second --seed 1 --head-width 16 --prediction v_prediction --steps 4000 --decay 1500 --ema-decay 0.998

testbed-scenes: $(READY) ## Train the text-to-image testbed from scratch (about eight hours of a core at what a step took for the weights that ship; goes on where it stopped)
	$(BIN)/python -m benchmarks.testbed.scenes.autoencoder --output $(SCENES)
	$(BIN)/python -m benchmarks.testbed.scenes.text --output $(SCENES)
	$(BIN)/python -m benchmarks.testbed.scenes.transformer --output $(SCENES) --tokens 64 --steps 12000 --decay 2500 --is-compiled
	$(BIN)/python -m benchmarks.testbed.scenes.transformer --output $(SCENES) --tokens 256 --steps 12000 --decay 4000 --lr 1.2e-3 --shift 5 --larger-every 5 --scene-weights 1 4 5 2 3 3 3 --is-compiled --is-bf16
	$(BIN)/python -m benchmarks.testbed.scenes.assemble --run $(SCENES) --output diffusers_graft/testbed/scenes/weights
	$(BIN)/python -m benchmarks.testbed.scenes.card

docs: $(READY) ## The documentation site, into site/
	@$(BIN)/python -c 'import mkdocs, mkdocstrings' 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -d site

release: ## Build, check the metadata, install the wheel in a clean environment, and run the quick start there
	PYTHON=$(PYTHON) .ci/release.sh

lint: $(READY) ## Format, style, spelling and types; the same tools as pre-commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

clean: ## Remove what the targets made, but for what they trained, in runs
	rm -rf $(VENV) $(LOWEST) quickstart dist site .pytest_cache .ruff_cache .hypothesis
