"""Studies: a grid of initial weights, tasks, label fractions and folds, run and tabulated."""
