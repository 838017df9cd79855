"""Sizing of a deployment: measure this machine, predict another."""
