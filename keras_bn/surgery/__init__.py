"""What changes the batch normalization of a whole model."""
