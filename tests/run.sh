#!/usr/bin/env bash
# What has to pass: environment, lint, format, types, tests. Arguments go to pytest; without any,
# the slow tests (all layouts, checkpoints, conversion, whole runs, Slurm) are left to `-m slow`.
#
#   tests/run.sh [--mcore-0.19] [pytest arguments]
#     --mcore-0.19   run the tests against megatron-core 0.19.2 instead of 0.16.1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_args=(--test)
mcore_path=
if [[ ${1:-} == --mcore-0.19 ]]; then
  shift
  setup_args+=(--mcore-0.19)
  mcore_path=$PWD/.venv/mcore-0.19
fi

# The tests on a real Slurm are skipped where it is missing, but never in continuous integration.
if [[ ${CI:-} == true && $EUID == 0 ]]; then
  tests/install_slurm.sh
fi
tools/setup_cpu.sh "${setup_args[@]}"
bin=$PWD/.venv/bin
export PATH=$bin:$PATH
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # or each process compiles again what it imports

if [[ $# -eq 0 ]]; then
  set -- -m "not slow"
fi

"$bin/ruff" check .
"$bin/ruff" format --check .
# Without a cache mypy takes two minutes of one core: it runs beside the tests and speaks after them.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$bin/mypy" megafork >"$types" 2>&1 &
mypy=$!
# Three tests at a time: many wait for a server or for ranks. Those of one xdist_group stay together,
# and tests/conftest.py has the longest come first.
status=0
PYTHONPATH=$mcore_path${PYTHONPATH:+:$PYTHONPATH} "$bin/python" -m pytest \
  -n 3 --dist loadgroup --no-loadscope-reorder --durations 10 "$@" || status=$?
wait "$mypy" || status=$?
cat "$types"
exit "$status"
