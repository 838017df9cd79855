"""Decoding with NVIDIA DALI, on a GPU with hardware JPEG units or on the CPU.

`decode` decodes files into one ragged batch, `prepare` crops its photos as `fastfundus.photo.prepare` would, and
`screen` scores photos on the device that decoded them. Files that are not clearly intact JPEGs go to the CPU decoder,
which decides their status. Requires the extras dali and train.
"""
