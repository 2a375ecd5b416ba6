#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch, triton, nvcc and pytest, and no network.
#
#   benchmarks/gpu.sh                 all stages, one after the other
#   benchmarks/gpu.sh build test      these stages
#
# build        the library in place, with the machine's own torch
# test         the tests marked `gpu`
# triton       the tests of the Triton kernels, which without a GPU run in the interpreter
# sanitize     a few of them under compute-sanitizer: memcheck, racecheck, initcheck
# nms, roi_align, roi_batches, non_local, conv_head, detections, detector
#              the benchmarks; they write benchmarks/results/<gpu>/*.json
# plot         tables and plots from the records
#
# A stage is stopped after 8 minutes (STAGE_SECONDS). A stage that fails is named at the end, and the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${STAGE_SECONDS:-480}
python=${PYTHON:-python3}

measure() { "$python" -m pytest -q -p no:cacheprovider "$@" --benchmark-only; }

stage_build() { "$python" -m pip install --quiet --no-build-isolation --no-deps -e . && "$python" -m doublehead.info; }

# Only files with GPU tests: others may need packages that this machine does not have.
gpu_tests() { grep -lE 'mark\.gpu' tests/test_*.py; }

stage_test() { "$python" -m pytest -q -m gpu $(gpu_tests); }

stage_triton() { "$python" -m pytest -q $(grep -lE 'triton_kernels' tests/test_*.py); }

stage_sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed: nothing checked"; return 0; }
  local failed=0 tool some="every_element or any_strides or strided_inputs or strange_boxes or early_stop"
  for tool in memcheck racecheck initcheck; do
    echo "-- $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((seconds / 3)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-regex kns=doublehead "$python" -m pytest -q -m gpu -k "$some" $(gpu_tests) || failed=1
  done
  return $failed
}

stage_nms() { measure benchmarks/test_bench_nms.py; }
stage_roi_align() { measure benchmarks/test_bench_roi_align.py -k "not batches"; }
stage_roi_batches() { measure benchmarks/test_bench_roi_align.py -k "batches"; }
stage_non_local() { measure benchmarks/test_bench_non_local.py; }
stage_conv_head() { measure benchmarks/test_bench_{conv_head,fused_conv,batch_norm}.py; }
stage_detections() { measure benchmarks/test_bench_detections.py benchmarks/test_bench_score_fusion.py; }
stage_detector() { measure benchmarks/test_bench_{detector,image_batch}.py; }
stage_plot() { "$python" benchmarks/plot.py; }

all=(build test triton sanitize nms roi_align roi_batches non_local conv_head detections detector plot)
[ $# -gt 0 ] && stages=("$@") || stages=("${all[@]}")
for stage in "${stages[@]}"; do
  [[ " ${all[*]} " == *" $stage "* ]] || { echo "no stage '$stage'; there are: ${all[*]}" >&2; exit 2; }
done
failed=()
export -f measure gpu_tests $(compgen -A function stage_)
export seconds python
for stage in "${stages[@]}"; do
  echo "== $stage"
  started=$SECONDS
  timeout "$seconds" bash -c "stage_$stage" || failed+=("$stage")
  echo "== $stage: $((SECONDS - started)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed or stopped: ${failed[*]}" >&2; exit 1; }
