"""Metrics with confidence intervals, calibration and operating points."""
