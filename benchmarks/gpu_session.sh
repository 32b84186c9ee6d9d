#!/usr/bin/env bash
# What has to be run on GPUs, step by step, each with a limit of its own; logs and results go to a folder, one line a
# step to the screen. A step that fails does not stop the others.
#
#   benchmarks/gpu_session.sh OUT_DIR [STEP ...]
#
#   ready     is nothing compiled after a server is ready? First, where the kernel caches are still empty
#   pytest    all other tests marked gpu                  kernels   each call of a layer
#   layer     a layer by parts, beside exact attention    ttft      servers, plain and APB, 8K to 128K, with traces
#   long      APB alone, 256K; with PREFILL_LENGTHS as a pair's prefill server, which keeps what each rank owns
#   answers   SmolLM2 (its folder in MODEL) against plain SGLang, with and without disaggregation, and a CPU's answers
#   chats     200 chats with SmolLM2 through a prefill/decode cluster, many at once, against plain SGLang's answers
#   ruler     RULER with the model in MODEL, at LENGTHS, SAMPLES prompts a task: exact, the defaults, and a cheaper
#             configuration, side by side on one GPU. OUT_DIR/ruler of an earlier run goes on where it ended
#
# GPUS is 1 if not set. SHAPE: of ttft and long, llama-3.1-8b if not set; with qwen3-8b on several GPUs plain SGLang's
# context parallelism is there to compare with. BACKENDS: of plain SGLang, as for `bench ttft`. Servers have SGLang's
# defaults: prefix cache, overlap, and CUDA graphs, whose capture is a part of each start.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: benchmarks/gpu_session.sh OUT_DIR [STEP ...]}
shift
mkdir -p "$out"
gpus=${GPUS:-1}
shape=${SHAPE:-llama-3.1-8b}
bench=(python3 -m sglang_apb.cli bench)

step() {  # name, seconds, command ...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  if timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1; then result=ok; else result="FAILED ($?)"; fi
  echo "== $name: $result, $((SECONDS - started)) s; $(tail -1 "$out/$name.log")"
}

run_ready() { step ready 580 python3 -m pytest -q tests/test_gpu_ready.py; }
run_pytest() { step pytest 580 python3 -m pytest -m gpu -q tests --ignore tests/test_gpu_ready.py; }
run_kernels() {
  step kernels 240 "${bench[@]}" kernels --lengths 32768,131072 --ranks "$gpus" --output "$out/kernels.json"
}
run_layer() { step layer 240 "${bench[@]}" layer --lengths 32768,131072 --ranks "$gpus" --output "$out/layer.json"; }
run_ttft() {
  step ttft 560 "${bench[@]}" ttft --shape "$shape" --lengths 8192,32768,131072 --gpus "$gpus" \
    ${BACKENDS:+--backends "$BACKENDS"} --output "$out/ttft.json" --log-dir "$out/servers" --trace "$out/traces"
}
run_long() {
  step long 560 "${bench[@]}" ttft --shape "$shape" --lengths "${PREFILL_LENGTHS:-262144}" --gpus "$gpus" \
    ${PREFILL_LENGTHS:+--prefill-only} --backends "" --repeats 2 --output "$out/long.json" --log-dir "$out/servers" \
    -- --attention-backend flashinfer
}
run_answers() {
  local ways=plain,apb-1,default-1,pd-1
  [ "$gpus" -gt 1 ] && ways=plain,apb-1,apb-2,default-1,default-2,pd-1,pd-2
  step answers 560 python3 benchmarks/gpu_check.py "$MODEL" "$out/answers" --ways "$ways" \
    --record "$out/answers.json" --against benchmarks/results/answers-cpu.json -- --attention-backend flashinfer
}
run_chats() {
  step chats 560 python3 benchmarks/cluster_chats.py --model "$MODEL" --sp-size "$gpus" --log-dir "$out/chats" \
    -- --attention-backend flashinfer
}
run_ruler() {
  step ruler "${RULER_SECONDS:-1500}" python3 -m sglang_apb.cli eval ruler --model "$MODEL" --output "$out/ruler" \
    --lengths "${LENGTHS:-16384,32768}" --num-samples "${SAMPLES:-20}" --at-once 6 --servers-per-gpu 3 \
    --config 'apb={"min_tokens": 0}' --config 'cheaper={"min_tokens": 0, "passing": 96}' \
    -- --attention-backend flashinfer --max-total-tokens 350000 --max-running-requests 8 \
    --cuda-graph-max-bs-decode 8 --cuda-graph-bs-prefill 2048
}

# SGLang imports every model that it knows in every process, for a minute where the disk is slow.
SGLANG_DISABLED_MODEL_ARCHS=$(python3 -c "
from importlib.util import find_spec
from pathlib import Path
models = Path(find_spec('sglang').origin).parent / 'srt' / 'models'
print(','.join(sorted({path.stem for path in models.glob('*.py')} - {'llama', 'mistral', 'qwen2', 'qwen3'})))")
export SGLANG_DISABLED_MODEL_ARCHS

for name in ${@:-ready pytest kernels layer ttft answers chats}; do
  "run_$name"
done
