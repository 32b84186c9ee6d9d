"""Engines that attend, and the merge of their partial results."""
