# Each target first makes .venv from pyproject.toml and constraints.txt if it is missing or older than them.
PYTHON ?= python3
comma := ,
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DOCS_STAMP := $(VENV)/.stamp-docs

.PHONY: venv run smollm2 test soak check docs bench
venv: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/python train.py

# A real model learns to write positive film reviews; the first call fetches it.
smollm2: $(STAMP)
	$(BIN)/python scripts/fetch.py smollm2
	$(BIN)/python train.py experiment=smollm2_sentiment

# CHECKED=rlhf_exp checks shapes and types in all packages, not only where tensors are computed.
test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		$(if $(CHECKED),--jaxtyping-packages=$(CHECKED)$(comma)beartype.beartype)

# What docs/reliability.md counts, with its long campaigns, and the table of it.
COUNTED := tests/test_faults.py tests/stages/test_every_stage_resumes.py tests/runs/test_checkpoint.py \
	tests/test_config_property.py tests/test_readers.py
soak: export RLHF_EXP_RELIABILITY := $(CURDIR)/outputs/reliability
soak: $(STAMP)
	rm -rf outputs/reliability
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'not gpu' $(COUNTED)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m soak tests $(addprefix --ignore=,$(COUNTED))
	$(BIN)/python -m tests.reliability outputs/reliability

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages of docs/ as a site in outputs/site; its packages are those of the extra `docs`, which no other target needs.
docs: $(DOCS_STAMP)
	$(BIN)/python -m tests.docs_pages outputs/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)

bench: $(STAMP)
	$(BIN)/python benchmarks/ppo_phase.py series 8
	$(BIN)/python benchmarks/ppo_phase.py reviews 12
	$(BIN)/python benchmarks/ppo_phase.py gpt2 5
	$(BIN)/python benchmarks/rollout.py series --lengths 20 --rounds 3
