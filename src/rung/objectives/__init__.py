"""Objectives: the losses that training minimizes, as sums with units."""
