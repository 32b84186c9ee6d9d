#!/usr/bin/env bash
# Makes a virtual environment with sglang-apb, its demo and its tests: launch/install.sh DIR
# pip's output goes to DIR/install.log. PYTHON names the Python to use, python3 if not set.
set -euo pipefail

venv=$1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "install.sh: $python is $("$python" -V 2>&1): sglang-apb needs Python 3.11 or newer, name one with PYTHON=..." >&2
  exit 1
fi
"$python" -m venv "$venv"
log=$venv/install.log
"$venv/bin/python" -m pip install --progress-bar off -e "$(dirname "$0")/..[demo,dev]" >"$log" 2>&1 &
pip=$!
trap 'kill "$pip" 2>/dev/null' EXIT
started=$SECONDS
while kill -0 "$pip" 2>/dev/null; do
  if ((SECONDS - started >= ${next:-0})); then
    echo "installing into $venv (11 GB, minutes; log in $log): $((SECONDS - started)) s, $(du -sh "$venv" | cut -f1)"
    next=$((SECONDS - started + 15))
  fi
  sleep 1
done
trap - EXIT
if ! wait "$pip"; then
  tail -20 "$log" >&2
  echo "install.sh: pip failed; the whole log is $log" >&2
  exit 1
fi
