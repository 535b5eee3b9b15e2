#!/usr/bin/env bash
# The whole test suite on a fresh machine: environment, format, lint, types, tests. Extra arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"
ruff format --check .
ruff check .
mypy
# One thread a worker: two workers of two threads each would fight over two cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
