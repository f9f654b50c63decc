"""Compiles Triton kernels for GPUs that are not here."""

from __future__ import annotations

from typing import Any

from torch_feather.launching import WARPS


def compiled_kernel(
    function: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    fusion: bool = False,
) -> Any:
    """Compile a kernel with the options of `launching.launch`.

    Args:
        function: a function of `triton.jit`.
        arguments: types by name, such as ``*fp32``.
        constants: compile-time constants by name.
        capability: of the GPU, such as 90.
        fusion: whether products and sums may be fused.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = arguments | dict.fromkeys(constants, "constexpr")
    return compile(
        ASTSource(fn=function, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS, "enable_fp_fusion": fusion},
    )
