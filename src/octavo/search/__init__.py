"""Sensitivity and allocation."""
