"""Paired comparisons of variants of one job, and the limits they are held against."""
