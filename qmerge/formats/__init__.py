"""On-disk weight formats: one small file each, and what each can hold, in plain values that the recipe is checked against."""

BITS: dict[str, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "compressed-tensors": (4, 8), "awq": (4,)}
"""int formats and their bits per weight"""

GROUP_SIZES = (128, 64, 32, -1)
"""inputs that share a scale in int formats; -1 is a whole row"""

BLOCK_SIZES: dict[str, tuple[int, ...]] = {kind: (32, 64, 128, 256, 512, 1024, 2048, 4096) for kind in ("nf4", "fp4")}
"""bitsandbytes' formats and the elements that may share a maximum (0.50; versions before 0.49 lack 32 on some devices)"""

QUANTIZING = ("gptq", "nf4", "fp4", "compressed-tensors", "awq")
"""formats that round, and so want calibration text"""

FLOAT = ("bf16", "fp16", "fp32")
"""formats that hold every weight as a number of its own"""

BUILT = (*QUANTIZING, *FLOAT)
"""formats that this version writes"""

MIXED = ("compressed-tensors",)
"""formats whose loaders take several bit widths in one checkpoint"""

SYMMETRIC_EXPERTS = ("gptq", "compressed-tensors")
"""formats whose public loaders read routed experts on symmetric grids alone (gptqmodel 7.7; transformers 5.23 drops their zero points)"""

PADDED = ("gptq", "compressed-tensors")
"""formats with a public loader that takes rows whose last word is short"""

HEADS = ("gptq", "compressed-tensors", "nf4", "fp4")
"""formats with a public loader that takes a quantized output head: gptqmodel's own for gptq, transformers' for the others; awq's leaves heads float"""
