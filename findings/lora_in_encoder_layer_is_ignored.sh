#!/usr/bin/env bash
# peft's LoRA on the attention of a torch.nn.TransformerEncoderLayer, in evaluation mode.
#
# One would guess: model.eval() turns off dropout and nothing else, so an adapter changes the outputs in evaluation as
# it does in training.
#
# peft 0.21.2 with torch 2.13.0: in evaluation the layer computes its attention by a fused function, from the weights in
# self_attn, and calls neither self_attn nor the adapter around it: what was trained has no effect, and nothing is
# raised. The layer takes this path where none of its own parameters needs a gradient, so with peft, which freezes
# them, also while gradients are recorded; the adapter then gets none.
#
# Output seen:
#   training: the adapter changes the output
#   evaluation, with gradients: the adapter changes nothing
#   evaluation, no_grad: the adapter changes nothing
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 peft==0.21.2

cat >"$folder/adapt.py" <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = get_peft_model(layer, LoraConfig(target_modules=["self_attn"], r=4, init_lora_weights=False))
x = torch.randn(2, 5, 16)


def changed():
    with_adapter = model.base_model.model(x)
    with model.disable_adapter():
        without = model.base_model.model(x)
    return "the adapter changes the output" if (with_adapter - without).abs().max() > 1e-3 else "the adapter changes nothing"


model.train()
print("training:", changed())
model.eval()
print("evaluation, with gradients:", changed())
with torch.no_grad():
    print("evaluation, no_grad:", changed())
PYTHON
output=$("$folder/venv/bin/python" "$folder/adapt.py")
printf '%s\n' "$output"
expected='training: the adapter changes the output
evaluation, with gradients: the adapter changes nothing
evaluation, no_grad: the adapter changes nothing'
[ "$output" = "$expected" ] || {
  echo "The behaviour has changed." >&2
  exit 1
}
