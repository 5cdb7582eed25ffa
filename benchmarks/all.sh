#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every number and figure of README.md and docs/benchmarks.md, measured on this machine: run it when nothing else does.
#
#   benchmarks/all.sh [--results DIR] [--tiny] [PART ...]       parts in this order; default: all of them
#
#   bars      the shapes at which the project states what it must reach, with peak memory     some 7 minutes on 2 cores
#   scaling   encode_topk and train_step from m = 2^10 to 2^18, with peak memory               some 9 minutes
#   ops       every op once, torch.compile and libraries too where they are installed          some 5 minutes
#   shares    what of a training step each op takes                                            under a minute
#   report    the README's table and blocks, docs/benchmarks.md, docs/figures                  seconds; part of "all"
#   quick     twice the quick ratios, and whether they agree within 10 %                       about 3 minutes; by name only
#
# DIR (default: benchmarks/results/here) is where bars.json, scaling.json, ops.json and shares.json go; a part replaces its
# file once it is through. --tiny does it all at shapes that mean nothing, and writes no page of this repository.
# PYTHON is the interpreter (default: .venv/bin/python, else python3), THREADS how many (default: all cores).
set -euo pipefail
cd "$(dirname "$0")/.."

results=benchmarks/results/here
tiny=0
parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --results) results=${2:?--results wants a folder}; shift ;;
    --tiny) tiny=1 ;;
    bars | scaling | ops | shares | report | quick) parts+=("$1") ;;
    *) sed -n '3,19p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(bars scaling ops shares report)
if [ -z "${PYTHON:-}" ]; then PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3); fi
threads=${THREADS:-$(nproc)}
mkdir -p "$results"

# A part is appended to a draft, which takes the place of the file when all of it is there.
measure() {
  local name=$1 draft="$results/.$1.draft.json" started=$SECONDS
  shift
  rm -f "$draft"
  "$PYTHON" benchmarks/run.py --gate --warmup 1 --threads "$threads" --out "$draft" "$@"
  mv "$draft" "$results/$name.json"
  echo "$name: $((SECONDS - started)) s"
}

report() {
  if [ "$tiny" = 1 ]; then
    # A page and figures of its own, beside the results.
    printf '<!-- %s:start -->\n<!-- %s:end -->\n' figure figure crossover crossover benchmarks benchmarks >"$results/README.md"
    "$PYTHON" benchmarks/report.py --all "$results" --readme "$results/README.md"
    "$PYTHON" benchmarks/report.py --check --readme "$results/README.md"
  else
    "$PYTHON" benchmarks/report.py --all "$results"
  fi
}

quick() {
  measure quick-1 "$@"
  measure quick-2 "$@"
  "$PYTHON" benchmarks/compare.py "$results/quick-1.json" "$results/quick-2.json"
}

for part in "${parts[@]}"; do
  case $part-$tiny in
    report-*) report ;;
    quick-0) quick --quick ;;
    quick-1) quick decode --n 64 --d 32 --m 512 --k 8 --no-memory --rounds 3 --within 0.5 || true ;;
    ops-0) measure ops --preset ops --compiled ;;
    *-0) measure "$part" --preset "$part" ;;
    *-1) measure "$part" --preset "tiny-$part" --no-memory ;;
  esac
done
