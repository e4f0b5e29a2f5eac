"""Scores of image samples, and the networks whose features they use."""
