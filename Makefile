# The commands a contributor needs. `make demo` and `make test` work in an empty clone: they make .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= demo

.PHONY: demo test slow lint format bench clean help

help:
	@echo "make demo           install into $(VENV) and run 'biomedclip demo' into $(OUT)/ (about 5 minutes)"
	@echo "make test           the default tests: offline, 3 to 6 minutes on 2 cores"
	@echo "make slow           the slow and the fault-injection tests"
	@echo "make lint           ruff and mypy"
	@echo "make format         let ruff rewrite"
	@echo "make bench NAME=x   one benchmark from tests/benchmarks, beside its peer; last line is JSON"

# torch and torchvision come first and together, from the registry's default build, which runs on a CPU too: a
# torchvision built for another torch does not import, and open_clip with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[app,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/biomedclip demo --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest -q --numprocesses 2

slow: $(READY)
	$(BIN)/python -m pytest -q -m "slow or fault" --numprocesses 2 --dist loadfile --timeout 300

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	@test -n "$(NAME)" || { echo "say which: make bench NAME=$$(ls tests/benchmarks/bench_*.py | sed 's/.*bench_//; s/.py//' | tr '\n' '|')"; exit 2; }
	$(BIN)/python tests/benchmarks/run.py $(NAME)

clean:
	rm -rf $(VENV) .bench
