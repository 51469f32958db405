"""Compiles every Triton kernel for a Hopper GPU, without one: a program of its own, as tests interpret kernels.

python tests/ops/compile_kernels.py
"""

import inspect

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_lm.ops.triton import adam as triton_adam
from moe_lm.ops.triton import grouped_gemm as triton_gemm
from moe_lm.ops.triton import lstm as triton_lstm
from moe_lm.ops.triton import noisy_top_k as triton_choice
from moe_lm.ops.triton import rows as triton_rows
from moe_lm.ops.triton import softmax as triton_softmax
from moe_lm.ops.triton.tiles import MAX_BLOCK_M, num_warps

SHARED = 227 << 10
"""Bytes that a program may have of a Hopper GPU's shared memory."""
INTEGERS = {"token", "order", "ends", "expert", "first", "hit", "row"}
"""Pointers to int64; all others are to float32, or to bfloat16 where a kernel is compiled so."""
NUMBERS = {"correction", "epsilon", "lr", "scale", "weight"}
SIZES = {"width", "rows", "parts", "hidden", "columns", "tokens", "experts", "chance_stride", "units", "h_stride"}
SIZES |= {"inputs", "outputs", "splits", "w_expert", "w_row", "w_column"}


def compiled(
    kernel, half: tuple[str, ...] = (), options: dict | None = None, any_size: bool = True, **constants: int
) -> None:
    """Compile one kernel with these constants; the arguments named in `half` are bfloat16.

    Addresses and sizes are multiples of 16, as the paper's are: only then the compiler copies ahead into shared memory.
    With `any_size` the kernel is compiled once more for any sizes.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    kinds = {name: "constexpr" if name in constants else _kind(name, half) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    even = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind == "i32" or kind[0] == "*"}
    for known in (even, {}) if any_size else (even,):
        source = ASTSource(kernel, kinds, values, known)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options or {})
        assert made.metadata.shared <= SHARED, f"{kernel.fn.__name__} {constants}: {made.metadata.shared} bytes"
    print(kernel.fn.__name__, constants, flush=True)


def _kind(name: str, half: tuple[str, ...]) -> str:
    if name in SIZES:
        return "i32"
    if name in NUMBERS:
        return "fp32"
    return "*i64" if name in INTEGERS else "*bf16" if name in half else "*fp32"


def _compile_products() -> None:
    """Compile the grouped products in each block shape, for full blocks and for narrow ones."""
    for (row_bytes, matrix_bytes), shape in triton_gemm.MM_SHAPES.items():
        half = ("x", "out", *(("w",) if matrix_bytes == 2 else ())) if row_bytes == 2 else ()
        options = {"RELU": bool(half), "GATHER": bool(half), "PRECISION": "ieee" if half else "tf32"}
        for strides in ({"w_column": 1}, {"w_row": 1}, {}):  # of matrices as they are, transposed, anyhow
            for block_m, block_n in ((MAX_BLOCK_M, shape.block_n), (32, 32)):
                block = _block(block_m, block_n, shape.block_k)
                launch = {"num_warps": num_warps(block_m * block_n), "num_stages": shape.stages}
                small = block_m == 32  # the large ones take longest to compile
                compiled(triton_gemm._grouped_mm, half, launch, small, **strides, **options, **block)
    for size, shape in triton_gemm.OUTER_SHAPES.items():
        half = ("x", "grad") if size == 2 else ()  # the sums stay float32
        for block_m, block_n in ((triton_gemm.OUTER_BLOCK_M, shape.block_n), (32, 32)):
            block = _block(block_m, block_n, shape.block_k)
            launch = {"num_warps": num_warps(block_m * block_n), "num_stages": shape.stages}
            for gather in (True, False):
                options = {"GATHER": gather, "PRECISION": "ieee" if half else "bf16x3"}
                compiled(triton_gemm._grouped_outer, half, launch, block_m == 32, **options, **block)


def _block(block_m: int, block_n: int, block_k: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}


def main() -> None:
    """Compile all of them."""
    compiled(triton_rows._gather, ("x", "out"), BLOCK=512)
    for weighted in (True, False):
        compiled(triton_rows._sum, ("y",), WEIGHTED=weighted, BLOCK=512)
    compiled(triton_rows._sum_scalars, BLOCK=1024)
    compiled(triton_rows._mask_and_dot, ("grad", "h"), BLOCK=1024)
    _compile_products()
    compiled(triton_softmax._probabilities, ("logits",), BLOCK=1024)
    for num_experts in (4, 256, 4096):
        largest, (_, sizes) = min(5, num_experts), triton_choice._layout(100, num_experts)
        del sizes["num_warps"]
        compiled(triton_choice._choose, K=4, LARGEST=largest, **sizes)
        for given in ((True, True, largest > 4), (True, False, largest > 4), (False, False, False)):
            flags = dict(zip(("TOP", "NOISY", "CHANCE"), given, strict=True))
            compiled(triton_choice._choice_gradient, K=4, LARGEST=largest, **flags, **sizes)
    for edge in (True, False):
        compiled(triton_lstm._forward, ("z", "h"), FIRST=edge, BLOCK=512)
        compiled(triton_lstm._backward, ("grad_h", "z", "grad_z"), FIRST=edge, LAST=not edge, BLOCK=512)
    compiled(triton_adam._square, ROWS=triton_adam._ROWS, PART=triton_adam._PART, BLOCK=1024)
    compiled(triton_adam._divide, ROWS=triton_adam._ROWS, BLOCK=1024)
    compiled(triton_adam._update_rows, BLOCK=512)


if __name__ == "__main__":
    main()
