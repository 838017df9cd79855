"""Draws believable fundus photographs whose truth is known: labels, field circle, vessels, disc, cup and lesions.

For demonstrations, tests and benchmarks. Nothing here is evidence about real eyes.

    from fastfundus.synthetic import draw_photo, write_dataset

    photo = draw_photo(seed=7, lesions=("drusen",), long_side=1024)
    write_dataset("photos", patients=50, seed=0)
"""

from fastfundus.synthetic.dataset import PhotoPlan, plan_dataset, write_dataset
from fastfundus.synthetic.draw import SyntheticPhoto, draw_photo
from fastfundus.synthetic.optics import CAMERAS, QUALITIES, Camera
from fastfundus.synthetic.pathology import LESIONS

__all__ = [
    "CAMERAS",
    "LESIONS",
    "QUALITIES",
    "Camera",
    "PhotoPlan",
    "SyntheticPhoto",
    "draw_photo",
    "plan_dataset",
    "write_dataset",
]
