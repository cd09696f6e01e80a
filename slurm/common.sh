# shellcheck shell=bash
# What the jobs share; sourced by them. docs/slurm.md says what each variable does.

# The Python that has megafork; the repository's own where there is one.
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$MEGAFORK_HOME/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi

unset SLURM_EXPORT_ENV # of sbatch: --export would keep the secret and PYTHONPATH from srun
export PYTHONPATH=$MEGAFORK_HOME${PYTHONPATH:+:$PYTHONPATH}
# How often a job that was stopped, or lost a node, goes back into the queue.
MAX_REQUEUES=${MAX_REQUEUES:-20}
# How long it asks a controller that does not answer.
REQUEUE_PATIENCE_S=${REQUEUE_PATIENCE_S:-600}
# Further words for srun, as --container-image=...
CONTAINER_ARGS=${CONTAINER_ARGS:-}

say() { echo "[$(date +%T)] $*"; }

die() {
  echo "error: $*" >&2
  exit 2
}

nodes_of() { scontrol show hostnames "$1"; }

joined() {
  local IFS=,
  echo "$*"
}

# A port of this job's own among the 10,000 from 20,000 upwards; a requeued job keeps it.
job_port() { echo $((20000 + (SLURM_JOB_ID * 16 + $1) % 10000)); }

# "job 17", "task 3 of the array 12".
job_name() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "task $SLURM_ARRAY_TASK_ID of array $SLURM_ARRAY_JOB_ID"
  else
    echo "job $SLURM_JOB_ID"
  fi
}

# Put the job back into the queue and wait for Slurm to end this script. Not when somebody has
# cancelled it. A controller that does not answer (a link, a restart) is asked again for a while.
requeue() {
  local why=$1 restarts=${SLURM_RESTART_COUNT:-0} id=$SLURM_JOB_ID shown
  if ((restarts >= MAX_REQUEUES)); then
    say "$why; not requeued: MAX_REQUEUES=$MAX_REQUEUES"
    return
  fi
  # The last task of an array has the whole array's id.
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  fi
  say "$why; the job goes back into the queue"
  local deadline=$((SECONDS + REQUEUE_PATIENCE_S))
  while ((SECONDS < deadline)); do
    if shown=$(scontrol --oneliner show job "$id"); then
      if [[ $shown != *JobState=RUNNING* ]]; then
        say "not requeued: the job is being ended"
        return
      fi
      # Slurm may have done it when it lost this node: the id is then another attempt's.
      if [[ $shown != *" Restarts=$restarts "* ]]; then
        say "not requeued: Slurm has done so already"
        return
      fi
      if scontrol requeue "$id"; then
        sleep 600
      fi
    fi
    sleep 5
  done
  say "not requeued: Slurm's controller did not take it for $REQUEUE_PATIENCE_S s"
}

# The shared array settings: every task has a seed and a folder of its own.
seed_overrides() { # RUN_DIR
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "training.seed=$SLURM_ARRAY_TASK_ID"
    echo "data.seed=$SLURM_ARRAY_TASK_ID"
    echo "run.dir=$1-seed$SLURM_ARRAY_TASK_ID"
  fi
}

# `megafork ARGUMENT...` on the job's node. Asked to stop, by STOP_FILE as the trainer is, it ends
# and the job is requeued.
run_restartable() { # STOP_FILE ARGUMENT...
  local status=0 asked=0 command
  export MEGAFORK_STOP_FILE=$1
  shift
  mkdir -p "$(dirname "$MEGAFORK_STOP_FILE")"
  rm -f "$MEGAFORK_STOP_FILE"
  trap 'say "asked to stop"; asked=1; touch "$MEGAFORK_STOP_FILE" || say "but $MEGAFORK_STOP_FILE cannot be written"' USR1
  # shellcheck disable=SC2086  # CONTAINER_ARGS are several words
  srun --ntasks=1 $CONTAINER_ARGS "$PYTHON" -m megafork "$@" &
  command=$!
  while kill -0 "$command" 2>/dev/null; do
    wait "$command" || true # a trap ends it early
  done
  wait "$command" || status=$?
  rm -f "$MEGAFORK_STOP_FILE"
  if ((asked && status != 0)); then
    requeue "stopped"
  fi
  exit "$status"
}
