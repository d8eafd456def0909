"""Replay of cache policies, compiled."""
