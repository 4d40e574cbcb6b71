#!/usr/bin/env bash
# Correctness, then figures, within MINUTES (11), into OUT: gpu.json, log.txt, logs/.
# Arguments go to kit.py's --only, such as: correctness
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OUT="${OUT:-gpu-results}"
mkdir -p "$OUT"
{
  date -u
  nvidia-smi || true
  free -g || true
  df -h /tmp || true
  python3 benchmarks/gpu/kit.py --minutes "${MINUTES:-11}" --out "$OUT" ${1:+--only "$@"}
  echo "kit.py ended with $?"
  date -u
} 2>&1 | tee "$OUT/log.txt"
