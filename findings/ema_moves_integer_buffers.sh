#!/usr/bin/env bash
# torch.optim.swa_utils.AveragedModel(use_buffers=True) and an integer buffer that never changes.
#
# One would guess: the average of equal numbers is that number, so a buffer of indices that model and average share
# stays as it is, whatever the decay.
#
# torch 2.13.0 (2.14.1 has the same code): the average is computed in float32 and truncated when it is copied back.
# - With get_ema_avg_fn or get_ema_multi_avg_fn and a decay of 0.9 or 0.9999, 3 or 11 becomes one less at the first
#   update, and a quarter or a fifth of the numbers below 200,000 do. With 0.99 and 0.999 none does: what a test with
#   those decays shows says nothing of the others.
# - Numbers from 2^24 on are rounded to float32 by every average, the default one included.
# Nothing is raised. Positions, vocabulary maps and sparse indices must not be buffers of a model that is averaged so.
#
# Output seen:
#   ema 0.9: 47970 of 200000 moved, the first: 3 to 2
#   ema 0.99: 0 of 200000 moved
#   ema 0.999: 0 of 200000 moved
#   ema 0.9999: 39475 of 200000 moved, the first: 11 to 10
#   default: 0 of 200000 moved, 16777217 is now 16777216
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/average.py" <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("index", torch.arange(200_000))
        self.register_buffer("large", torch.tensor([2**24 + 1]))


def averaged(**arguments):
    model = Model()
    average = AveragedModel(model, use_buffers=True, **arguments)
    for _ in range(2):  # the first only copies
        average.update_parameters(model)
    moved = (average.module.index != model.index).nonzero()[:, 0]
    text = f"{len(moved)} of {len(model.index)} moved"
    first = f", the first: {int(moved[0])} to {int(average.module.index[moved[0]])}" if len(moved) else ""
    return text, first, int(average.module.large)


for decay in (0.9, 0.99, 0.999, 0.9999):
    text, first, _ = averaged(avg_fn=get_ema_avg_fn(decay))
    print(f"ema {decay}: {text}{first}")
text, first, large = averaged()
print(f"default: {text}{first}, {2**24 + 1} is now {large}")
PYTHON
output=$("$folder/venv/bin/python" "$folder/average.py")
printf '%s\n' "$output"
expected='ema 0.9: 47970 of 200000 moved, the first: 3 to 2
ema 0.99: 0 of 200000 moved
ema 0.999: 0 of 200000 moved
ema 0.9999: 39475 of 200000 moved, the first: 11 to 10
default: 0 of 200000 moved, 16777217 is now 16777216'
[ "$output" = "$expected" ] || {
  echo "The behaviour has changed." >&2
  exit 1
}
