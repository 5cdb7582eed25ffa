#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that wants one NVIDIA GPU (written for an H200), in parts of at most nine minutes:
#
#   benchmarks/gpu.sh {build|conform|sanitize|bench|train} [FOLDER]
#
#   build     Installs this checkout into $PYTHON without a network (--no-build-isolation --no-deps --no-index), CUDA
#             kernels for this GPU alone, and the wheels in benchmarks/wheels (ignored by git; at most 60 MiB) that the
#             machine lacks: pytest-xdist, sparsify.
#   conform   The conformance suite and the tests of ops and Triton kernels on the GPU: values, gradients, runs and streams
#             that must agree bit by bit, CUDA graphs, weights of more than 2^31 elements.
#   sanitize  compute-sanitizer (memcheck, racecheck, initcheck) on small cases full of ties. Skipped, and said so, where
#             the machine has no compute-sanitizer.
#   bench     encode_topk, encode_batch_topk, decode and a training step at shapes A to D in bfloat16, beside their rivals.
#             What takes longer than the part has left is cut off, and said so: run it again with fewer shapes
#             (SHAPES="8192 4096 131072 64"), or another backend (BACKEND=cuda).
#   train     A short training of the demo's dictionary on the CPU and on the GPU, whose FVU must agree within 1 %, on the
#             rows in benchmarks/wheels/rows.npy (20 MiB of the demo's activations, say) or planted ones.
#
# Writes everything under FOLDER (default: benchmarks/results/<device>), nothing elsewhere in the checkout but the build.
# PYTHON is the interpreter to use (default: python3). DRY=1 prints the commands and runs none. Every part stops itself
# after LIMIT seconds (default 530) and its exit code is that of its first failure; the rest of the part still runs.
# REHEARSE=1 runs a part without a GPU, where it can: Triton kernels interpreted, everything tiny, nothing worth keeping.
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-}
python=${PYTHON:-python3}
limit=${LIMIT:-530}
wheels=benchmarks/wheels

usage() { sed -n '3,29p' "$0" | sed 's/^# \{0,1\}//'; }

case $part in
  build | conform | sanitize | bench | train) ;;
  *) usage >&2; exit 2 ;;
esac

device() { nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr '[:upper:] ' '[:lower:]-'; }

rehearse=${REHEARSE:-0}
if [ "${DRY:-0}" != 1 ] && [ "$rehearse" != 1 ] && [ -z "$(device)" ]; then
  echo "no NVIDIA GPU here (nvidia-smi names none)" >&2
  exit 3
fi
name=$(device)
[ "$rehearse" = 1 ] && name=rehearsal
folder=${2:-benchmarks/results/${name:-gpu}}
started=$SECONDS
failed=0

