"""Scores answer choices; writes and reads results.json, and reports it as tables and plots."""
