"""One photo at a time, from a file's bytes to the square that models see. No torch."""

from fastfundus.photo.prepare import PreparedPhoto, prepare_photo

__all__ = ["PreparedPhoto", "prepare_photo"]
