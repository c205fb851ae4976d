#!/usr/bin/env bash
# Makes the project's environment in .venv, or brings it up to date: bash scripts/setup.sh [EXTRA]   (EXTRA: test or dev)
# Then: source .venv/bin/activate. quickstart.sh and test.sh source this file; for them $PYTHON is the environment's interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
venv=${WTN_VENV:-.venv}
installed="$venv/.installed-$(cat setup.py wtn_pretrain/version.py | sha256sum | cut -c1-16)"
stamp="$installed${extra:+-$extra}"
if [ ! -e "$stamp" ] && [ ! -e "$installed-dev" ]; then
  base=${WTN_BASE_PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $base is older than Python 3.11; set WTN_BASE_PYTHON to a newer one" >&2; exit 2; }
  echo "setting up $venv (torch, DeepSpeed, Transformers, ONNX Runtime: about 2 GB, two to four minutes)"
  [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check -e ".${extra:+[$extra]}"
  touch "$stamp"
fi
PYTHON="$PWD/$venv/bin/python"
case $venv in /*) PYTHON="$venv/bin/python" ;; esac
export PYTHON PATH="$(dirname "$PYTHON"):$PATH"  # DeepSpeed looks for ninja on PATH
