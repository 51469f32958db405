"""Compiles every Triton kernel for a Hopper GPU, which needs none: a program of its own, as tests interpret kernels.

python tests/kernels/compile_kernels.py
"""

import inspect
import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_lm.ops.triton import factored_adam as triton_factored
from moe_lm.ops.triton import lazy_adam as triton_lazy
from moe_lm.ops.triton import lstm as triton_lstm
from moe_lm.ops.triton import noisy_top_k as triton_choice
from moe_lm.ops.triton import outer_products as triton_outer_products
from moe_lm.ops.triton import products as triton_products
from moe_lm.ops.triton import rows as triton_rows
from moe_lm.ops.triton import softmax as triton_softmax
from moe_lm.ops.triton.tiles import MOST_ROWS, warps_of

SHARED = 227 << 10
"""Bytes that a program may have of a Hopper GPU's shared memory."""
INTEGERS = {"token", "order", "ends", "expert", "first", "hit", "row"}
"""Pointers to int64; all others are to float32, or to bfloat16 where a kernel is compiled so."""
NUMBERS = {"epsilon", "rate", "weight"}
SIZES = {"width", "rows", "parts", "hidden", "columns", "tokens", "experts", "chance_stride", "units", "h_stride"}
SIZES |= {"inputs", "outputs", "shares", "w_expert", "w_row", "w_column"}


def compiled(
    kernel, half: tuple[str, ...] = (), options: dict | None = None, any_size: bool = True, **constants: int
) -> None:
    """Compile one kernel with these constants; arguments of the names in `half` are bfloat16.

    Once for addresses and sizes that are multiples of 16, as the paper's are, since only so the compiler copies ahead
    into shared memory, and once for `any_size`.
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
    """In each form that there is, of full tiles and of narrow ones."""
    for (of_rows, of_matrix), form in triton_products.FORMS.items():
        half = ("x", "out", *(("w",) if of_matrix == 2 else ())) if of_rows == 2 else ()
        sizes = {"DEPTH": form.depth, "PRECISION": "ieee" if half else "tf32"}
        for strides in ({"w_column": 1}, {"w_row": 1}, {}):  # of matrices as they are, transposed, anyhow
            for rows, columns in ((MOST_ROWS, form.columns), (32, 32)):
                shape = {"ROWS": rows, "COLUMNS": columns, "RELU": bool(half), "TAKEN": bool(half)}
                options = {"num_warps": warps_of(rows * columns), "num_stages": form.stages}
                small = rows == 32  # the large ones take longest to compile
                compiled(triton_products._product, half, options, small, **strides, **shape, **sizes)
    for of_rows, form in triton_outer_products.FORMS.items():
        half = ("x", "grad") if of_rows == 2 else ()  # the sums stay float32
        sizes = {"DEPTH": form.depth, "PRECISION": "ieee" if half else "bf16x3"}
        for down, across in ((triton_outer_products.DOWN, form.columns), (32, 32)):
            options = {"num_warps": warps_of(down * across), "num_stages": form.stages}
            shape = {"DOWN": down, "ACROSS": across, **sizes}
            for taken, squares in itertools.product((True, False), repeat=2):
                compiled(triton_outer_products._outer, half, options, down == 32, TAKEN=taken, SQUARES=squares, **shape)


def main() -> None:
    """Compile all of them."""
    compiled(triton_rows._gather, ("x", "out"), BLOCK=512)
    for weighted in (True, False):
        compiled(triton_rows._sum, ("y",), WEIGHTED=weighted, BLOCK=512)
    compiled(triton_rows._sum_of_run, BLOCK=1024)
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
    compiled(triton_factored._square, ROWS=triton_factored._ROWS, PART=triton_factored._PART, BLOCK=1024)
    for copied in (True, False):
        compiled(triton_factored._divide, ("copy",), COPIED=copied, ROWS=triton_factored._ROWS, BLOCK=1024)
    compiled(triton_lazy._update, BLOCK=512)


if __name__ == "__main__":
    main()
