"""Experts on many devices, and training across slow links."""
