"""Realistic synthetic fundus photographs with known ground truth: labels, field, vessels, disc, cup and lesions.

For demonstrations, tests and benchmarks. Results on these photos are not evidence about real eyes.

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
