#!/usr/bin/env bash
# The wheel, in an empty environment: it imports and works with no extra installed.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE  # nothing is compiled ahead
wheel=$(realpath "$1")
constraints=$(realpath constraints.txt)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
"${PYTHON:-python3}" -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check -c "$constraints" "$wheel"
env/bin/python - <<'PY'
import importlib.util, sys
import torch
import lora_lite as ll
from lora_lite.core.variant import needs_data

for extra in ("transformers", "bitsandbytes", "accelerate", "peft", "beartype"):
    assert importlib.util.find_spec(extra) is None, f"{extra} came with the core"
x = torch.tensor([[1, 3]])
model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
base = model(x)
places = {"norm": {"target_names": "1"}, "tokens": {"target_names": "0", "token_ids": (1,)}, "reft": {"kinds": "linear"}}
for variant, method in ll.REGISTRY.items():
    cfg = ll.config_for(variant)
    rank = {"r": 2} if "r" in cfg.__dataclass_fields__ else {}
    config = cfg(**{"target_names": "2", "target_roles": ()} | rank | places.get(variant, {}))
    data = {"directions": torch.ones(8)} if needs_data(config) else None
    if variant == "history":  # made of a round, the fresh one of another method
        ll.attach(model, ll.LoRAConfig(r=2, target_names="2"), "round")
        ll.freeze_into(model, "round", "default")
        assert torch.equal(model(x), base)
    else:
        ll.attach(model, config, calibration_data=data)
        assert torch.equal(model(x), base) == method.has_identity_init
    ll.save(model, "adapter.safetensors")
    ll.detach(model)
    ll.load(model, "adapter.safetensors")
    ll.detach(model)
print(f"lora_lite {ll.__version__} works from its wheel, with no extras")
PY
status=0
message=$(env/bin/lora-lite --help 2>&1) || status=$?
[ "$status" = 2 ] && grep -qF "pip install 'lora-lite[cli]'" <<<"$message" || { echo "lora-lite without its extra: $message"; exit 1; }
