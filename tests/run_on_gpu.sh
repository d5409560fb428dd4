#!/usr/bin/env bash
# The engine and kernel tests on a GPU machine, several processes at once: bash tests/run_on_gpu.sh [LOG_FOLDER]
# Needs a CUDA build of vLLM and this package installed. Prints pytest's closing line of each group; fails if one fails.
# GROUPS_TO_RUN="NAME ..." chooses groups, AT_ONCE is how many run together, GROUP_SECONDS when one is ended.
# The first engines on a machine compile the same kernels, each for itself: run one small group before the rest.
set -u
cd "$(dirname "$0")"
logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
# float32 as float32: Triton's default for matrix products is tf32, good to about 1e-3.
export TRITON_F32_DEFAULT=ieee VLLM_ENABLE_V1_MULTIPROCESSING=0
names=() pids=()
group() { # NAME COMMAND...: in the background, its output to a log
  local name=$1
  shift
  while [ "$(jobs -rp | wc -l)" -ge "${AT_ONCE:-6}" ]; do wait -n; done
  timeout "${GROUP_SECONDS:-400}" "$@" >"$logs/$name.log" 2>&1 &
  names+=("$name") pids+=($!)
}
tests() { group "$1" python3 -m pytest -q --show-capture=no -p no:cacheprovider "${@:2}"; }

only=${GROUPS_TO_RUN:-all}
wanted() { [ "$only" = all ] || [[ " $only " == *" $1 "* ]]; }
for family in mamba1 mamba2 zamba2 granite_hybrid; do
  wanted "graphs_$family" && tests "graphs_$family" engine/test_gpu.py -k "cuda_graphs and $family"
done
for family in mamba1 mamba2 zamba2; do
  wanted "tensor_parallel_$family" && tests "tensor_parallel_$family" engine/test_tensor_parallel.py -k "$family"
done
wanted expert_parallel && tests expert_parallel engine/test_tensor_parallel.py -k expert
for family in mamba1 falcon_h1 nemotron_h; do
  wanted "pipeline_$family" && tests "pipeline_$family" engine/test_pipeline_parallel.py -k "$family"
done
wanted stock && tests stock engine/test_gpu.py -k "stock or offsets"
wanted plain && tests plain engine/test_exactness.py -k plain_model
wanted families && tests families engine/test_exactness.py -k "every_family or retention"
for family in mamba1 mamba2 zamba2; do
  wanted "cut_$family" && tests "cut_$family" engine/test_exactness.py -k "cut_of_a_prompt and $family"
done
wanted prefix_cache && tests prefix_cache engine/test_prefix_cache.py
wanted preemption && tests preemption engine/test_preemption.py
for family in mamba2 zamba2 granite_hybrid falcon_h1 nemotron_h; do
  wanted "speculative_$family" && tests "speculative_$family" engine/test_speculative.py -k "$family"
done
wanted speculative_calibration && tests speculative_calibration engine/test_speculative.py -k calibration
wanted state_updates && tests state_updates engine/test_state_updates.py -k "not replayssm"
wanted state_dtype && tests state_dtype engine/test_state_dtype.py
wanted prompt_embeds && tests prompt_embeds engine/test_prompt_embeds.py
wanted requests && tests requests engine/test_requests.py
wanted kv_connectors && tests kv_connectors engine/test_kv_connectors.py -k offloaded
wanted kv_two_engines && tests kv_two_engines engine/test_kv_connectors.py -k another_engine
wanted embeddings && tests embeddings engine/test_embeddings.py
for family in mamba1 mamba2 falcon_mamba; do
  wanted "decimamba_$family" &&
    tests "decimamba_$family" engine/test_decimamba.py -k "$family and not tensor_parallel and not preempted"
done
wanted decimamba_preemption && tests decimamba_preemption engine/test_decimamba.py -k preempted
wanted tensor_parallel_decimamba && tests tensor_parallel_decimamba engine/test_decimamba.py -k tensor_parallel
wanted decimamba_evaluate && tests decimamba_evaluate evaluate/test_decimamba_engine.py
# vLLM knows one engine with sleep mode per process.
for family in mamba1 mamba2 zamba2 granite_hybrid; do
  wanted "sleep_$family" && tests "sleep_$family" engine/test_sleep.py -k "$family"
done
wanted reload && tests reload engine/test_reload.py
wanted quantized && tests quantized engine/test_quantized.py
wanted calibrate && tests calibrate engine/test_calibrate.py
wanted calibrate_at_start && tests calibrate_at_start engine/test_calibrate_at_start.py
wanted evaluate && tests evaluate evaluate/test_eval_engine.py
wanted inspect && tests inspect engine/test_inspect.py
wanted kernels && tests kernels kernels tables
# Engines of all defaults take what memory they find: alone on a GPU, and only where they are asked for.
if [ "$only" != all ]; then
  for family in mamba1 mamba2 zamba2 falcon_mamba jamba granite_hybrid falcon_h1 nemotron_h; do
    wanted "defaults_$family" && tests "defaults_$family" engine/test_defaults.py -k "[$family]"
  done
  wanted defaults_decimamba && tests defaults_decimamba engine/test_decimamba_defaults.py
fi
export VLLM_USE_V2_MODEL_RUNNER=0
wanted runner_v1 && tests runner_v1 engine/test_gpu.py engine/test_preemption.py -k "cuda_graphs or resumed"
wanted speculative_runner_v1 &&
  tests speculative_runner_v1 engine/test_speculative.py engine/test_refusals.py -k "(zamba2 and drafts) or model_runner_v1"
wanted replayssm_runner_v1 && tests replayssm_runner_v1 engine/test_state_updates.py -k replayssm
wanted decimamba_runner_v1 && tests decimamba_runner_v1 engine/test_decimamba.py -k "cuda_graphs or preempted"

failed=0
for index in "${!pids[@]}"; do
  if ! wait "${pids[$index]}"; then failed=1; fi
  echo "${names[$index]}: $(tail -n 1 "$logs/${names[$index]}.log")"
done
exit $failed
