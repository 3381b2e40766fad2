"""Runs that are killed at random moments, again and again: `make soak` kills forty times, the slow tests four."""
