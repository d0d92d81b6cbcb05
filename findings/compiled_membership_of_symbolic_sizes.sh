#!/usr/bin/env bash
# Whether a number is in a tuple of a tensor's sizes, in compiled code with dynamic shapes.
#
# One would guess: as in Python, `8 in (x.size(0), x.size(1))` is True for an x of 8 x 8, since torch.compile guards on
# what a branch depends on, as it does for `8 == x.size(0)`.
#
# torch 2.13.0: False, with fullgraph=True and no warning, so the other branch is taken: results differ from Python's, or a
# check of sizes raises for right ones (outside fullgraph that frame then silently runs uncompiled). The other way round,
# `x.size(0) in (8, 9)`, is right. torch 2.14.1: True. What is right in both: comparing with each size by ==.
#
# Output seen:
#   2.13.0: number in sizes False, size in numbers True, number == size True
#   2.14.1: number in sizes True, size in numbers True, number == size True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/membership.py" <<'PYTHON'
import torch

FUNCTIONS = {
    "number in sizes": lambda x: x + 1 if 8 in (x.size(0), x.size(1)) else x,
    "size in numbers": lambda x: x + 1 if x.size(0) in (8, 9) else x,
    "number == size": lambda x: x + 1 if 8 == x.size(0) or 8 == x.size(1) else x,
}
x = torch.zeros(8, 8)
found = []
for name, function in FUNCTIONS.items():
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="eager")
    found.append(f"{name} {bool(compiled(x).all())}")
print(f"{torch.__version__.partition('+')[0]}: {', '.join(found)}")
PYTHON
output=$(
  for version in 2.13.0 2.14.1; do
    python3 -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==$version numpy==2.4.6 setuptools==84.2.1 2>/dev/null
    "$folder/venv/bin/python" "$folder/membership.py"
  done
)
printf '%s\n' "$output"
expected='2.13.0: number in sizes False, size in numbers True, number == size True
2.14.1: number in sizes True, size in numbers True, number == size True'
[ "$output" = "$expected" ] || {
  echo "The behaviour has changed." >&2
  exit 1
}
