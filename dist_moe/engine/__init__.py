"""Batches, the leader's and the followers' loops, sampling."""
