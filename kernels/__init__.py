"""Kernels, their PyTorch reference and their torch operators.

The package imports nothing else from FastFundus and can be copied into another project.
"""

if __name__ != "fastfundus.kernels":
    # In a checkout, `import kernels` would find this folder too, and the second copy would register every operator
    # again.
    raise ImportError("import fastfundus.kernels, not kernels")
