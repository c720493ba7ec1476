# make test is the whole check; .ci/run calls it. Each target first picks the environment (slurm/env.sh).
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
ENV := export GRPO_KD_NEEDS=dev; source slurm/env.sh

.PHONY: test test-slow test-slurm lint format demo clean

# Files side by side, a process more than cores as one often waits; then what is held to seconds, two at a time. Both use one demo.
test: lint
	@$(ENV) && export GRPO_KD_TESTS_SHARED=$$(mktemp -d) && trap 'rm -rf $$GRPO_KD_TESTS_SHARED' EXIT && \
	python -m pytest -m "not slow and not gpu and not alone" -n "$$(($$(nproc) + 1))" --dist loadfile \
		--no-loadscope-reorder --durations 30 --durations-min 10 && \
	python -m pytest -m "alone and not slow and not gpu" -n 2 --dist loadfile --durations 10 \
		$$(grep -rl --include="*.py" "mark[.]alone" tests)

test-slow:
	@$(ENV) && python -m pytest -m "slow and not gpu" --timeout 3600

# A SLURM of its own with three nodes on this machine; needs root (tests/slurm/run.sh).
test-slurm:
	@bash tests/slurm/run.sh

lint:
	@$(ENV) && ruff check . && ruff format --check . && mypy && lint-imports --no-logo

format:
	@$(ENV) && ruff check --fix . && ruff format .

demo:
	@bash slurm/run_stage2_grpo.sh

# Caches and Python's leavings; .venv and runs/ stay.
clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
