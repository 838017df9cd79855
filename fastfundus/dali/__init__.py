"""NVIDIA DALI as decoder: on a GPU with its hardware JPEG units, and on the CPU.

`decode` turns files into one ragged batch, `prepare` makes crops of it as `fastfundus.photo.prepare` would, and
`stream` feeds training straight from camera files. What is not plainly a sound JPEG goes to the CPU's decoder,
whose word counts. Needs the extras dali and train; `stream` can do without the first.
"""
