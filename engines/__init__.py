"""Engines: export, build, describe, prove and run. Code only; built engines live where `--output` says."""

if __name__ != "fastfundus.engines":
    # From a checkout `import engines` finds this folder too, as a second copy of every class.
    raise ImportError("import fastfundus.engines, not engines")
