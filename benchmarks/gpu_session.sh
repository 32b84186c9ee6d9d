#!/usr/bin/env bash
# What has to be run on GPUs, step by step, each with a limit of its own; logs and results go to a folder, one line a
# step to the screen. A step that fails does not stop the others.
#
#   benchmarks/gpu_session.sh OUT_DIR [STEP ...]     steps: pytest_gpu kernels layer ttft answers; all in this order if none
#
# MODEL names a SmolLM2 folder (`sglang-apb model smollm2 DIR`) for `answers`. GPUS is 1 if not set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/gpu_session.sh OUT_DIR [STEP ...]}
shift
mkdir -p "$out"
gpus=${GPUS:-1}

step() {  # name, seconds, command ...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  if timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1; then result=ok; else result="FAILED ($?)"; fi
  echo "== $name: $result, $((SECONDS - started)) s; $(tail -1 "$out/$name.log")"
}

pytest_gpu() { step pytest_gpu 420 python3 -m pytest -m gpu -q tests; }
kernels() {
  step kernels 240 python3 -m sglang_apb.cli bench kernels --lengths 32768,131072 --ranks "$gpus" \
    --output "$out/kernels.json" --plot "$out/kernels.png"
}
layer() {
  step layer 240 python3 -m sglang_apb.cli bench layer --lengths 32768,131072 --ranks "$gpus" \
    --output "$out/layer.json" --plot "$out/layer.png"
}
ttft() {
  step ttft 560 python3 -m sglang_apb.cli bench ttft --shape llama-3.1-8b --lengths 8192,32768,131072 --gpus "$gpus" \
    --output "$out/ttft.json" --plot "$out/ttft.png" --log-dir "$out/servers"
}
answers() {
  local ways=plain,apb-1,pd-1
  [ "$gpus" -gt 1 ] && ways=plain,apb-1,apb-2,pd-1,pd-2
  step answers 560 python3 benchmarks/gpu_check.py "$MODEL" "$out/answers" --ways "$ways"
}

for name in "${@:-pytest_gpu kernels layer ttft answers}"; do
  for each in $name; do "$each"; done
done
