"""Choosing a sub-network and bringing it to where it runs."""
