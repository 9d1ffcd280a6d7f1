"""What a trained encoder is worth: frozen features, kNN monitor, linear probe."""
