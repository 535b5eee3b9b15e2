# Sourced by demo.sh and test.sh: makes .venv on a fresh machine with python3 and pip, and puts it on the PATH.
# PYTHON=python3.12 chooses the interpreter. ENVIRONMENT=current makes no .venv and takes the Python on the PATH, where
# slotscops must be installed. Argument: the extras to install, such as [test].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${ENVIRONMENT:-}" != current ] || return 0
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' ||
  { echo "slotscops: $("$python" --version) found, needed 3.11 or newer; name another one, such as PYTHON=python3.12" >&2; exit 2; }
wanted="$(sha256sum pyproject.toml) $("$python" --version) $1"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet --editable ".$1"
  echo "$wanted" >.venv/installed
fi
PATH="$PWD/.venv/bin:$PATH"
