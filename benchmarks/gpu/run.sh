#!/usr/bin/env bash
# Correctness, then figures, within MINUTES (11), into OUT: gpu.json, log.txt, logs.tar.gz.
# Arguments go to kit.py's --only, such as: correctness
# WHEELS (.wheels): a folder that wheels.py filled, installed where python3 finds it and nowhere else.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OUT="${OUT:-gpu-results}"
mkdir -p "$OUT"
{
  date -u
  if compgen -G "${WHEELS:=.wheels}/*.whl" > /dev/null; then
    site="$(mktemp -d)"
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  fi
  nvidia-smi || true
  free -g || true
  df -h /tmp || true
  python3 benchmarks/gpu/kit.py --minutes "${MINUTES:-11}" --out "$OUT" ${1:+--only "$@"}
  echo "kit.py ended with $?"
  tar -czf "$OUT/logs.tar.gz" -C "$OUT" logs && rm -r "$OUT/logs"
  date -u
} 2>&1 | tee "$OUT/log.txt"
