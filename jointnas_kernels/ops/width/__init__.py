"""Operators of searched sizes: width masks, depth gates, weight mixing."""
