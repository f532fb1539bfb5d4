PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint

# The stamp makes a second call instant; it is made anew when the requirements change.
install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

quickstart: install
	@echo "rendering the street (about a minute), then pretraining a small PooDLe on it"
	$(BIN)/python -m training.street
	test -f runs/quickstart/config.yaml && resume="--resume_from_checkpoint latest" || resume=""; \
	$(BIN)/accelerate launch training/pretrain.py --output_dir runs/quickstart $$resume
	$(BIN)/python benchmarks/knn_street.py --model runs/quickstart/model
	@echo
	@echo "runs/quickstart: panels/ (pictures), metrics.jsonl (curves), checkpoints/, encoder/ and model/ (weights)"
	@echo "next, on your own clips:"
	@echo "  $(BIN)/accelerate launch training/pretrain.py --videos path/to/my/videos --output_dir runs/mine"

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
