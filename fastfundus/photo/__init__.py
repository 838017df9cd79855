"""Processing of single photos, from the bytes of a file to the square model input. Does not import torch."""

from fastfundus.photo.prepare import PreparedPhoto, prepare_photo

__all__ = ["PreparedPhoto", "prepare_photo"]
