"""One paper, one file. Importing this package registers the method of every file in it, and offers its `__all__`."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; a new file works without a line here
    from .abliteration import *
    from .adalora import *
    from .adamss import *
    from .antipasto import *
    from .bdlora import *
    from .beft import *
    from .bias import *
    from .boft import *
    from .c3a import *
    from .corda import *
    from .deft import *
    from .delora import *
    from .dora import *
    from .eva import *
    from .fourierft import *
    from .frod import *
    from .full import *
    from .glora import *
    from .gralora import *
    from .hira import *
    from .hra import *
    from .ia3 import *
    from .ia3_ff import *
    from .kasa import *
    from .lily import *
    from .loftq import *
    from .loha import *
    from .lokr import *
    from .lora import *
    from .lora_ga import *
    from .mica import *
    from .milora import *
    from .miss import *
    from .norm import *
    from .oft import *
    from .olora import *
    from .orthogonal import *
    from .osf import *
    from .peanut import *
    from .pissa import *
    from .psoft import *
    from .pvera import *
    from .randlora import *
    from .reft import *
    from .road import *
    from .shira import *
    from .ssteer import *
    from .steer import *
    from .supertuning import *
    from .tinylora import *
    from .tokens import *
    from .unilora import *
    from .vblora import *
    from .velora import *
    from .vera import *
    from .waveft import *

__all__: list[str] = []
for _file in iter_modules(__path__):
    _module = import_module(f".{_file.name}", __name__)
    __all__ += _module.__all__
    globals().update({name: getattr(_module, name) for name in _module.__all__})
