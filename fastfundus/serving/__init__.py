"""HTTP server for screening photos. Does not import torch; requires the extra `serve`."""
