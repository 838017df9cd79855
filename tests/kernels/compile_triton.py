"""Compile the Triton kernel in every tiling, mode and output type, and report registers, spills and shared memory.

No GPU is needed. Usage: python -m tests.kernels.compile_triton [OUTPUT.json]
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
JOBS = {"longs_pointer": "*i64", "words_pointer": "*i32", "floats_pointer": "*fp32"}


Job = tuple[int, dict[str, str], dict[str, Any], int, bool]
"""Architecture, signature, constants, warps, and True if pointers and sizes are multiples of 16."""


def jobs() -> list[Job]:
    """Return every variant that a launch can select."""
    from fastfundus.kernels import sample
    from fastfundus.kernels.jobs import MODES

    found = []
    for architecture, aligned in itertools.product(ARCHITECTURES, (True, False)):
        for (block, warps), mode, out in itertools.product(sample.TILINGS, MODES, ("fp32", "fp16", "bf16")):
            signature = {"pixels_pointer": "*u8", **JOBS, "output_pointer": f"*{out}", "out_size": "i32"}
            # A program covers part of a row, as at 512 px, or several rows, as at sizes below 64.
            constants = {"MODE": mode, "COLUMNS": 512 if aligned else 64, "BLOCK": block}
            found.append((architecture, signature, constants, warps, aligned))
    return found


def compiled(job: Job) -> tuple[str, dict[str, int]]:
    """Compile one variant; return its name and resource usage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastfundus.kernels.sample import sample_kernel

    architecture, signature, constants, warps, aligned = job
    # The launcher specialises the kernel for arguments that are multiples of 16, as at 512 px.
    facts = {(n,): [["tt.divisibility", 16]] for n in range(len(signature))} if aligned else None
    source = ASTSource(sample_kernel.fn, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, facts)
    options = {"num_warps": warps, "num_stages": 1}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    assert match, usage.stdout
    registers, stack, _, local = map(int, match.groups())
    variant = " ".join(f"{key}={value}" for key, value in constants.items())
    out = signature["output_pointer"].removeprefix("*")
    title = f"sample sm_{architecture} {out} {variant} warps={warps}{' aligned' if aligned else ''}"
    return title, {"registers": registers, "spilled_bytes": stack + local, "shared_bytes": binary.metadata.shared}


def main() -> dict[str, Any]:
    """Compile all variants in parallel, on all cores."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels cannot be compiled"
    import triton

    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        variants = dict(pool.map(compiled, jobs(), chunksize=8))
    return {"triton": triton.__version__, "variants": variants}


if __name__ == "__main__":
    text = json.dumps(main(), indent=1) + "\n"
    Path(sys.argv[1]).write_text(text) if len(sys.argv) > 1 else print(text)
