#!/usr/bin/env bash
# Runs the whole test suite on a fresh machine: environment, format, lint, types, tests. Extra arguments go to pytest.
# The last lines name each test that was skipped, and why. With SLOTSCOPS_NO_SKIPS=1 a skipped test is a failure.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"

# Some tests need programs that pip cannot install. They are skipped where these are missing and cannot be installed.
missing=()
command -v chromium chromium-browser google-chrome >/dev/null || missing+=(chromium)
PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v nginx >/dev/null || missing+=(nginx)
command -v ip >/dev/null || missing+=(iproute2)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "slotscops: installing ${missing[*]} for the tests"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -qq --yes --no-install-recommends "${missing[@]}" ||
      echo "slotscops: apt-get could not install ${missing[*]}; tests that need them are skipped" >&2
  else
    echo "slotscops: ${missing[*]} not found; install them as root, or the tests that need them are skipped" >&2
  fi
fi

ruff format --check .
ruff check .
mypy
# Three workers keep two cores busy, because some tests mostly wait. Each uses one thread: more would compete for the cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n "${TEST_WORKERS:-3}" --dist worksteal -rfEs "$@"
