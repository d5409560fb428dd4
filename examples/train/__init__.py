"""Trains the reference models of this repository; see README.md."""
