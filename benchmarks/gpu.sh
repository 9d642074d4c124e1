#!/usr/bin/env bash
# On a machine with a CUDA device: first the tests that need one, among them equality with the
# textbook path, then a phase and the rollout on the shape "medium": benchmarks/gpu.sh [PHASES].
# What the tests say goes to stderr; stdout gets JSON lines.
# PYTHON names an interpreter with this package's dependencies, by default that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
phases=${1:-10}

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device")'
"$python" -m pytest -m gpu >&2
for options in "--dtype auto" "--dtype fp32" "--dtype auto --compile off"; do
  # shellcheck disable=SC2086  # options are words
  "$python" benchmarks/ppo_phase.py medium "$phases" $options
done
"$python" benchmarks/rollout.py medium --json
