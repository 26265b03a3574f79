"""Adaptation methods: which parameters are trained, how they start, and how they are saved."""
