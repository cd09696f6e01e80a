#!/usr/bin/env bash
# slurm/chain.sh RUN_DIR CONFIG.toml [section.key=value ...] -- BENCHMARK... [section.key=value ...]
#
# Submits three jobs, each of which starts when the one before it has succeeded: train, convert (the
# last checkpoint to an HF folder, RUN_DIR/hf) and eval of that (RUN_DIR/eval). Prints their ids.
# TRAIN_ARGS, CONVERT_ARGS and EVAL_ARGS are sbatch's options for each.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MEGAFORK_HOME=${MEGAFORK_HOME:-$(dirname "$here")}
usage="usage: chain.sh RUN_DIR CONFIG.toml [section.key=value ...] -- BENCHMARK..."
(($# >= 4)) || {
  echo "error: $usage" >&2
  exit 2
}
run_dir=$1
shift
train=()
while (($#)) && [[ $1 != -- ]]; do
  train+=("$1")
  shift
done
((${#train[@]})) || {
  echo "error: no config; $usage" >&2
  exit 2
}
(($# >= 2)) || {
  echo "error: no benchmark after --; $usage" >&2
  exit 2
}
shift
# A job whose predecessor failed can never run: it goes, too. (sbatch prints ID;CLUSTER on some.)
after() { echo "--dependency=afterok:${1%%;*} --kill-on-invalid-dep=yes"; }

# shellcheck disable=SC2086  # the options are several words
first=$(sbatch --parsable ${TRAIN_ARGS:-} "$here/train.sbatch" "${train[@]}" "run.dir=$run_dir")
# shellcheck disable=SC2046,SC2086
second=$(sbatch --parsable $(after "$first") ${CONVERT_ARGS:-} "$here/convert.sbatch" \
  megatron-to-hf "$run_dir/hf" "$run_dir")
# shellcheck disable=SC2046,SC2086
third=$(sbatch --parsable $(after "$second") ${EVAL_ARGS:-} "$here/eval.sbatch" \
  "$run_dir/hf" "$run_dir/eval" "$@")
echo "train $first convert $second eval $third"
