"""One paper, one file. Importing this package registers the method of every file in it, and offers its `__all__`."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; a new file works without a line here
    from .abliteration import *
    from .adalora import *
    from .antipasto import *
    from .dora import *
    from .ia3 import *
    from .ia3_ff import *
    from .lora import *
    from .pissa import *
    from .reft import *
    from .ssteer import *
    from .steer import *
    from .vera import *

__all__: list[str] = []
for _file in iter_modules(__path__):
    _module = import_module(f".{_file.name}", __name__)
    __all__ += _module.__all__
    globals().update({name: getattr(_module, name) for name in _module.__all__})
