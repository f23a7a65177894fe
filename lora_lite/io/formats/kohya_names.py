"""Names of layers in kohya's files: a path with underscores in the place of dots, after a model's prefix.

    lora_unet_down_blocks_0_attentions_0_proj_in     down_blocks.0.attentions.0.proj_in of a UNet

So a name is found by the model's own paths, and one that two of them share is refused. Where a program trains a
model of its own, names are of that one's layers:

    SGM     Stability's UNet, by which kohya names SDXL: input_blocks_4_1_..., of blocks that are counted through
    BFL     Black Forest Labs' Flux: double_blocks_0_img_attn_qkv is to_q, to_k and to_v, one above the other
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from ...errors import CheckpointError, brief
from ..keys import core

PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_")
"""The beginnings of names, which tell the model that they are of."""

# Within a block of the UNet: diffusers' name -> SGM's.
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_IN_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)")
_IN_DOUBLE = {  # of Flux: BFL's name -> diffusers'
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_IN_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_IN_FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


@dataclass(frozen=True)
class Place:
    """The layers that one name is of: several where a file's layer has the rows of all, in this order."""

    paths: tuple[str, ...]
    is_swapped: bool = False  # its first half of rows is the model's second


def mangled(path: str) -> str:
    return path.replace(".", "_")


def component_of(root: nn.Module) -> str:
    """The prefix of a model: lora_unet of every UNet, lora_te of a model of transformers, lora_transformer of others,
    as their programs know diffusers' names of layers."""
    if "UNet" in type(root).__name__:
        return "lora_unet"
    return "lora_te" if type(root).__module__.startswith("transformers.") else "lora_transformer"


def original_names(root: nn.Module, paths: Collection[str]) -> dict[str, Place]:
    """The layers by the names of the program that trained the model: SGM's of a UNet, BFL's of Flux; of others none."""
    kind = type(root).__name__
    places = _sgm(paths) if "UNet" in kind else _bfl(paths) if kind.startswith("Flux") else {}
    return {mangled(name): place for name, place in places.items()}


def _sgm(paths: Collection[str]) -> dict[str, Place]:
    """SGM counts the parts of all blocks through: a resnet and the attention after it are one, and a downsampler is."""
    parts: dict[tuple[str, int], set[str]] = defaultdict(set)  # a block -> "resnets.0", "attentions.0", ...
    matches = {path: match for path in paths if (match := _BLOCK.fullmatch(path))}
    for match in matches.values():
        parts[match[1], int(match[2] or 0)].add(f"{match[3]}.{match[4]}")
    numbers: dict[tuple[str, int, str], str] = {}  # block and part -> "input_blocks.4.1"
    for side, name, count in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for block in sorted(index for known, index in parts if known == side):
            inside = parts[side, block]
            for j in range(len([part for part in inside if part.startswith("resnets.")])):
                numbers[side, block, f"resnets.{j}"] = f"{name}.{count}.0"
                numbers[side, block, f"attentions.{j}"] = f"{name}.{count}.1"
                count += 1
            if "downsamplers.0" in inside:
                numbers[side, block, "downsamplers.0"] = f"{name}.{count}.0"
                count += 1
            # An upsampler follows the last of its block, after the attention if there is one.
            numbers[side, block, "upsamplers.0"] = f"{name}.{count - 1}.{1 + any('attentions.' in p for p in inside)}"
    middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    numbers |= {("mid_block", 0, part): f"middle_block.{n}" for part, n in middle.items()}
    places = {theirs: Place((ours,)) for ours, theirs in _IN_UNET.items() if ours in paths}
    for path, match in matches.items():
        start = numbers.get((match[1], int(match[2] or 0), f"{match[3]}.{match[4]}"))
        rest = _IN_RESNET.get(match[5]) if match[3] == "resnets" else match[5]
        rest = "op" if match[3] == "downsamplers" else rest
        if start is not None and rest is not None:
            places[f"{start}.{rest}"] = Place((path,))
    return places


def _bfl(paths: Collection[str]) -> dict[str, Place]:
    places: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in _IN_FLUX.items()}
    for stack, theirs, inside in (
        ("transformer_blocks", "double_blocks", _IN_DOUBLE),
        ("single_transformer_blocks", "single_blocks", _IN_SINGLE),
    ):
        indices = {path.split(".")[1] for path in paths if path.startswith(f"{stack}.")}
        places |= {
            f"{theirs}.{i}.{name}": tuple(f"{stack}.{i}.{part}" for part in parts)
            for i in indices
            for name, parts in inside.items()
        }
    # diffusers' norm has scale and shift, BFL's shift and scale.
    return {
        name: Place(parts, is_swapped=name.startswith("final_layer.adaLN"))
        for name, parts in places.items()
        if set(parts) <= set(paths)
    }


class Names:
    """The layers of a model by every name that a file may have for them."""

    def __init__(self, root: nn.Module, paths: Iterable[str]) -> None:
        self.root, self.paths = root, list(paths)
        # transformers 4 had CLIP's text encoder in a module of this name, and kohya's files are of that time.
        inner = type(root).__name__ == "CLIPTextModel" and not any(p.startswith("text_model.") for p in self.paths)
        self.start = "text_model_" if inner else ""
        self._by_name: list[dict[str, list[Place]]] = []  # the first that has a name tells
        for name_of in (mangled, lambda path: self.start + mangled(path), lambda path: mangled(core(path))):
            known: dict[str, list[Place]] = defaultdict(list)
            for path in self.paths:
                known[name_of(path)].append(Place((path,)))
            self._by_name.append(known)
        self.original = original_names(root, set(self.paths))
        self._by_name.append({name: [place] for name, place in self.original.items()})

    def find(self, name: str) -> list[Place]:
        """The layers of this name, without the prefix: none, one place, or those that share it."""
        return next((known[name] for known in self._by_name if name in known), [])

    def written(self, path: str, where: str) -> str:
        """The name of a layer in a file. Raises CheckpointError where another layer has it, too."""
        name = self.start + mangled(path)
        if len(places := self.find(name)) > 1:
            others = ", ".join(place.paths[0] for place in places[:3])
            raise CheckpointError(f"{where}: {brief(name)} is the name of {others}\n  leave them out (exclude_names)")
        return name


def split_prefix(name: str) -> tuple[str, str]:
    """The prefix of a name, and the rest; "" before a name of no known one."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)
