"""Machine code for the host processor, and for others, generated with LLVM.

A kernel computes a range of work items of one operation. An operation consists of a kernel, the
address of its arguments (a record) and its number of work items. The function `run` executes a
list of operations on all threads, with a barrier after each operation.

`records` defines the tables that Python and machine code share, `tiles` the shapes of the
convolution kernels. `convolution`, `plane_copy`, `recurrence` and `schedule` emit LLVM IR as text,
and `build` compiles it.
"""

from .activations import ACTIVATIONS
from .attention import VECTORS, scratch_size
from .build import (
    KernelLibrary,
    add_objects,
    compile_object,
    emit_convolutions,
    emit_module,
    emit_object,
    fingerprint,
    library,
)
from .convolution import Variant, declare_intrinsics, emit_convolution
from .host import Target, host, llvm, openmp
from .plane_copy import CHANNEL_BLOCK, COLUMN_STRIDES
from .records import (
    ATTENTION,
    CONVOLUTION,
    COPY,
    OPERATION,
    PLANE_OPERATION,
    RECURRENCE,
    TRANSPOSE,
)
from .recurrence import UNROLL
from .text import FunctionText, VectorText
from .tiles import Tile, tiles

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "CHANNEL_BLOCK",
    "COLUMN_STRIDES",
    "CONVOLUTION",
    "COPY",
    "OPERATION",
    "PLANE_OPERATION",
    "RECURRENCE",
    "TRANSPOSE",
    "UNROLL",
    "VECTORS",
    "FunctionText",
    "KernelLibrary",
    "Target",
    "Tile",
    "Variant",
    "VectorText",
    "add_objects",
    "compile_object",
    "declare_intrinsics",
    "emit_convolution",
    "emit_convolutions",
    "emit_module",
    "emit_object",
    "fingerprint",
    "host",
    "library",
    "llvm",
    "openmp",
    "scratch_size",
    "tiles",
]
