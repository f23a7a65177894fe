"""BOFT: rotate the input by butterfly factors of blocks (Liu et al. 2023, arXiv:2311.06243).

    y = s ⊙ (W (Rᵀ x)) + b      R = B_m ... B_2 B_1, on rows x R      R_j (i / k, k, k) trained, k the block size
    B_j  = P_j blockdiag(C_j) P_jᵀ      C_j = (I - K)(I + K)⁻¹, K = (R_j - R_jᵀ) / 2      s (o, 1)
    P_j makes each block of channels that lie (k / 2) 2ʲ⁻¹ apart: k / 2 neighbours, and k / 2 others; P_1 = I

Identity   R_j = 0 and s = 1, bit-exact
Base       never read: any layer kind. On a convolution its patches turn
Departs    the factors act on x one after the other, where PEFT multiplies them out to (i, i) and takes m = 1 for any m
           without its CUDA extension. At scale c both parts have it: x + c x (B_j - I), factor by factor, and
           1 + c (s - 1). dropout: in training int(p D) of the D blocks of one factor drawn by chance don't turn
Checked    against PEFT BOFTConfig: outputs, gradients, three AdamW steps; m > 1 with its extension's op in torch
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.orthogonal import change_by
from ..ops.cayley import rotation_less_identity, turned_by
from ..ops.recompute import recomputed

__all__ = ["BOFT", "BOFTConfig"]
