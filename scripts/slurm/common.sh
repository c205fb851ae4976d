# What the batch scripts share; they source it. Here a site's environment, container and srun options are written once.
set -uo pipefail
root=${WTN_ROOT:-$SLURM_SUBMIT_DIR}
cd "$SLURM_SUBMIT_DIR"

# Modules:
#   module load cuda nccl
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -e "$root/.venv/bin/activate" ] || source "$root/.venv/bin/activate"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# srun does not take it from sbatch (since Slurm 22.05)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# Several networks: the one between the nodes, for NCCL and gloo.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

within=()
# Apptainer:
#   within=(apptainer exec --nv --bind "$PWD,$root" "$HOME/wtn.sif")
pyxis=()
# Pyxis:
#   pyxis=(--container-image="$HOME/wtn.sqsh" --container-mounts="$PWD:$PWD,$root:$root" --container-workdir="$PWD")

logs="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
mkdir -p "$logs"
# told to end, the run leaves this mark: exit codes of the ranks that Slurm then ends would hide its own, 75
export WTN_MARK="$PWD/$logs/preempted"
rm -f "$WTN_MARK"
# a signal is for the ranks: this script ends after them
trap : TERM USR1

# run_ranks SCRIPT [arguments]: one process a rank, logs/JOB-ID/NODE-RANK.log; ends the job, or requeues it if it was told to end.
run_ranks() {
  local code=0
  echo "$(date +%FT%T) start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, logs in $logs"
  srun --kill-on-bad-exit=1 --output="$logs/%n-%t.log" --open-mode=append ${pyxis[@]+"${pyxis[@]}"} \
    ${within[@]+"${within[@]}"} python -u "$root/$1" "${@:2}" || code=$?
  if [ $code -eq 75 ] || [ -e "$WTN_MARK" ]; then
    # one that was cancelled was told to end, too
    if [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${WTN_RESTARTS:-50}" ]; then
      echo "$(date +%FT%T) told to end, all saved: back into the queue"
      exec scontrol requeue "$SLURM_JOB_ID"
    fi
    code=75
  fi
  [ $code -eq 0 ] || grep -h '^error: ' "$logs"/*.log | tail -1 >&2
  echo "$(date +%FT%T) ended with exit code $code"
  exit $code
}
