"""``python -m fastfundus``."""

from fastfundus.cli import main

main()
