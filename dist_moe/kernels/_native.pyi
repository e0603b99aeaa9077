# The compiled module: cffi declares its contents from csrc/dist_moe.h at run time, so its types are not known here.
from typing import Any

ffi: Any
lib: Any
