#!/usr/bin/env bash
# Prefill, decode and router on this machine: launch/pd_local.sh --model DIR [--sp-size 2] [-- server arguments]
# Prints READY and the URL when it answers; Ctrl-C ends everything. All options: launch/pd_local.sh --help
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
check='import importlib.util, sys, sglang_apb.cli; sys.exit(not importlib.util.find_spec("sglang"))'
for python in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$root/.venv/bin/python" python3; do
  # A Python started in this folder finds sglang_apb without having what it needs.
  if [ -n "$python" ] && "$python" -c "$check" 2>/dev/null; then
    exec "$python" -m sglang_apb.cli launch "$@"
  fi
done
echo "pd_local.sh: found no Python with sglang-apb: run 'pip install sglang-apb', or name one with PYTHON=..." >&2
exit 1
