"""Compiles the kernels for an H100 and prints how often each load and store stands in the result."""

from __future__ import annotations

import re
import sys
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polyak.tensors import fused, kernels

TARGET = GPUTarget("cuda", 90, 32)


def compiled(kernel, signature, constants):
    positions = {name: index for index, name in enumerate(signature)}
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(positions[name],): value for name, value in constants.items()},
    )
    options = {"num_warps": fused._WARPS}
    return triton.compile(source, target=TARGET, options=options).asm["ptx"]


def update(n_columns, n_copies, on_device):
    weights = tuple("*fp64" if on_device >> k & 1 else "fp32" for k in range(n_columns)) or (
        "fp32",
    )
    tables = {"programs": "*i64", "rows": "*i64", "sources": "*i64"}
    columns = {"columns": ("*i64",) * (n_columns or 1), "weights": weights}
    columns["adds"] = ("fp32",) * len(weights)
    columns["copies"] = ("*i64",) * (n_copies or 1)
    constants = {"on_device": on_device, "n_columns": n_columns, "n_copies": n_copies}
    constants["block"] = fused.BLOCK
    return compiled(kernels.update, tables | columns | dict.fromkeys(constants, ""), constants)


def fold(on_device):
    tables = dict.fromkeys(("programs", "rows", "averages", "sums"), "*i64")
    numbers = dict.fromkeys(("growth", "excess"), "*fp64" if on_device else "fp32")
    constants = {"on_device": on_device, "block": fused.BLOCK}
    return compiled(kernels.fold, tables | numbers | dict.fromkeys(constants, ""), constants)


if __name__ == "__main__":
    n = int(sys.argv[1])
    for on_device in (0, 1):
        fold(on_device)
        update(n, 0, on_device)
        update(0, n, on_device)
        text = update(n, n, on_device)
    for name, count in Counter(re.findall(r"(?:ld|st)\.global\.[a-z0-9.]+", text)).items():
        print(name, count)
