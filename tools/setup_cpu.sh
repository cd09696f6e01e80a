#!/usr/bin/env bash
# Makes .venv at the repository root: all that a machine without a GPU needs. Run it as often as you like:
# it does nothing when the environment is current and repairs one that was interrupted.
#
#   tools/setup_cpu.sh [--test] [--mcore-0.19]
#     --test         also requirements/test.txt (pytest, ruff, mypy), Triton in .venv/triton (requirements/triton.txt),
#                    mbridge in .venv/mbridge (requirements/mbridge.txt), TRL in .venv/trl (requirements/trl.txt) and
#                    W&B, MLflow and Trackio in .venv/trackers (requirements/trackers.txt)
#     --mcore-0.19   also megatron-core 0.19.2 in .venv/mcore-0.19 (see requirements/mcore-0.19.txt)
#   PYTHON=/path/to/python3.11 picks the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
# A path in front of .venv would make pip look at, and uninstall, the wrong packages.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_USER

fail() {
  echo "setup_cpu: $*" >&2
  exit 1
}

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

with_test=no
with_mcore=no
for arg in "$@"; do
  case $arg in
    --test) with_test=yes ;;
    --mcore-0.19) with_mcore=yes ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "unknown argument: $arg" ;;
  esac
done

is_python_311() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_python_311 "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or later: point PYTHON at one"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3 python; do
    if is_python_311 "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later on PATH: install one (apt install python3.11 python3.11-venv," \
    "or uv python install 3.11) or set PYTHON=/path/to/python3.11"
}

# A phase is current when its stamp holds the hash of the files it was made from.
hash_of() { cat -- "$@" | sha256sum | cut -d' ' -f1; }

# phase NAME STAMP "FILES" COMMAND...: run COMMAND unless STAMP is current.
phase() {
  local name=$1 stamp=$venv/$2.stamp log=$venv/$2.log files=$3 hash started=$SECONDS
  shift 3
  # shellcheck disable=SC2086 # FILES is a list
  hash=$(hash_of $files)
  [[ -f $stamp && $(<"$stamp") == "$hash" ]] && return
  rm -f "$stamp"
  echo "setup_cpu: $name ..."
  if ! "$@" >"$log" 2>&1; then
    tail -n 25 "$log" >&2
    fail "$name failed; its whole log is $log"
  fi
  echo "$hash" >"$stamp"
  echo "setup_cpu: $name done in $((SECONDS - started)) s"
}

# Python compiles the third of it that is used when it is used: see write_bytecode.
pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install -q --no-compile --no-deps "$@"; }

# pip writes INSTALLER last: a package without it was cut off half-way, though pip would take it for installed.
forget_partial_packages() {
  local info
  for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
    if [[ -d $info && ! -f $info/INSTALLER ]]; then
      rm -rf -- "$info"
    fi
  done
}

require_cpu_torch() {
  "$venv/bin/python" - <<'PY'
import importlib.util, pathlib, runpy, sys
version = runpy.run_path(str(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
if version["cuda"] is not None:
    sys.exit(f"torch {version['__version__']} is a CUDA build. Run again with "
             "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (see requirements/cpu.txt)")
PY
}

install_cpu() {
  pip_install -r requirements/cpu.txt
  require_cpu_torch
}

# Where PYTHONDONTWRITEBYTECODE is set, as in many containers, Python would compile all that it imports at
# every start: 17 instead of 6 CPU seconds for a rank, 37 instead of 18 for a server.
write_bytecode() {
  local compile=(env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c)
  "${compile[@]}" 'import megafork.train' &
  "${compile[@]}" 'import vllm.entrypoints.openai.api_server, vllm.v1.engine.core' && wait $!
}

install_mcore() {
  rm -rf "$venv/mcore-0.19"
  pip_install --ignore-requires-python --target "$venv/mcore-0.19" -r requirements/mcore-0.19.txt
}

install_triton() {
  rm -rf "$venv/triton"
  pip_install --target "$venv/triton" -r requirements/triton.txt
}

install_mbridge() {
  rm -rf "$venv/mbridge"
  pip_install --target "$venv/mbridge" -r requirements/mbridge.txt
}

install_trl() {
  rm -rf "$venv/trl"
  pip_install --target "$venv/trl" -r requirements/trl.txt
}

install_trackers() {
  rm -rf "$venv/trackers"
  pip_install --target "$venv/trackers" -r requirements/trackers.txt
}

exec 9<tools/setup_cpu.sh
flock 9 # of two calls at once the second waits

if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  python=$(find_python)
  echo "setup_cpu: new environment in $venv from $("$python" --version)"
  "$python" -m venv --clear "$venv" || fail "$python -m venv failed: install its venv module (apt install python3-venv)"
fi

# No package of these is among the runtime packages: they are installed beside them.
install_the_rest() {
  if [[ $with_test == yes ]]; then
    phase "test and lint packages" test requirements/test.txt pip_install -r requirements/test.txt
    phase "Triton, for tests of the kernels (640 MB)" triton requirements/triton.txt install_triton
    phase "mbridge, another converter to compare ours with" mbridge requirements/mbridge.txt install_mbridge
    phase "TRL, to compare our objectives with (280 MB)" trl requirements/trl.txt install_trl
    phase "W&B, MLflow and Trackio, to read back what a run logs (110 MB)" trackers requirements/trackers.txt install_trackers
  fi
  if [[ $with_mcore == yes ]]; then
    phase "megatron-core 0.19" mcore-0.19 requirements/mcore-0.19.txt install_mcore
  fi
}

forget_partial_packages
set -m # a process group of its own, so that its pip ends with it
install_the_rest &
rest=$!
set +m
trap 'kill -- "-$rest" 2>/dev/null || true; wait' EXIT # it is not left behind when the other fails
phase "runtime packages (2.5 GB, minutes the first time)" cpu requirements/cpu.txt install_cpu
phase "megafork itself" package "pyproject.toml megafork/__init__.py" pip_install --no-build-isolation -e .
phase "compiling what a run imports" bytecode requirements/cpu.txt write_bytecode
wait "$rest" || fail "not all was installed: see above"
