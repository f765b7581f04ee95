"""qmerge: one 4-bit checkpoint that keeps a QLoRA fine-tune, with the evidence of what merging cost."""

__version__ = "0.1.0"
