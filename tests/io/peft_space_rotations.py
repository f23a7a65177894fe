"""PEFT's rotations on the models of peft_space.py."""

from typing import Any

import peft

OFT, BOFT, HRA, ROAD, PSOFT = (getattr(peft, f"{name}Config") for name in ("OFT", "BOFT", "HRA", "Road", "Psoft"))
EXACT: dict[str, Any] = {"use_cayley_neumann": False}
TWO: dict[str, Any] = {"r": 2, "oft_block_size": 0}
PAIRS: dict[str, Any] = {"oft_block_size": 2}
OVERLAP = {"refused": "other numbers than a weight holds"}
TURNED = {"gradients": False}  # v has the other sign here, and so its gradient
# v of a bounded block is the bound's, in PEFT in the file and here in each forward
BOUNDED = {"gradients": False}


def on(*names: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **fields}


TABLE: list[tuple[Any, ...]] = [
    ("mlp", OFT, {"target_modules": "lin0", **TWO, **EXACT}, TURNED),
    ("mlp", OFT, on("lin0", **TWO, **EXACT), TURNED),
    ("mlp", OFT, on("lin0", modules_to_save=["lin1"], **TWO, **EXACT), TURNED),
    ("mlp", OFT, on("lin0", module_dropout=0.1, **TWO, **EXACT), TURNED),
    ("mlp", OFT, on("lin0", coft=True, eps=1e-2, **TWO), BOUNDED),
    ("mlp", OFT, on("lin0", block_share=True, **TWO, **EXACT), TURNED),
    ("mlp", OFT, on("lin0", coft=True, eps=1e-2, block_share=True, **TWO), BOUNDED),
    ("mlp", OFT, on("lin0", **PAIRS)),
    ("mlp", OFT, on("lin0", **PAIRS, **EXACT), TURNED),
    ("mlp", OFT, on("lin0", coft=True, eps=1e-2, block_share=True, **PAIRS), BOUNDED),
    ("mlp", OFT, on("lin0", coft=True, eps=1e-2, block_share=True, **PAIRS, **EXACT), BOUNDED),
    ("mlp", OFT, on("lin0", "lin1", oft_block_size=10)),
    ("mlp", OFT, on("lin0", "lin1", **TWO), {"unwritten": "block_size differs by layer"}),
    ("mlp", OFT, on("lin0", oft_block_size=4)),  # 4 doesn't divide 10: PEFT takes 5
    ("mlp", OFT, on("lin0", num_cayley_neumann_terms=3, **TWO)),
    ("mlp", OFT, on("lin0", num_cayley_neumann_terms=4, **TWO)),
    ("mlp", OFT, on("lin0", num_cayley_neumann_terms=7, **TWO)),
    ("mlp", OFT, on("lin0", num_cayley_neumann_terms=2, **TWO), {"refused": "wanted 3 or more"}),
    ("mlp", OFT, on("lin0", num_cayley_neumann_terms=1, **TWO, **EXACT), TURNED),
    ("mlp", OFT, on("lin0", bias="all", **PAIRS)),
    ("mlp", OFT, on("lin0", "lin1", bias="oft_only", **PAIRS)),
    ("mlp_no_bias", OFT, on("lin0", "lin1", **PAIRS)),
    ("emb", OFT, on("emb", r=1, oft_block_size=0)),
    ("emb", OFT, on("emb", r=1, oft_block_size=0, block_share=True)),
    ("emb", OFT, on("emb", "lin0", oft_block_size=5)),
    ("conv2d", OFT, on("conv2d", r=5, oft_block_size=0), OVERLAP),
    ("conv2d", OFT, on("conv2d", r=5, oft_block_size=0, coft=True), OVERLAP),
    ("conv2d", OFT, on("conv2d", r=5, oft_block_size=0, block_share=True), OVERLAP),
    ("conv2d", OFT, on("conv2d", r=5, oft_block_size=0, coft=True, block_share=True), OVERLAP),
    ("conv2d_1x1", OFT, on("conv2d", "lin0", **PAIRS)),
    ("llama", OFT, on("q_proj", "down_proj", oft_block_size=4)),
    ("llama", OFT, on("embed_tokens", "v_proj", oft_block_size=8)),
    ("deep", OFT, on("lin0", oft_block_size=3, layers_to_transform=[0, 2])),
    ("mlp", BOFT, on("lin1", boft_block_size=2)),
    ("mlp", BOFT, on("lin1", boft_block_size=2, modules_to_save=["lin0"])),
    ("mlp", BOFT, on("lin1", boft_block_size=2, boft_dropout=0.1)),
    ("mlp", BOFT, on("lin1", boft_block_size=2, boft_block_num=0, boft_n_butterfly_factor=1)),
    ("mlp", BOFT, on("lin1", boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=1)),
    ("mlp", BOFT, on("lin1", boft_block_size=10, boft_block_num=0, boft_n_butterfly_factor=2)),
    ("mlp", BOFT, on("lin0", "lin1", boft_block_size=5, boft_n_butterfly_factor=3)),
    ("mlp", BOFT, on("lin0", "lin1", boft_block_size=2, bias="boft_only")),
    ("mlp", BOFT, on("lin0", boft_block_size=2, bias="all")),
    ("conv2d", BOFT, on("conv2d", boft_block_size=9, boft_block_num=0)),
    ("conv2d", BOFT, on("conv2d", boft_block_size=0, boft_block_num=1)),
    ("conv2d", BOFT, on("conv2d", "lin0", boft_block_size=2, boft_n_butterfly_factor=2)),
    ("conv2d_1x1", BOFT, on("conv2d", boft_block_size=2)),
    ("llama_bias", BOFT, on("q_proj", "down_proj")),
    ("mlp", HRA, {"target_modules": "lin0"}),
    ("mlp", HRA, on("lin0")),
    ("mlp", HRA, on("lin0", "lin1")),
    ("mlp", HRA, on("lin0", modules_to_save=["lin1"])),
    ("mlp", HRA, on("lin0", r=3)),
    ("mlp", HRA, on("lin0", r=1, bias="hra_only")),
    ("mlp", HRA, on("lin0", r=4, apply_GS=True, init_weights=False)),
    ("mlp", HRA, on("lin0", "lin1", r=3, apply_GS=True, bias="all")),
    ("conv2d", HRA, on("conv2d")),
    ("conv2d", HRA, on("conv2d", "lin0", r=6, apply_GS=True, init_weights=False)),
    ("conv2d_1x1", HRA, on("conv2d", r=2)),
    ("llama", HRA, on("q_proj", "down_proj")),
    ("mlp", ROAD, {"target_modules": "lin0", "group_size": 2}),
    ("mlp", ROAD, on("lin0", group_size=2)),
    ("mlp", ROAD, on("lin1", group_size=2)),
    ("mlp", ROAD, on("lin0", "lin1", group_size=2)),
    ("mlp", ROAD, on("lin0", variant="road_2", group_size=2)),
    ("mlp", ROAD, on("lin0", variant="road_4", group_size=2)),
    ("mlp", ROAD, on("lin0", group_size=10, modules_to_save=["lin1"])),
    ("mlp", ROAD, on("lin0", variant="road_4", group_size=20)),
    ("llama", ROAD, on("q_proj", "down_proj", group_size=16)),
    ("mlp", PSOFT, {"target_modules": "lin0", "r": 4, "psoft_alpha": 4}),
    ("mlp", PSOFT, on("lin0", r=4, psoft_alpha=4)),
    ("mlp", PSOFT, on("lin1", r=2, psoft_alpha=2)),
    ("mlp", PSOFT, on("lin0", "lin1", r=2, psoft_alpha=2)),
    ("mlp", PSOFT, on("lin0", modules_to_save=["lin1"], r=4, psoft_alpha=4)),
    ("mlp", PSOFT, on("lin0", r=4, psoft_alpha=4, psoft_mag_a=False, psoft_mag_b=False)),
    ("mlp", PSOFT, on("lin0", r=4, psoft_alpha=4, psoft_svd="lowrank", psoft_svd_lowrank_niter=10)),
    ("mlp", PSOFT, on("lin0", r=3, psoft_alpha=7, psoft_svd="lowrank", psoft_svd_lowrank_niter=2, random_seed=3)),
    (
        "mlp",
        PSOFT,
        on(
            "lin0",
            r=4,
            psoft_alpha=4,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=5,
            cayley_neumann_eps=0.9,
        ),
    ),
    ("mlp", PSOFT, on("lin0", r=4, use_cayley_neumann=True, num_cayley_neumann_terms=3, cayley_neumann_eps=0.1)),
    ("mlp", PSOFT, on("lin0", r=4, use_cayley_neumann=True, num_cayley_neumann_terms=1), {"refused": "wanted 3"}),
    ("mlp", PSOFT, on("lin0", r=4, psoft_alpha=4, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)),
    ("mlp", PSOFT, on("lin0", r=4, psoft_alpha=4, ab_svd_init="pissa_init")),
    ("mlp", PSOFT, on("lin0", r=4, psoft_alpha=9, ab_svd_init="pissa_init", psoft_orth=False)),
    ("llama", PSOFT, on("q_proj", "down_proj", r=5)),
]
