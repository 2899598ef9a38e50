#!/usr/bin/env bash
# Starts one vLLM replica for Kotae. Usage: vllm-replica.sh MODEL_FOLDER PORT [more arguments of vLLM]
# Tried: two of them with vLLM 0.32's CPU build behind one Kotae, on one machine (docs/scale-out.md).
# Not tried: on several machines, on GPUs.
set -euo pipefail
model=${1:?the folder of the base model, the same files as on Kotae\'s machine}
port=${2:?a port that only Kotae can reach}
shift 2

# Without it vLLM has no /v1/load_lora_adapter. Whoever reaches the port can then load adapters: keep it closed.
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
export VLLM_NO_USAGE_STATS=1

# On a CPU, two replicas of one machine choose the same cores: give each its own, e.g. VLLM_CPU_OMP_THREADS_BIND=0-7.
# --max-loras: adapters in one batch. Kotae keeps stable, previous and canary loaded, and the next one while it is probed.
# --max-lora-rank: no less than the rank in the alignment's configuration; vLLM refuses what is larger.
# The name under which the base answers is learnt from /v1/models: no --served-model-name is needed.
exec "${PYTHON:-python3}" -m vllm.entrypoints.openai.api_server --model "$model" --host "${HOST:-127.0.0.1}" --port "$port" \
    --enable-lora --max-loras 4 --max-cpu-loras 8 --max-lora-rank 64 "$@"
