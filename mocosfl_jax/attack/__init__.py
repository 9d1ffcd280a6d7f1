"""The model inversion attack on a run: from what its clients send, back to their images."""