# Runs a command for as long as the part has left, its output in FOLDER/<log>.txt, and remembers that it failed.
step() {
  local log=$1 left=$((limit - (SECONDS - started))) code=0
  shift
  echo "+ $*"
  if [ "${DRY:-0}" = 1 ]; then return 0; fi
  mkdir -p "$folder"
  if [ "$left" -le 5 ]; then
    echo "  not run: $limit seconds are over" | tee "$folder/$log.txt"
    failed=${failed/#0/124}
    return 0
  fi
  timeout -k 10 "$left" "$@" >"$folder/$log.txt" 2>&1 || code=$?
  tail -n 3 "$folder/$log.txt" | sed 's/^/  /'
  if [ "$code" -ne 0 ]; then
    echo "  exit code $code: see $folder/$log.txt"
    [ "$failed" -ne 0 ] || failed=$code
  fi
}

build() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    size=$(du -sm "$wheels" | cut -f 1)
    if [ "$size" -gt 60 ]; then
      echo "$wheels holds $size MiB, 60 at most" >&2
      exit 2
    fi
    step wheels "$python" -m pip install --no-deps --no-index "$wheels"/*.whl
  else
    echo "no wheels in $wheels: the machine's own packages have to do"
  fi
  # Of the GPU's own capability alone: compiling for all of them takes minutes more.
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
  case $arch in
    9*) arch=${arch}a-real ;;
    ?*) arch=${arch}-real ;;
    *) arch=90a-real ;;
  esac
  step install "$python" -m pip install --no-build-isolation --no-deps --no-index \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$arch" -e .
  step versions "$python" -m fusae
}

# pytest, in as many processes as pay off where pytest-xdist is there: most of the time goes into compiling kernels.
tests() {
  local log=$1 several=()
  shift
  "$python" -c "import xdist" 2>/dev/null && several=(-n "${WORKERS:-8}")
  step "$log" "$python" -m pytest -q -p no:cacheprovider --tb=short "${several[@]}" --junitxml "$folder/$log.xml" "$@"
}

conform() {
  if [ "$rehearse" = 1 ]; then
    tests gpu tests/test_triton_gpu.py
    tests triton tests/test_triton_encode.py tests/test_triton_batch.py -k "14-k_is_1 or one_row"
    tests conformance tests/test_conformance.py -k "triton and topk and n3-m40 and fp32"
    return 0
  fi
  # With a GPU the tests are not interpreted: the variable must not be there.
  unset TRITON_INTERPRET
  # What is most likely to be wrong comes first: when the time is over, the rest is not run.
  tests gpu tests/test_triton_gpu.py
  tests triton tests/test_triton_encode.py tests/test_triton_batch.py tests/test_triton_decode.py \
    tests/test_triton_latents.py tests/test_triton_dense.py tests/test_triton_adam_rows.py tests/test_triton_tuning.py
  tests conformance tests/test_conformance.py -k "triton or cuda"
  tests determinism tests/test_determinism.py -k "triton or cuda"
  tests ops tests/test_ops_ragged.py tests/test_ops_decode_loss.py tests/test_ops_codes_from_dense.py \
    tests/test_ops_adam_rows.py tests/test_ops_autograd.py tests/test_ops_torch.py tests/test_ops_vmap.py \
    -k "triton or cuda"
}

sanitize() {
  local tool
  if ! tool=$(command -v compute-sanitizer) && [ "${DRY:-0}" != 1 ]; then
    mkdir -p "$folder"
    echo "skipped: no compute-sanitizer on this machine" | tee "$folder/sanitize.txt"
    return 0
  fi
  unset TRITON_INTERPRET
  for check in memcheck racecheck initcheck; do
    # Torch's allocator hides what is out of bounds between its blocks.
    step "sanitize-$check" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool:-compute-sanitizer}" --tool "$check" --error-exitcode 99 \
      "$python" -m pytest -q -x -p no:cacheprovider tests/test_triton_encode.py tests/test_triton_batch.py \
      -k "pitfall or repaired or storm"
  done
}

bench() {
  local common=(--device cuda --backend "${BACKEND:-triton}" --dtype bfloat16 --gate --out "$folder/bars.json")
  local all="8192 4096 131072 64,8192 768 1048576 32,4096 2304 65536 64,8192 1024 32768 32"
  local shape shapes op
  if [ "$rehearse" = 1 ]; then
    common=(--device cpu --dtype bfloat16 --no-memory --out "$folder/bars.json")
    all="32 16 64 4"
  fi
  IFS=, read -r -a shapes <<<"${SHAPES:-$all}"
  for shape in "${shapes[@]}"; do
    # shellcheck disable=SC2086
    set -- $shape
    for op in encode_topk train_step encode_batch_topk decode; do
      step "$op-n$1-d$2-m$3-k$4" "$python" benchmarks/run.py "$op" --n "$1" --d "$2" --m "$3" --k "$4" --rounds 5 "${common[@]}"
    done
  done
}

train() {
  local data=planted sizes=()
  [ -f "$wheels/rows.npy" ] && data=$wheels/rows.npy
  local devices=(cpu cuda)
  if [ "$rehearse" = 1 ]; then
    devices=(cpu cpu)
    sizes=(--tokens 600 --m 64 --k 4 --batch 100)
  fi
  step train "$python" benchmarks/gpu_training.py --data "$data" --devices "${devices[@]}" "${sizes[@]}" \
    --out "$folder/training.json"
}

"$part"
if [ "${DRY:-0}" != 1 ]; then echo "$part: $((SECONDS - started)) s, exit code $failed, results in $folder"; fi
exit "$failed"
