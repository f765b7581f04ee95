"""On-disk weight formats: one small file each, and the list of what can be written."""

BUILT = ("gptq", "nf4", "bf16", "fp16", "fp32")
"""formats that this version writes"""

KNOWN = ("gptq", "nf4", "fp4", "bf16", "fp16", "fp32", "compressed-tensors", "awq")
"""formats that the command line names; those not in `BUILT` are refused by name"""

QUANTIZING = ("gptq", "nf4")
