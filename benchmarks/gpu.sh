#!/bin/sh
# Every test and figure that needs a GPU, in about ten minutes (twelve and a half at most); prints the table that was
# asked for. Exits with 1 if any part failed or ran out of its time.
#
#     benchmarks/gpu.sh [folder]      # figures.jsonl and the log of the tests go there; /tmp/polyak-gpu
#
# It runs from the source tree, with the torch that is there; peers that are not installed are left out.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-/tmp/polyak-gpu}
mkdir -p "$out"
PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH PYTHONUNBUFFERED=1
status=0

# What a command prints goes to a file and is shown; a pipe to tee would hide that the command failed.
shown() {
    file=$1
    shift
    "$@" >"$file" || status=1
    cat "$file"
}
shown "$out/card.txt" nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
shown "$out/torch.txt" python3 -c 'import torch; print("torch", torch.__version__)'

# The conftest of the root runs the documentation, which needs more than a GPU.
check() {
    echo "== $*"
    timeout "$1" python3 -m pytest -q -rfE --confcutdir=tests -p no:cacheprovider ${2} >"$out/$3.log" 2>&1 || status=1
    tail -3 "$out/$3.log"
}
check 120 "-m gpu tests/unit/averaging tests/unit/batchnorm tests/unit/reference_run" gpu-tests
check 60 "tests/unit/tensors/test_kernels.py" kernels
check 120 "-p reference.on_gpu tests/laws/test_averages.py" laws
check 120 "-p reference.on_gpu -p reference.on_host tests/laws/test_averages.py" laws-on-the-host

echo "== figures"
timeout 270 python3 benchmarks/update.py --device cuda --peers --rounds 20 >"$out/figures.jsonl" || status=1
shown "$out/table.md" timeout 30 python3 benchmarks/gpu_table.py "$out/figures.jsonl"
shown "$out/update-bn.jsonl" timeout 30 python3 benchmarks/update_bn.py --device cuda
cat "$out/update-bn.jsonl" >>"$out/figures.jsonl"
exit $status
