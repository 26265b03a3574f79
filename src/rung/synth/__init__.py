"""Data that a model makes."""
