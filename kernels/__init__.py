"""The kernel `sample`, its PyTorch reference and its torch operator.

The package imports nothing else from FastFundus and can be copied into another project.
"""

if __name__ != "fastfundus.kernels":
    # In a checkout, `import kernels` would find this folder too, and the second copy would register the operator
    # again.
    raise ImportError("import fastfundus.kernels, not kernels")
