#!/usr/bin/env bash
# The gradient of torch.clamp for a number that lies exactly on the bound.
#
# One would guess: 1, as clamp leaves the number as it is, and as it was for years; parameters that start at the bound
# of a clamp, as gates that start open do, train.
#
# torch 2.13.0: 1. torch 2.14.1: 0, on the lower bound as on the upper, the output being the same. Parameters that start on
# the bound never move, and nothing is raised. What keeps the gradient: x.masked_fill(x > 1, 1.0).
#
# Output seen:
#   2.13.0: clamp [1.0, 1.0, 0.0] masked_fill [1.0, 1.0, 0.0]
#   2.14.1: clamp [1.0, 0.0, 0.0] masked_fill [1.0, 1.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/clamp.py" <<'PYTHON'
import torch


def gradient(function):
    x = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    return torch.autograd.grad(function(x).sum(), x)[0].tolist()


clamped, filled = gradient(lambda x: x.clamp(max=1.0)), gradient(lambda x: x.masked_fill(x > 1, 1.0))
print(f"{torch.__version__.partition('+')[0]}: clamp {clamped} masked_fill {filled}")
PYTHON
output=$(
  for version in 2.13.0 2.14.1; do
    python3 -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==$version numpy==2.4.6 2>/dev/null
    "$folder/venv/bin/python" "$folder/clamp.py"
  done
)
printf '%s\n' "$output"
expected='2.13.0: clamp [1.0, 1.0, 0.0] masked_fill [1.0, 1.0, 0.0]
2.14.1: clamp [1.0, 0.0, 0.0] masked_fill [1.0, 1.0, 0.0]'
[ "$output" = "$expected" ] || {
  echo "The behaviour has changed." >&2
  exit 1
}
