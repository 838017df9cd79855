"""Engine export, building, parity checking and inference.

This package holds code only; built engines are written to `--output`.
"""

if __name__ != "fastfundus.engines":
    # In a checkout, `import engines` also finds this folder and would create a second copy of every class.
    raise ImportError("import fastfundus.engines, not engines")
