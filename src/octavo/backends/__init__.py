"""Fused rounding and low-precision products behind one protocol."""
