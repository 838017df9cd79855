"""What each command does, as a function: the Python API, and what the command line calls.

The package `fastfundus` exports these functions; importing it loads none of them.
"""
