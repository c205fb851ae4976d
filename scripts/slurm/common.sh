# What the batch scripts share; they source it. Here a site's environment, container and srun options are written once.
set -uo pipefail
root=${WTN_ROOT:-$SLURM_SUBMIT_DIR}
cd "$SLURM_SUBMIT_DIR" || { echo "error: $SLURM_SUBMIT_DIR is not on $(hostname); submit from a folder that all nodes see" >&2; exit 2; }
# the number of an array's last element is that of the whole array, too
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Modules (a batch script is no login shell: the function may be missing; Lmod's file is lmod.sh, or reads unset variables):
#   set +u
#   command -v module > /dev/null || source /etc/profile.d/modules.sh
#   module load cuda nccl || exit 2
#   set -u
# again where it was active when the job was submitted: a module may have put another python before it
env=${VIRTUAL_ENV:-$root/.venv}
[ ! -e "$env/bin/activate" ] || source "$env/bin/activate"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# srun does not take it from sbatch (since Slurm 22.05)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# Several networks: the one between the nodes, for NCCL and gloo.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

within=()
# Apptainer (PATH is the image's, and so would be a PYTHONPATH that the image sets):
#   within=(apptainer exec --nv --env "PYTHONPATH=$PYTHONPATH" --bind "$PWD,$root" "$HOME/wtn.sif")
# Bubblewrap, or another runtime that a signal ends instead of being passed on (srun signals the whole group, the ranks too):
#   within=(env --ignore-signal=TERM,USR1 bwrap --bind "$HOME/wtn" / --dev-bind /dev /dev --proc /proc --unshare-pid)
#   within+=(--bind "$root" "$root" --bind "$PWD" "$PWD")
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

# errors: what the ranks have called one, from all starts
errors() { grep -hs '^error: ' "$logs"/*.log | sort; }

# back WHY: puts the job back into the queue and does not return, unless it was cancelled or has been there too often.
back() {
  # one that was cancelled was told to end, too
  [ "$(squeue -h -j "$job" -o %T)" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${WTN_RESTARTS:-50}" ] || return 0
  echo "$(date +%FT%T) $1: back into the queue"
  exec scontrol requeue "$job"
}

# run_ranks SCRIPT [arguments]: one process a rank, logs/JOB-ID/NODE-RANK.log; ends the job, or requeues it if it was told to end or has lost
# a rank. A rank that is lost within the hour time and again will not be saved by another start.
run_ranks() {
  local code=0 lost=0 before own said teeing
  before=$(errors)
  echo "$(date +%FT%T) start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, logs in $logs"
  exec {said}> >(trap "" INT TERM USR1; exec tee "$logs/srun" >&2)
  teeing=$! SECONDS=0
  srun --kill-on-bad-exit=1 --output="$logs/%n-%t.log" --open-mode=append ${pyxis[@]+"${pyxis[@]}"} \
    ${within[@]+"${within[@]}"} python -u "$root/$1" "${@:2}" 2>&$said || code=$?
  exec {said}>&-
  wait $teeing
  # ranks that srun then ends hide the code of the one that found a mistake
  if [ $code -eq 143 ] && own=$(grep -Eom1 'Exited with exit code (1|2|130)$' "$logs/srun"); then code=${own##* }; fi
  [ $code -eq 0 ] || comm -13 <(echo "$before") <(errors) | tail -1 >&2
  if [ -e "$WTN_MARK" ]; then
    back "told to end, all saved"
    code=75
  elif [ $code -eq 75 ] || { [ $code -gt 128 ] && [ $code -ne 130 ]; }; then
    [ $SECONDS -ge 3600 ] || lost=$(($(cat "$logs/lost" 2> /dev/null || echo 0) + 1))
    echo $lost > "$logs/lost"
    [ $lost -gt "${WTN_LOST:-3}" ] || back "a rank was lost or hung (exit code $code), on from the newest checkpoint"
  fi
  echo "$(date +%FT%T) ended with exit code $code"
  exit $code
}
