"""Figures and pages about a trained run: retrieval, t-SNE, attention, pseudo-labels."""
