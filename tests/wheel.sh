#!/usr/bin/env bash
# The wheel, in an empty environment: it imports and works with no extra installed; then with those of $EXTRAS, if any.
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
import importlib.resources, importlib.util, sys
import torch
import lora_lite as ll
from lora_lite.core.variant import needs_data

for extra in ("transformers", "bitsandbytes", "accelerate", "peft", "beartype"):
    assert importlib.util.find_spec(extra) is None, f"{extra} came with the core"
x = torch.tensor([[1, 3]])
d = 256  # every method's defaults fit a layer of this width
model = torch.nn.Sequential(torch.nn.Embedding(5, d), torch.nn.LayerNorm(d), torch.nn.Linear(d, d), torch.nn.Linear(d, 4))
base = model(x)
batches = [{"input": x}]
data = {"loftq": {"2": torch.randn(d, d)}, "lora_ga": {"batches": batches, "loss": lambda m, x: m(**x).square().mean()}}
data |= {"eva": batches, "corda": batches}
places = {"norm": {"target_names": "1"}, "tokens": {"target_names": "0", "token_ids": (1,)}, "reft": {"kinds": "linear"}}
for variant, method in ll.REGISTRY.items():
    cfg = ll.config_for(variant)
    rank = {"r": 2} if "r" in cfg.__dataclass_fields__ else {}
    config = cfg(**{"target_names": "2", "target_roles": ()} | rank | places.get(variant, {}))
    if variant == "history":  # made of a round, the fresh one of another method
        ll.attach(model, ll.LoRAConfig(r=2, target_names="2"), "round")
        ll.freeze_into(model, "round", "default")
        assert torch.equal(model(x), base)
    else:
        given = data.get(variant, {"directions": torch.ones(d)}) if needs_data(config) else None
        ll.attach(model, config, calibration_data=given)
        assert torch.equal(model(x), base) == method.has_identity_init
    ll.save(model, "adapter.safetensors")
    ll.detach(model)
    ll.load(model, "adapter.safetensors")
    ll.detach(model)
page = importlib.resources.files("lora_lite.play")
assert all((page / name).is_file() for name in ("neutral.json", "presets.json", "page/index.html", "page/main.js"))
print(f"lora_lite {ll.__version__} works from its wheel, with no extras")
PY
status=0
message=$(env/bin/lora-lite --help 2>&1) || status=$?
[ "$status" = 2 ] && grep -qF "pip install 'lora-lite[cli]'" <<<"$message" || { echo "lora-lite without its extra: $message"; exit 1; }
[ -z "${EXTRAS:-}" ] && exit
env/bin/python -m pip install -q --no-compile --disable-pip-version-check -c "$constraints" "$wheel[$EXTRAS]"
env/bin/lora-lite --help >help.txt
env/bin/python - <<'PY'
import torch, transformers
import lora_lite as ll
from lora_lite.trainer import AdapterTrainer

sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained("base")
ids = torch.arange(12)[None]
for quantization in (None, "nf4"):
    model = ll.load_base("base", quantization=quantization)
    adapter = ll.attach(model, ll.LoRAConfig(r=4))
    assert ll.audit(model, {"input_ids": ids, "labels": ids})
    ll.save(model, "adapter.safetensors")
PY
env/bin/lora-lite inspect adapter.safetensors >report.txt
echo "and with the extras $EXTRAS, on $(env/bin/python --version)"
