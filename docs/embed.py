"""Score photos in your own program without torch: python embed.py BUNDLE PHOTO..."""

import sys
from pathlib import Path

import numpy as np

from fastfundus.engines.bundle import Bundle
from fastfundus.photo.prepare import prepare_photo

bundle = Bundle.open(Path(sys.argv[1]))
with bundle.load() as engine:
    for name in sys.argv[2:]:
        prepared = prepare_photo(Path(name), bundle.spec)
        if prepared.image is None:
            print(name, prepared.status, prepared.reason)
            continue
        photos = np.stack([prepared.image])  # uint8 [N, S, S, 3] RGB
        (scores,) = engine.infer(photos)  # float32 probabilities [N, labels]
        print(name, {label: f"{score:.4f}" for label, score in zip(bundle.labels, scores, strict=True)})
