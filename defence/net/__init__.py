"""Keras nets in memory: cut, run, mask and train them; nothing here reads a file."""
