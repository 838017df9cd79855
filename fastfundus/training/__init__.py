"""The training loop and its components. Imports torch."""
