PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test test-oldest test-long coverage mutants lint

# On all cores; pip has one, and takes a minute and a half. Packages may hold files for other versions of Python, which do not compile.
compile = $(1)/python -m compileall -qq -j 0 $(1)/../lib || true

# The stamp makes a second call instant; it is made anew when the requirements change.
install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --editable '.[test]'
	$(call compile,$(BIN))
	touch $@

quickstart: install
	@echo "rendering the street (one to five minutes), then pretraining PooDLe and FlowE on it, for as many steps each"
	$(BIN)/python -m training.street
	test -f runs/quickstart/config.yaml && resume="--resume_from_checkpoint latest" || resume=""; \
	$(BIN)/accelerate launch training/pretrain.py --output_dir runs/quickstart $$resume
	test -f runs/quickstart-flowe/config.yaml && resume="--resume_from_checkpoint latest" || resume=""; \
	$(BIN)/accelerate launch training/pretrain.py --config flowe_street --output_dir runs/quickstart-flowe $$resume
	@echo "measuring both, and the untrained network, on held-out drives"
	for readout in linear knn; do \
	$(BIN)/accelerate launch evaluation/segment.py --model random:runs/quickstart --model runs/quickstart-flowe \
	    --model runs/quickstart --dataset street --readout $$readout --num_train_epochs 80 --output_dir runs/quickstart-$$readout --resume_from_checkpoint latest || exit 1; \
	done
	@echo
	$(BIN)/python -m evaluation.compare runs/quickstart-linear/evaluation.json runs/quickstart-knn/evaluation.json
	@echo
	@echo "runs/quickstart: panels/ (pictures), metrics.jsonl (curves), checkpoints/, encoder/ and model/ (weights)"
	@echo "runs/quickstart-linear, runs/quickstart-knn: report.html"
	@echo "next, on your own clips:"
	@echo "  $(BIN)/accelerate launch training/pretrain.py --videos path/to/my/videos --output_dir runs/mine"

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# With the oldest versions that setup.cfg admits, in an environment of its own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

.venv-oldest/installed: setup.cfg pyproject.toml requirements/oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --no-compile --constraint requirements/oldest.txt --editable '.[test]'
	$(call compile,.venv-oldest/bin)
	touch $@

# Lines that tests run, in their processes and in those that these start.
coverage: install
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Changes what the tests ought to notice, once in each place, in a copy of the last commit; figures of one run stand in docs/reliability.md.
# mutmut passes over decorated functions, and its wrappers lack the docstrings that `evaluate` asks of a metric's methods.
mutants: install
	rm -rf build/mutants build/mutmut
	mkdir -p build/mutants
	git archive HEAD | tar x -C build/mutants
	sed -i '/^@torch.no_grad()$$/d' build/mutants/training/views.py
	$(BIN)/python -m pip install --quiet --target build/mutmut mutmut==3.8.1
	sed -i 's/^            def _trampoline_wrapper(\*args: P.args, \*\*kwargs: P.kwargs) -> R:$$/&\n                """-"""/' build/mutmut/mutmut/mutation/trampoline.py
	cd build/mutants && PYTHONPATH=$(CURDIR)/build/mutmut OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m mutmut run --max-children 2
	cd build/mutants && PYTHONPATH=$(CURDIR)/build/mutmut $(CURDIR)/$(BIN)/python -m mutmut results

# Minutes each; results of one run stand in docs/reliability.md.
test-long: install
	$(BIN)/python -m pytest -m long -s --durations=0

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
