"""What tells whether the moving statistics of a model are right."""
