#!/bin/bash
# PooDLe on several machines under SLURM: one task per machine starts a launcher, which starts one process per GPU.
#
#   sbatch --nodes 4 training/launch/slurm.sh --config bdd100k_r50 --videos PATH --output_dir SHARED_FOLDER --bf16 \
#     --per_device_train_batch_size 4
#
# Arguments go to training/pretrain.py. Submit from the repository's root; output_dir must be on a file system that all machines share.
# A job that was stopped resumes from its last checkpoint when it is requeued, or submitted again with the same arguments. Where these name
# a checkpoint with --resume_from_checkpoint, the job begins there each time that it is submitted, but not when it is requeued.
#SBATCH --job-name=poodle
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --output=poodle-%j.log
set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:?this script is for sbatch, on machines with GPUs}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_host=${hosts%%$'\n'*} # not by head, which may end before scontrol has written all: an error under pipefail

resume=()
output_dir=
previous=
chosen=
for argument in "$@"; do
  case $previous in --output_dir | --output-dir) output_dir=$argument ;; esac
  case $argument in
    --output_dir=* | --output-dir=*) output_dir=${argument#*=} ;;
    --resume_from_checkpoint* | --resume-from-checkpoint*) chosen=yes ;;
  esac
  previous=$argument
done
case $output_dir in "~/"*) output_dir=$HOME/${output_dir#"~/"} ;; esac # of --output_dir=~/runs, which bash leaves as it is
[[ -n $output_dir ]] || { echo "give --output_dir, a folder that all machines share" >&2; exit 2; }
if [[ -f $output_dir/config.yaml && (-z $chosen || ${SLURM_RESTART_COUNT:-0} -gt 0) ]]; then
  resume=(--resume_from_checkpoint latest) # behind the arguments, of which the last counts
fi

port=$((20000 + ${SLURM_JOB_ID:-0} % 10000)) # of this job: two that share a machine do not meet
# srun does not take this over from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# In single quotes, so that each machine expands its own SLURM_NODEID.
srun --kill-on-bad-exit=1 bash -c '
  gpus=$1 host=$2 port=$3
  shift 3
  accelerate=.venv/bin/accelerate
  [[ -x $accelerate ]] || accelerate=accelerate # of a conda environment or a container
  exec "$accelerate" launch --config_file training/launch/several_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$host" --main_process_port "$port" training/pretrain.py "$@"
' launch "$gpus" "$main_host" "$port" "$@" ${resume[@]+"${resume[@]}"}
