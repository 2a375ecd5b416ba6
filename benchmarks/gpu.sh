#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch, triton, nvcc and pytest, and no network.
#
#   benchmarks/gpu.sh                 all stages, one after the other
#   benchmarks/gpu.sh build smoke     these stages
#   benchmarks/gpu.sh --help          this text
#
# build        the library in place, with the machine's own torch and nvcc: about a minute for one architecture
# smoke        each kernel once against its reference, a detector's steps, a graph: at most 90 s
# headline     the numbers that matter beside their peers: at most 4 min; the table is printed again at the end
# test         the tests marked `gpu`: 770, 2 min on 5 processes (pytest-xdist), longer without
# triton       the tests of the Triton kernels, which without a GPU run in the interpreter: 780, 2.5 min on 11
# sanitize_memcheck, sanitize_racecheck, sanitize_initcheck
#              some 20 small tests of our CUDA kernels under compute-sanitizer, which makes them 10 to 50 times slower
# nms, roi_align, roi_batches, non_local, conv_head, fused_conv, detections, detector
#              the benchmarks, each case 3 to 10 s; they write benchmarks/results/<gpu>/*.json
# plot         tables and plots from the records
#
# A stage is stopped after 8 minutes (STAGE_SECONDS), and is named as stopped. The others run in any case; all failures
# are named at the end, and the exit status is 1 then. PYTHON chooses the interpreter (python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${STAGE_SECONDS:-480}
python=${PYTHON:-python3}
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
all=(build smoke headline test triton sanitize_memcheck sanitize_racecheck sanitize_initcheck
     nms roi_align roi_batches non_local conv_head fused_conv detections detector plot)

has_module() { "$python" -c "import $1" 2>/dev/null; }

# `parallel N`: arguments for so many processes, if pytest-xdist is installed. Each keeps to one thread.
parallel() { has_module xdist && echo "-n $1" || echo "not in parallel: pytest-xdist is not installed" >&2; }

run_tests() { OMP_NUM_THREADS=1 PYTHONPATH=. "$python" -m pytest -q -ra -p no:cacheprovider "$@"; }

# Files that have such tests, as others need not be collected.
files_with() { grep -lE "$1" tests/*/test_*.py; }

needs_gpu() {
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return 0
  echo "no GPU: nothing checked"
  return 1
}

measure() { needs_gpu || return 0; PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider "$@" --benchmark-only --full --record; }

# Unfiltered by kernel: memory that another kernel writes or leaves unwritten counts too.
sanitize() {
  needs_gpu || return 0
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: nothing checked" >&2; return 1; }
  local some="every_element or any_strides or strided_inputs or early_stop"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -q -ra -p no:cacheprovider -m gpu -k "$some" tests/ops/test_nms_gpu.py tests/ops/test_roi_align_gpu.py
}

stage_build() {
  command -v nvcc >/dev/null || echo "nvcc is not on PATH: the part for CUDA may be left out" >&2
  "$python" setup.py -q build_ext --inplace && PYTHONPATH=. "$python" -m doublehead info
}
stage_smoke() { PYTHONPATH=. "$python" benchmarks/smoke.py; }
stage_headline() {
  needs_gpu || return 0
  PYTHONPATH=. "$python" benchmarks/headline.py --seconds 240 2>&1 | tee -i "$results/headline"
  return "${PIPESTATUS[0]}"
}
stage_test() { needs_gpu || return 0; run_tests -m gpu $(parallel 5) $(files_with 'mark\.gpu'); }
stage_triton() { needs_gpu || return 0; run_tests -m "not gpu" $(parallel 11) $(files_with 'triton_kernels'); }
stage_sanitize_memcheck() { sanitize memcheck; }
stage_sanitize_racecheck() { sanitize racecheck; }
stage_sanitize_initcheck() { sanitize initcheck; }
stage_nms() { measure benchmarks/test_bench_nms.py; }
stage_roi_align() { measure benchmarks/test_bench_roi_align.py -k "not batches"; }
stage_roi_batches() { measure benchmarks/test_bench_roi_align.py -k "batches"; }
stage_non_local() { measure benchmarks/test_bench_non_local.py; }
stage_conv_head() { measure benchmarks/test_bench_conv_head.py; }
stage_fused_conv() { measure benchmarks/test_bench_{fused_conv,batch_norm}.py; }
stage_detections() { measure benchmarks/test_bench_detections.py benchmarks/test_bench_score_fusion.py; }
stage_detector() { measure benchmarks/test_bench_{detector,image_batch}.py; }
stage_plot() { needs_gpu || return 0; PYTHONPATH=. "$python" benchmarks/plot.py; }

help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' benchmarks/gpu.sh; }
for stage in "$@"; do
  case $stage in
    -h | --help) help; exit 0 ;;
  esac
  [[ " ${all[*]} " == *" $stage "* ]] || { echo "no stage '$stage'; there are: ${all[*]}" >&2; exit 2; }
done
[ $# -gt 0 ] && stages=("$@") || stages=("${all[@]}")

failed=()
export -f has_module parallel run_tests files_with needs_gpu measure sanitize $(compgen -A function stage_)
export python results
for stage in "${stages[@]}"; do
  echo "== $stage"
  started=$SECONDS
  # SIGINT first: pytest then names the failures so far. What still runs 10 s later is killed.
  timeout -s INT -k 10 "$seconds" bash -c "stage_$stage"
  status=$?
  case $status in
    0) ;;
    124 | 137) echo "== $stage: stopped after $seconds s"; failed+=("$stage (stopped after $seconds s)") ;;
    *) failed+=("$stage (status $status)") ;;
  esac
  echo "== $stage: $((SECONDS - started)) s"
done
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; }
[ ! -s "$results/headline" ] || { echo "== headline, again"; cat "$results/headline"; }
[ ${#failed[@]} -eq 0 ]
