"""Settings that come with FastFundus, each with its reasons: `fastfundus train --recipe NAME`."""

RECIPES = ("upstream", "finetune", "linear_probe", "dr_grading", "vessels")
"""Names of the recipes, each a TOML file in this folder."""
