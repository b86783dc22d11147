"""Numerics: what the weights become at each precision, and what that cost. Imports numpy and, of ours, `runtime`."""
