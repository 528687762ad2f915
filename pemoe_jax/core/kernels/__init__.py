"""Faster forms of core functions for one backend; tests compare them with the plain forms."""
