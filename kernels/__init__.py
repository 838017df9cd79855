"""Kernels, their PyTorch reference and their torch operators: a leaf that one could lift into another project."""

if __name__ != "fastfundus.kernels":
    # From a checkout `import kernels` finds this folder too; a second copy would register every operator twice.
    raise ImportError("import fastfundus.kernels, not kernels")
