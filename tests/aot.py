"""Compile every kernel for GPUs that are not here: a JSON line per case on stdout. Run without TRITON_INTERPRET."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minirlhf.kernels import head

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
VARIANTS = {  # bias, reference, softcap
    "plain": (False, False, None),
    "bias_softcap": (True, False, 30.0),
    "kl": (False, True, None),
    "all": (True, True, 30.0),
}


def compile_kernel(kernel, capability, pointers, sizes, constants, **options):
    """As a launch would, for pointers aligned to 16 bytes and sizes that are (True) or are not multiples of 16."""
    names = kernel.arg_names
    types = pointers | dict.fromkeys(sizes, "i32")
    aligned = set(pointers) | {name for name, multiple in sizes.items() if multiple}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def forward(capability, dtype, variant):
    bias, kl, softcap = VARIANTS[variant]
    tile = head.forward_tile(dtype, capability, plain=variant == "plain", kl=kl)
    x, wide = "*" + TYPES[dtype], "*fp64" if dtype == torch.float64 else "*fp32"
    pointers = {"hidden": x, "weight": x, "targets": "*i64", "partials": wide}
    pointers |= {"bias": x} if bias else {}
    pointers |= {"ref_hidden": x, "ref_weight": x} if kl else {}
    constants = dict.fromkeys({"bias", "ref_hidden", "ref_weight"} - set(pointers))
    constants |= {"TEMPERATURE": 0.7, "SOFTCAP": softcap, "SPAN": head.SPAN, "ROWS": tile.rows, "COLS": tile.cols}
    return compile_kernel(
        head.forward_kernel, capability, pointers, {"N": False, "V": False, "C": True, "ref_C": True},
        constants | {"WIDTH": tile.width}, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def gradient(capability, dtype, variant):
    bias, kl, softcap = VARIANTS[variant]
    x, wide = "*" + TYPES[dtype], "*fp64" if dtype == torch.float64 else "*fp32"
    pointers = {"logits": wide, "targets": "*i64", "rows": wide, "out": x}
    pointers |= {"bias": x} if bias else {}
    pointers |= {"ref_logits": wide} if kl else {}
    constants = dict.fromkeys({"bias", "ref_logits"} - set(pointers))
    constants |= {"TEMPERATURE": 0.7, "SOFTCAP": softcap, "COLS": head.GRADIENT_COLS}
    sizes = {"N": False, "n": False, "stride": True}
    return compile_kernel(
        head.gradient_kernel, capability, pointers, sizes, constants, num_warps=4, enable_fp_fusion=True
    )


def stack_bytes(cubin):
    """What a thread spills, from the compiler's own dump; None where it cannot be read."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


if __name__ == "__main__":
    for kernel, capability, dtype, variant in json.loads(sys.argv[1]):
        build = {"forward_kernel": forward, "gradient_kernel": gradient}[kernel]
        binary = build(capability, getattr(torch, dtype), variant)
        ptx = binary.asm["ptx"]
        print(json.dumps({"kernel": kernel, "capability": capability, "dtype": dtype, "variant": variant,
                          "target": ptx.split(".target")[1].split()[0], "shared": binary.metadata.shared,
                          "stack": stack_bytes(binary.asm["cubin"]), "wgmma": "wgmma.mma_async" in ptx,
                          "mma": "mma.sync" in ptx}), flush=True)  # fmt: skip
