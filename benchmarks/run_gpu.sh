#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, the sanitizer, older cards' code, speed, and the check.
#
#   benchmarks/run_gpu.sh OUTPUT_DIRECTORY [STEP...]
#
# Steps, all of them by default and in this order: info check tests prefill merge cache tuning
# sm8x bench bench_prefill bench_merge bench_append bench_chunked bench_quantised bench_invariant
# tune first_call sanitizer soak bounds suite. Each has a limit (LIMIT_<STEP>, seconds), its log is
# OUTPUT_DIRECTORY/<step>.log, and a step that fails stops none of the others. PYTHON names the
# interpreter; PYTEST_ARGS (such as "-n 8", to compile on several cores), BENCH_ARGS and SOAK_ARGS
# (such as "--seconds 300 --jobs 8") are handed on.
set -u

cd "$(dirname "$0")/.."
if [ $# -lt 1 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
fi
output=$1
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(info check tests prefill merge cache tuning sm8x bench \
    bench_prefill bench_merge bench_append bench_chunked bench_quantised bench_invariant tune \
    first_call sanitizer soak bounds suite)

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$output"
output=$(cd "$output" && pwd)
summary="$output/summary.txt"
: >"$summary"

command_of() {
    case $1 in
    info) echo "nvidia-smi; $python -m mla_triton info" ;;
    check) echo "$python -m mla_triton check" ;;
    tests) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_decode_gpu.py" ;;
    prefill) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_prefill_gpu.py \
        tests/gpu/test_chunked_prefill_gpu.py tests/gpu/test_lengths_gpu.py" ;;
    merge) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_merge_gpu.py" ;;
    cache) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_cache_gpu.py" ;;
    tuning) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_tuning_gpu.py" ;;
    sm8x) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_sm8x_code.py" ;;
    bench) echo "$python benchmarks/decode.py --output '$output/bench.json' ${BENCH_ARGS:-}; rc=\$?;
        [ ! -f '$output/bench.json' ] || $python benchmarks/targets.py '$output/bench.json'
        exit \$rc" ;;
    bench_prefill) echo "$python benchmarks/prefill.py --output '$output/prefill.json'" ;;
    bench_merge) echo "$python benchmarks/merge.py --output '$output/merge.json'" ;;
    bench_append) echo "$python benchmarks/append.py --output '$output/append.json'" ;;
    bench_chunked) echo "$python benchmarks/chunked.py --output '$output/chunked.json'" ;;
    bench_quantised) echo "$python benchmarks/quantised.py --output '$output/quantised.json'" ;;
    bench_invariant) echo "$python benchmarks/invariant.py --output '$output/invariant.json'" ;;
    tune) echo "$python benchmarks/tune.py --output '$output/tune.json'" ;;
    first_call) echo "$python benchmarks/first_call.py --output '$output/first_call.json'" ;;
    sanitizer) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_sanitizer.py" ;;
    soak) echo "$python tests/gpu/soak.py ${SOAK_ARGS:---seconds 300 --jobs 8}" ;;
    bounds) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/gpu/test_bounds_gpu.py \
        tests/gpu/test_steady_gpu.py tests/gpu/test_soak_gpu.py" ;;
    suite) echo "$python -m pytest -q ${PYTEST_ARGS:-} tests/test_operators.py \
        tests/test_prefill_operators.py tests/test_merge.py tests/test_merge_operators.py \
        tests/test_append.py tests/test_gather.py tests/test_copy_pages.py tests/test_formats.py \
        tests/test_recall.py tests/test_deepseek_v3_layer.py" ;;
    *) return 1 ;;
    esac
}

limit_of() {
    local own="LIMIT_${1^^}"
    case $1 in
    info) echo "${!own:-60}" ;;
    check) echo "${!own:-180}" ;;
    tests) echo "${!own:-600}" ;;
    prefill) echo "${!own:-900}" ;;
    merge) echo "${!own:-300}" ;;
    cache) echo "${!own:-600}" ;;
    tuning) echo "${!own:-300}" ;;
    sm8x) echo "${!own:-240}" ;;
    bench) echo "${!own:-420}" ;;
    bench_prefill) echo "${!own:-300}" ;;
    bench_merge) echo "${!own:-240}" ;;
    bench_append) echo "${!own:-240}" ;;
    bench_chunked) echo "${!own:-300}" ;;
    bench_quantised) echo "${!own:-240}" ;;
    bench_invariant) echo "${!own:-180}" ;;
    tune) echo "${!own:-300}" ;;
    first_call) echo "${!own:-300}" ;;
    sanitizer) echo "${!own:-900}" ;;
    soak) echo "${!own:-600}" ;;
    bounds) echo "${!own:-300}" ;;
    suite) echo "${!own:-900}" ;;
    esac
}

failed=0
for step in "${steps[@]}"; do
    if ! command=$(command_of "$step"); then
        echo "run_gpu.sh: error: no step $step" >&2
        exit 2
    fi
    limit=$(limit_of "$step")
    began=$SECONDS
    timeout --kill-after=10 "$limit" bash -c "$command" >"$output/$step.log" 2>&1
    code=$?
    took=$((SECONDS - began))
    case $code in
    0) verdict=passed ;;
    124 | 137) verdict="stopped after $limit s" ;;
    *) verdict="FAILED ($code)" ;;
    esac
    [ $code -eq 0 ] || failed=1
    last=$(grep -v '^[[:space:]]*$' "$output/$step.log" | tail -n 1 | cut -c1-100)
    printf '%-10s %-22s %5d s  %s\n' "$step" "$verdict" "$took" "$last" | tee -a "$summary"
done
exit $failed
